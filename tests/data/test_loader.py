import threading

import numpy as np
import pytest

from prelm_jax.data.loader import prefetch


class Counting:
    """Batches whose rows say which step and row they are; building one after `broken` fails."""

    batch_size = 8

    def __init__(self, broken=10**9):
        self.broken = broken
        self.threads = set()

    def __getitem__(self, step):
        return self.rows(step, 0, self.batch_size)

    def rows(self, step, start, stop):
        self.threads.add(threading.current_thread())
        if step >= self.broken:
            raise RuntimeError(f"no batch {step}")
        return {"step": np.full(stop - start, step), "row": np.arange(start, stop)}


def place(batch):
    return {name: array.tolist() for name, array in batch.items()}


def test_steps_in_order_each_with_its_rows():
    batches = Counting()
    placed = list(prefetch(batches, 1000, 1050, slice(2, 5), place))
    assert placed == [(step, {"step": [step] * 3, "row": [2, 3, 4]}) for step in range(1000, 1050)]
    assert threading.main_thread() not in batches.threads


def test_nothing_to_do():
    assert list(prefetch(Counting(), 7, 7, slice(0, 8), place)) == []


def test_place_runs_in_the_caller():
    threads = [batch for _, batch in prefetch(Counting(), 0, 3, slice(0, 8), lambda batch: threading.current_thread())]
    assert threads == [threading.current_thread()] * 3


def test_an_error_reaches_the_step_that_needs_the_batch():
    steps = prefetch(Counting(broken=5), 3, 20, slice(0, 8), place)
    assert [next(steps)[0] for _ in range(2)] == [3, 4]
    with pytest.raises(RuntimeError, match="no batch 5"):
        next(steps)


def test_threads_end_when_the_caller_stops_early():
    batches = Counting()
    steps = prefetch(batches, 0, 10**9, slice(0, 8), place)
    next(steps)
    assert any(thread.is_alive() for thread in batches.threads)
    steps.close()
    for thread in batches.threads:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in batches.threads)
