"""From rows to numbers and their intervals: the one place for ties, unknown words and the bootstrap.

An interval is about other paradigms, words or sentences like these, so groups are resampled and not items: a thousand
pairs of one paradigm are one template. It is that of the percentiles, 95 % of the resampled values.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from prelm_jax.errors import InputError
from prelm_jax.study.records import Row

DRAWS = 10_000
LEVEL = 0.95
DRAWN_AT_ONCE = 1 << 22  # Items.


class Interval(NamedTuple):
    """A value, and the interval around it."""

    value: float
    low: float
    high: float


class Statistic(NamedTuple):
    """A metric of some rows: `of(drawn)` is [draws] for the groups drawn, numbers [draws, groups]."""

    num_groups: int
    of: Callable[[np.ndarray], np.ndarray]


Metric = Callable[[Sequence[Row]], Statistic]


def _macro(rows: Sequence[Row]) -> Statistic:
    group_N, number = _numbered(rows)
    means_G = np.bincount(group_N, _values(rows), number) / np.bincount(group_N, minlength=number)
    return Statistic(number, lambda drawn: means_G[drawn].mean(-1))


def _micro(rows: Sequence[Row]) -> Statistic:
    group_N, number = _numbered(rows)
    sums_G, counts_G = np.bincount(group_N, _values(rows), number), np.bincount(group_N, minlength=number)
    return Statistic(number, lambda drawn: sums_G[drawn].sum(-1) / counts_G[drawn].sum(-1))


def _spearman(rows: Sequence[Row]) -> Statistic:
    from scipy.stats import rankdata

    group_N, number = _numbered(rows)
    gold_N = np.array([np.nan if row.gold is None else row.gold for row in rows])
    if np.isnan(gold_N).any():
        raise InputError("spearman needs a gold value in each row, to correlate its value with")
    pairs_2N, members = np.stack([_values(rows), gold_N]), [np.flatnonzero(group_N == i) for i in range(number)]

    def correlation(pairs_2DN: np.ndarray) -> np.ndarray:
        centered = rankdata(pairs_2DN, axis=-1)
        centered -= centered.mean(-1, keepdims=True)
        norms_D = np.sqrt((centered**2).sum(-1).prod(0))
        return np.divide((centered[0] * centered[1]).sum(-1), norms_D, out=np.zeros(len(norms_D)), where=norms_D > 0)

    def of(drawn: np.ndarray) -> np.ndarray:
        if number == len(rows):
            return correlation(pairs_2N[:, np.concatenate(members)[drawn]])
        items = (np.concatenate([members[i] for i in each]) for each in drawn)
        return np.array([correlation(pairs_2N[:, None, each])[0] for each in items])

    return Statistic(number, of)


# How the rows of a line become a number. accuracy, mean: the mean over items. macro_accuracy: the mean over groups of
# the means of their items, each group as much as any other. spearman: the rank correlation of value and gold.
METRICS: Mapping[str, Metric] = {
    "accuracy": _micro,
    "mean": _micro,
    "macro_accuracy": _macro,
    "spearman": _spearman,
}


def value(rows: Sequence[Row], metric: str) -> float:
    """The number that rows come to. Raises InputError for an unknown metric, and where there are no rows."""
    statistic = _statistic(rows, metric)
    return float(statistic.of(np.arange(statistic.num_groups)[None])[0])


def interval(rows: Sequence[Row], metric: str, draws: int = DRAWS, seed: int = 0) -> Interval:
    """The number that rows come to, and its interval by the bootstrap over groups."""
    return Interval(value(rows, metric), *_percentiles(_resampled([_statistic(rows, metric)], draws, seed)[0]))


def difference(a: Sequence[Row], b: Sequence[Row], metric: str, draws: int = DRAWS, seed: int = 0) -> Interval:
    """The number of `a` minus that of `b`, paired: of the items that both have, with the same groups resampled.

    Raises InputError if they have none in common.
    """
    of_b = {row.item: row for row in b}
    pairs = [(row, replace(of_b[row.item], group=row.group)) for row in a if row.item in of_b]
    if not pairs:
        raise InputError("two subjects have no item of the test in common: measure them with the same settings")
    both = list(zip(*pairs, strict=True))
    first, second = _resampled([_statistic(rows, metric) for rows in both], draws, seed)
    return Interval(value(both[0], metric) - value(both[1], metric), *_percentiles(first - second))


def ties(rows: Sequence[Row]) -> float:
    """The share of rows that are ties."""
    return sum(row.tie for row in rows) / max(len(rows), 1)


def unknown(rows: Sequence[Row]) -> float:
    """The share of rows with a word that the subject does not know."""
    return sum(row.unknown > 0 for row in rows) / max(len(rows), 1)


def known(rows: Sequence[Row]) -> list[Row]:
    """The rows without such words."""
    return [row for row in rows if not row.unknown]


def with_ties(rows: Sequence[Row], counted: float) -> list[Row]:
    """The rows with another value for ties: 1 is BabyLM's rule."""
    return [replace(row, value=counted) if row.tie else row for row in rows]


def _statistic(rows: Sequence[Row], metric: str) -> Statistic:
    if metric not in METRICS:
        raise InputError(f"there is no metric {metric!r}: a record has one of {', '.join(METRICS)}")
    if not rows:
        raise InputError("there are no rows to compute a number of")
    return METRICS[metric](rows)


def _numbered(rows: Sequence[Row]) -> tuple[np.ndarray, int]:
    """The number of each row's group, in the order of their names, and how many groups there are."""
    numbers = {name: number for number, name in enumerate(sorted({row.group for row in rows}))}
    return np.array([numbers[row.group] for row in rows]), len(numbers)


def _values(rows: Sequence[Row]) -> np.ndarray:
    return np.array([row.value for row in rows], np.float64)


def _resampled(statistics: Sequence[Statistic], draws: int, seed: int) -> list[np.ndarray]:
    """The values [draws] of some statistics of the same groups, all with the same draws."""
    number, rng = statistics[0].num_groups, np.random.default_rng(seed)
    at_once = max(1, DRAWN_AT_ONCE // number)
    found = []
    for start in range(0, draws, at_once):
        drawn = rng.integers(0, number, (min(at_once, draws - start), number))
        found.append([statistic.of(drawn) for statistic in statistics])
    return [np.concatenate(parts) for parts in zip(*found, strict=True)]


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)
