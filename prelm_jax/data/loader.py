"""Batches built ahead of the steps that need them, and placed on the devices."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import grain
import numpy as np


class Batches(Protocol):
    """What `pairs`, `windows` and `streams` build: the batch of every step, a pure function of (seed, step)."""

    batch_size: int
    layout: dict[str, str]
    """For each key "rows" (a host builds its own rows), or what every host builds whole: "replicated" (every device
    gets all of it) or "shared" (a part of its first axis each; never cut into micro-batches)."""

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        """The global batch of a step."""

    def rows(self, step: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows start to stop of the global batch of a step, built without the others."""

    def baselines(self, evaluation: Iterable[dict[str, np.ndarray]]) -> dict[str, dict[str, float]]:
        """Loss or metric → model → value: what models that know next to nothing reach on evaluation batches."""

    def in_other_units(self, name: str, value: float) -> dict[str, float]:
        """A loss of these batches as its readers know it: perplexity and the like, by name."""

    def show(self, batch: dict[str, np.ndarray], tokenizer: Any) -> Iterator[str]:
        """Each row of a batch for people to read, in a few lines (`prelm_jax.data.show`)."""


def prefetch(
    batches: Batches,
    start: int,
    stop: int,
    rows: slice,
    place: Callable[[dict[str, np.ndarray]], Any],
) -> Iterator[tuple[int, Any]]:
    """(step, placed batch) for the steps from start to stop, built in a thread of its own, a few steps ahead.

    Args:
        batches: what to build; nothing of it is saved or restored, the step is its state.
        start, stop: the first step, and the one after the last.
        rows: the rows of the global batch that this process feeds.
        place: puts these rows onto the devices. Called in the caller's thread, so that it may use JAX as it likes.

    Raises:
        Whatever building a batch raises, at the step that needs it.
    """
    dataset = grain.MapDataset.source(_Steps(batches, stop, rows))[start:].to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    )
    for step, batch in enumerate(dataset, start):
        yield step, place(batch)


class _Steps:
    """A source whose element is a whole batch: Grain takes some 150 µs for an element, however large."""

    def __init__(self, batches: Batches, stop: int, rows: slice):
        self._batches, self._stop, self._rows = batches, stop, rows

    def __len__(self) -> int:
        return self._stop

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        return self._batches.rows(step, self._rows.start, self._rows.stop)
