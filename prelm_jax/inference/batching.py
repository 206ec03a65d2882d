"""Many texts through a model: encoded, padded to a few lengths, computed in batches, returned in order.

A `Program` computes examples of one padded length together, a `Query` is what it computes for one text. The commands
run queries in full batches (`answers`); a server mixes those of all its clients, in the same programs.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Sized
from typing import Generic, TypeVar

import jax
import numpy as np
from jax import Array

from prelm_jax.errors import InputError
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.training.contract import Params

# Texts are padded to a few lengths, and each batch has about as many positions: few programs to compile, and the shape
# in which a text is computed depends on its own length alone. On a CPU, larger batches are no faster, and the last one
# of each length is mostly padding.
SHORTEST = 8
TOKENS_PER_BATCH, CPU_TOKENS_PER_BATCH = 2048, 256
# The number of tokens whose results are held at once to put texts back into their order.
TOKENS_PER_WINDOW = 8 * TOKENS_PER_BATCH

Tag = TypeVar("Tag")
Text = TypeVar("Text", bound=Sized)
Example = TypeVar("Example")
Result = TypeVar("Result")
Answer = TypeVar("Answer")


@dataclasses.dataclass(frozen=True, eq=False)
class Program(Generic[Example, Result]):
    """What a model with parameters computes for examples of the same padded length together.

    compute: (params, examples, rows, length) to the result of each example, in a batch of `rows` rows, of which the
    examples are the first; the parameters are the program's, on any device. length: the padded length of an
    example. lengths: those that there are, shortest first. canary: an example of a padded length that fills it, with
    random tokens.
    """

    name: str
    params: Params
    compute: Callable[[Params, Sequence[Example], int, int], Sequence[Result]]
    length: Callable[[Example], int]
    lengths: tuple[int, ...]
    canary: Callable[[int, np.random.Generator], Example]
    texts: int = 1  # In a row.

    def full_rows(self, length: int) -> int:
        """The rows of a full batch of a padded length."""
        return full_rows(length * self.texts)


@dataclasses.dataclass(frozen=True, eq=False)
class Query(Generic[Example, Result, Answer]):
    """What is to be computed for a text: examples for a program, and the answer that their results make.

    The results are parts of large arrays: `finish` copies what it keeps.
    """

    program: Program[Example, Result]
    examples: Sequence[Example]
    finish: Callable[[Sequence[Result]], Answer]


def answers(queries: Sequence[Query[Example, Result, Answer]]) -> Iterator[Answer]:
    """The answers to queries, in order, computed in full batches."""
    waiting: defaultdict[tuple[Program[Example, Result], int], list[tuple[int, int, Example]]] = defaultdict(list)
    results: list[dict[int, Result]] = [{} for _ in queries]
    finished: dict[int, Answer] = {}

    def compute(program: Program[Example, Result], length: int) -> None:
        some = waiting.pop((program, length))
        found = program.compute(program.params, [example for _, _, example in some], program.full_rows(length), length)
        for (i, j, _), result in zip(some, found, strict=True):
            results[i][j] = result
            if len(results[i]) == len(queries[i].examples):
                finished[i] = queries[i].finish([results[i].pop(j) for j in range(len(queries[i].examples))])

    for i, query in enumerate(queries):
        if not query.examples:
            finished[i] = query.finish([])
        for j, example in enumerate(query.examples):
            key = query.program, query.program.length(example)
            waiting[key].append((i, j, example))
            if len(waiting[key]) == query.program.full_rows(key[1]):
                compute(*key)
    for key in list(waiting):
        compute(*key)
    return (finished.pop(i) for i in range(len(queries)))


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
    """The next of 8, 16, 24, 32, 48, 64, 96, …, at most `longest`."""
    power = max(SHORTEST, 1 << (length - 1).bit_length())
    between = power // 4 * 3
    return min(longest, between if length <= between and between % SHORTEST == 0 else power)


def padded_lengths(longest: int) -> tuple[int, ...]:
    """All padded lengths up to `longest`, shortest first."""
    lengths = [padded_length(1, longest)]
    while lengths[-1] < longest:
        lengths.append(padded_length(lengths[-1] + 1, longest))
    return tuple(lengths)


def full_rows(length: int) -> int:
    """The rows of a batch of this padded length: a power of two, with at most TOKENS_PER_BATCH tokens if there are."""
    tokens = CPU_TOKENS_PER_BATCH if jax.default_backend() == "cpu" else TOKENS_PER_BATCH
    return 1 << (max(1, tokens // length).bit_length() - 1)


def batch(examples: Sequence[Sequence[int]], rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, segments), int32 [rows, length]: each example is segment 1 of its row; padding is segment 0."""
    tokens_BT, segments_BT = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
    for row, example in enumerate(examples):
        tokens_BT[row, : len(example)] = example
        segments_BT[row, : len(example)] = 1
    return tokens_BT, segments_BT


def in_order(
    window: Sequence[list[int]], compute: Callable[[np.ndarray, np.ndarray], Array], longest: int
) -> Iterator[tuple[list[int], np.ndarray]]:
    """For each text its ids and its part [T, ...] of the result [B, T, ...] of `compute(tokens_BT, segments_BT)`.

    It is empty for a text without ids, which is not computed.
    """

    def results(params: Params, examples: Sequence[list[int]], rows: int, length: int) -> list[np.ndarray]:
        rows_BT = np.asarray(compute(*batch(examples, rows, length)))
        return [row[: len(ids)] for ids, row in zip(examples, rows_BT, strict=False)]

    def finish(results: Sequence[np.ndarray]) -> np.ndarray:
        return results[0].copy() if results else np.zeros(0, np.float32)

    program = Program("", {}, results, lambda ids: padded_length(len(ids), longest), (), lambda length, rng: [])
    queries = [Query(program, [ids] if ids else [], finish) for ids in window]
    return zip(window, answers(queries), strict=True)


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
