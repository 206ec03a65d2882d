"""Many texts through a model: encoded, padded to a few lengths, computed in batches, returned in order."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Sized
from typing import TypeVar

import numpy as np
from jax import Array

from prelm_jax.errors import InputError
from prelm_jax.tokenizers.base import Tokenizer

# Texts are padded to a few lengths, and each batch has about TOKENS_PER_BATCH positions: few programs to compile, and
# the shape in which a text is computed depends on its own length alone.
SHORTEST = 16
TOKENS_PER_BATCH = 2048
# The number of tokens whose results are held at once to put texts back into their order.
TOKENS_PER_WINDOW = 8 * TOKENS_PER_BATCH

Tag = TypeVar("Tag")
Text = TypeVar("Text", bound=Sized)


def encode(tokenizer: Tokenizer, texts: Collection[str], room: int, truncate: bool = False) -> Iterator[list[int]]:
    """The ids of each text, in order, a part of the texts at a time.

    A text of more than `room` tokens is cut if `truncate`; else it raises InputError with its line number, before
    anything is computed for the texts ahead of it.
    """
    if not truncate:
        for number, ids in enumerate(tokenizer.encode_each(texts), 1):
            if len(ids) > room:
                raise InputError(
                    f"line {number} has {len(ids)} tokens, but the model takes {room}; split or truncate it"
                )
    for ids in tokenizer.encode_each(texts):
        yield ids[:room]


def padded_length(length: int, longest: int) -> int:
    """The next power of two, between SHORTEST and `longest`."""
    return min(longest, max(SHORTEST, 1 << (length - 1).bit_length()))


def batch(examples: Sequence[Sequence[int]], rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, segments), int32 [rows, length]: each example is segment 1 of its row; padding is segment 0."""
    tokens_BT, segments_BT = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
    for row, example in enumerate(examples):
        tokens_BT[row, : len(example)] = example
        segments_BT[row, : len(example)] = 1
    return tokens_BT, segments_BT


def batches(
    examples: Iterable[tuple[Tag, Sequence[int]]], longest: int
) -> Iterator[tuple[tuple[Tag, ...], np.ndarray, np.ndarray]]:
    """(tags, tokens, segments) of tagged examples with the same padded length.

    All batches of a length have the same shape; `tags` names the rows that are examples.
    """
    waiting: defaultdict[int, list[tuple[Tag, Sequence[int]]]] = defaultdict(list)

    def rows(length: int) -> int:
        return max(1, TOKENS_PER_BATCH // length)

    def build(length: int) -> tuple[tuple[Tag, ...], np.ndarray, np.ndarray]:
        tags, together = zip(*waiting.pop(length), strict=True)
        return tags, *batch(together, rows(length), length)

    for tag, ids in examples:
        length = padded_length(len(ids), longest)
        waiting[length].append((tag, ids))
        if len(waiting[length]) == rows(length):
            yield build(length)
    for length in list(waiting):
        yield build(length)


def in_order(
    window: Sequence[list[int]], compute: Callable[[np.ndarray, np.ndarray], Array], longest: int
) -> Iterator[tuple[list[int], np.ndarray]]:
    """For each text its ids and its part [T, ...] of the result [B, T, ...] of `compute(tokens_BT, segments_BT)`.

    It is empty for a text without ids, which is not computed.
    """
    results = {}
    for tags, *inputs in batches(((i, ids) for i, ids in enumerate(window) if ids), longest):
        for i, row in zip(tags, np.asarray(compute(*inputs)), strict=False):
            results[i] = row[: len(window[i])].copy()
    for i, ids in enumerate(window):
        yield ids, results.get(i, np.zeros(0, np.float32))


def windows(texts: Iterable[Text], multiple: int = 1) -> Iterator[list[Text]]:
    """Consecutive texts, about TOKENS_PER_WINDOW tokens at a time; but for the last window a multiple of `multiple`."""
    window, tokens = [], 0
    for text in texts:
        window.append(text)
        tokens += len(text)
        if tokens >= TOKENS_PER_WINDOW and len(window) % multiple == 0:
            yield window
            window, tokens = [], 0
    if window:
        yield window
