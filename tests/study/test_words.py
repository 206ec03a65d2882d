"""Similarity and analogies of words, against plain loops."""

import numpy as np
import pytest
import tiny_subjects
from tiny_subjects import Embedding, word_vector

from prelm_jax.errors import InputError
from prelm_jax.study import words
from prelm_jax.study.base import Settings
from prelm_jax.study.tests import make_test

TEXT = """Cats

The cat sees a Dog . The cat sleeps.
a cat
A bird, and a cat!

no animal here
cat five
cat six
"""


@pytest.fixture
def data(tmp_path):
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "simplewiki.txt").write_text(TEXT)
    (tmp_path / "study" / "wordsim").mkdir(parents=True)
    (tmp_path / "study" / "wordsim" / "EN-WS-353-ALL.txt").write_text("cat\tdog\t7.5\ncat\tunicorn\t2\nbird\tdog\t5\n")
    return tmp_path / "study"


@pytest.fixture(autouse=True)
def plain_corpus(monkeypatch):
    monkeypatch.setattr(words, "CORPUS", "simplewiki.txt")
    monkeypatch.setattr(words, "CONTEXT", 2)


def test_contexts(data):
    found = words.find_contexts(["cat", "dog", "Bird", "unicorn"], words.corpus_path(data))
    assert found["dog"] == [(["sees", "a", "Dog", ".", "The"], 2)]
    assert found["Bird"] == [(["A", "bird", ",", "and"], 1)] and found["unicorn"] == []
    assert [" ".join(sentence) for sentence, _ in found["cat"]] == [
        "The cat sees a",
        "a cat",
        "and a cat !",
        "cat five",
        "cat six",
    ]


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def test_similarity(data):
    subject = tiny_subjects.contextual()
    rows = list(make_test("ws353", Settings(data)).measure(subject))
    assert {(row.kind, row.layer) for row in rows} == {("", 0), ("", 1), ("contexts", 0), ("contexts", 1)}
    assert [row.gold for row in rows[:3]] == [7.5, 2, 5] and rows[0].group == "0 cat dog"
    alone = {word: next(iter(subject.embed([[word]])))[1, 0] for word in ("cat", "dog")}
    contexts = words.find_contexts(["cat", "dog"], words.corpus_path(data))
    mean = {
        word: np.mean([next(iter(subject.embed([s])))[1, i] for s, i in contexts[word]], 0) for word in ("cat", "dog")
    }
    for kind, vectors in (("", alone), ("contexts", mean)):
        (row,) = [row for row in rows if (row.item, row.kind, row.layer) == ("0", kind, 1)]
        assert row.value == pytest.approx(cosine(vectors["cat"], vectors["dog"]), abs=1e-5)
    (row,) = [row for row in rows if (row.item, row.kind, row.layer) == ("1", "contexts", 1)]
    assert (row.value, row.unknown) == (0, 1)  # The corpus has no unicorn.


def test_vectors_without_context_have_one_line(data):
    known = {"cat", "dog"}

    def embed(sentence):
        return np.stack([word_vector(word) if word in known else np.zeros(16) for word in sentence])[None]

    rows = list(make_test("ws353", Settings(data)).measure(Embedding(embed, 1)))
    assert [(row.kind, row.layer, row.unknown) for row in rows] == [("", 0, 0), ("", 0, 1), ("", 0, 1)]
    assert rows[0].value == pytest.approx(cosine(word_vector("cat"), word_vector("dog")), abs=1e-5)


def test_own_pairs(data, write):
    path = write("own.tsv", "cat\tdog\t1\nNew York\tcity\t2\n")
    (data.parent / "pretrain" / "simplewiki.txt").unlink()
    test = make_test(f"similarity:{path}", Settings(data))
    assert test.name == f"similarity:{path}" and test.settings["contexts"] is None
    rows = list(test.measure(tiny_subjects.contextual()))
    assert len(rows) == 4 and {row.kind for row in rows} == {""}
    with pytest.raises(InputError, match="similarity:FILE"):
        make_test("similarity", Settings(data))


def test_solve():
    """Against a loop over all words."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(50, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    questions = np.array([rng.permutation(50)[:3] for _ in range(30)])
    expected = []
    for a, b, c in questions:
        target = vectors[b] - vectors[a] + vectors[c]
        others = [i for i in range(50) if i not in (a, b, c)]
        expected.append(max(others, key=lambda i: cosine(vectors[i], target)))
    assert words.solve(vectors, questions).tolist() == expected


def test_analogies(data):
    """Vectors that add up; a question with a rare word is left out, and an unknown word is a wrong answer."""
    folder = data / "analogies"
    folder.mkdir()
    (folder / "questions-words.txt").write_text(
        ": royal\nMan King Woman Queen\nman king boy prince\nman king woman unicorn\n: more\nboy man girl woman\n"
    )
    (data.parent / "pretrain" / "simplewiki.txt").write_text("man king woman queen. Boy prince girl Woman man man\n")
    parts = {"man": "m", "woman": "w", "king": "mr", "queen": "wr", "boy": "my", "girl": "wy"}

    def embed(sentence):
        return np.array([[[float(letter in parts.get(word, "")) for letter in "mwry"] for word in sentence]])

    rows = list(make_test("analogies", Settings(data)).measure(Embedding(embed, 1)))
    assert [(row.item, row.group, row.value, row.unknown) for row in rows] == [
        ("0", "royal", 1, 0),
        ("1", "royal", 0, 1),
        ("3", "more", 1, 0),
    ]


def test_analogies_need_a_corpus(data):
    (data.parent / "pretrain" / "simplewiki.txt").unlink()
    with pytest.raises(InputError, match=r"simplewiki\.txt"):
        make_test("analogies", Settings(data))


def test_frequent_words(data):
    found = words.frequent_words(words.corpus_path(data))
    assert found[:2] == ["cat", "a"] and "dog" in found and "Dog" not in found
