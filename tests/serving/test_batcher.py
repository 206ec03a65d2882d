"""The queue with programs that are plain functions: order, room, cancellation, failures, canaries."""

import asyncio
import contextlib
import threading

import jax
import numpy as np
import pytest

pytest.importorskip("starlette", reason="needs the extra serve: pip install 'prelm_jax[serve]'")

from prelm_jax.inference.batching import Program, Query, full_rows
from prelm_jax.serving.batcher import CPU_TOKENS, Batcher
from prelm_jax.serving.lanes import Generation, choose_rows
from prelm_jax.serving.protocol import Refusal


class Gate:
    """A program that waits at a gate, doubles its examples, and remembers its batches."""

    def __init__(self, compute=lambda x: 2 * x, lengths=(8, 16)):
        self.open, self.entered, self.batches = threading.Event(), threading.Event(), []
        self.compute = compute
        self.program = Program(
            "gate",
            {},
            self._run,
            lambda x: lengths[0] if x < 10**6 else lengths[1],
            lengths,
            lambda length, rng: length,
        )

    def _run(self, params, examples, rows, length):
        self.entered.set()
        assert self.open.wait(30)
        self.batches.append((list(examples), rows, length))
        return [self.compute(x) for x in examples]

    def queries(self, examples):
        return [Query(self.program, [x], lambda found: found[0]) for x in examples]


@contextlib.asynccontextmanager
async def running(gate, room=10**6):
    batcher = Batcher(jax.devices()[:1], room)
    batcher.start()
    try:
        yield batcher
    finally:
        gate.open.set()
        await asyncio.to_thread(batcher.stop)


async def queued(batcher, tokens):
    """Waits until this many tokens are in the queue."""
    async with asyncio.timeout(30):
        while batcher.queue_tokens != tokens:
            await asyncio.sleep(0)


async def entered(gate):
    await asyncio.to_thread(gate.entered.wait, 30)


@pytest.mark.parametrize(
    ("waiting", "rows"), [(1, 1), (2, 1), (3, 4), (4, 4), (5, 4), (8, 4), (9, 16), (32, 16), (33, 64), (500, 64)]
)
def test_choose_rows(waiting, rows):
    assert choose_rows(waiting, (1, 4, 16, 64)) == rows


def test_a_lone_number_of_rows_is_always_taken():
    assert choose_rows(1, (64,)) == choose_rows(100, (64,)) == 64


def test_answers_come_in_the_order_of_their_queries():
    async def check():
        gate = Gate()
        gate.open.set()
        async with running(gate) as batcher:
            pair = Query(gate.program, [1, 10**6, 3], lambda found: tuple(int(x) for x in found))
            none = Query(gate.program, [], lambda found: "nothing")
            assert await batcher.submit([*gate.queries([5]), pair, none]) == [10, (2, 2 * 10**6, 6), "nothing"]

    asyncio.run(check())


def test_a_small_request_does_not_wait_for_a_bulk_one():
    async def check():
        gate, full = Gate(), full_rows(8)
        async with running(gate) as batcher:
            bulk = asyncio.create_task(batcher.submit(gate.queries(range(4 * full))))
            await entered(gate)  # The first batch is taken.
            small = asyncio.create_task(batcher.submit(gate.queries([10**6])))
            await queued(batcher, 3 * full * 8 + 16)
            gate.open.set()
            assert await small == [2 * 10**6]
            assert await bulk == [2 * x for x in range(4 * full)]
        assert [length for _, _, length in gate.batches].index(16) <= 2

    asyncio.run(check())


def test_many_small_requests_wait_for_small_batches():
    """On a CPU, where a larger batch gains nothing; a bulk request is computed in full batches."""

    async def check():
        gate, full = Gate(), full_rows(8)
        async with running(gate) as batcher:
            batcher.rows[gate.program, 8] = (1, 4, 16, full)
            bulk = asyncio.create_task(batcher.submit(gate.queries(range(full))))
            await entered(gate)
            small = [asyncio.create_task(batcher.submit(gate.queries([1]))) for _ in range(2 * full)]
            await queued(batcher, 2 * full * 8)
            gate.open.set()
            await asyncio.gather(bulk, *small)
        assert [rows for _, rows, _ in gate.batches] == [full] + [CPU_TOKENS // 8] * (2 * full * 8 // CPU_TOKENS)

    asyncio.run(check())


def test_a_full_queue_and_a_request_larger_than_it():
    async def check():
        gate = Gate()
        async with running(gate, room=16 * full_rows(8)) as batcher:
            first = asyncio.create_task(batcher.submit(gate.queries(range(full_rows(8)))))
            await entered(gate)
            second = asyncio.create_task(batcher.submit(gate.queries(range(full_rows(8)))))
            await queued(batcher, 8 * full_rows(8))
            with pytest.raises(Refusal) as refusal:
                await batcher.submit(gate.queries([10**6] * full_rows(8)))
            assert refusal.value.status == 429 and int(refusal.value.headers["retry-after"]) >= 1
            with pytest.raises(Refusal) as refusal:
                await batcher.submit(gate.queries([10**6] * (full_rows(8) + 1)))
            assert refusal.value.status == 413
            gate.open.set()
            await asyncio.gather(first, second)
            assert batcher.queue_tokens == 0

    asyncio.run(check())


def test_what_was_cancelled_or_expired_is_not_computed():
    async def check():
        gate = Gate()
        async with running(gate) as batcher:
            first = asyncio.create_task(batcher.submit(gate.queries([1])))
            await entered(gate)
            gone = asyncio.create_task(batcher.submit(gate.queries([2, 3])))
            await queued(batcher, 16)
            gone.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gone
            with pytest.raises(Refusal) as refusal:
                await batcher.submit(gate.queries([4]), seconds=0)
            assert refusal.value.status == 504 and batcher.queue_tokens == 0
            last = asyncio.create_task(batcher.submit(gate.queries([5])))
            gate.open.set()
            assert await first == [2] and await last == [10]
        assert [examples for examples, _, _ in gate.batches] == [[1], [5]]

    asyncio.run(check())


def test_a_poisoned_text_fails_alone():
    def compute(x):
        if x == 13:
            raise ArithmeticError("poison")
        return 2 * x

    async def check():
        gate = Gate(compute)
        async with running(gate) as batcher:
            first = asyncio.create_task(batcher.submit(gate.queries([0])))
            await entered(gate)
            others = [asyncio.create_task(batcher.submit(gate.queries([x, x + 100]))) for x in (12, 13, 14)]
            await queued(batcher, 48)
            gate.open.set()
            assert await first == [0]
            assert await others[0] == [24, 224] and await others[2] == [28, 228]
            with pytest.raises(ArithmeticError, match="poison"):
                await others[1]
            assert await batcher.submit(gate.queries([15])) == [30]  # The thread lives.

    asyncio.run(check())


def test_generation_and_batches_take_turns():
    async def check():
        gate, seen, done = Gate(), [], asyncio.Event()
        loop = asyncio.get_running_loop()

        def steps(params):
            for i in range(3):
                seen.append((i, len(gate.batches)))
                yield i

        def emit(event):
            if event is None:
                loop.call_soon_threadsafe(done.set)

        async with running(gate) as batcher:
            bulk = asyncio.create_task(batcher.submit(gate.queries(range(6 * full_rows(8)))))
            await entered(gate)
            batcher.generate(Generation({}, steps, emit, float("inf")))
            gate.open.set()
            await asyncio.gather(bulk, done.wait())
        assert [i for i, _ in seen] == [0, 1, 2]
        assert seen[0][1] <= 2 and seen[2][1] <= 4  # A token after each batch.

    asyncio.run(check())


class Bits:
    """A program whose results depend on the number of rows, or on the position in a batch."""

    def __init__(self, result):
        self.program = Program(
            "bits",
            {},
            lambda params, examples, rows, length: [np.float32(result(rows, i)) for i, _ in enumerate(examples)],
            lambda x: 8,
            (8,),
            lambda length, rng: 0,
        )


@pytest.mark.parametrize(
    ("result", "rows", "exact"),
    [
        (lambda rows, i: 1.0, (1, 8), True),
        (lambda rows, i: 1.0 if rows > 1 else 1.0000001, (8,), True),
        (lambda rows, i: 1.0 if i < 6 else 1.0000001, (1, 8), False),
    ],
)
def test_only_numbers_of_rows_with_the_same_bits_are_used(result, rows, exact):
    batcher = Batcher(jax.devices()[:1], 10**6)
    program = Bits(result).program
    batcher.warm([program])
    batcher.start()
    while batcher.num_cold():
        threading.Event().wait(0.001)
    batcher.stop()
    assert batcher.rows == {(program, 8): rows} and batcher.exact == {(program, 8): exact}
