"""Rows: the batches that framed examples fill."""

import numpy as np
import tiny
from tiny import example

from prelm_jax.data.examples import Example
from prelm_jax.data.framing import frame_examples


def test_token_types_begin_with_the_second_text():
    frame = tiny.frame("bert")
    rows, _ = frame_examples(frame, [example("the cat", "a dog"), example("the")], "label")
    batch = frame.batch([[row] for row in rows], slice(0, 2), 8, 1, 1)
    np.testing.assert_array_equal(batch["token_types"][:, 0], [[0, 0, 0, 0, 1, 1, 1, 0], [0] * 8])
    np.testing.assert_array_equal(batch["segments"][:, 0], [[1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch["positions"][1, 0], np.arange(8))


def test_the_examples_of_a_group_share_a_row():
    """Each is a segment with positions of its own; its texts begin at the same position of their rows."""
    frame = tiny.frame("bert")
    pairs = [example("the cat", "a dog", label="x"), example("the", label="y"), example("a big cat", label="x")]
    rows, _ = frame_examples(frame, pairs, "label", "xy")
    batch = frame.batch([rows[:2], rows[2:]], slice(0, 2), 12, 1, 3)
    np.testing.assert_array_equal(batch["segments"][:, 0], [[1] * 7 + [2] * 3 + [0] * 2, [1] * 5 + [0] * 7])
    np.testing.assert_array_equal(batch["positions"][0, 0], [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4])
    np.testing.assert_array_equal(batch["token_types"][0, 0], [0, 0, 0, 0, 1, 1, 1] + [0] * 5)
    np.testing.assert_array_equal(batch["tokens"][0, 0, :10], np.concatenate([row.texts[0].ids for row in rows[:2]]))
    np.testing.assert_array_equal(batch["read_positions"][:, 0], [[0, 7, -1], [0, -1, -1]])
    np.testing.assert_array_equal(batch["labels"], [[0, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(batch["label_weights"], [[1, 1, 0], [1, 0, 0]])
    options = [Example("0", (("a", "the cat"), ("a big cat", "dog")), 1), Example("1", (("a", "dog"),), 0)]
    rows, _ = frame_examples(frame, options, "choice")
    batch = frame.batch([rows], slice(0, 1), 16, 2, 2)
    np.testing.assert_array_equal(batch["segments"][0], [[1] * 6 + [0, 2, 2, 2, 2, 2] + [0] * 4, [1] * 7 + [0] * 9])
    np.testing.assert_array_equal(batch["read_positions"][0], [[0, 7], [0, -1]])
