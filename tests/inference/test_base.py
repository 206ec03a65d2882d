"""Embeddings as an HDF5 file."""

import json
import resource
import signal

import h5py
import numpy as np
import pytest
from model_directories import contents

from prelm_jax.errors import InputError
from prelm_jax.formats import huggingface_bert
from prelm_jax.inference.base import write_embeddings
from prelm_jax.inference.bert import BertPretrained


@pytest.fixture(scope="module")
def model(bert_directory):
    return BertPretrained(huggingface_bert.read(bert_directory))


def test_embeddings_are_written(model, tmp_path):
    lines = ["the cat", "", 'a " ü 猫'] * 4  # Eleven and more: "10" sorts before "2".
    write_embeddings(model, lines, tmp_path / "output.hdf5")
    assert [path.name for path in tmp_path.iterdir()] == ["output.hdf5"]
    with h5py.File(tmp_path / "output.hdf5") as file:
        assert set(file) == {str(i) for i in range(len(lines))}
        for i, (tokens, hidden) in enumerate(model.embed(lines)):
            assert file[str(i)].dtype == np.float32
            np.testing.assert_array_equal(file[str(i)], hidden)
            assert json.loads(file[str(i)].attrs["tokens"]) == tokens
        assert file["1"].shape == (3, 0, 32)


def test_a_full_disk_is_named(model, tmp_path):
    """Where HDF5's own files crash."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            write_embeddings(model, ["the cat"] * 20, tmp_path / "output.hdf5")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert error.value.filename == str(tmp_path / "output.hdf5")
    assert list(tmp_path.iterdir()) == []


def test_failed_embeddings_leave_the_old_file(model, tmp_path):
    output = tmp_path / "output.hdf5"
    output.write_bytes(b"old")
    with pytest.raises(InputError, match="line 2 has 30 tokens"):
        write_embeddings(model, ["a", "a " * 30], output)
    assert contents(tmp_path) == {"output.hdf5": b"old"}
    write_embeddings(model, ["a", "a " * 30], output, truncate=True)
    with h5py.File(output) as file:
        assert file["1"].shape == (3, 24, 32)
    with pytest.raises(InputError, match="there is no directory"):
        write_embeddings(model, ["a"], tmp_path / "missing" / "output.hdf5")


def test_an_option_of_another_family_is_refused(model, tmp_path):
    with pytest.raises(InputError, match="--batch-size: bert has no such option; leave it out"):
        write_embeddings(model, ["a"], tmp_path / "output.hdf5", batch_size=3)
    assert list(tmp_path.iterdir()) == []
