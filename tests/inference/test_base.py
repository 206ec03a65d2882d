"""Embeddings as an HDF5 file."""

import json

import h5py
import numpy as np
import pytest
from model_directories import contents

from prelm_jax.errors import InputError
from prelm_jax.formats import huggingface_bert, huggingface_gpt
from prelm_jax.inference import batching
from prelm_jax.inference.base import write_embeddings
from prelm_jax.inference.bert import BertPretrained
from prelm_jax.inference.elmo import ELMoPretrained
from prelm_jax.inference.gpt import GPTPretrained
from prelm_jax.tokenizers import base as tokenizers


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


class Lines(list):
    """Lines that count how many of them the latest loop has read."""

    def __iter__(self):
        self.read = 0
        for line in super().__iter__():
            self.read += 1
            yield line


@pytest.mark.parametrize(
    ("family", "command", "options"),
    [
        *((family, command, {}) for family in ("bert", "gpt", "elmo") for command in ("embed", "score")),
        ("elmo", "embed", {"state": "warm"}),
        ("elmo", "embed", {"state": "carry", "batch_size": 3}),
    ],
)
def test_lines_are_read_as_results_are_asked_for(
    bert_directory, gpt_directory, elmo_with_softmax, family, command, options, monkeypatch
):
    model = {
        "bert": lambda: BertPretrained(huggingface_bert.read(bert_directory)),
        "gpt": lambda: GPTPretrained(huggingface_gpt.read(gpt_directory)),
        "elmo": lambda: ELMoPretrained(elmo_with_softmax),
    }[family]()
    use, lines = getattr(model, command), Lines(["the cat", "", "a dog sat on the mat", "on"] * 10)
    together = list(use(lines, **options))
    monkeypatch.setattr(batching, "TOKENS_PER_WINDOW", 20)
    monkeypatch.setattr(tokenizers, "TEXTS_AT_ONCE", 3)
    results = use(lines, **options)
    some = [next(results)]
    assert lines.read < len(lines) / 2
    some += results
    assert len(some) == lines.read == len(lines)
    for (first, second), (expected, alike) in zip(some, together, strict=True):
        if command == "score":
            assert (first, second) == (pytest.approx(expected, abs=1e-5), alike)
        else:
            assert first == expected
            np.testing.assert_allclose(second, alike, atol=1e-6)


def test_a_full_disk_is_named(model, full_disk, tmp_path):
    list(model.embed(["the cat"]))  # Compiled programs are cached on this disk.
    with full_disk(5_000), pytest.raises(OSError, match="File too large") as error:
        write_embeddings(model, ["the cat"] * 20, tmp_path / "output.hdf5")
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
