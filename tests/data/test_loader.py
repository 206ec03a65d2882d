import threading

import numpy as np
import pytest

from prelm_jax.data.loader import prefetch


class Counting:
    """Batches whose rows hold their step and row; building batch `broken` or a later one fails."""

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


def as_lists(batch):
    return {name: array.tolist() for name, array in batch.items()}


def test_steps_come_in_order_with_their_rows():
    batches = Counting()
    found = list(prefetch(batches, 1000, 1050, slice(2, 5), as_lists))
    assert found == [(step, {"step": [step] * 3, "row": [2, 3, 4]}) for step in range(1000, 1050)]
    assert threading.main_thread() not in batches.threads


@pytest.mark.parametrize("stop", [7, 3])
def test_no_steps(stop):
    assert list(prefetch(Counting(), 7, stop, slice(0, 8), as_lists)) == []


def test_put_runs_in_the_callers_thread():
    threads = [batch for _, batch in prefetch(Counting(), 0, 3, slice(0, 8), lambda batch: threading.current_thread())]
    assert threads == [threading.current_thread()] * 3


def test_an_error_reaches_the_step_that_needs_the_batch():
    steps = prefetch(Counting(broken=5), 3, 20, slice(0, 8), as_lists)
    assert [next(steps)[0] for _ in range(2)] == [3, 4]
    with pytest.raises(RuntimeError, match="no batch 5"):
        next(steps)


def test_threads_end_when_the_caller_stops_early():
    batches = Counting()
    steps = prefetch(batches, 0, 10**9, slice(0, 8), as_lists)
    next(steps)
    assert any(thread.is_alive() for thread in batches.threads)
    steps.close()
    for thread in batches.threads:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in batches.threads)
