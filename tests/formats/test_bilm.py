"""ELMo directories in bilm-tf's format."""

import json
import re
import shutil

import h5py
import jax
import numpy as np
import pytest
from model_directories import ELMO_OPTIONS, ELMO_SHAPES, ELMO_WORDS, elmo_weights

from prelm_jax.errors import InputError
from prelm_jax.formats.base import abstract_params, save
from prelm_jax.formats.bilm import FORMAT, SOFTMAX, dataset_name, read, write
from prelm_jax.models.elmo import ELMoConfig
from prelm_jax.training.parameters import path_name


@pytest.fixture
def spoiled(elmo_directory, tmp_path):
    """A directory to spoil."""
    return shutil.copytree(elmo_directory, tmp_path / "spoiled")


def test_every_dataset_is_read_and_written(elmo_directory, tmp_path):
    """Every value is written under the name and in the shape that it was read from; so are the options."""
    save(read(elmo_directory), FORMAT, tmp_path / "again", "")
    with h5py.File(tmp_path / "again" / "weights.hdf5") as file:
        found = {}
        file.visititems(lambda name, item: found.update({name: item}) if isinstance(item, h5py.Dataset) else None)
        assert set(found) == set(ELMO_SHAPES)
        for name, value in elmo_weights().items():
            assert found[name].dtype == np.float32
            assert found[name].chunks is None and not found[name].attrs
            np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert json.loads((tmp_path / "again" / "options.json").read_text()) == ELMO_OPTIONS


def test_the_original_has_37_datasets_of_93_6_million_numbers():
    """From the table of allennlp.org: 93.6 M parameters, without the softmax."""

    leaves = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(abstract_params(ELMoConfig(9)))}
    published = {dataset_name(path): x.size for path, x in leaves.items() if path not in SOFTMAX}
    assert len(published) == 37
    assert sum(published.values()) == 93_600_848


def test_export_load_export_gives_the_same_bytes(elmo_with_softmax, tmp_path):
    save(elmo_with_softmax, FORMAT, tmp_path / "first", "# A model\n")
    save(read(tmp_path / "first"), FORMAT, tmp_path / "second", "# A model\n")
    files = sorted(file.name for file in (tmp_path / "first").iterdir())
    assert files == ["README.md", "options.json", "tokenizer_config.json", "vocab.txt", "weights.hdf5"]
    assert files == sorted(file.name for file in (tmp_path / "second").iterdir())
    for name in files:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name
    assert (tmp_path / "first" / "vocab.txt").read_text().splitlines() == ELMO_WORDS
    with h5py.File(tmp_path / "first" / "weights.hdf5") as file:
        assert h5py.h5g.get_objinfo(file.id, b"char_embed").mtime == 0, "a second later it would be other bytes"


def test_an_export_has_no_softmax(elmo_with_softmax, tmp_path):
    save(elmo_with_softmax, FORMAT, tmp_path / "model", "")
    exported = read(tmp_path / "model")
    assert exported.missing == SOFTMAX
    assert exported.tokenizer.tokens == ELMO_WORDS
    for name, module in elmo_with_softmax.params.items():
        if name != "softmax":
            jax.tree.map(np.testing.assert_array_equal, exported.params[name], module)


def test_an_export_overwrites_an_export_and_nothing_else(elmo_directory, tmp_path):
    model = read(elmo_directory)
    save(model, FORMAT, tmp_path / "model", "# first\n")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    save(model, FORMAT, tmp_path / "model", "# second\n")
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "model" / "README.md").read_text() == "# second\n"
    with pytest.raises(InputError, match="not empty, and not a model directory"):
        save(model, FORMAT, elmo_directory, "")


def test_either_number_of_characters_is_read(spoiled):
    configure(spoiled, "char_cnn", n_characters=261)
    assert read(spoiled).config == read(spoiled).config
    assert read(spoiled).params["characters"]["embedding"].shape == (261, 4)


def configure(directory, group, **changed):
    file = directory / "elmo_tiny_options.json"
    options = json.loads(file.read_text())
    options[group].update(changed)
    file.write_text(json.dumps(options))


@pytest.mark.parametrize(
    ("group", "changed", "complaint"),
    [
        ("char_cnn", {"max_characters_per_token": 30}, "max_characters_per_token is 30; only 50 is supported"),
        ("char_cnn", {"n_characters": 6000}, "n_characters is 6000; only 262"),
        ("char_cnn", {"activation": "gelu"}, 'char_cnn.activation is "gelu": must be relu or tanh'),
        ("char_cnn", {"filters": 7}, "char_cnn.filters is 7"),
        ("char_cnn", {"embedding": None}, "char_cnn.embedding.dim is missing"),
        ("lstm", {"cell_clip": None}, "lstm.cell_clip is missing"),
        ("lstm", {"dim": "many"}, 'lstm.dim is "many"'),
        ("lstm", {"use_skip_connections": None}, "lstm.use_skip_connections is missing"),
        ("lstm", {"n_layers": 1}, "2 groups Cell…, but the options ask for 1"),
        ("lstm", {"n_layers": 10**9}, "lstm.n_layers is 1000000000: must be at most"),
        ("lstm", {"cell_clip": -3.0}, r"lstm.cell_clip is -3\.0: must be above 0"),
        ("char_cnn", {"filters": [[1, 8], [2]]}, r"char_cnn.filters.1 is \[2\]: must be a list of 2"),
        ("char_cnn", {"filters": []}, r"char_cnn.filters is \[\]"),
        ("char_cnn", {"n_highway": 0}, "groups CNN_high_…, but the options ask for 0"),
        ("lstm", {"n_layers": 3}, "2 groups Cell…, but the options ask for 3"),
        ("lstm", {"dim": 24}, r"dataset RNN_\d\S+ is \[64\] of float32, but the options ask for \[96\] of float32"),
    ],
)
def test_invalid_options_are_refused(group, changed, complaint, spoiled):
    configure(spoiled, group, **changed)
    with pytest.raises(InputError, match=complaint) as error:
        read(spoiled)
    assert "\n" not in str(error.value)


def test_a_model_without_characters_is_refused(spoiled):
    (spoiled / "elmo_tiny_options.json").write_text(json.dumps({"lstm": ELMO_OPTIONS["lstm"]}))
    with pytest.raises(InputError, match=r"elmo_tiny_options.json: no char_cnn"):
        read(spoiled)


@pytest.mark.parametrize("size", [100, 3000, 10_000])
def test_a_full_disk_is_named(elmo_directory, size, full_disk, tmp_path):
    model = read(elmo_directory)
    with full_disk(size), pytest.raises(OSError, match="File too large") as error:
        write(model, tmp_path)
    assert error.value.filename == str(tmp_path / "weights.hdf5")


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("CNN/W_cnn_1", None, r"weights.hdf5: no dataset CNN/W_cnn_1 \[1, 2, 4, 8\]"),
        ("char_embed", np.zeros((262, 4), np.float32), r"char_embed is \[262, 4\] of float32, .* \[261, 4\]"),
        ("CNN_proj/b_proj", np.zeros(8, np.int32), r"CNN_proj/b_proj is \[8\] of int32"),
        ("CNN_proj/b_proj", np.full(8, np.nan, np.float32), "CNN_proj/b_proj has 8 values that are NaN"),
        ("CNN_proj/b_proj", "text", r"CNN_proj/b_proj is \[\] of object"),
    ],
)
def test_invalid_weights_are_refused(name, value, complaint, spoiled):
    with h5py.File(spoiled / "elmo_tiny_weights.hdf5", "a") as file:
        del file[name]
        if value is not None:
            file[name] = value
    with pytest.raises(InputError, match=complaint) as error:
        read(spoiled)
    assert "\n" not in str(error.value)


def test_invalid_files_are_refused(spoiled):
    weights = spoiled / "elmo_tiny_weights.hdf5"
    shutil.copy(weights, spoiled / "other_weights.hdf5")
    with pytest.raises(InputError, match=r"exactly one file \*weights.hdf5, but .* elmo_tiny_weights.hdf5, other_wei"):
        read(spoiled)
    (spoiled / "other_weights.hdf5").unlink()
    whole = weights.read_bytes()
    for content in (b"", b"no HDF5", whole[:3000]):
        weights.write_bytes(content)
        with pytest.raises(InputError, match=r"elmo_tiny_weights.hdf5: cannot be read as HDF5"):
            read(spoiled)
    groups = [match.start() for match in re.finditer(b"SNOD", whole)]
    assert len(groups) > 10
    for at in groups:
        weights.write_bytes(whole[:at] + b"snod" + whole[at + 4 :])
        with pytest.raises(InputError, match=r"elmo_tiny_weights.hdf5: "):
            read(spoiled)
    weights.unlink()
    with pytest.raises(InputError, match=r"exactly one file \*weights.hdf5, but here is none$"):
        read(spoiled)
    (spoiled / "model.ckpt-935588.index").touch()
    with pytest.raises(InputError, match=r"here is none; .*dump_weights.py"):
        read(spoiled)
    shutil.copy(spoiled / "elmo_tiny_options.json", spoiled / "options.json")
    with pytest.raises(InputError, match=r"exactly one file \*options.json, but here is elmo_tiny_options.json, opt"):
        read(spoiled)
