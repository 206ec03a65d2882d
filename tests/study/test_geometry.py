"""Self-similarity and CKA, against loops and Gram matrices."""

import numpy as np
import pytest
import tiny_subjects
from tiny_subjects import lines

from prelm_jax.study import geometry
from prelm_jax.study.base import Settings
from prelm_jax.study.tests import make_test
from prelm_jax.study.treebank import SENTENCES, TREEBANK


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def brute_force_cka(x, y):
    """By the Hilbert-Schmidt criterion of N x N Gram matrices."""
    number = len(x)
    centering = np.eye(number) - 1 / number

    def hsic(k, m):
        return np.trace(k @ centering @ m @ centering)

    k, m = x @ x.T, y @ y.T
    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


def test_cka():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 5)) + 3, rng.normal(size=(40, 7))
    y[:, :3] += x[:, :3]
    assert geometry.cka(x, y) == pytest.approx(brute_force_cka(x, y))
    assert 0.1 < geometry.cka(x, y) < 0.9
    rotation = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    assert geometry.cka(x, 3 * x @ rotation + 7) == pytest.approx(1)
    assert geometry.cka(x, np.ones((40, 2))) == 0


def test_self_similarity():
    vectors = np.random.default_rng(0).normal(size=(6, 4)) + 1
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = np.mean([cosine(vectors[i], vectors[j]) for i in range(6) for j in range(6) if i != j])
    assert geometry.self_similarity(unit) == pytest.approx(expected)


def test_occurrences():
    sentences = [["The", "cat", "the", "."]] * 4 + [["the", "dog", "."]]
    assert {word: indices.tolist() for word, indices in geometry.occurrences(sentences).items()} == {
        "the": [2, 6, 10, 14, 16]
    }
    many = geometry.occurrences([["a", "b"]] * 100)
    assert many["a"].tolist() == list(range(0, 40, 2))


def test_random_pairs():
    offsets = np.array([0, 3, 4, 10, 30])
    pairs = geometry.random_pairs(offsets)
    sentence = np.repeat(np.arange(4), np.diff(offsets))
    assert pairs.shape == (geometry.PAIRS, 2) and set(pairs.ravel()) == set(range(30))
    assert (sentence[pairs[:, 0]] != sentence[pairs[:, 1]]).all()


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / TREEBANK
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split in SENTENCES:
        text = ""
        for _ in range(40):
            words = [f"w{'abcdefgh'[rng.integers(8)]}" for _ in range(rng.integers(3, 8))]
            text += "".join(f"{i}\t{w}\t_\tX\t_\t_\t{i - 1}\tx\t_\t_\n" for i, w in enumerate(words, 1)) + "\n"
        (folder / f"x-{split}.conllu").write_text(text)
    return tmp_path


def test_selfsim(data):
    """Without context a word is always the same; with it, it is not, but more so than random words."""
    found = lines(make_test("selfsim", Settings(data)).measure(tiny_subjects.contextual()))
    means = {line: np.mean(values) for line, values in found.items()}
    assert means["", 0] == pytest.approx(1, abs=1e-3) == means["standardized", 0]
    assert means["baseline", 1] < means["", 1] < 0.98
    assert len(found["", 1]) == 8 and len(found["baseline", 0]) == geometry.PAIRS


def test_cka_of_layers(data):
    subject, other = tiny_subjects.contextual(), tiny_subjects.static("runs/other")
    values = {row.item: row.value for row in geometry.CKA(data / TREEBANK).measure(subject)}
    assert values["0 0"] == pytest.approx(1) == values["1 1"] and values["0 1"] == pytest.approx(values["1 0"])
    assert 0.3 < values["0 1"] < 0.95
    test = geometry.CKA(data / TREEBANK, other)
    values = {row.item: row.value for row in test.measure(subject)}
    assert values["0 0"] == pytest.approx(1) and set(values) == {"0 0", "1 0"}
    assert test.name == "cka:runs/other" and test.settings["other"] == other.origin.model
