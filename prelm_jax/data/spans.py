"""Spans: the stretches of text into which the rows of a batch cut a line of items.

Parts of documents (GPT) or sentences (ELMo) are laid end to end as one line. A row reads an interval of the line, and
the tokens that it takes from one item are a span:

    line     aaaaabbbcccccc     three items; offsets 0 5 8 14
    row      ....[      ]..     the interval [4, 12)
    spans        abbbcccc       items 0 1 2, starts 4 0 0 within the item, lengths 1 3 4
"""

from typing import NamedTuple

import numpy as np


class Spans(NamedTuple):
    """Spans of several rows, row after row: int64 [R] each."""

    item: np.ndarray  # the item that the span belongs to
    number: np.ndarray  # counts the spans of a row, from 0
    start: np.ndarray  # how far from the item's beginning the span begins
    length: np.ndarray


def cut(offsets: np.ndarray, begin_B: np.ndarray, end_B: np.ndarray) -> Spans:
    """The spans of rows that read the intervals [begin, end) of a line.

    Args:
        offsets: int64 [items + 1], where each item begins on the line, and the line's length; no item is empty.
        begin_B, end_B: int64, not empty and inside the line.
    """
    first_B = np.searchsorted(offsets, begin_B, side="right") - 1
    count_B = np.searchsorted(offsets, end_B) - first_B
    number_R = count_up(count_B)
    item_R = np.repeat(first_B, count_B) + number_R
    begin_R = np.maximum(offsets[item_R], np.repeat(begin_B, count_B))
    end_R = np.minimum(offsets[item_R + 1], np.repeat(end_B, count_B))
    return Spans(item_R, number_R, begin_R - offsets[item_R], end_R - begin_R)


def count_up(lengths: np.ndarray) -> np.ndarray:
    """0, 1, … for each length, end to end: [2, 3] gives 0 1 0 1 2."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
