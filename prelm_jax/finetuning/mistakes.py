"""What a model gets wrong: confusions, the metrics of each label, and the calibration of its probabilities."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from prelm_jax.data.examples import Kind, Label
from prelm_jax.finetuning.metrics import GOLD, label_counts, micro_f1, micro_precision, micro_recall

BINS = 15  # of equal width, for the calibration error (Guo et al., 2017)


def confusion(gold: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """int64 [K, K]: how often each label (row) is predicted as each label (column)."""
    indices = {name: index for index, name in enumerate(labels)}
    flat = [indices[g] * len(labels) + indices[p] for g, p in zip(gold, predicted, strict=True)]
    return np.bincount(np.array(flat, np.int64), minlength=len(labels) ** 2).reshape(len(labels), -1)


def by_label(
    kind: Kind, predictions: Sequence[Label], gold: Sequence[Label], labels: Sequence[str]
) -> dict[str, tuple[int, float, float, float]]:
    """label -> (how often it is gold, precision, recall, F1); of tags in BIO, type of span -> the same."""
    names, counts = label_counts(kind, predictions, gold, labels)
    sums = counts.sum(0)
    found = {}
    for index, name in enumerate(names):
        own = sums[:, index : index + 1]
        precision, recall, f1 = (float(value(own)) for value in (micro_precision, micro_recall, micro_f1))
        found[name] = (int(own[GOLD, 0]), precision, recall, f1)
    return found


class Calibration(NamedTuple):
    """Whether predictions are right as often as they claim.

    `error` (ECE) is the mean over examples of |accuracy - confidence| of the bin. `bins` has for each bin that is not
    empty its number of examples, mean confidence and accuracy.
    """

    error: float
    bins: list[tuple[int, float, float]]


def calibration(confidences: Sequence[float], right: Sequence[bool]) -> Calibration:
    """The calibration of predictions with these probabilities."""
    confidence, hit = np.array(confidences, np.float64), np.array(right, np.float64)
    bins = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    number, sums, hits = (np.bincount(bins, x, BINS) for x in (np.ones_like(hit), confidence, hit))
    error = np.abs(sums - hits).sum() / max(1, len(hit))
    filled = [(int(n), float(c / n), float(h / n)) for n, c, h in zip(number, sums, hits, strict=True) if n]
    return Calibration(float(error), filled)
