"""Vectors of words: training, the cache, text files."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest

from prelm_jax.errors import InputError
from prelm_jax.study import word2vec
from prelm_jax.study.word2vec import WordVectors


def test_read(write):
    path = write("vectors.txt", "2 3\ncat 1 0 0.5\n\u00a0x 0 1 -2e-1 \n")
    vectors = word2vec.read(Path(path))
    assert vectors.words == ["cat", "\u00a0x"]
    np.testing.assert_array_equal(vectors.vectors_VD, np.array([[1, 0, 0.5], [0, 1, -0.2]], np.float32))
    glove = word2vec.read(Path(write("glove.txt", "cat 1 0 0.5\ndog 0 1 2\n")))
    assert glove.words == ["cat", "dog"] and vectors.fingerprint != glove.fingerprint


@pytest.mark.parametrize("line", ["dog 1 2", "dog 1 2 x", "dog", "dog 1 2 nan"])
def test_wrong_line(write, line):
    path = write("vectors.txt", f"2 3\ncat 1 0 0.5\n{line}\n")
    with pytest.raises(InputError, match=f"{path}:3"):
        word2vec.read(Path(path))


def test_a_part_of_a_file_is_refused(write):
    with pytest.raises(InputError, match=r"1 vectors, .* first line says 2"):
        word2vec.read(Path(write("vectors.txt", "2 3\na 1 0 0\n")))


def test_no_vectors(write):
    with pytest.raises(InputError, match=r"vectors\.txt"):
        word2vec.read(Path(write("vectors.txt", "")))


def test_lookup():
    vectors = WordVectors(["cat", "Paris", "paris", "cat"], np.arange(1, 9, dtype=np.float32).reshape(4, 2))
    found = vectors.lookup(["cat", "Cat", "Paris", "PARIS", "unicorn"])
    assert found.tolist() == [[1, 2], [1, 2], [3, 4], [5, 6], [0, 0]]
    assert vectors.vectors_VD[3].tolist() == [7, 8]  # `lookup` leaves it alone.
    assert vectors.lookup([]).shape == (0, 2)


@pytest.fixture
def corpus(write):
    """Fruits and animals in sentences of their own."""
    rng = random.Random(0)
    groups = [["Apple", "pear", "plum", "sweet"], ["cat", "dog", "cow", "tame"]]
    lines = [" ".join(rng.choices(rng.choice(groups), k=8)) + " 1990." for _ in range(300)]
    return write("corpus.txt", "\n".join([*lines, "rare"]) + "\n")


def test_train(corpus, monkeypatch):
    pytest.importorskip("gensim")
    monkeypatch.setitem(word2vec.SETTINGS, "epochs", 20)
    vectors = word2vec.train(corpus)
    assert {"apple", "cat"} <= set(vectors.words) and not {"Apple", "rare", ".", "1990"} & set(vectors.words)
    assert vectors.vectors_VD.shape == (len(vectors.words), 100) and vectors.vectors_VD.dtype == np.float32
    unit = vectors.vectors_VD / np.linalg.norm(vectors.vectors_VD, axis=1, keepdims=True)
    row = {word: unit[i] for i, word in enumerate(vectors.words)}
    assert row["apple"] @ row["pear"] > row["apple"] @ row["dog"] + 0.1
    monkeypatch.setitem(sys.modules, "gensim.models", None)  # From now on it cannot be imported.
    assert word2vec.train(corpus).fingerprint == vectors.fingerprint
    monkeypatch.setitem(word2vec.SETTINGS, "seed", 2)
    with pytest.raises(InputError, match=r"prelm_jax\[study\]"):
        word2vec.train(corpus)


def test_training_repeats_its_bits(corpus, monkeypatch, tmp_path):
    pytest.importorskip("gensim")
    first = word2vec.train(corpus).fingerprint
    monkeypatch.setenv("PRELM_CACHE", str(tmp_path / "another"))
    assert word2vec.train(corpus).fingerprint == first


def test_no_frequent_word(write):
    pytest.importorskip("gensim")
    with pytest.raises(InputError, match=r"few\.txt.*5 times"):
        word2vec.train(write("few.txt", "a few words\n"))
