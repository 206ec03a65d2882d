"""tokenizer train and tokenizer inspect."""

import re

import pytest

from prelm_jax.cli.main import main


@pytest.mark.parametrize(
    ("kind", "options", "name"),
    [
        ("wordpiece", ("--vocab-size", "90"), "WordPiece"),
        ("bpe", ("--num-merges", "40"), "BPE"),
        ("sentencepiece", ("--vocab-size", "60", "--model-type", "bpe"), "SentencePiece"),
        ("words", ("--vocab-size", "20"), "WordVocabulary"),
    ],
)
def test_train_and_inspect(folder, kind, options, name, tmp_path, capsys):
    main(["tokenizer", "train", kind, f"{tmp_path}/it", "--corpus", f"{folder}/corpus.txt", *options])
    assert re.search(r"wrote \S+: \d+ tokens", capsys.readouterr().out)
    (tmp_path / "lines.txt").write_text("The old cat sees a hen.\nThe [old] ☃ dog ☃ ☃\n")
    main(["tokenizer", "inspect", f"{tmp_path}/it", f"{tmp_path}/lines.txt"])
    out = capsys.readouterr().out
    for part in (name, "special tokens", "longest tokens", "bytes per token", "tokens per word"):
        assert part in out
    assert re.search(r"line 2: [1-9]\d* unknown +│ The \[old\] ☃ dog ☃ ☃", out)
    assert re.search(r"lowercases +│ no" if kind == "words" else r"lowercases +│ yes", out)
    main(["tokenizer", "inspect", f"{tmp_path}/it"])
    assert "bytes per token" not in capsys.readouterr().out


def test_mistakes(folder, fails, tmp_path):
    corpus = ("--corpus", folder / "corpus.txt")
    assert "Did you mean wordpiece?" in fails("tokenizer", "train", "wordpeice", tmp_path / "it", *corpus)
    assert "--corpus must be given" in fails("tokenizer", "train", "bpe", tmp_path / "it")
    assert "KIND comes first" in fails("tokenizer", "train", "--corpus", "x")
    message = fails("tokenizer", "train", "wordpiece", tmp_path / "it", *corpus, "--vocab-size", 3)
    assert re.search("vocab[_-]size[= ]3 ", message)
    assert f"{tmp_path}/none" in fails("tokenizer", "inspect", tmp_path / "none")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/vocab.txt").write_text("a cat")
    message = fails("tokenizer", "train", "words", tmp_path / "full", "--corpus", tmp_path / "full/vocab.txt")
    assert f"{tmp_path}/full is not empty" in message
    for output in (tmp_path / "full/vocab.txt", "/dev/null"):
        assert f"{output} is a " in fails("tokenizer", "train", "words", output, *corpus)
    assert "/proc/none" in fails("tokenizer", "train", "words", "/proc/none", *corpus)
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "vocab.txt"]
    assert (tmp_path / "full/vocab.txt").read_text() == "a cat"


def test_a_file_whose_name_looks_like_an_option(folder, fails, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-dash.txt").write_bytes((folder / "corpus.txt").read_bytes())
    assert "./-dash.txt" in fails("tokenizer", "train", "words", "it", "--corpus", "-dash.txt")
    main(["tokenizer", "train", "words", "it", "--corpus", "./-dash.txt"])
    assert "wrote it: " in capsys.readouterr().out
