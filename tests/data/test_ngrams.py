import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prelm_jax.corpus.store import Store
from prelm_jax.data import ngrams
from prelm_jax.data.ngrams import trigram_loss

V = 6
DOCUMENTS = st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=12), min_size=1, max_size=12)


def reference(documents, asked):
    """The same model, one n-gram at a time."""
    counts = Counter()
    observed = []
    for document in documents:
        for i, token in enumerate(document):
            before = tuple(document[max(i - 2, 0) : i])
            observed.append((*before, token))
            for n in range(len(before) + 1):
                history = before[len(before) - n :]
                counts["history", history] += 1
                counts["whole", (*history, token)] += 1

    def frequency(ngram, left_out):
        seen = max(counts["history", ngram[:-1]] - left_out, 0)
        return max(counts["whole", ngram] - left_out, 0) / max(seen, 1), seen.bit_length()

    def probability(ngram, left_out, weights):
        if len(ngram) == 1:
            return (counts["whole", ngram] - left_out + 1) / (len(observed) - left_out + V)
        share, level = frequency(ngram, left_out)
        lower = probability(ngram[1:], left_out, weights)
        weight = weights[len(ngram)].get(level, 0.5) if level else 0
        return weight * share + (1 - weight) * lower

    weights = {2: {}, 3: {}}
    for n in (2, 3):
        levels = {}
        for ngram in observed:
            if len(ngram) >= n:
                share, level = frequency(ngram[-n:], 1)
                levels.setdefault(level, []).append((share, probability(ngram[1 - n :], 1, weights)))
        for level, pairs in levels.items():
            weight = 0.5
            for _ in range(30):
                mine = [weight * share / (weight * share + (1 - weight) * lower) for share, lower in pairs]
                weight = (sum(mine) + 0.5) / (len(pairs) + 1)
            weights[n][level] = weight
    return -sum(math.log(probability(ngram, 0, weights)) for ngram in asked) / len(asked)


def as_array(asked):
    return np.array([[V] * (3 - len(ngram)) + list(ngram) for ngram in asked]).T


@settings(deadline=None)
@given(
    documents=DOCUMENTS,
    asked=st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=3).map(tuple), min_size=1, max_size=8),
    piece=st.sampled_from([1, 7, 1000]),
)
def test_the_model_is_that_of_the_reference(documents, asked, piece):
    store = Store.from_documents([document] for document in documents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngrams, "PIECE", piece)
        patch.setattr(ngrams, "COUNTED", 1000)
        assert trigram_loss(store, V, as_array(asked)) == pytest.approx(reference(documents, asked), rel=1e-9)


@settings(deadline=None)
@given(documents=DOCUMENTS, history=st.lists(st.integers(0, V - 1), max_size=2))
def test_probabilities_add_up_to_one(documents, history):
    store = Store.from_documents([document] for document in documents)
    probabilities = [math.exp(-trigram_loss(store, V, as_array([(*history, token)]))) for token in range(V)]
    assert sum(probabilities) == pytest.approx(1)


def test_no_ngram_crosses_the_border_of_a_document():
    store = Store.from_documents([[[0], [1]], [[2, 3]]] * 500)
    sure, unseen = (trigram_loss(store, V, as_array([ngram])) for ngram in ((0, 1), (1, 2)))
    assert sure < 0.01 and unseen > math.log(4)


def test_of_a_large_corpus_a_part_is_counted(monkeypatch):
    monkeypatch.setattr(ngrams, "PIECE", 10)
    monkeypatch.setattr(ngrams, "COUNTED", 4)
    pieces = ngrams._pieces(85)
    assert [(piece.start, piece.stop) for piece in pieces] == [(0, 10), (20, 30), (40, 50), (60, 70)]
    assert [len(piece) for piece in ngrams._pieces(34)] == [10, 10, 10, 4]
    parts = [[0, 1] * 5, [2, 3] * 5] * 4  # every other piece
    store = Store.from_documents([[ids] for ids in parts])
    half = Store.from_documents([[[0, 1] * 5]] * 4)
    asked = as_array([(0, 1, 0), (2, 3, 2), (3,)])
    assert trigram_loss(store, V, asked) == trigram_loss(half, V, asked)


def test_the_weights_are_fitted_to_a_sample(monkeypatch):
    rng = np.random.default_rng(0)
    store = Store.from_documents([[(np.cumsum(rng.integers(1, 3, 20_000)) % V).tolist()]])
    asked = as_array([(0, 1, 2), (0, 1, 3)])
    whole = trigram_loss(store, V, asked)
    monkeypatch.setattr(ngrams, "FITTED_ON", 3000)
    sampled = trigram_loss(store, V, asked)
    assert sampled != whole
    assert sampled == pytest.approx(whole, rel=0.01) == pytest.approx(math.log(2), rel=0.01)
