"""Batches of a task: each epoch a permutation, one stream, pure; evaluation once for each row."""

from itertools import combinations

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from prelm_jax.data.examples import Example
from prelm_jax.data.framing import frame_examples
from prelm_jax.data.tasks import (
    LEAST_SAVING,
    TaskBatches,
    TaskEvaluation,
    balanced,
    best_num_rows,
    best_widths,
    weighted,
)


def make(family="bert", number=7):
    frame = tiny.frame(family, 64)
    lengths = [3, 50, 1, 20, 30, 31, 2][:number]
    examples = [Example(str(i), ((" ".join(["cat"] * n),),), f"{i}") for i, n in enumerate(lengths)]
    return frame, frame_examples(frame, examples, "label", [f"{i}" for i in range(number)])[0]


def test_an_epoch_has_each_row_once_and_the_next_another_order():
    frame, rows = make()
    batches = TaskBatches(frame, rows, batch_size=3, seed=0)
    stream = np.concatenate([batches.numbers(step) for step in range(14)]).reshape(6, 7)
    assert all(sorted(epoch) == list(range(7)) for epoch in stream)
    assert len({tuple(epoch) for epoch in stream}) > 3
    other = TaskBatches(frame, rows, batch_size=3, seed=1)
    assert any((other.numbers(step) != batches.numbers(step)).any() for step in range(3))


@pytest.mark.parametrize("family", ["bert", "elmo"])
def test_a_part_of_a_batch_is_that_of_the_whole(family):
    """Every host has the width and the ELMo characters of the whole batch."""
    frame, rows = make(family)
    batches = TaskBatches(frame, rows, batch_size=4, seed=0)
    for step in range(5):
        whole, again = batches[step], TaskBatches(frame, rows, batch_size=4, seed=0)
        parts = [again.rows(step, 0, 1), again.rows(step, 1, 4)]
        for name, x in whole.items():
            joined = (
                np.concatenate([part[name] for part in parts]) if batches.layout[name] == "rows" else parts[1][name]
            )
            np.testing.assert_array_equal(joined, x)
        assert whole["labels"][:, 0].tolist() == batches.numbers(step).tolist()
        longest = max(rows[number].length for number in batches.numbers(step))
        assert whole["segments"].shape == (4, 1, next(width for width in batches.widths if width >= longest))


@pytest.mark.parametrize("family", ["bert", "elmo"])
def test_no_batch_is_larger_than_the_largest(family):
    frame, rows = make(family)
    for batch_size in (3, 9):
        batches = TaskBatches(frame, rows, batch_size, seed=0)
        shapes = [{name: x.shape for name, x in batches[step].items()} for step in range(7)]
        largest = {name: x.shape for name, x in batches.largest().items()}
        assert largest in shapes and all(shape["segments"] <= largest["segments"] for shape in shapes)
        assert largest["segments"] == (batch_size, 1, 56)


def test_evaluation_has_each_row_once_by_length():
    frame, rows = make()
    evaluation = TaskEvaluation(frame, rows, batch_size=4)
    assert len(evaluation) == 2
    seen = [evaluation.numbers(step)[: evaluation.num_real(step)] for step in range(2)]
    assert np.concatenate(seen).tolist() == [2, 6, 0, 3, 4, 5, 1]
    last = evaluation[1]
    assert last["label_weights"].tolist() == [[1], [1], [1], [0]] and evaluation[0]["label_weights"].sum() == 4
    assert [evaluation[step]["segments"].shape[-1] for step in range(2)] == [24, 56]
    np.testing.assert_array_equal(evaluation.rows(1, 2, 4)["label_weights"], [[1], [0]])


def test_the_widths_of_an_evaluation_are_those_of_all_its_batches():
    """Not of the first ones, which are the shortest."""
    frame, rows = make()
    many = [rows[2]] * 300 + [rows[0]] * 300 + [rows[4]] * 300
    evaluation = TaskEvaluation(frame, many, batch_size=1)
    assert {row.length: evaluation.width(step) for step, row in enumerate(many)} == {
        row.length: -(-row.length // 8) * 8 for row in (rows[2], rows[0], rows[4])
    }


def test_balanced_labels_weigh_the_same_together():
    """Of classes, and of the tags of all words, of which those in two windows count once."""
    frame = tiny.frame("bert", 8)
    labels = ["b", "a", "b", "c", "b", "b"]
    examples = [Example(str(i), (("cat",),), label) for i, label in enumerate(labels)]
    rows = frame_examples(frame, examples, "label", "abc")[0]
    expected = np.array([6 / 3, 6 / (3 * 4), 6 / 3])
    np.testing.assert_allclose(balanced(rows, 3), expected, rtol=1e-6)
    batch = TaskBatches(frame, weighted(rows, balanced(rows, 3)), 6, 0)[0]
    np.testing.assert_allclose(batch["label_weights"], expected[batch["labels"]], rtol=1e-6)
    assert batch["label_weights"].dtype == np.float32
    sentences = [tuple("acaabaaca"), ("b",)]  # 6 times a, twice b and c.
    examples = [Example(str(i), ((("cat",) * len(tags),),), tags) for i, tags in enumerate(sentences)]
    rows = frame_examples(frame, examples, "tags", "abcd")[0]
    assert len(rows) > 2
    np.testing.assert_allclose(balanced(rows, 4), [10 / 24, 10 / 8, 10 / 8, 1], rtol=1e-6)
    batch = TaskEvaluation(frame, weighted(rows, balanced(rows, 4)), len(rows))[0]
    np.testing.assert_allclose(batch["label_weights"].sum(), 3 * 10 / 4, rtol=1e-6)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=30), st.integers(8, 14))
def test_the_widths_pad_the_least(needed, widest):
    """Any other six, the last of which holds the widest batch there may be, cost as much or more; each has a price."""
    needed = [min(each, widest) for each in needed]
    widths = best_widths(needed, widest)
    assert len(widths) <= 6 and widths[-1] == widest and sorted(set(widths)) == list(widths)

    def cost(widths):
        used = widths if widths[-1] in needed else widths[:-1]
        return np.array(widths)[np.searchsorted(widths, needed)].sum() + LEAST_SAVING * sum(needed) * len(used)

    others = sorted(set(needed) - {widest})
    least = min(
        cost((*some, widest)) for number in range(min(5, len(others)) + 1) for some in combinations(others, number)
    )
    assert cost(widths) <= least * (1 + 1e-9)


# Packing


@given(st.lists(st.integers(1, 40), min_size=5, max_size=30), st.sampled_from([2, 4]))
@settings(max_examples=30)
def test_packed_batches_have_the_rows_of_those_that_are_not(counts, num_rows):
    """Each row of the batch once, whatever the lengths, in the same shapes on any number of hosts."""
    frame, names = tiny.frame("bert", 48), [str(i) for i in range(len(counts))]
    examples = [Example(name, ((" ".join(["cat"] * n),),), name) for name, n in zip(names, counts, strict=True)]
    rows = frame_examples(frame, examples, "label", names)[0]
    packed, plain = (TaskBatches(frame, rows, 8, 0, number) for number in (num_rows, None))
    assert packed.batch_size == num_rows and len(packed.widths) <= 6
    for step in range(4):
        batch, expected = packed[step], plain[step]
        assert batch["segments"].shape == (num_rows, 1, packed.width(step))
        found = batch["labels"][batch["label_weights"] > 0]
        assert sorted(found) == sorted(expected["labels"][:, 0])
        read = batch["read_positions"][:, 0]
        np.testing.assert_array_equal(read >= 0, batch["label_weights"] > 0)
        segments = np.take_along_axis(batch["segments"][:, 0], read, 1)
        assert (segments == np.arange(1, read.shape[1] + 1))[read >= 0].all()
        assert (batch["segments"] > 0).sum() == (expected["segments"] > 0).sum()
        halves = [packed.rows(step, 0, num_rows // 2), packed.rows(step, num_rows // 2, num_rows)]
        for name, x in batch.items():
            np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), x)


def test_rows_are_packed_where_that_saves_positions():
    short, rng = np.full(1000, 13), np.random.default_rng(0)
    varied = rng.choice([10, 12, 14, 60], 1000)
    assert best_num_rows(short, 32, 8) == 8 and best_num_rows(short, 32, 16) == 32
    assert best_num_rows(varied, 32, 8) == 8 and best_num_rows(varied, 32, 32) == 32
    assert best_num_rows(np.full(1000, 512), 32, 8) == 32
    assert best_num_rows(varied, 30, 8) == 30
