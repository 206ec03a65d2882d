"""From rows to numbers and their intervals: the one place for ties, unknown words and the bootstrap.

An interval is that of other paradigms, words or sentences like these, so groups are resampled and not items: a thousand
pairs of one paradigm are one template. Intervals are percentiles of the resampled values, 95 % of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from prelm_jax.errors import InputError
from prelm_jax.study.records import Row

DRAWS = 10_000
LEVEL = 0.95
DRAWN_AT_ONCE = 1 << 24  # Numbers of groups.


class Interval(NamedTuple):
    """A value, and the interval around it."""

    value: float
    low: float
    high: float


class Groups(NamedTuple):
    """The sums of the rows' values in each group, and their numbers."""

    sums: np.ndarray
    counts: np.ndarray


Metric = Callable[[Groups], np.ndarray]  # From [..., groups] to [...].


def _macro(groups: Groups) -> np.ndarray:
    return (groups.sums / groups.counts).mean(-1)


def _micro(groups: Groups) -> np.ndarray:
    return groups.sums.sum(-1) / groups.counts.sum(-1)


# How the rows of a line become a number. macro_accuracy: the mean over groups of the means of their values, each group
# as much as any other. accuracy and mean: the mean over items.
METRICS: Mapping[str, Metric] = {"macro_accuracy": _macro, "accuracy": _micro, "mean": _micro}


def value(rows: Sequence[Row], metric: str) -> float:
    """The number that rows come to. Raises InputError for an unknown metric, and where there are no rows."""
    return float(_metric(metric)(_groups(rows)))


def interval(rows: Sequence[Row], metric: str, draws: int = DRAWS, seed: int = 0) -> Interval:
    """The number that rows come to, and its interval by the bootstrap over groups."""
    groups, compute = _groups(rows), _metric(metric)
    resampled = _resampled([groups], [compute], draws, seed)[0]
    return Interval(float(compute(groups)), *_percentiles(resampled))


def difference(a: Sequence[Row], b: Sequence[Row], metric: str, draws: int = DRAWS, seed: int = 0) -> Interval:
    """The number of `a` minus that of `b`, paired: both with the same groups resampled.

    Of the items that both have. Raises InputError if there are none.
    """
    common = {row.item for row in a} & {row.item for row in b}
    if not common:
        raise InputError("two subjects have no item of the test in common: measure them with the same settings")
    of_a, of_b = ({row.item: row for row in rows if row.item in common} for rows in (a, b))
    items = sorted(common)
    pair = [
        _groups([of_a[item] for item in items]),
        _groups([replace(of_b[item], group=of_a[item].group) for item in items]),
    ]
    compute = _metric(metric)
    first, second = _resampled(pair, [compute, compute], draws, seed)
    return Interval(float(compute(pair[0]) - compute(pair[1])), *_percentiles(first - second))


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


def _metric(name: str) -> Metric:
    if name not in METRICS:
        raise InputError(f"there is no metric {name!r}: a record has one of {', '.join(METRICS)}")
    return METRICS[name]


def _groups(rows: Sequence[Row]) -> Groups:
    if not rows:
        raise InputError("there are no rows to compute a number of")
    numbers = {name: number for number, name in enumerate(sorted({row.group for row in rows}))}
    group_N = np.array([numbers[row.group] for row in rows])
    value_N = np.array([row.value for row in rows], np.float64)
    return Groups(np.bincount(group_N, value_N, len(numbers)), np.bincount(group_N, minlength=len(numbers)))


def _resampled(groups: Sequence[Groups], metrics: Sequence[Metric], draws: int, seed: int) -> list[np.ndarray]:
    """For each of some groups the metric [draws] of resampled groups; all of them with the same draws."""
    number, rng = len(groups[0].counts), np.random.default_rng(seed)
    at_once = max(1, DRAWN_AT_ONCE // number)
    found: list[list[np.ndarray]] = [[] for _ in groups]
    for start in range(0, draws, at_once):
        drawn = rng.integers(0, number, (min(at_once, draws - start), number))
        for values, each, metric in zip(found, groups, metrics, strict=True):
            values.append(metric(Groups(each.sums[drawn], each.counts[drawn])))
    return list(map(np.concatenate, found))


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)
