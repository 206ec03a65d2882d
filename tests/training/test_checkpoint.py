"""Checkpoints: which are kept, restoring by step, and damage of any kind."""

import contextlib
import json
import math
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prelm_jax.errors import InputError, Preempted
from prelm_jax.training import checkpoint
from prelm_jax.training.checkpoint import Checkpoints, Record, restore_params
from prelm_jax.training.checksums import checksums
from prelm_jax.training.sharding import MeshConfig


def items(step: int) -> dict:
    """Two trees whose values depend on the step."""
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
    """A flipped bit that the decompression does not notice."""
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
    with pytest.raises(InputError, match="all 2 checkpoints are damaged"):
        restore(directory)


@pytest.mark.parametrize(("newer", "message"), [(4, "an earlier version .*format 3"), (2, "upgrade")])
def test_another_format_is_refused(directory, monkeypatch, newer, message):
    monkeypatch.setattr(checkpoint, "FORMAT", newer)
    with pytest.raises(InputError, match=f"^{directory / '3'} was written by .*{message}"):
        restore(directory)
    assert (directory / "3").is_dir()


def test_a_reader_skips_a_damaged_checkpoint_and_changes_nothing(directory, capsys):
    flip(directory / "3")
    before = files(directory.parent)
    assert restore_params(directory, abstract(items(0)["params"]))[0] == 2
    assert f"{directory / '3'} is damaged" in capsys.readouterr().err
    for step, message in [(3, f"{directory / '3'} is damaged .*2, 3"), ("best", "no evaluated checkpoint.*2, 3")]:
        with pytest.raises(InputError, match=message):
            restore_params(directory, abstract(items(0)["params"]), step)
    assert files(directory.parent) == before


def files(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# Kept checkpoints: the newest, the best, and parameters forever


def save(directory, keep, *records):
    """Saves a checkpoint for each (step, evaluation loss or None, scheduled); the steps that are left."""
    with contextlib.closing(Checkpoints(directory, keep)) as checkpoints:
        for step, loss, scheduled in records:
            checkpoints.save(step, items(step), Record(100 * step, loss, scheduled))
    return sorted(int(path.name) for path in directory.iterdir())


def test_the_best_is_kept_with_the_newest(tmp_path):
    directory = tmp_path / "checkpoints"
    assert save(directory, 2, (1, 3.0, True), (2, 1.5, True), (3, None, True), (4, 1.5, True)) == [2, 3, 4]
    assert save(directory, 2, (5, 2.0, True), (6, None, True)) == [2, 5, 6]  # Also after a restart.
    with contextlib.closing(Checkpoints(directory)) as checkpoints:
        assert checkpoints.improves(1.4) and not checkpoints.improves(1.5) and not checkpoints.improves(math.nan)
        assert checkpoints.tokens_seen(5) == 500 and checkpoints.tokens_seen(0) == 0
        step, restored = checkpoints.restore(abstract(items(0)), step="best")
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, restored, items(2))


def test_a_checkpoint_of_sigterm_is_replaced_by_the_next(tmp_path):
    directory = tmp_path / "checkpoints"
    assert save(directory, 2, (1, None, True), (2, None, True), (3, None, False)) == [1, 2, 3]
    assert save(directory, 2, (4, None, True)) == [2, 4]


@pytest.fixture
def kept(directory):
    """Parameters alone of step 1, besides the full checkpoints of steps 2 and 3."""
    with contextlib.closing(Checkpoints(directory, keep=2)) as checkpoints:
        checkpoints.keep_parameters(1, items(1) | {"opt_state": {"kernel": jnp.zeros(5)}})
    return directory


def test_parameters_are_kept_without_the_optimizer_state(kept):
    params = abstract(items(0)["params"])
    step, restored = restore_params(kept, params, step=1)
    assert step == 1
    jax.tree.map(np.testing.assert_array_equal, restored, items(1)["params"])
    with contextlib.closing(Checkpoints(kept)) as checkpoints:
        opt_state = {"kernel": jax.ShapeDtypeStruct((5,), jnp.float32)}
        with pytest.raises(InputError, match=f"{kept}.kept/1 holds no opt_state, only params, rest"):
            checkpoints.restore({"params": params, "opt_state": opt_state}, step=1)
    assert restore_params(kept, params)[0] == 3


def test_kept_parameters_are_overwritten_by_the_same_step(kept):
    with contextlib.closing(Checkpoints(kept, keep=1)) as checkpoints:
        checkpoints.keep_parameters(1, items(7))
        checkpoints.keep_parameters(2, items(2))
    _, restored = restore_params(kept, abstract(items(0)["params"]), step=1)
    jax.tree.map(np.testing.assert_array_equal, restored, items(7)["params"])
    assert sorted(path.name for path in (kept.parent / "checkpoints.kept").iterdir()) == ["1", "2"]


def test_an_absent_step_lists_the_steps(kept):
    params = abstract(items(0)["params"])
    with contextlib.closing(Checkpoints(kept, keep=2)) as checkpoints:
        checkpoints.save(4, items(4), Record(evaluation_loss=2.0))
    with pytest.raises(InputError, match=rf"{kept}: no checkpoint of step 7; .* 1, 3, 4 \(best\)$"):
        restore_params(kept, params, step=7)
    assert restore_params(kept, params, step="best")[0] == 4


def test_another_tree_is_refused_and_not_called_damaged(directory):
    params = abstract(items(0)["params"])
    other = {"kernel": params["kernel"], "scale": params["bias"]}
    for keep in (None, 2):
        with contextlib.closing(Checkpoints(directory, keep)) as checkpoints:
            with pytest.raises(InputError, match=f"{directory / '3'} is of another model .*params/bias"):
                checkpoints.restore({"params": other})
            with pytest.raises(InputError, match=f"{directory / '3'} holds no opt_state, only params, rest"):
                checkpoints.restore({"opt_state": params})
    assert (directory / "3").is_dir()


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), ValueError("PERMISSION_DENIED: Error opening local file")]
)
def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(directory, monkeypatch, error):
    def refuse(*arguments):
        raise error

    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", refuse)
    with pytest.raises(InputError, match=f"cannot read the checkpoint {directory / '3'}: permission denied"):
        restore(directory)
    assert (directory / "3").is_dir()


@pytest.mark.parametrize(
    ("step", "content"),
    [
        ("2", b"[]"),
        ("3", b"[]"),
        ("3", b""),
        ("3", b"\xff"),
        ("3", b'{"custom_metadata": null}'),
        ("3", b'{"custom_metadata": {"format": [3]}}'),
        ("3", b'{"custom_metadata": {"format": 3, "checksums": 5, "record": {}}}'),
        ("3", b'{"custom_metadata": {"format": 3, "checksums": {}, "record": {"tokens": 1}}}'),
    ],
)
def test_metadata_of_any_form_are_damage_of_that_checkpoint_alone(directory, capsys, step, content):
    """For a reader, which skips it, and for a trainer, which lists all checkpoints when it saves."""
    (directory / step / "_CHECKPOINT_METADATA").write_bytes(content)
    assert restore_params(directory, abstract(items(0)["params"]))[0] == 5 - int(step)
    with contextlib.closing(Checkpoints(directory, keep=2)) as checkpoints:
        assert checkpoints.restore(abstract(items(0)))[0] == 5 - int(step)
        checkpoints.save(4, items(4))
        checkpoints.wait()
    assert restore(directory)[0] == 4
    assert (directory.parent / "checkpoints.damaged" / step).is_dir()
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(f"{directory / step} is damaged (its file _CHECKPOINT_METADATA" in line for line in lines)


def test_other_files_in_the_directory_are_left_alone(directory):
    for name in ("notes", "4.bak", "007", "-1", "٣", "5.orbax-checkpoint-tmp-1"):
        (directory / name).mkdir()
    (directory / "9").touch()
    assert restore_params(directory, abstract(items(0)["params"]))[0] == 3
    with contextlib.closing(Checkpoints(directory, keep=2)) as checkpoints:
        assert checkpoints.restore(abstract(items(0)))[0] == 3
        checkpoints.save(4, items(4))
    assert restore(directory)[0] == 4
    assert {"notes", "4.bak", "007", "-1", "٣", "9"} <= {path.name for path in directory.iterdir()}


def test_a_reader_lists_again_when_the_trainer_deletes_what_it_reads(directory, monkeypatch, capsys):
    """The files of a checkpoint are deleted one by one, after a newer one was saved."""
    load, saved = checkpoint.ocp.load_checkpointables, []

    def delete_and_load(*arguments):
        if not saved:
            saved.append(True)
            with contextlib.closing(Checkpoints(directory, keep=1)) as checkpoints:
                checkpoints.save(4, items(4))
        return load(*arguments)

    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", delete_and_load)
    step, params = restore_params(directory, abstract(items(0)["params"]))
    assert step == 4
    jax.tree.map(np.testing.assert_array_equal, params, items(4)["params"])
    saved.clear()
    with pytest.raises(InputError, match=f"{directory}: no checkpoint of step 4; choose a --step: 5"):
        monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", delete_and_load_of(directory, 5, load))
        restore_params(directory, abstract(items(0)["params"]), step=4)
    assert "damaged" not in capsys.readouterr().err


def delete_and_load_of(directory, step, load):
    def delete_and_load(*arguments):
        with contextlib.closing(Checkpoints(directory, keep=1)) as checkpoints:
            checkpoints.save(step, items(step))
        return load(*arguments)

    return delete_and_load


def test_who_lost_the_directory_neither_saves_nor_deletes(directory):
    lost = []

    def check():
        if lost:
            raise Preempted("taken over")

    checkpoints = Checkpoints(directory, keep=1, before_write=check)
    checkpoints.save(4, items(4))
    lost.append(True)
    with pytest.raises(Preempted):
        checkpoints.wait()
    with pytest.raises(Preempted):
        checkpoints.save(5, items(5))
    checkpoints.close()
    assert sorted(path.name for path in directory.iterdir()) == ["2", "3", "4"]


def test_a_kill_while_a_checkpoint_is_deleted_leaves_no_half_of_it(directory, monkeypatch, capsys):
    def kill(path, *arguments, **options):
        (path / "_CHECKPOINT_METADATA").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, contextlib.closing(Checkpoints(directory, keep=1)) as checkpoints:
        patch.setattr(type(checkpoints.directory), "rmtree", kill)
        checkpoints.save(4, items(4))
        with pytest.raises(KeyboardInterrupt):
            checkpoints.wait()
    assert len(list(directory.glob("*deleted"))) == 1
    assert restore(directory)[0] == 4
    assert save(directory, 1, (5, None, True)) == [5]  # Nothing else is left.
    assert capsys.readouterr().err == ""


def test_a_reader_waits_for_the_end_of_a_deletion(directory, monkeypatch, capsys):
    """Half of the files are gone, and the directory follows a moment later."""
    (directory / "3" / "_CHECKPOINT_METADATA").unlink()

    def sleep(seconds):
        (directory / "3").rename(directory / "3.orbax-checkpoint-tmp")

    monkeypatch.setattr(checkpoint, "time", types.SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
    assert restore_params(directory, abstract(items(0)["params"]))[0] == 2
    assert capsys.readouterr().err == ""


def test_a_reader_creates_nothing(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path / 'absent'}: no checkpoint"):
        restore_params(tmp_path / "absent", abstract(items(0)["params"]), step=5)
    assert list(tmp_path.iterdir()) == []


# Checksums


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
