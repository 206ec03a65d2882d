"""Directories: load, save, work directories, going on from a model; embeddings into HDF5."""

import dataclasses
import json

import h5py
import jax
import numpy as np
import pytest

from prelm_jax.errors import InputError
from prelm_jax.formats.huggingface_bert import BertModel
from prelm_jax.formats.model import initial_params, load, save, write_embeddings
from prelm_jax.tokenizers.wordpiece import WordPiece
from prelm_jax.training.checkpoint import Checkpoints
from prelm_jax.training.parameters import path_name


@pytest.fixture(scope="module")
def model(reference_directory):
    return load(reference_directory)


def contents(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.is_file()}


# Work directories


def test_a_work_directory_loads_its_newest_checkpoint(model, tmp_path):
    settings = {"model": {"model_type": "bert", **dataclasses.asdict(model.config)}, "seed": 1}
    (tmp_path / "run.json").write_text(json.dumps(settings))
    model.tokenizer.save(tmp_path / "tokenizer")
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    checkpoints.save(1, {"params": jax.tree.map(lambda x: x * 0, model.params)})
    checkpoints.save(2, {"params": model.params})
    checkpoints.close()
    loaded = load(tmp_path)
    assert type(loaded) is BertModel
    assert loaded.config == model.config
    assert loaded.tokenizer.tokens == model.tokenizer.tokens
    assert loaded.missing == frozenset()
    for found, expected in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(model.params), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({}, "neither a model directory"),
        ({"config.json": "{"}, "config.json is not JSON: "),
        ({"config.json": "[]"}, "config.json is not a JSON object"),
        ({"config.json": "{}"}, "config.json: model_type is None; supported: bert"),
        ({"run.json": '{"model": {"model_type": "bert", "depth": 1}}'}, "run.json: not the fields of a BertConfig"),
        ({"run.json": '{"model": {"model_type": "bert", "vocab_size": 9}}'}, "no checkpoint here"),
    ],
)
def test_other_directories_are_refused(files, complaint, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=complaint) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


# Saving


def test_save_overwrites_a_model_directory_and_leaves_other_files(model, tmp_path):
    directory = tmp_path / "deep" / "model"
    save(model, directory, "# first\n")
    first = contents(directory)
    (directory / "notes.txt").write_text("mine")
    save(model, directory, "# second\n")
    assert contents(directory) == first | {"README.md": b"# second\n", "notes.txt": b"mine"}
    assert [path.name for path in directory.parent.iterdir()] == ["model"]


def test_save_refuses_a_directory_of_something_else(model, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="not empty, and not a model directory"):
        save(model, tmp_path, "")
    with pytest.raises(InputError, match="not a directory"):
        save(model, tmp_path / "thesis.tex", "")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_save_leaves_what_was_there(existing, model, tmp_path, monkeypatch):
    directory = tmp_path / "model"
    if existing:
        save(model, directory, "# first\n")
    before = contents(directory) if existing else None

    def disk_full(*args, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr(WordPiece, "save", disk_full)
    with pytest.raises(OSError, match="no space left"):
        save(model, directory, "# second\n")
    assert (contents(directory) if existing else None) == before
    assert list(tmp_path.iterdir()) == ([directory] if existing else [])


# Going on from a model


def fresh(config):
    """Parameters that are nothing like the loaded ones, and all different."""
    abstract = jax.eval_shape(config.build().init_params, jax.random.key(0))
    return jax.tree.map(lambda leaf: 100.0 + np.arange(leaf.size, dtype=np.float32).reshape(leaf.shape), abstract)


def test_going_on_with_a_longer_vocabulary(model):
    old, new = model.tokenizer.vocab_size, 150  # Past one multiple of 128.
    tokenizer = WordPiece([*model.tokenizer.tokens, *(f"new{i}" for i in range(new - old))])
    config = dataclasses.replace(model.config, vocab_size=new, hidden_dropout=0.0)
    loaded = dataclasses.replace(model, missing=frozenset({"pooler/kernel", "next_sentence/bias"}))
    start = fresh(config)
    params = initial_params(loaded, config, jax.tree.map(jax.numpy.asarray, start), tokenizer)
    for (path, value), new_value, old_value in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(start), jax.tree.leaves(model.params), strict=True
    ):
        name = path_name(path)
        if name in loaded.missing:
            np.testing.assert_array_equal(value, new_value)
        elif name in ("word_embeddings/embedding", "masked_lm_bias"):
            np.testing.assert_array_equal(value[:old], old_value[:old])
            np.testing.assert_array_equal(value[old:], new_value[old:])
        else:
            np.testing.assert_array_equal(value, old_value)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"hidden_size": 64}, "hidden_size is 32 in the model, but 64 in the run"),
        ({"num_layers": 3}, "num_layers is 2 in the model, but 3 in the run"),
        ({"num_heads": 2}, "num_heads is 4 in the model, but 2 in the run"),
        ({"max_position_embeddings": 48}, "max_position_embeddings is 24 in the model, but 48 in the run"),
    ],
)
def test_going_on_with_other_sizes_is_refused(changed, complaint, model):
    config = dataclasses.replace(model.config, **changed)
    with pytest.raises(InputError, match=complaint):
        initial_params(model, config, {}, model.tokenizer)


def test_going_on_with_another_vocabulary_is_refused(model):
    tokens = list(model.tokenizer.tokens)
    swapped = [*tokens[:10], tokens[11], tokens[10], *tokens[12:]]
    with pytest.raises(
        InputError, match=f"entry 10 of the vocabulary is '{tokens[10]}' in the model, but '{tokens[11]}'"
    ):
        initial_params(model, model.config, {}, WordPiece(swapped))
    with pytest.raises(InputError, match="entry 44 of the vocabulary is '##t' in the model, but nothing in the run"):
        initial_params(model, model.config, {}, WordPiece(tokens[:-1]))


# Embeddings


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


def test_embeddings_that_fail_leave_the_old_file(model, tmp_path):
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
