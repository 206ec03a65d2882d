"""Model directories: their model_type, and saving."""

import pytest
from model_directories import contents

from prelm_jax.errors import InputError
from prelm_jax.formats.base import find_model_type, save
from prelm_jax.formats.huggingface_bert import FORMAT, read
from prelm_jax.tokenizers.wordpiece import WordPiece


@pytest.fixture(scope="module")
def model(bert_directory):
    return read(bert_directory)


@pytest.mark.parametrize(
    ("name", "text", "model_type"),
    [
        ("config.json", '{"model_type": "roberta"}', "roberta"),
        ("config.json", "{}", None),
        ("params_shapes.json", "", "openai-gpt"),
        ("elmo_2x_options.json", "", "elmo"),
        ("weights.hdf5", "", "elmo"),
    ],
)
def test_the_model_type_of_a_directory(name, text, model_type, tmp_path):
    (tmp_path / name).write_text(text)
    found, source = find_model_type(tmp_path)
    assert found == model_type
    assert source in (tmp_path, tmp_path / name)


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(InputError, match=rf"{tmp_path}: .*config.json"):
        find_model_type(tmp_path)


def test_save_overwrites_a_model_directory_and_leaves_other_files(model, tmp_path):
    directory = tmp_path / "deep" / "model"
    save(model, FORMAT, directory, "# first\n")
    first = contents(directory)
    (directory / "notes.txt").write_text("mine")
    save(model, FORMAT, directory, "# second\n")
    assert contents(directory) == first | {"README.md": b"# second\n", "notes.txt": b"mine"}
    assert [path.name for path in directory.parent.iterdir()] == ["model"]


def test_nothing_of_an_earlier_model_is_read_with_a_later_one(model, tmp_path):
    """Other tokens, another head, another pooling."""
    save(model, FORMAT, tmp_path / "model", "")
    expected = contents(tmp_path / "model")
    for name in ("added_tokens.json", "head.safetensors", "modules.json", "sentence_bert_config.json", "spiece.model"):
        (tmp_path / "model" / name).write_text("{}")
    save(model, FORMAT, tmp_path / "model", "")
    assert contents(tmp_path / "model") == expected


def test_save_refuses_any_other_directory(model, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="not empty, and not a model directory"):
        save(model, FORMAT, tmp_path, "")
    with pytest.raises(InputError, match="not a directory"):
        save(model, FORMAT, tmp_path / "thesis.tex", "")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_save_leaves_the_directory_unchanged(existing, model, tmp_path, monkeypatch):
    directory = tmp_path / "model"
    if existing:
        save(model, FORMAT, directory, "# first\n")
    before = contents(directory) if existing else None

    def disk_full(*args, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr(WordPiece, "save", disk_full)
    with pytest.raises(OSError, match="no space left"):
        save(model, FORMAT, directory, "# second\n")
    assert (contents(directory) if existing else None) == before
    assert list(tmp_path.iterdir()) == ([directory] if existing else [])
