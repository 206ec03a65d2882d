"""Trivial baselines: the loss or accuracy that a model must beat to have learned anything; and derived metrics.

Baselines are fitted on the training side and evaluated on the batches on which the model is evaluated. Losses are in
nats. Unigram frequencies are counts plus one; the trigram model is `data.ngrams`.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import numpy as np

from prelm_jax.corpus.store import Store
from prelm_jax.data.batches import StoreBatches
from prelm_jax.data.ngrams import TokenSource, trigram_nll
from prelm_jax.training.contract import HostBatch

Baselines = dict[str, dict[str, float]]  # metric → baseline → value

_BINS = 16  # of a segment's length
TRIGRAMS_AT_ONCE = 1 << 21  # Each block reads the training text.
_VOTERS = 10_000  # training examples that vote on the lengths


class Targets(TokenSource, Protocol):
    """The targets of one direction of a bidirectional language model; each document is a sentence."""

    end_id: int  # last target of every sentence


class _TargetCounts:
    """Counts targets; scores them by models without context."""

    def __init__(self, source: TokenSource, vocab_size: int):
        self.counts_V = source.token_counts(vocab_size)
        self.targets_V = np.zeros(vocab_size, np.int64)

    def add(self, targets: np.ndarray) -> None:
        self.targets_V += np.bincount(targets, minlength=len(self.targets_V))

    def unigram_loss(self) -> float:
        smoothed_V = self.counts_V + 1
        return float(np.log(smoothed_V.sum())) - self._mean(float(np.log(smoothed_V) @ self.targets_V))

    def most_frequent(self) -> dict[str, float]:
        return {"most frequent token": self._mean(float(self.targets_V[self.counts_V.argmax()]))}

    def _mean(self, total: float) -> float:
        return total / int(self.targets_V.sum()) if self.targets_V.any() else math.nan


class _Trigrams:
    """Scores targets after the two tokens before them, a block at a time, so that memory does not grow with them."""

    def __init__(self, source: TokenSource, vocab_size: int):
        self.unigrams = _TargetCounts(source, vocab_size)
        self._source, self._vocab_size = source, vocab_size
        self._block, self._waiting = [], 0
        self._total, self._scored = 0.0, 0

    def add(self, trigrams: np.ndarray) -> None:
        """Adds int [3, n], as in `trigram_nll`."""
        self.unigrams.add(trigrams[2])
        self._block.append(trigrams.astype(np.int32))
        self._waiting += trigrams.shape[1]
        if self._waiting >= TRIGRAMS_AT_ONCE:
            self._score()

    def losses(self) -> dict[str, float]:
        self._score()
        trigram = self._total / self._scored if self._scored else math.nan
        return {"unigram": self.unigrams.unigram_loss(), "trigram": trigram}

    def _score(self) -> None:
        if self._waiting:
            nll = trigram_nll(self._source, self._vocab_size, np.concatenate(self._block, axis=1))
            self._total, self._scored = self._total + float(nll.sum()), self._scored + len(nll)
            self._block, self._waiting = [], 0


def pair_baselines(
    batches: StoreBatches, examples: Callable[[np.ndarray], HostBatch], evaluation: Iterable[HostBatch]
) -> Baselines:
    """Baselines of `pairs`; `examples` builds training examples from their numbers.

    `masked_lm_loss`: unigram. `masked_lm_accuracy`: always the most frequent token. `next_sentence_accuracy`: always
    the label that is more frequent in the evaluation; and a guess from the lengths of the two segments.
    """
    tokens = _TargetCounts(batches.store, batches.vocab_size)
    pairs_2L = np.zeros((2, _BINS**2), np.int64)  # by label and lengths
    for batch in evaluation:
        tokens.add(batch["masked_targets"][batch["masked_weights"] > 0])
        if "next_sentence_labels" in batch:
            pairs_2L += pairs_by_lengths(batch)
    result = {"masked_lm_loss": {"unigram": tokens.unigram_loss()}, "masked_lm_accuracy": tokens.most_frequent()}
    if pairs_2L.any():
        result["next_sentence_accuracy"] = {
            "majority": float(pairs_2L.sum(axis=1).max() / pairs_2L.sum()),
            "lengths only": length_only_accuracy(pairs_by_lengths(examples(np.arange(_VOTERS))), pairs_2L),
        }
    return result


def window_baselines(batches: StoreBatches, evaluation: Iterable[HostBatch]) -> Baselines:
    """Baselines of `windows`. `lm_loss`: unigram, trigram. `lm_accuracy`: always the most frequent token."""
    vocab_size = batches.vocab_size
    trigrams = _Trigrams(batches.store, vocab_size)
    for batch in evaluation:
        real_BT = batch["weights"] > 0
        # A segment's first token has no token before it; the trigram model writes that as vocab_size.
        before_BT = np.where(batch["positions"] > 0, np.roll(batch["tokens"], 1, axis=1), vocab_size)
        trigrams.add(np.stack([x[real_BT] for x in (before_BT, batch["tokens"], batch["targets"])]))
    return {"lm_loss": trigrams.losses(), "lm_accuracy": trigrams.unigrams.most_frequent()}


def stream_baselines(targets: Mapping[str, Targets], vocab_size: int, evaluation: Iterable[HostBatch]) -> Baselines:
    """Baselines of `streams`: unigram and trigram of each direction, and the mean of both directions (`loss`).

    Args:
        targets: for each direction the targets of the training side.
        vocab_size: V, above all ids.
        evaluation: consecutive batches of the same rows.
    """
    trigrams = {direction: _Trigrams(source, vocab_size) for direction, source in targets.items()}
    before_B2: dict[str, np.ndarray] = {}  # of each direction the last two targets of the batch before
    for batch in evaluation:
        for direction, source in targets.items():
            # Rows continue from batch to batch, so the tokens before a target are the targets before it, up to the
            # beginning of its sentence. With | for the end id and V for "nothing":
            #
            #     target    a  b  c  |  d
            #     second    V  a  b  c  V
            #     first     V  V  a  b  V
            targets_BT = batch[f"{direction}_targets"]
            nothing_B2 = np.full((len(targets_BT), 2), vocab_size)
            ended_BT = np.where(targets_BT == source.end_id, vocab_size, targets_BT)
            before_BT = np.concatenate([before_B2.get(direction, nothing_B2), ended_BT], axis=1)
            before_B2[direction] = before_BT[:, -2:]
            second_BT = before_BT[:, 1:-1]
            first_BT = np.where(second_BT == vocab_size, vocab_size, before_BT[:, :-2])
            real_BT = batch[f"{direction}_weights"] > 0
            trigrams[direction].add(np.stack([x[real_BT] for x in (first_BT, second_BT, targets_BT)]))
    result = {f"{direction}_loss": found.losses() for direction, found in trigrams.items()}
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


def length_only_accuracy(votes_2L: np.ndarray, pairs_2L: np.ndarray) -> float:
    """How often the lengths of the two segments alone tell a next sentence from a random one.

    Of two counts by `pairs_by_lengths`, one votes for each pair of (binned) lengths, and the other tests the votes. The
    baseline of next-sentence accuracy: 0.5 where the lengths say nothing.
    """
    random_L = votes_2L[1] > votes_2L[0]
    return float(np.where(random_L, pairs_2L[1], pairs_2L[0]).sum() / pairs_2L.sum())


def pairs_by_lengths(batch: HostBatch) -> np.ndarray:
    """The number of pairs of each label with each binned lengths of both segments, int64 [2, _BINS²]."""
    segments_BT, labels_BK = batch["segments"], batch["next_sentence_labels"]
    (B, T), K = segments_BT.shape, labels_BK.shape[1]
    # Slot k - 1 belongs to segment k.
    index_BT = np.arange(0, B * (K + 1), K + 1)[:, None] + segments_BT

    def count(index: np.ndarray) -> np.ndarray:
        return np.bincount(index, minlength=B * (K + 1)).reshape(B, -1)[:, 1:]

    total_BK, second_BK = count(index_BT.ravel()), count(index_BT[batch["token_types"] == 1])
    bin_BK = (total_BK - second_BK) * _BINS // (T + 1) * _BINS + second_BK * _BINS // (T + 1)
    used_BK = batch["next_sentence_weights"] > 0
    return np.bincount((labels_BK * _BINS**2 + bin_BK)[used_BK], minlength=2 * _BINS**2).reshape(2, -1)
