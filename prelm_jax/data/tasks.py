"""Batches of a task: a permutation of the rows each epoch, in one stream that runs on over the ends of epochs.

    4 rows in batches of 3      2 0 3 | 1 0 2 | 1 3 …      the second epoch begins within the second batch

A batch is as wide as its longest row needs, in six widths at most, so that as many programs are compiled: those that
pad the batches of a file the least. Nothing is sorted for training: rows of one length would often have one label.
"""

import abc
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from prelm_jax.data.frames import Frame, Row
from prelm_jax.data.randomness import bits, key, permute
from prelm_jax.training.contract import Layout

WIDTHS = (32, 48, 64, 96, 128, 192, 256, 384)  # And the longest row that a frame allows.
NUM_WIDTHS = 6


def best_widths(lengths: Sequence[int], batch_size: int, longest: int) -> tuple[int, ...]:
    """Up to six widths, the last of them `longest`, whose padded batches of rows of these lengths are the smallest.

    batch_size: rows of a batch, drawn at random; the longest decides.
    """
    shorter, sorted_lengths = [width for width in WIDTHS if width < longest], np.sort(lengths)

    def mean_width(widths: Sequence[int]) -> float:
        share_W = np.searchsorted(sorted_lengths, widths, side="right") / len(lengths)
        return float(np.diff(share_W**batch_size, prepend=0) @ np.array(widths))

    some = itertools.combinations(shorter, min(NUM_WIDTHS - 1, len(shorter)))
    return min(((*widths, longest) for widths in some), key=mean_width)


def balanced(rows: Sequence[Row], num_labels: int) -> np.ndarray:
    """The weight of each label, float32 [num_labels], with which the examples of any label weigh the same in total.

    An example, or a tagged word, weighs 1 on average, as in scikit-learn; a label that does not occur weighs 1.
    """
    labels, weights = (np.concatenate([np.ravel(x) for x in each]) for each in _labels_and_weights(rows))
    counts = np.bincount(labels, weights, num_labels)
    found = np.divide(counts.sum(), num_labels * counts, out=np.ones(num_labels), where=counts > 0)
    return found.astype(np.float32)


def weighted(rows: Sequence[Row], weight_N: np.ndarray) -> list[Row]:
    """The rows with the weight of each label, or of each tag, times that of its class."""
    labels, weights = _labels_and_weights(rows)
    return [row._replace(weight=w * weight_N[label]) for row, label, w in zip(rows, labels, weights, strict=True)]


def _labels_and_weights(rows: Sequence[Row]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    found = [(row.label, row.weight) for row in rows if row.label is not None and row.weight is not None]
    return [label for label, _ in found], [weight for _, weight in found]


class _Rows(abc.ABC):
    """The rows of a task, and the batches of some of them. Fulfills `Batches`; a subclass defines `numbers`.

    drawn: rows of a batch that are drawn at random.
    """

    def __init__(self, frame: Frame, rows: Sequence[Row], batch_size: int, drawn: int):
        self.frame, self._rows, self.batch_size = frame, rows, batch_size
        self.widths = best_widths([row.length for row in rows], drawn, frame.max_length)
        self.num_texts = max(len(row.texts) for row in rows)
        # Tags read a token of each word; the others read one.
        self._reads_words = any(len(text.read) > 1 for row in rows for text in row.texts)
        self.layout: Mapping[str, Layout] = frame.layout(self._batch(np.arange(1), slice(0, 1)))

    def _batch(self, number_B: np.ndarray, own: slice) -> dict[str, np.ndarray]:
        rows = [self._rows[number] for number in number_B]
        width = self.frame.fitting_width(rows, self.num_texts, self.widths)
        return self.frame.batch(rows, own, width, self.num_texts, width if self._reads_words else 1)

    @abc.abstractmethod
    def numbers(self, step: int) -> np.ndarray:
        """The numbers of the rows of a step's batch."""

    def width(self, step: int) -> int:
        """The length that the texts of a step's batch are padded to."""
        rows = [self._rows[number] for number in self.numbers(step)]
        return self.frame.fitting_width(rows, self.num_texts, self.widths)

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        return self.rows(step, 0, self.batch_size)

    def rows(self, step: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows start to stop of the batch of a step; its width is that of the whole batch."""
        return self._batch(self.numbers(step), slice(start, stop))

    def largest(self) -> dict[str, np.ndarray]:
        """A batch of the longest rows, which is as wide as any."""
        longest = np.argsort([-row.length for row in self._rows], kind="stable")
        return self._batch(np.resize(longest, self.batch_size), slice(None))


class TaskBatches(_Rows):
    """The training batches of a task, pure in (seed, step)."""

    def __init__(self, frame: Frame, rows: Sequence[Row], batch_size: int, seed: int):
        super().__init__(frame, rows, batch_size, drawn=batch_size)
        self._key = key(seed, "tasks: epoch")

    def numbers(self, step: int) -> np.ndarray:
        """The numbers of the rows of a step's batch."""
        epoch_B, index_B = np.divmod(step * self.batch_size + np.arange(self.batch_size), len(self._rows))
        return permute(index_B, len(self._rows), bits(self._key, epoch_B))


class TaskEvaluation(_Rows):
    """All rows of a task once, sorted by length; rows of weight 0 fill the last batch."""

    def __init__(self, frame: Frame, rows: Sequence[Row], batch_size: int):
        super().__init__(frame, rows, batch_size, drawn=1)
        self._order = np.argsort([row.length for row in rows], kind="stable")

    def __len__(self) -> int:
        return -(-len(self._rows) // self.batch_size)

    def numbers(self, step: int) -> np.ndarray:
        """The numbers of the rows of a step's batch; those after the last row repeat it."""
        place_B = step * self.batch_size + np.arange(self.batch_size)
        return self._order[np.minimum(place_B, len(self._rows) - 1)]

    def num_real(self, step: int) -> int:
        """How many rows of a step's batch are not there to fill it."""
        return min(self.batch_size, len(self._rows) - step * self.batch_size)

    def rows(self, step: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows start to stop of the batch of a step; its width is that of the whole batch."""
        batch = super().rows(step, start, stop)
        if "label_weights" in batch:
            batch["label_weights"][np.arange(start, stop) >= self.num_real(step)] = 0
        return batch
