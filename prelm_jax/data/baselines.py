"""Trivial baselines: the loss or accuracy that a model must beat to have learned anything; and derived metrics.

Baselines are fitted on the training side and evaluated on the batches on which the model is evaluated. Losses are in
nats. Unigram frequencies are counts plus one; the trigram model is `data.ngrams`.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np

from prelm_jax.corpus.store import Store
from prelm_jax.data.batches import StoreBatches
from prelm_jax.data.ngrams import TokenSource, trigram_loss
from prelm_jax.training.contract import HostBatch

Baselines = dict[str, dict[str, float]]  # metric → baseline → value

_BINS = 16  # of a segment's length
_VOTERS = 10_000  # training examples that vote on the lengths


class Targets(TokenSource, Protocol):
    """The targets of one direction of a bidirectional language model; each document is a sentence."""

    end_id: int  # last target of every sentence


def pair_baselines(batches: StoreBatches, evaluation: Iterable[HostBatch]) -> Baselines:
    """Baselines of `pairs`.

    `masked_lm_loss`: unigram. `masked_lm_accuracy`: always the most frequent token. `next_sentence_accuracy`: always
    the label that is more frequent in the evaluation; and a guess from the lengths of the two segments.
    """
    batch = _concatenate(evaluation)
    targets = batch["masked_targets"][batch["masked_weights"] > 0]
    counts_V = batches.store.token_counts(batches.vocab_size)
    result = {
        "masked_lm_loss": {"unigram": _unigram_loss(counts_V, targets)},
        "masked_lm_accuracy": _most_frequent(counts_V, targets),
    }
    if "next_sentence_labels" in batch:
        random = float(batch["next_sentence_labels"].mean())
        result["next_sentence_accuracy"] = {
            "majority": max(random, 1 - random),
            "lengths only": length_only_accuracy(batches.rows(0, 0, _VOTERS), batch),
        }
    return result


def window_baselines(batches: StoreBatches, evaluation: Iterable[HostBatch]) -> Baselines:
    """Baselines of `windows`. `lm_loss`: unigram, trigram. `lm_accuracy`: always the most frequent token."""
    store, vocab_size, batch = batches.store, batches.vocab_size, _concatenate(evaluation)
    real_BT = batch["weights"] > 0
    # A segment's first token has no token before it; the trigram model writes that as vocab_size.
    before_BT = np.where(batch["positions"] > 0, np.roll(batch["tokens"], 1, axis=1), vocab_size)
    trigrams = np.stack([before_BT[real_BT], batch["tokens"][real_BT], batch["targets"][real_BT]])
    return {
        "lm_loss": _ngram_losses(store, vocab_size, trigrams),
        "lm_accuracy": _most_frequent(store.token_counts(vocab_size), trigrams[2]),
    }


def stream_baselines(targets: Mapping[str, Targets], vocab_size: int, evaluation: Iterable[HostBatch]) -> Baselines:
    """Baselines of `streams`: unigram and trigram of each direction, and the mean of both directions (`loss`).

    Args:
        targets: for each direction the targets of the training side.
        vocab_size: V, above all ids.
        evaluation: consecutive batches.
    """
    batches = list(evaluation)
    result = {}
    for direction, source in targets.items():
        # Rows continue from batch to batch, so the tokens before a target are the targets before it, up to the
        # beginning of its sentence. With | for the end id and V for "nothing":
        #
        #     target    a  b  c  |  d
        #     second    V  a  b  c  V
        #     first     V  V  a  b  V
        targets_BT = np.concatenate([batch[f"{direction}_targets"] for batch in batches], axis=1)
        nothing_B2 = np.full((len(targets_BT), 2), vocab_size)
        ended_BT = np.where(targets_BT == source.end_id, vocab_size, targets_BT)
        before_BT = np.concatenate([nothing_B2, ended_BT], axis=1)
        second_BT = before_BT[:, 1:-1]
        first_BT = np.where(second_BT == vocab_size, vocab_size, before_BT[:, :-2])
        real_BT = np.concatenate([batch[f"{direction}_weights"] for batch in batches], axis=1) > 0
        trigrams = np.stack([first_BT[real_BT], second_BT[real_BT], targets_BT[real_BT]])
        result[f"{direction}_loss"] = _ngram_losses(source, vocab_size, trigrams)
    names = ("unigram", "trigram")
    return result | {"loss": {name: sum(losses[name] for losses in result.values()) / len(result) for name in names}}


def perplexity(names: Mapping[str, str], name: str, value: float) -> dict[str, float]:
    """The perplexity of a loss, under the name that `names` has for it; {} for a metric that `names` does not have."""
    return {names[name]: math.exp(value)} if name in names else {}


def bits_per_byte(loss: float, store: Store) -> float:
    """The loss of each token in bits, per byte of the original text, which does not depend on the vocabulary.

    The first token of a document, which is never predicted, counts like the others. An unknown token costs no more
    than another, although it says less.
    """
    return float(loss / math.log(2) * (store.num_tokens / store.document_bytes.sum()))


def length_only_accuracy(training: HostBatch, evaluation: HostBatch) -> float:
    """How often the lengths of the two segments alone tell a next sentence from a random one.

    The examples of one batch vote for each pair of (binned) lengths, the examples of the other test the votes. The
    baseline of next-sentence accuracy: 0.5 where the lengths say nothing.
    """
    votes = np.bincount(_length_bins(training), 1 - 2 * training["next_sentence_labels"][:, 0], minlength=_BINS**2)
    guesses = votes[_length_bins(evaluation)] < 0
    return float(np.mean(guesses == evaluation["next_sentence_labels"][:, 0]))


def _length_bins(batch: HostBatch) -> np.ndarray:
    """One number for the binned lengths of both segments of each row."""
    T = batch["tokens"].shape[1]
    total_B, second_B = batch["segments"].sum(axis=1), batch["token_types"].sum(axis=1)
    return (total_B - second_B) * _BINS // (T + 1) * _BINS + second_B * _BINS // (T + 1)


def _concatenate(batches: Iterable[HostBatch]) -> dict[str, np.ndarray]:
    """The rows of all batches as one batch."""
    batches = list(batches)
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def _ngram_losses(source: TokenSource, vocab_size: int, trigrams: np.ndarray) -> dict[str, float]:
    return {
        "unigram": _unigram_loss(source.token_counts(vocab_size), trigrams[2]),
        "trigram": trigram_loss(source, vocab_size, trigrams),
    }


def _unigram_loss(counts_V: np.ndarray, targets: np.ndarray) -> float:
    smoothed_V = counts_V + 1
    return float(np.log(smoothed_V.sum()) - np.log(smoothed_V)[targets].mean())


def _most_frequent(counts_V: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    return {"most frequent token": float(np.mean(targets == counts_V.argmax()))}
