import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prelm_jax.corpus.store import Store
from prelm_jax.data import ngrams
from prelm_jax.data.ngrams import trigram_nll

V = 6
DOCUMENTS = st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=12), min_size=1, max_size=12)


def reference(documents, queries):
    """The same model in plain Python, one n-gram at a time."""
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
        mine, level = frequency(ngram, left_out)
        lower = probability(ngram[1:], left_out, weights)
        weight = weights[len(ngram)].get(level, 0.5) if level else 0
        return weight * mine + (1 - weight) * lower

    weights = {2: {}, 3: {}}
    for n in (2, 3):
        levels = {}
        for ngram in observed:
            if len(ngram) >= n:
                mine, level = frequency(ngram[-n:], 1)
                levels.setdefault(level, []).append((mine, probability(ngram[1 - n :], 1, weights)))
        for level, pairs in levels.items():
            weight = 0.5
            for _ in range(30):
                posteriors = [weight * mine / (weight * mine + (1 - weight) * lower) for mine, lower in pairs]
                weight = (sum(posteriors) + 0.5) / (len(pairs) + 1)
            weights[n][level] = weight
    return -sum(math.log(probability(ngram, 0, weights)) for ngram in queries) / len(queries)


def trigram_loss(*arguments):
    return trigram_nll(*arguments).mean()


def as_array(queries):
    return np.array([[V] * (3 - len(ngram)) + list(ngram) for ngram in queries]).T


@settings(deadline=None)
@given(
    documents=DOCUMENTS,
    queries=st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=3).map(tuple), min_size=1, max_size=8),
    chunk=st.sampled_from([1, 7, 1000]),
)
def test_the_loss_matches_the_reference(documents, queries, chunk):
    store = Store.from_documents([document] for document in documents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngrams, "CHUNK", chunk)
        patch.setattr(ngrams, "COUNTED_CHUNKS", 1000)
        assert trigram_loss(store, V, as_array(queries)) == pytest.approx(reference(documents, queries), rel=1e-9)


@settings(deadline=None)
@given(documents=DOCUMENTS, history=st.lists(st.integers(0, V - 1), max_size=2))
def test_probabilities_add_up_to_one(documents, history):
    store = Store.from_documents([document] for document in documents)
    probabilities = [math.exp(-trigram_loss(store, V, as_array([(*history, token)]))) for token in range(V)]
    assert sum(probabilities) == pytest.approx(1)


def test_no_ngram_crosses_the_boundary_of_a_document():
    store = Store.from_documents([[[0], [1]], [[2, 3]]] * 500)
    sure, unseen = (trigram_loss(store, V, as_array([ngram])) for ngram in ((0, 1), (1, 2)))
    assert sure < 0.01 and unseen > math.log(4)


def test_chunks_of_a_large_corpus_are_counted(monkeypatch):
    monkeypatch.setattr(ngrams, "CHUNK", 10)
    monkeypatch.setattr(ngrams, "COUNTED_CHUNKS", 4)
    chunks = ngrams._chunks(85)
    assert [(chunk.start, chunk.stop) for chunk in chunks] == [(0, 10), (20, 30), (40, 50), (60, 70)]
    assert [len(chunk) for chunk in ngrams._chunks(34)] == [10, 10, 10, 4]
    parts = [[0, 1] * 5, [2, 3] * 5] * 4  # every other chunk
    store = Store.from_documents([[ids] for ids in parts])
    half = Store.from_documents([[[0, 1] * 5]] * 4)
    queries = as_array([(0, 1, 0), (2, 3, 2), (3,)])
    assert trigram_loss(store, V, queries) == trigram_loss(half, V, queries)


def test_the_weights_are_fitted_to_a_sample(monkeypatch):
    rng = np.random.default_rng(0)
    store = Store.from_documents([[(np.cumsum(rng.integers(1, 3, 20_000)) % V).tolist()]])
    queries = as_array([(0, 1, 2), (0, 1, 3)])
    whole = trigram_loss(store, V, queries)
    monkeypatch.setattr(ngrams, "FITTED_ON", 3000)
    sampled = trigram_loss(store, V, queries)
    assert sampled != whole
    assert sampled == pytest.approx(whole, rel=0.01) == pytest.approx(math.log(2), rel=0.01)
