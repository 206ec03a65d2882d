"""From rows to numbers and their intervals: the one place for ties, unknown words and the bootstrap.

An interval is about other paradigms, words or sentences like these, so groups are resampled and not items: a thousand
pairs of one paradigm are one template. It is that of the percentiles, 95 % of the resampled values.
"""

from collections.abc import Callable, Mapping, Sequence
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
    """A metric of some rows: `of(times_BG)` is f64 [B] for samples that contain each group `times_BG` times."""

    num_groups: int
    of: Callable[[np.ndarray], np.ndarray]


Metric = Callable[[Sequence[Row]], Statistic]


def _macro(rows: Sequence[Row]) -> Statistic:
    group_N, number = _numbered(rows)
    means_G = np.bincount(group_N, _values(rows), number) / np.bincount(group_N, minlength=number)
    return Statistic(number, lambda times_BG: times_BG @ means_G / number)


def _micro(rows: Sequence[Row]) -> Statistic:
    group_N, number = _numbered(rows)
    sums_G, counts_G = np.bincount(group_N, _values(rows), number), np.bincount(group_N, minlength=number)
    return Statistic(number, lambda times_BG: (times_BG @ sums_G) / (times_BG @ counts_G))


def _spearman(rows: Sequence[Row]) -> Statistic:
    group_N, number = _numbered(rows)
    gold_N = np.array([np.nan if row.gold is None else row.gold for row in rows])
    if np.isnan(gold_N).any():
        raise InputError("spearman needs a gold value in each row, to correlate its value with")
    levels_2N = [np.unique(each, return_inverse=True)[1] for each in (_values(rows), gold_N)]

    def of(times_BG: np.ndarray) -> np.ndarray:
        times_BN = times_BG[:, group_N]
        a_BN, b_BN = (_centered_ranks(level_N, times_BN) for level_N in levels_2N)
        norms_B = np.sqrt((times_BN * a_BN**2).sum(1) * (times_BN * b_BN**2).sum(1))
        products_B = (times_BN * a_BN * b_BN).sum(1)
        return np.divide(products_B, norms_B, out=np.zeros(len(norms_B)), where=norms_B > 0)

    return Statistic(number, of)


def _centered_ranks(level_N: np.ndarray, times_BN: np.ndarray) -> np.ndarray:
    """The ranks of items minus their mean; each item counts `times_BN` times, and equal levels share their mean rank.

    Levels 1 0 1 and times 1 1 2 are the values 1 0 1 1, whose ranks are 3 1 3 3, and their mean 2.5.
    """
    order = np.argsort(level_N, kind="stable")
    starts = np.searchsorted(level_N[order], np.arange(level_N.max() + 1))
    times_BL = np.add.reduceat(times_BN[:, order], starts, axis=1)
    ranks_BL = np.cumsum(times_BL, axis=1) - (times_BL - 1) / 2
    return ranks_BL[:, level_N] - (times_BN.sum(1, keepdims=True) + 1) / 2


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
    return float(statistic.of(np.ones((1, statistic.num_groups)))[0])


def interval(rows: Sequence[Row], metric: str, draws: int = DRAWS, seed: int = 0) -> Interval:
    """The number that rows come to, and its interval by the bootstrap over groups."""
    return Interval(value(rows, metric), *_percentiles(_resampled([_statistic(rows, metric)], draws, seed)[0]))


def difference(a: Sequence[Row], b: Sequence[Row], metric: str, draws: int = DRAWS, seed: int = 0) -> Interval:
    """The number of `a` minus that of `b`, paired: of the items that both have, with the same groups resampled.

    Raises InputError if they have none in common.
    """
    of_b = {row.item: row for row in b}
    pairs = [(row, of_b[row.item]._replace(group=row.group)) for row in a if row.item in of_b]
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
    return [row._replace(value=counted) if row.tie else row for row in rows]


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
        rows = number * np.arange(len(drawn))[:, None]
        times_BG = np.bincount((rows + drawn).ravel(), minlength=drawn.size).reshape(drawn.shape).astype(np.float64)
        found.append([statistic.of(times_BG) for statistic in statistics])
    return [np.concatenate(parts) for parts in zip(*found, strict=True)]


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)
