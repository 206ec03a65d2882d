"""Checkpoints: any flipped bit is noticed, damage of any kind means the one before."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prelm_jax.errors import InputError
from prelm_jax.training import checkpoint
from prelm_jax.training.checkpoint import Checkpoints, checksums, restore_params
from prelm_jax.training.sharding import MeshConfig


def items(step: int) -> dict:
    """Two trees, with values that tell the step."""
    params = {"kernel": jnp.arange(96, dtype=jnp.float32).reshape(8, 12) + step, "bias": jnp.full(3, step, jnp.float32)}
    return {"params": params, "rest": {"step": jnp.int32(step), "carry": {}}}


def abstract(tree):
    replicated = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), tree)


@pytest.fixture
def directory(tmp_path):
    """Checkpoints of steps 1, 2 and 3, of which two are kept."""
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints", keep=2)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, items(step))
    return tmp_path / "checkpoints"


def restore(directory):
    with contextlib.closing(Checkpoints(directory, keep=2)) as checkpoints:
        return checkpoints.restore(abstract(items(0)))


def test_the_newest_is_restored_and_the_oldest_is_gone(directory):
    assert sorted(path.name for path in directory.iterdir()) == ["2", "3"]
    step, restored = restore(directory)
    assert step == 3
    jax.tree.map(np.testing.assert_array_equal, restored, items(3))


def test_nothing_to_restore(tmp_path):
    assert restore(tmp_path / "empty") is None
    with pytest.raises(InputError, match="no checkpoint here yet"):
        restore_params(tmp_path / "absent", abstract(items(0)["params"]))


def test_restored_onto_another_mesh(directory):
    mesh = MeshConfig(devices=4).build()
    replicated, sharding = (jax.NamedSharding(mesh, spec) for spec in (jax.P(), jax.P("data")))
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), items(0))
    kernel = wanted["params"]["kernel"]
    wanted["params"]["kernel"] = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype, sharding=sharding)
    with contextlib.closing(Checkpoints(directory)) as checkpoints:
        _, restored = checkpoints.restore(wanted)
    assert restored["params"]["kernel"].sharding == sharding
    np.testing.assert_array_equal(restored["params"]["kernel"], items(3)["params"]["kernel"])


def test_parameters_alone(directory):
    step, params = restore_params(directory, abstract(items(0)["params"]))
    assert step == 3
    jax.tree.map(np.testing.assert_array_equal, params, items(3)["params"])


def largest(directory):
    return max((path for path in directory.rglob("d/*")), key=lambda path: path.stat().st_size)


def flip(directory):
    data = bytearray(largest(directory).read_bytes())
    data[len(data) // 3] ^= 4
    largest(directory).write_bytes(data)


def truncate(directory):
    file = largest(directory)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def remove(directory):
    for file in directory.rglob("manifest.ocdbt"):
        file.unlink()


def remove_metadata(directory):
    (directory / "_CHECKPOINT_METADATA").unlink()


def change_values(directory):
    """What a flipped bit does that the compression does not notice: other values than those that were saved."""
    metadata = directory / "_CHECKPOINT_METADATA"
    recorded = json.loads(metadata.read_text())
    recorded["custom_metadata"]["checksums"]["params"]["bias"] ^= 1 << 7
    metadata.write_text(json.dumps(recorded))


@pytest.mark.parametrize("damage", [flip, truncate, remove, remove_metadata, change_values])
def test_damage_is_named_and_the_one_before_used(directory, capsys, damage):
    damage(directory / "3")
    step, restored = restore(directory)
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, restored, items(2))
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and f"{directory / '3'} is damaged" in errors[0]
    assert (directory.parent / "checkpoints.damaged" / "3").is_dir()
    with contextlib.closing(Checkpoints(directory, keep=2)) as checkpoints:
        checkpoints.save(3, items(3))
    assert restore(directory)[0] == 3


def test_all_damaged_is_an_error(directory):
    for step in ("2", "3"):
        flip(directory / step)
    with pytest.raises(InputError, match="none of 2 checkpoints is whole"):
        restore(directory)


def test_another_format_is_refused(directory, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 0)
    with pytest.raises(InputError, match="has format 2, not 0: upgrade prelm_jax"):
        restore(directory)
    assert (directory / "3").is_dir()


@settings(deadline=None, max_examples=50)
@given(word=st.integers(0, 95), bit=st.integers(0, 31))
def test_every_flipped_bit_changes_the_checksum(word, bit):
    array = np.linspace(-1, 1, 96, dtype=np.float32)
    flipped = array.view(np.uint32).copy()
    flipped[word] ^= np.uint32(1) << np.uint32(bit)
    assert checksums(jnp.asarray(array)) != checksums(jnp.asarray(flipped.view(np.float32)))


def test_checksums_do_not_depend_on_the_mesh():
    array = jnp.arange(64, dtype=jnp.float32).reshape(8, 8)
    sharded = jax.device_put(array, jax.NamedSharding(MeshConfig(devices=8).build(), jax.P(None, "data")))
    assert int(checksums(array)) == int(checksums(sharded))
    assert int(checksums(array)) != int(checksums(array.T))


def test_metadata_is_json(directory):
    recorded = json.loads((directory / "3" / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    assert set(recorded["checksums"]["params"]) == {"kernel", "bias"}
