"""Builds batches ahead of the steps that need them and puts them on the devices."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import grain

from prelm_jax.training.contract import Batches, HostBatch

Put = TypeVar("Put")


def prefetch(
    batches: Batches, start: int, stop: int, rows: slice, put: Callable[[HostBatch], Put]
) -> Iterator[tuple[int, Put]]:
    """Yields (step, batch on the devices) for the steps [start, stop), built in a thread a few steps ahead.

    Args:
        batches: source of the batches. Nothing is saved or restored: the step is its state.
        start, stop: first step, and the one after the last.
        rows: rows of the global batch that this process feeds.
        put: puts these rows on the devices. It runs in the caller's thread, so it may use JAX freely.

    Raises:
        Whatever building a batch raises, at the step that needs the batch.
    """
    # Grain takes some 150 µs for an element, however large: so an element is a whole batch.
    built = grain.MapDataset.range(start, stop).map(lambda step: batches.rows(step, rows.start, rows.stop))
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    for step, batch in enumerate(built.to_iter_dataset(options), start):
        yield step, put(batch)
