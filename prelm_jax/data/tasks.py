"""Batches of a task: a permutation of the rows each epoch, in one stream that runs on over the ends of epochs.

    4 rows in batches of 3      2 0 3 | 1 0 2 | 1 3 …      the second epoch begins within the second batch

A batch is as wide as it must be, in six widths at most, because each is a program to compile; they are those that pad
the batches of a file the least. Nothing is sorted for training: rows of one length would often have one label. Instead
the rows of a batch may be packed into fewer, the same number in each batch:

    8 rows of 26 tokens on average, the longest 60      8 × 64 positions, or 2 packed rows × 112

A row is here an example or a window of it (`rows.Row`).
"""

import abc
from collections.abc import Mapping, Sequence

import numpy as np

from prelm_jax.data.frames import Frame
from prelm_jax.data.packing import pack
from prelm_jax.data.randomness import bits, key, permute
from prelm_jax.data.rows import Row
from prelm_jax.training.contract import Layout

NUM_WIDTHS = 6
LEAST_SAVING = 0.03  # Fraction of all positions that a width, which is a program to compile, must save.
_TRIED = 200  # Batches by which widths and the number of packed rows are chosen, at most.


def best_widths(needed: Sequence[int], widest: int) -> tuple[int, ...]:
    """Up to six widths, the last of them `widest`, that pad batches the least.

    needed: the width that each batch needs. A batch gets the smallest width in which it fits.
    """
    least, count = np.unique(np.minimum(needed, widest), return_counts=True)
    batches, price = [0, *np.cumsum(count).tolist()], LEAST_SAVING * float(least @ count)
    # chosen[i]: the lowest cost of the batches that need one of the i smallest widths, and the widths that have it.
    # Each turn allows one more width, the largest of these i.
    chosen: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for _ in range(NUM_WIDTHS - 1):
        wider = {
            i: min(
                (cost + price + width * (batches[i] - batches[j]), (*widths, width))
                for j, (cost, widths) in chosen.items()
                if j < i
            )
            for i, width in enumerate(least.tolist(), 1)
        }
        chosen = {i: min(wider[i], chosen.get(i, wider[i])) for i in wider} | {0: chosen[0]}
    costs = {i: cost + widest * (batches[-1] - batches[i]) for i, (cost, _) in chosen.items()}
    _, widths = chosen[min(costs, key=costs.__getitem__)]
    return widths if widths[-1:] == (widest,) else (*widths, widest)


def needed_width(length_B: np.ndarray, num_rows: int) -> int:
    """The smallest width, a multiple of 8, at which rows of these lengths fit into `num_rows` packed rows."""
    width = -(-max(int(length_B.max()), -(-int(length_B.sum()) // num_rows)) // 8) * 8
    while (pack(length_B, width, num_rows) < 0).any():
        width += 8
    return width


def best_num_rows(length_X: np.ndarray, batch_size: int, multiple: int) -> int:
    """How many packed rows to use for a batch: a multiple of `multiple`, or `batch_size` if packing does not pay.

    The cost is the number of positions, with a surcharge for attention over longer rows. length_X: lengths of the rows,
    shuffled.
    """
    drawn = np.resize(length_X, (min(_TRIED, -(-len(length_X) // batch_size)), batch_size))

    def cost(num_rows: int) -> float:
        widths = np.array([needed_width(length_B, num_rows) for length_B in drawn])
        return float((num_rows * widths * (1 + widths / 512)).mean())

    possible = [batch_size // n for n in (2, 4, 8) if batch_size % n == 0 and batch_size // n % multiple == 0]
    return min([batch_size, *possible], key=cost)


def balanced(rows: Sequence[Row], num_labels: int) -> np.ndarray:
    """The weight of each label, float32 [num_labels], with which the examples of any label weigh the same in total.

    An example, or a tagged word, weighs 1 on average, as in scikit-learn; a label that does not occur weighs 1.
    """
    labels, weights = (np.concatenate([np.ravel(x) for x in each]) for each in _labels_and_weights(rows))
    counts = np.bincount(labels, weights, num_labels)
    found = np.divide(counts.sum(), num_labels * counts, out=np.ones(num_labels), where=counts > 0)
    return found.astype(np.float32)


def weighted(rows: Sequence[Row], weight_N: np.ndarray) -> list[Row]:
    """The rows, with each weight multiplied by `weight_N` of the label, or of the tag."""
    labels, weights = _labels_and_weights(rows)
    return [row._replace(weight=w * weight_N[label]) for row, label, w in zip(rows, labels, weights, strict=True)]


def _labels_and_weights(rows: Sequence[Row]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    found = [(row.label, row.weight) for row in rows if row.label is not None and row.weight is not None]
    return [label for label, _ in found], [weight for _, weight in found]


class _RowBatches(abc.ABC):
    """Batches of the rows of a task. Fulfills `Batches`; a subclass defines `numbers`.

    num_drawn: rows of the task in a batch. batch_size: rows of the batch, fewer if the others are packed into them.
    steps: those by whose batches the widths are chosen.
    """

    def __init__(self, frame: Frame, rows: Sequence[Row], num_drawn: int, batch_size: int, steps: Sequence[int]):
        self.frame, self._rows, self.batch_size, self._num_drawn = frame, rows, batch_size, num_drawn
        self._is_unpacked = batch_size == num_drawn
        self._length_X = np.array([row.length for row in rows])
        self.num_texts = max(len(row.texts) for row in rows)
        # Tags read a token of each word; the others read one of each row.
        self._reads_words = any(len(text.read) > 1 for row in rows for text in row.texts)
        needed = [needed_width(self._length_X[self.numbers(step)], batch_size) for step in steps]
        self._needs_most = steps[int(np.argmax(needed))]
        self.widths = best_widths(needed, self._widest())
        self.layout: Mapping[str, Layout] = frame.layout(self._batch(self._longest(), slice(0, 1)))

    def _widest(self) -> int:
        """A width that any batch fits into."""
        if self._is_unpacked:
            return self.frame.max_length
        # A row of n tokens fits nowhere only if every packed row already holds more than width - n tokens.
        longest = self._length_X[self._longest()]
        return -(-int(longest[0] + longest[1:].sum() // self.batch_size) // 8) * 8

    def _longest(self) -> np.ndarray:
        """The numbers of a batch of the longest rows."""
        # A small file is read several times within a batch, so the longest row may occur more than once.
        epochs = 1 - (1 - self._num_drawn) // len(self._rows)
        return np.repeat(np.argsort(-self._length_X, kind="stable"), epochs)[: self._num_drawn]

    def _packed(self, number_X: np.ndarray) -> tuple[list[list[Row]], int]:
        """The rows with these numbers, in the groups that share a row of the batch, and the batch's width."""
        rows, length_X = [self._rows[number] for number in number_X], self._length_X[number_X]
        if self._is_unpacked:
            return [[row] for row in rows], self.frame.fitting_width(rows, self.num_texts, self.widths)
        for width in self.widths:
            row_X = pack(length_X, width, self.batch_size)
            if width >= length_X.max() and (row_X >= 0).all():
                break
        return [[rows[i] for i in np.flatnonzero(row_X == number)] for number in range(self.batch_size)], width

    def _batch(self, number_X: np.ndarray, own: slice) -> dict[str, np.ndarray]:
        groups, width = self._packed(number_X)
        num_read = width
        if not self._reads_words:  # As many examples as there can be in a row.
            num_read = 1 if self._is_unpacked else min(self._num_drawn, width // int(self._length_X.min()))
        return self.frame.batch(groups, own, width, self.num_texts, num_read)

    @abc.abstractmethod
    def numbers(self, step: int) -> np.ndarray:
        """The numbers of the rows of a step's batch."""

    def width(self, step: int) -> int:
        """The length that the texts of a step's batch are padded to."""
        return self._packed(self.numbers(step))[1]

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        return self.rows(step, 0, self.batch_size)

    def rows(self, step: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows start to stop of the batch of a step; its width is that of the whole batch."""
        return self._batch(self.numbers(step), slice(start, stop))

    def largest(self) -> dict[str, np.ndarray]:
        """A batch as large as any; with packed rows, as any of the first: the longest hardly ever come together."""
        return self._batch(self._longest() if self._is_unpacked else self.numbers(self._needs_most), slice(None))


class TaskBatches(_RowBatches):
    """The training batches of a task, pure in (seed, step).

    batch_size: rows of the task in a batch. num_rows: rows of the batch, into which these are packed; None: as many.
    """

    def __init__(self, frame: Frame, rows: Sequence[Row], batch_size: int, seed: int, num_rows: int | None = None):
        self._key = key(seed, "tasks: epoch")
        steps = range(min(_TRIED, -(-len(rows) // batch_size)))
        super().__init__(frame, rows, batch_size, num_rows or batch_size, steps)

    def numbers(self, step: int) -> np.ndarray:
        """The numbers of the rows of a step's batch."""
        epoch_X, index_X = np.divmod(step * self._num_drawn + np.arange(self._num_drawn), len(self._rows))
        return permute(index_X, len(self._rows), bits(self._key, epoch_X))


class TaskEvaluation(_RowBatches):
    """All rows of a task once, sorted by length; rows of weight 0 fill the last batch."""

    def __init__(self, frame: Frame, rows: Sequence[Row], batch_size: int):
        self._order = np.argsort([row.length for row in rows], kind="stable")
        last = -(-len(rows) // batch_size) - 1
        # From the shortest rows to the longest.
        steps = np.linspace(0, last, min(_TRIED, last + 1)).round().astype(int).tolist()
        super().__init__(frame, rows, batch_size, batch_size, steps)

    def __len__(self) -> int:
        return -(-len(self._rows) // self.batch_size)

    def numbers(self, step: int) -> np.ndarray:
        """The numbers of the rows of a step's batch; those after the last row repeat it."""
        place_B = step * self.batch_size + np.arange(self.batch_size)
        return self._order[np.minimum(place_B, len(self._rows) - 1)]

    def num_real(self, step: int) -> int:
        """The number of rows in a step's batch that are not repeated to fill it."""
        return min(self.batch_size, len(self._rows) - step * self.batch_size)

    def rows(self, step: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows start to stop of the batch of a step; its width is that of the whole batch."""
        batch = super().rows(step, start, stop)
        if "label_weights" in batch:
            batch["label_weights"][np.arange(start, stop) >= self.num_real(step)] = 0
        return batch
