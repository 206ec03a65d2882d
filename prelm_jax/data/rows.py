"""Rows of a task: examples, or windows of them, as tokens; and the batches that rows fill."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Text(NamedTuple):
    """A text, or a pair, as the model reads it."""

    ids: np.ndarray  # int32 [tokens]
    second: int  # The position where the second text of a pair begins; the number of tokens if there is none.
    read: np.ndarray  # int32 [K]: the positions that a task reads.


class Row(NamedTuple):
    """An example, or a window of it."""

    example: int  # Its number.
    texts: tuple[Text, ...]
    label: np.ndarray | None = None  # As `labels` in models/task.py, of one row; None: not known.
    weight: np.ndarray | None = None  # As `label_weights` there.
    # Of a window: the number of its first word or token in the example, and for each of its words or tokens whether no
    # other window shows more of the context (bool).
    first: int = 0
    most_context: np.ndarray | None = None
    # Of a window of a passage: the position of its first token in the row, and for each of its tokens the characters of
    # the passage at which the token begins and ends (int [tokens, 2]).
    begin: int = 0
    characters: np.ndarray | None = None

    @property
    def length(self) -> int:
        """Tokens of the longest text."""
        return max(len(text.ids) for text in self.texts)


def fill_batch(
    groups: Sequence[Sequence[Row]], width: int, num_texts: int, num_read: int, max_length: int
) -> dict[str, np.ndarray]:
    """The batch of groups of rows, as models/task.py has it: [B, num_texts, width].

    Each group shares a row of the batch, one after the other; without packing it is a single Row.

    Args:
        num_read: positions that can be read in a row of the batch, and so labels of one.
        max_length: positions that the model knows; only padding is beyond them.
    """
    shape = (len(groups), num_texts, width)
    tokens, types, segments = (np.zeros(shape, np.int32) for _ in range(3))
    position_T = np.minimum(np.arange(width, dtype=np.int32), max_length - 1)
    positions = np.tile(position_T, (*shape[:2], 1))
    for i, group in enumerate(groups):
        for segment, (begin, row) in enumerate(_with_begins(group), 1):
            positions[i, :, begin:] = position_T[: width - begin]
            for j, text in enumerate(row.texts):
                end = begin + len(text.ids)
                tokens[i, j, begin:end] = text.ids
                types[i, j, begin + text.second : end] = 1
                segments[i, j, begin:end] = segment
    batch = {"tokens": tokens, "token_types": types, "positions": positions, "segments": segments}
    return batch | _read_and_labels(groups, num_texts, num_read)


def _with_begins(group: Sequence[Row]) -> Iterator[tuple[int, Row]]:
    """The rows of a group, each with the position at which it begins in the row that they share."""
    begin = 0
    for row in group:
        yield begin, row
        begin += row.length


def _read_and_labels(groups: Sequence[Sequence[Row]], num_texts: int, num_read: int) -> dict[str, np.ndarray]:
    """The positions that are read of each group, and its labels, both in the order of its rows."""
    read = np.full((len(groups), num_texts, num_read), -1, np.int32)
    found: dict[str, np.ndarray] = {"read_positions": read}
    for i, group in enumerate(groups):
        number = 0
        for begin, row in _with_begins(group):
            for j, text in enumerate(row.texts):
                read[i, j, number : number + len(text.read)] = begin + text.read
            if row.label is not None and row.weight is not None:
                # An example adds one label to its group, or a tag for each word of its sentence.
                labels, weights = (x if row.weight.ndim else x[None] for x in (row.label, row.weight))
                for name, x in (("labels", labels), ("label_weights", weights)):
                    if name not in found:
                        found[name] = np.zeros((len(groups), num_read, *x.shape[1:]), x.dtype)
                    found[name][i, number : number + len(x)] = x
            number += max(len(text.read) for text in row.texts)
    return found
