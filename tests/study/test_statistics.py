"""Numbers and intervals against scipy and hand-worked rows."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from prelm_jax.errors import InputError
from prelm_jax.study import statistics
from prelm_jax.study.records import Row


def rows_of(groups, value=lambda rng: float(rng.integers(0, 2)), seed=0, **fields):
    """Rows of groups of different sizes, {"a": 3, …}."""
    rng = np.random.default_rng(seed)
    return [Row(f"{name}{i}", name, value(rng), **fields) for name, size in groups.items() for i in range(size)]


ROWS = rows_of({"a": 3, "b": 10, "c": 1, "d": 7, "e": 4})


def scipy_interval(statistic, data, paired=False):
    rng = np.random.default_rng(0)
    options = {"n_resamples": 2000, "method": "percentile", "paired": paired, "rng": rng, "vectorized": True}
    return scipy.stats.bootstrap(data, statistic, **options).confidence_interval


def group_means(rows):
    return np.array([np.mean([row.value for row in rows if row.group == g]) for g in sorted({r.group for r in rows})])


def test_macro_accuracy_equals_scipy():
    found = statistics.interval(ROWS, "macro_accuracy", draws=2000)
    assert found.value == pytest.approx(group_means(ROWS).mean())
    expected = scipy_interval(np.mean, (group_means(ROWS),))
    np.testing.assert_allclose(found[1:], expected, atol=1e-12)


def test_accuracy_equals_scipy():
    """A ratio of sums over resampled groups, as a statistic of pairs."""
    names = sorted({row.group for row in ROWS})
    sums, counts = (
        np.array([sum(of(row) for row in ROWS if row.group == name) for name in names])
        for of in (lambda row: row.value, lambda row: 1)
    )
    found = statistics.interval(ROWS, "accuracy", draws=2000)
    assert found.value == pytest.approx(sum(row.value for row in ROWS) / len(ROWS))
    ratio = scipy_interval(lambda a, b, axis: a.sum(axis) / b.sum(axis), (sums, counts), paired=True)
    np.testing.assert_allclose(found[1:], ratio, atol=1e-12)


def test_differences_are_paired():
    other = [Row(row.item, row.group, 1 - row.value if row.group in "bd" else row.value) for row in reversed(ROWS)]
    found = statistics.difference(ROWS, other, "macro_accuracy", draws=2000)
    expected = scipy_interval(np.mean, (group_means(ROWS) - group_means(other),))
    np.testing.assert_allclose(found[1:], expected, atol=1e-12)
    assert statistics.difference(ROWS, ROWS, "accuracy") == (0, 0, 0)
    renamed = [row._replace(group="one") for row in other]  # Groups come from the first.
    assert statistics.difference(ROWS, renamed, "macro_accuracy", draws=2000) == found
    fewer = statistics.difference(ROWS, other[:7], "accuracy", draws=10)  # Of the seven items alone.
    assert fewer.value == statistics.value(ROWS[-7:], "accuracy") - statistics.value(other[:7], "accuracy")
    with pytest.raises(InputError, match="no item"):
        statistics.difference(ROWS, [Row("other", "a", 1.0)], "accuracy")


@pytest.mark.parametrize("size", [1, 4])
def test_spearman_equals_scipy(size):
    rng = np.random.default_rng(1)
    gold = rng.integers(0, 5, 12 * size).astype(float)  # With ties.
    values = gold + rng.normal(size=12 * size)
    rows = [Row(f"{i}", f"group {i // size:02}", v, gold=g) for i, (v, g) in enumerate(zip(values, gold, strict=True))]
    assert statistics.value(rows, "spearman") == pytest.approx(scipy.stats.spearmanr(values, gold).statistic)
    found = statistics.interval(rows, "spearman", draws=50)
    drawn = np.random.default_rng(0).integers(0, 12, (50, 12))
    index = (drawn[..., None] * size + np.arange(size)).reshape(50, -1)
    expected = [scipy.stats.spearmanr(values[i], gold[i]).statistic for i in index]
    np.testing.assert_allclose(found[1:], np.percentile(expected, [2.5, 97.5]), atol=1e-12)
    with pytest.raises(InputError, match="gold"):
        statistics.value(ROWS, "spearman")
    constant = [Row("a", "a", 1.0, gold=1.0), Row("b", "b", 1.0, gold=2.0)]
    assert statistics.value(constant, "spearman") == 0


def test_many_groups_are_drawn_in_parts(monkeypatch):
    whole = statistics.interval(ROWS, "accuracy", draws=101)
    monkeypatch.setattr(statistics, "DRAWN_AT_ONCE", 33)
    assert statistics.interval(ROWS, "accuracy", draws=101) == whole


def test_an_interval_has_the_level_it_says():
    """Of means of 30 groups of a known distribution, 95 % of the intervals hold the true mean."""
    hits = 0
    for seed in range(200):
        rows = rows_of(dict.fromkeys(map(str, range(30)), 1), lambda rng: rng.normal(), seed)
        found = statistics.interval(rows, "macro_accuracy", draws=500)
        hits += found.low <= 0 <= found.high
    assert 0.89 <= hits / 200 <= 0.98


def test_ties_and_unknown_words():
    rows = [
        Row("1", "a", 0.5, tie=True, unknown=2),
        Row("2", "a", 1.0),
        Row("3", "b", 0.0, unknown=1),
        Row("4", "b", 1.0),
    ]
    assert statistics.value(rows, "accuracy") == 0.625
    assert statistics.ties(rows) == 0.25 and statistics.unknown(rows) == 0.5
    assert statistics.value(statistics.with_ties(rows, 1.0), "accuracy") == 0.75
    assert statistics.value(statistics.with_ties(rows, 0.0), "accuracy") == 0.5
    assert statistics.known(rows) == [rows[1], rows[3]]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=20))
def test_intervals_hold_their_value(found):
    rows = [Row(str(i), group, value) for i, (group, value) in enumerate(found)]
    for metric in ("accuracy", "macro_accuracy"):
        point, low, high = statistics.interval(rows, metric, draws=30)
        assert 0 <= low <= high <= 1 and 0 <= point <= 1


def test_what_has_no_number():
    with pytest.raises(InputError, match="'f2'"):
        statistics.value(ROWS, "f2")
    with pytest.raises(InputError, match="no rows"):
        statistics.value([], "accuracy")
