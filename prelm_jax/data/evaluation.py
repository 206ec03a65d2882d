"""Batches of a text that is evaluated: each row once, in order, whatever the batch size."""

from collections.abc import Mapping
from typing import Annotated

import numpy as np

from prelm_jax.bounds import Bounds, Fraction
from prelm_jax.training.contract import EvaluationRows, Layout
from prelm_jax.validation import check

Sample = Annotated[Fraction, Bounds(above=0)]


class EvaluationBatches:
    """The rows of a text, `batch_size` at a time; in the last batch, rows of zeros fill up. Fulfills `Batches`.

    `num_steps` consecutive batches hold the parts of the same rows: the carry of a model starts afresh after them.

    Rows 0 to 4 in two parts, batch size 4:

        batch    0    1    2            3
        rows     0-3  0-3  4 and zeros  4 and zeros
        part     0    1    0            1

    sample: fraction of the text to read. Of rows in one part, some are read, evenly spaced; of rows in several parts,
        the first parts of all rows. `share` is the fraction that is read, at least one row or part. Raises OutOfBounds.
    """

    def __init__(self, rows: EvaluationRows, batch_size: int, sample: float = 1.0):
        check(sample, Sample, ("sample",))
        self.batch_size = batch_size
        self._rows, self._num_rows, self.num_steps = rows, rows.num_rows, rows.num_steps
        if self.num_steps > 1:
            self.num_steps = max(1, round(sample * rows.num_steps))
        else:
            self._num_rows = max(1, round(sample * rows.num_rows))
        self.share = self._num_rows * self.num_steps / (rows.num_rows * rows.num_steps)

    @property
    def layout(self) -> Mapping[str, Layout]:
        """How each key is spread over hosts and devices."""
        return self._rows.layout

    def __len__(self) -> int:
        return -(-self._num_rows // self.batch_size) * self.num_steps

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        """The global batch of a step."""
        return self.rows(step, 0, self.batch_size)

    def rows(self, step: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows start to stop of the global batch of a step, built without the others."""
        group, part = divmod(step, self.num_steps)
        number_B = group * self.batch_size + np.arange(start, stop)
        row_B = np.minimum(number_B, self._num_rows - 1) * self._rows.num_rows // self._num_rows
        batch = self._rows.rows(part, row_B)
        for name, layout in self.layout.items():
            if layout == "rows":
                batch[name][number_B >= self._num_rows] = 0
        return batch
