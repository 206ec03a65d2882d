"""Packing: several examples in one row, so that less of it is padding (Krell et al. 2021, arXiv 2107.02027).

A fixed number of examples, N, is packed into a fixed number of rows, B: those of a step, or of several. The sizes of
the examples alone decide which row each is in, so every host finds the same rows and then builds only its own. An
example that fits nowhere is dropped; N is as large as it can be while few are.

Here N and B are axes of what is packed together. E are the examples of some rows, sorted by row.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from prelm_jax.training.contract import HostBatch

MOST_DROPPED = 0.0025  # Fraction of the examples by which N is chosen; over a run less than 0.005 are dropped.
# N is chosen by packing this many times, or this many examples if that is less, but at least four times.
_TRIED, _TRIED_EXAMPLES = 100, 1 << 16


class Packing(NamedTuple):
    """How many examples are packed together (N), and the fraction of them that is dropped."""

    num_examples: int
    dropped: float


def choose_packing(sizes: Callable[[np.ndarray], np.ndarray], capacity: int, num_rows: int) -> Packing:
    """The largest N that drops at most MOST_DROPPED of the examples of the first steps; at least an example a row.

    Args:
        sizes: the sizes of the examples with these numbers.
        capacity: the sum of sizes that a row has room for.
        num_rows: B.
    """
    # One more than would fill all rows.
    limit = max(num_rows, int(num_rows * capacity / sizes(np.arange(_TRIED_EXAMPLES // 8)).mean())) + 1
    size_X = sizes(np.arange(max(4 * limit, min(_TRIED * limit, _TRIED_EXAMPLES))))

    def dropped(n: int) -> float:
        tried_XN = size_X[: len(size_X) // n * n][: _TRIED * n].reshape(-1, n)
        return float(np.mean([pack(size_N, capacity, num_rows) < 0 for size_N in tried_XN]))

    low, high = num_rows, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if dropped(middle) <= MOST_DROPPED else (low, middle)
    return Packing(low, dropped(low))


def pack(size_N: np.ndarray, capacity: int, num_rows: int) -> np.ndarray:
    """The row of each example, or -1 if it is dropped: int64 [N].

    The largest examples go one to each row. Then each row, the fullest first, takes the largest example left that fits
    into it; and so on until none fits anywhere. Two rows of capacity 10:

        size         8   2   5   4   2   3     left in the rows
        the largest  0       1                 2 5
        then             0       1             0 1
        row          0   0   1   1  -1  -1
    """
    order_N = np.argsort(-size_N, kind="stable")
    row_N = np.full(len(size_N), -1)
    first = order_N[:num_rows]
    row_N[first] = np.arange(len(first))
    free_B = np.full(num_rows, capacity)
    free_B[: len(first)] -= size_N[first]
    left = order_N[num_rows:][::-1]
    while left.size:
        matched, row = _match(size_N[left], free_B)
        if not matched.size:
            break
        row_N[left[matched]] = row
        free_B[row] -= size_N[left[matched]]
        left = left[row_N[left] < 0]
    return row_N


def _match(size_X: np.ndarray, free_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs each row, the fullest first, with the largest example that fits and that no row before it took.

    Sorted by size together, examples open parentheses and rows close them; a row takes the example whose parenthesis
    it closes. A pair is adjacent among those of its level:

        size    2  3  3  5  6  7  9
                (  (  )  (  )  )  )      examples of 2, 3 and 5, rows with room for 3, 6, 7 and 9
        level   1  2  2  2  2  1  0

    size_X: ascending. Returns the indices of the examples and of their rows.
    """
    num_examples = len(size_X)
    sizes = np.concatenate([size_X, free_B])
    order = np.argsort(sizes, kind="stable")  # Stable: an example sorts before a row that it just fits.
    opens = order < num_examples
    level = np.cumsum(np.where(opens, 1, -1)) + ~opens
    by_level = np.argsort(level, kind="stable")
    left, right = by_level[:-1], by_level[1:]
    pairs = opens[left] & (level[left] == level[right])
    return order[left[pairs]], order[right[pairs]] - num_examples


def join(examples: HostBatch, row_E: np.ndarray, num_pairs: int) -> dict[str, np.ndarray]:
    """Joins examples, one a row as `PairBatches.examples` builds them, into fewer rows.

    A row of T = 8 from two examples, with masks at position 1 of the first and 2 of the second, and M = K = 3:

        tokens                    c a s c b b s .
        positions                 0 1 2 0 1 2 3 4    padding continues its example
        segments                  1 1 1 2 2 2 2 0
        masked_positions          1 5 0              counted in the row, like those of [CLS]; unused slots come last
        next_sentence_positions   0 3 0              slot k - 1 belongs to segment k

    Args:
        row_E: the row of each example, ascending; no row is without one.
        num_pairs: K, at least the number of examples in any row.
    """
    length_E = np.count_nonzero(examples["segments"], axis=1)
    masked_EM = examples["masked_weights"] > 0
    number_E = np.arange(len(row_E)) - np.searchsorted(row_E, row_E)  # of an example in its row, from 0
    begin_E = _begins(length_E, number_E)[:, None].astype(np.int32)
    moved = dict(examples)
    moved["segments"] = examples["segments"] * (1 + number_E[:, None]).astype(np.int32)
    moved["masked_positions"] = examples["masked_positions"] + begin_E * masked_EM
    indices = {"masked": _joined(masked_EM.sum(axis=1), masked_EM.shape[1], number_E, row_E)}
    index_BT = _joined(length_E, examples["tokens"].shape[1], number_E, row_E)
    rows = {}
    for name, values in moved.items():
        if name.startswith("next_sentence"):
            rows[name] = np.zeros((row_E[-1] + 1, num_pairs), values.dtype)
            rows[name][row_E, number_E] = (values + begin_E if name.endswith("positions") else values)[:, 0]
        else:
            rows[name] = values.reshape(-1)[indices.get(name.partition("_")[0], index_BT)]
    return rows


def _begins(count_E: np.ndarray, number_E: np.ndarray) -> np.ndarray:
    """Where the values of each example begin in its row; `count_E` is their number."""
    begin_E = np.cumsum(count_E) - count_E
    return begin_E - begin_E[np.arange(len(number_E)) - number_E]


def _joined(count_E: np.ndarray, width: int, number_E: np.ndarray, row_E: np.ndarray) -> np.ndarray:
    """Indices [B, width] into values [E, width], end to end: the first `count_E` of each example of a row.

    The span of a row's last example is extended to the row's end, with values that are padding.
    """
    begin_E = _begins(count_E, number_E)
    is_last_E = np.append(number_E[1:], 0) == 0
    span_E = np.where(is_last_E, width - begin_E, count_E)
    index_BX = np.repeat((np.arange(len(row_E)) - row_E) * width - begin_E, span_E).reshape(-1, width)
    index_BX += np.arange(index_BX.size).reshape(index_BX.shape)
    return index_BX
