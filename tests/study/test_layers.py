"""The tests of hidden states from the command line: models of each family, and vectors of words from a file."""

import pytest
import tiny

from prelm_jax.cli.main import main
from prelm_jax.study import records

SENTENCES = 40


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A treebank of random sentences, their third words marked, and three pairs of words."""
    data = tmp_path_factory.mktemp("data")
    (data / "ud-en-ewt").mkdir()
    (data / "wordsim").mkdir()
    (data / "wordsim" / "EN-WS-353-ALL.txt").write_text("cat\tdog\t7\ncat\triver\t1\nhouse\tdog\t4\n")
    for seed, split in enumerate(("train", "dev", "test")):
        text = ""
        for line in tiny.text(seed, SENTENCES).lower().replace(".", " .").splitlines():
            words = line.split()
            text += "".join(
                f"{i}\t{word}\t_\t{'VERB' if word in ('sees', 'finds', 'likes') else 'X'}\t_\t_\t{i - 1}\tx\t_\t_\n"
                for i, word in enumerate(words, 1)
            )
            text += "\n" if words else ""
        (data / "ud-en-ewt" / f"tiny-{split}.conllu").write_text(text)
    return data


@pytest.fixture
def vectors(write):
    return write("vectors.txt", "".join(f"{word} {i % 3 + 1} {i % 5} {i % 7}\n" for i, word in enumerate(tiny.WORDS)))


def study(capsys, *arguments: object) -> list[records.Record]:
    main(["study", *map(str, arguments)])
    return [records.read(path) for path in capsys.readouterr().out.split()]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_model(family, data, tmp_path, capsys):
    pytest.importorskip("sklearn")
    model = tiny.directory(tmp_path / "model", family)
    options = ("--output", tmp_path / "out", "--data", data)
    upos, similarity, alike = study(capsys, model, "--tests", "upos", "ws353", f"cka:{model}", *options)
    lines = dict(records.rows_by_line(upos.rows))
    layers = max(layer for _, layer in lines if layer is not None) + 1
    assert layers == (3 if family == "elmo" else 2)
    assert set(lines) == {("majority", None), *((kind, i) for kind in ("", "dev", "control") for i in range(layers))}
    right = sum(row.value for row in lines["", 0]) / len(lines["", 0])
    assert right > 0.95  # Layer 0 knows the word.
    assert {row.gold for row in similarity.rows} == {7, 1, 4} and similarity.header.metric == "spearman"
    values = {row.item: row.value for row in alike.rows}
    assert len(values) == layers**2 and values["1 1"] == pytest.approx(1)


def test_vectors_of_words(vectors, data, tmp_path, capsys):
    options = ("--output", tmp_path / "out", "--data", data)
    similarity, spread = study(capsys, vectors, "--tests", "ws353", "selfsim", *options)
    assert similarity.header.family == "word2vec"
    assert [(row.layer, row.kind, row.unknown) for row in similarity.rows] == [(0, "", 0)] * 3
    assert {round(row.value, 2) for row in spread.rows if not row.kind} == {1}
    assert "ws353" in str(records.find(tmp_path / "out")[1])


def complaint(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as error:
        main(["study", *map(str, arguments)])
    assert error.value.code == 1
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def test_complaints(vectors, data, write, tmp_path, capsys):
    options = ("--output", tmp_path / "out", "--data", data)
    pairs = write("pairs.tsv", "cat\tdog\t1\ncat dog 2\n")
    assert f"{pairs}:2" in complaint(capsys, vectors, "--tests", f"similarity:{pairs}", *options)
    assert "missing.tsv" in complaint(capsys, vectors, "--tests", "similarity:missing.tsv", *options)
    assert "semcor" in complaint(capsys, vectors, "--tests", "semcor", *options)
    assert f"{pairs}:1" in complaint(capsys, pairs, "--tests", "ws353", *options)
