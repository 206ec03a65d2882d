"""Replacement maps: a word moves where its vector depends on the one that was replaced."""

import numpy as np
import tiny_subjects

from prelm_jax.study.base import Settings
from prelm_jax.study.replacement import NEUTRAL, SENTENCES
from prelm_jax.study.tests import make_test


def moved(embed):
    """By sentence, [moved, replaced]."""
    rows = list(make_test("replacement", Settings(None)).measure(tiny_subjects.Embedding(embed, 2)))
    assert len({(row.item, row.kind, row.layer) for row in rows}) == len(rows)
    found = {}
    for row in rows:
        number, i, j = map(int, row.item.split())
        words = len(SENTENCES[number].split())
        assert row.group == SENTENCES[number]
        found.setdefault(number, np.full((words, words), np.nan))[i, j] = row.value
    return list(found.values())


def vectors(words):
    return np.stack([tiny_subjects.word_vector(word) for word in words])


def test_words_without_context_move_only_themselves():
    for number, values in enumerate(moved(lambda words: np.stack([np.zeros((len(words), 16)), vectors(words)]))):
        assert not np.isnan(values).any() and (values[~np.eye(len(values), dtype=bool)] == 0).all()
        own = vectors(SENTENCES[number].split())
        expected = np.linalg.norm(own - vectors([NEUTRAL]), axis=1) / np.linalg.norm(own, axis=1)
        np.testing.assert_allclose(np.diag(values), expected, rtol=1e-5)


def test_a_left_to_right_model_has_zeros_above_the_diagonal():
    for values in moved(lambda words: np.stack([vectors(words), np.cumsum(vectors(words), 0)])):
        assert (np.triu(values, 1) == 0).all() and (values[np.tril_indices(len(values))] > 0).all()
