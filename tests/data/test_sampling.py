"""Sampling: which text the examples of pairs are made of."""

from collections import Counter

import numpy as np
import pytest
from tiny_pairs import CLS, FIRST_ID, PAD, SEP, Corpus, article_sizes, batches_of, corpus, random_sizes, unmasked

from prelm_jax.data.baselines import length_only_accuracy, pairs_by_lengths
from prelm_jax.errors import InputError


def test_every_sentence_is_the_anchor_once_an_epoch():
    """A document that fits is drawn once per sentence; one of a single sentence is only a random segment."""
    sizes = [[3], [2, 3], [4, 1, 2], [5], [1] * 9, [2, 2]]
    text = Corpus(corpus(sizes))
    batches = batches_of(text.documents, 16, max_length=32)
    assert batches.examples_per_epoch == 16
    orders = set()
    for epoch in range(20):
        firsts = [text.document(id) for id in unmasked(batches[epoch])[:, 1].tolist()]
        assert Counter(firsts) == {1: 2, 2: 3, 4: 9, 5: 2}
        orders.add(tuple(firsts))
    assert len(orders) == 20


def test_every_sentence_is_reached():
    """In long documents too, a few epochs of windows cover every sentence."""
    sizes = random_sizes(np.random.default_rng(0), 5, 100)
    text = Corpus(corpus(sizes))
    batches = batches_of(text.documents, 500, max_length=64)
    times = Counter()
    for epoch in range(10):
        batch = batches[epoch]
        next_B1 = batch["next_sentence_labels"] == 0
        mine = unmasked(batch)[(batch["segments"] == 1) & (next_B1 | (batch["token_types"] == 0))]
        times.update({text.location[id][:2] for id in mine.tolist() if id >= FIRST_ID})
    assert len(times) == 500


def test_labels_are_a_coin_and_random_sentences_uniform():
    # Equal documents: every sentence of another document with the same number of tokens left is equally likely.
    text = Corpus(corpus([[5] * 4] * 100))
    batch = batches_of(text.documents, 40_000, max_length=64)[0]
    labels = batch["next_sentence_labels"][:, 0]
    assert abs(labels.mean() - 0.5) < 0.005
    second = unmasked(batch)[
        np.arange(len(labels)), batch["segments"].sum(axis=1) - batch["token_types"].sum(axis=1) + 1
    ]
    documents = np.bincount([text.document(id) for id in second[labels == 1].tolist()], minlength=100)
    assert abs(((documents - documents.mean()) ** 2 / documents.mean()).sum() - 99) < 4 * np.sqrt(2 * 99)


@pytest.mark.parametrize("sizes", [[[3], [2] * 300], [[2] * 300, [3]]])
def test_a_random_sentence_is_found_if_nearly_all_are_in_one_document(sizes):
    text = Corpus(corpus(sizes))
    batch = batches_of(text.documents, 100, max_length=16, max_predictions=5)[0]
    rows = np.flatnonzero(batch["next_sentence_labels"])
    tokens = unmasked(batch)[rows]
    assert len(rows) > 20
    assert all(text.documents[sizes.index([3])][0] == row[row.index(SEP) + 1 :][:3] for row in tokens.tolist())


def halves(batch):
    middle = len(batch["tokens"]) // 2
    return {n: a[:middle] for n, a in batch.items()}, {n: a[middle:] for n, a in batch.items()}


@pytest.mark.parametrize("T", [64, 128])
@pytest.mark.parametrize("kind", ["three sentences", "articles", "few articles"])
def test_lengths_do_not_give_the_label_away(kind, T):
    rng = np.random.default_rng(0)
    sizes = {
        "three sentences": random_sizes(rng, 3000, 3),
        "articles": article_sizes(rng, 1000),
        "few articles": article_sizes(rng, 60),
    }[kind]
    batch = batches_of(corpus(sizes), 40_000, max_length=T, short_sequence_probability=0.1)[0]
    assert length_only_accuracy(*map(pairs_by_lengths, halves(batch))) < 0.52


def test_length_only_accuracy_detects_lengths_that_give_the_label_away():
    B, T = 4000, 64
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (B, 1))
    first, second = rng.integers(5, 25, (B, 1)), rng.integers(5, 25, (B, 1)) + 6 * labels
    column = np.arange(T)
    batch = {
        "tokens": np.zeros((B, T), np.int32),
        "segments": (column < first + second + 3).astype(np.int32),
        "token_types": ((column >= first + 2) & (column < first + second + 3)).astype(np.int32),
        "next_sentence_labels": labels,
        "next_sentence_weights": np.ones_like(labels),
    }
    # 6 of the 20 lengths of a label tell it; for the others one can only guess.
    assert abs(length_only_accuracy(*map(pairs_by_lengths, halves(batch))) - (6 + 14 / 2) / 20) < 0.04


@pytest.mark.parametrize("sizes", [[[3, 4, 5]], [[3], [4], [5]], []])
def test_a_corpus_without_pairs_is_refused(sizes):
    with pytest.raises(InputError, match=r"--data\.no-next-sentence$") as error:
        batches_of(corpus(sizes), 4)
    assert "\n" not in str(error.value)


def test_a_corpus_without_pairs_has_single_segments():
    batches = batches_of(corpus([[3, 4, 5]]), 4, max_length=16, max_predictions=5, next_sentence=False)
    assert unmasked(batches[0]).tolist() == [[CLS, *range(FIRST_ID, FIRST_ID + 12), SEP, PAD, PAD]] * 4


def test_an_empty_corpus_is_refused():
    with pytest.raises(InputError, match="the corpus is empty"):
        batches_of([], 4, next_sentence=False)
