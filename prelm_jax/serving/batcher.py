"""Batches the queries of all clients in fixed shapes, with one thread per device.

A thread takes the next batch as soon as its device is free. There is no waiting window: what arrives while a batch runs
goes into later ones. Small requests, bulk requests and generated texts (one token at a time) take turns. The queue is
bounded in tokens.

A batch has 1, 4, 16 or `full_rows` rows. Only row counts that give the same bits as full batches are used: after the
start, other threads compute the same examples ("canaries") in each of them and compare. Until that is done for a shape,
and where bits differ, its batches are full.
"""

import asyncio
import collections
import itertools
import threading
import time
from collections.abc import Sequence

import jax
import numpy as np

from prelm_jax.inference.batching import SHORTEST
from prelm_jax.serving.lanes import AnyProgram, AnyQuery, Entry, Generation, Lane, Shape, Ticket, choose_rows
from prelm_jax.serving.metrics import SECONDS, SIZES, Counter, Histogram
from prelm_jax.serving.protocol import Refusal
from prelm_jax.training.contract import Params

ROWS = (1, 4, 16)
CPU_TOKENS = 128  # In a batch of small requests. On a CPU larger batches are no faster, and make others wait.
SMALL = 16  # Examples; a request with more is bulk.
GENERATIONS = 8  # Texts that a device generates at the same time, each with a cache of keys and values.
SECONDS_TO_ANSWER = 60.0
CANARIES = 8  # Examples per shape.
ENOUGH_BYTES = 4096  # A result this large shows alone whether its bits depend on the rows.


class Placement:
    """Copies parameters to a device, each tree once."""

    def __init__(self, device: jax.Device):
        self._device, self._lock = device, threading.Lock()
        self._placed: dict[int, tuple[Params, Params]] = {}

    def __call__(self, params: Params) -> Params:
        with self._lock:
            if id(params) not in self._placed:
                self._placed[id(params)] = params, jax.device_put(params, self._device)
            return self._placed[id(params)][1]


class Batcher:
    """The queue, and the threads of the devices. Call `submit` and `generate` in the thread of the event loop."""

    def __init__(self, devices: Sequence[jax.Device], max_queue_tokens: int):
        self.max_queue_tokens, self.queue_tokens = max_queue_tokens, 0
        self.exact: dict[Shape, bool] = {}  # Whether the bits of a row depend on nothing else.
        self.rows: dict[Shape, tuple[int, ...]] = {}  # Row counts with the bits of full batches.
        self.tokens_per_second = 1000.0  # A running mean, without padding rows.
        self.batch_rows = Histogram("prelm_batch_rows", "Texts in a batch.", SIZES)
        self.batch_seconds = Histogram("prelm_batch_seconds", "Time of a batch on its device.", SECONDS)
        self.queue_seconds = Histogram("prelm_queue_seconds", "Time of a text in the queue.", SECONDS)
        self.dropped = Counter("prelm_dropped_total", "Texts not computed: cancelled, expired, failed.", "reason")
        self.tokens = Counter("prelm_tokens_total", "Tokens computed, padding included.")
        self.generated = Counter("prelm_generated_tokens_total", "Tokens generated.")
        self._devices, self._is_cpu = devices, devices[0].platform == "cpu"
        self._lanes = {"small": Lane(), "bulk": Lane()}
        self._generations: collections.deque[Generation] = collections.deque()
        self._cold: list[collections.deque[Shape]] = [collections.deque() for _ in devices]
        self._canaries: dict[Shape, list[bytes]] = {}
        self._changed = threading.Condition()
        self._numbers = itertools.count()
        self._stopped = False
        self._threads = [
            threading.Thread(target=target, args=arguments, name=f"{device}", daemon=True)
            for device, cold in zip(devices, self._cold, strict=True)
            for place in [Placement(device)]
            for target, arguments in ((self._work, (place,)), (self._warm, (place, cold)))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> bool:
        """Ends the threads after their current batches. Returns whether all ended within a second each."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(1)
        return not any(thread.is_alive() for thread in self._threads)

    def warm(self, programs: Sequence[AnyProgram]) -> None:
        """Schedules all shapes of the programs for compilation, the first program first. Call before `start`."""
        for cold in self._cold:
            cold.extend(Shape(program, length) for program in programs for length in reversed(program.lengths))

    def stop_warming(self) -> None:
        """Cancels the compilation of the remaining shapes."""
        for cold in self._cold:
            cold.clear()

    def num_cold(self, programs: Sequence[AnyProgram] | None = None) -> int:
        """The number of shapes that are not compiled yet, of all programs or of these."""
        return sum(programs is None or program in programs for cold in self._cold for program, _ in list(cold))

    @property
    def num_devices(self) -> int:
        return len(self._devices)

    @property
    def device_names(self) -> list[str]:
        return [f"{device.platform}:{device.id}" for device in self._devices]

    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """The row counts of batches, by program and padded length."""
        found: dict[str, dict[str, tuple[int, ...]]] = {}
        for (program, length), rows in sorted(self.rows.items(), key=lambda item: item[0][1]):
            found.setdefault(program.name, {})[str(length)] = rows
        return found

    def check_room(self, texts: int) -> None:
        """Raises a Refusal if the queue has no room for this many texts, however short."""
        self._check_room(texts * SHORTEST)

    async def submit(self, queries: Sequence[AnyQuery], seconds: float = SECONDS_TO_ANSWER) -> list[object]:
        """The answers to queries. Cancelling it drops what is still in the queue.

        Raises a Refusal for a full queue or after `seconds`, and the error of the first text that fails.
        """
        entries: list[tuple[Shape, int, int, object]] = []
        for i, query in enumerate(queries):
            for j, example in enumerate(query.examples):
                entries.append((Shape(query.program, query.program.length(example)), i, j, example))
        tokens = sum(shape.tokens for shape, *_ in entries)
        self._check_room(tokens)
        future = asyncio.get_running_loop().create_future()
        ticket = Ticket(queries, future, time.monotonic(), tokens)
        ticket.answers = [None] * len(queries)
        ticket.missing = [len(query.examples) for query in queries]
        for i, query in enumerate(queries):
            if not query.examples:
                ticket.answers[i] = query.finish([])
        if not entries:
            return ticket.answers
        with self._changed:
            self.queue_tokens += tokens
            groups = self._lanes["small" if len(entries) <= SMALL else "bulk"].groups
            for shape, i, j, example in entries:
                groups.setdefault(shape, collections.deque()).append(Entry(ticket, i, j, example, next(self._numbers)))
            self._changed.notify(len(entries))
        try:
            async with asyncio.timeout(seconds):
                return await future
        except TimeoutError:
            self.dropped.add("expired")
            raise Refusal(504, f"no answer within {seconds:g} seconds", code="timeout") from None
        except asyncio.CancelledError:
            self.dropped.add("cancelled")
            raise
        finally:
            with self._changed:
                ticket.dead = True
                self.queue_tokens -= ticket.tokens
                ticket.tokens = 0

    def generate(self, generation: Generation) -> None:
        """Queues a text to generate."""
        with self._changed:
            self._generations.append(generation)
            self._changed.notify()

    @property
    def seconds_to_wait(self) -> float:
        """An estimate of the time until the queue of now is computed."""
        return self.queue_tokens / self.tokens_per_second

    def _check_room(self, tokens: int) -> None:
        if tokens > self.max_queue_tokens:
            message = f"the request has {tokens} tokens, padding included; the server takes {self.max_queue_tokens}"
            raise Refusal(413, message, code="too_many_tokens")
        if self.queue_tokens + tokens > self.max_queue_tokens:
            message = f"{self.queue_tokens} tokens are waiting already; try again later"
            raise Refusal(429, message, code="queue_full", retry_after=self.seconds_to_wait)

    def _warm(self, place: Placement, cold: collections.deque[Shape]) -> None:
        """The loop of a device's second thread, which compiles shapes, so that requests do not wait for it."""
        while cold and not self._stopped:
            shape = cold[0]
            try:
                self._check_bits(place, shape)
            except Exception:
                self.exact[shape] = False
                self.dropped.add("canary failed")
            if cold:
                cold.popleft()

    def _work(self, place: Placement) -> None:
        """The loop of a device's first thread, which computes batches and generates tokens."""
        generating: collections.deque[Generation] = collections.deque()
        turns = itertools.cycle(("small", "bulk", "generation"))
        while True:
            with self._changed:
                while not (self._stopped or self._has_work(generating)):
                    self._changed.wait()
                if self._stopped:
                    return
                while self._generations and len(generating) < GENERATIONS:
                    generating.append(self._generations.popleft())
                batch, generates = None, False
                for turn in itertools.islice(turns, 3):
                    generates = turn == "generation" and bool(generating)
                    if generates or (turn != "generation" and (batch := self._take(turn)) is not None):
                        break
            if batch is not None:
                self._run(place, *batch)
            elif generates:
                self._generate_token(place, generating)

    def _has_work(self, generating: Sequence[Generation]) -> bool:
        queued = any(lane.oldest() is not None for lane in self._lanes.values())
        return queued or bool(generating or self._generations)

    def _take(self, name: str) -> tuple[Shape, list[Entry], int] | None:
        """The next batch of a lane: (shape, entries, rows). Spare rows are filled from the other lane."""
        lane = self._lanes[name]
        shape = lane.oldest()
        if shape is None:
            return None
        allowed = self._allowed_rows(shape)
        waiting = sum(len(each.groups.get(shape, ())) for each in self._lanes.values())
        if name == "small" and self._is_cpu:
            allowed = [rows for rows in allowed if rows * shape.tokens <= CPU_TOKENS] or allowed[:1]
        rows = choose_rows(waiting, allowed)
        entries = lane.take(shape, rows)
        for other in self._lanes.values():
            entries += other.take(shape, rows - len(entries))
        now = time.monotonic()
        for entry in entries:
            entry.ticket.tokens -= shape.tokens
            self.queue_tokens -= shape.tokens
            self.queue_seconds.observe(now - entry.ticket.arrived)
        return shape, entries, rows

    def _allowed_rows(self, shape: Shape) -> Sequence[int]:
        return self.rows.get(shape, (shape.full_rows,))

    def _run(self, place: Placement, shape: Shape, entries: list[Entry], rows: int) -> None:
        program, length = shape
        began = time.monotonic()
        done: list[Ticket] = []
        try:
            results = program.compute(place(program.params), [entry.example for entry in entries], rows, length)
            for entry, result in zip(entries, results, strict=True):
                self._collect(entry, result, done)
        except Exception as error:
            self._run_one_by_one(place, shape, entries, error, done)
        seconds = time.monotonic() - began
        self.batch_rows.observe(len(entries))
        self.batch_seconds.observe(seconds)
        self.tokens.add(by=rows * shape.tokens)
        self.tokens_per_second += 0.1 * (len(entries) * shape.tokens / seconds - self.tokens_per_second)
        self._deliver(done)

    def _run_one_by_one(
        self, place: Placement, shape: Shape, entries: list[Entry], error: Exception, done: list[Ticket]
    ) -> None:
        """Repeats a failed batch example by example, so that only those at fault are answered with an error."""
        program, length = shape
        rows = self._allowed_rows(shape)[0]
        for entry in entries:
            try:
                if len(entries) > 1:
                    (result,) = program.compute(place(program.params), [entry.example], rows, length)
                    self._collect(entry, result, done)
                    continue
            except Exception as alone:
                error = alone
            self.dropped.add("failed")
            entry.ticket.answers = [error]
            entry.ticket.dead = True
            done.append(entry.ticket)

    def _collect(self, entry: Entry, result: object, done: list[Ticket]) -> None:
        """Stores the result of an example; the last one completes its query. Appends complete tickets to `done`."""
        ticket, i = entry.ticket, entry.i
        if ticket.dead:
            return
        examples = ticket.queries[i].examples
        if len(examples) == 1:
            ticket.answers[i] = ticket.queries[i].finish([result])
        else:
            ticket.results[i, entry.j] = jax.tree.map(np.array, result)
        ticket.missing[i] -= 1
        if ticket.missing[i]:
            return
        if len(examples) > 1:
            ticket.answers[i] = ticket.queries[i].finish([ticket.results.pop((i, j)) for j in range(len(examples))])
        if not any(ticket.missing):
            done.append(ticket)

    def _deliver(self, tickets: Sequence[Ticket]) -> None:
        """Hands the answers to the event loop."""
        if tickets:
            tickets[0].future.get_loop().call_soon_threadsafe(_resolve, tickets)

    def _generate_token(self, place: Placement, generating: collections.deque[Generation]) -> None:
        generation = generating.popleft()
        if generation.dead:
            self.dropped.add("cancelled")
            return
        try:
            if generation.running is None:
                generation.running = generation.steps(place(generation.params))
            if time.monotonic() > generation.deadline:
                raise Refusal(504, "the text took too long", code="timeout")
            event = next(generation.running, None)
        except Exception as error:
            event = error
        if event is not None and not isinstance(event, Exception):
            self.generated.add()
            generating.append(generation)
        if not generation.dead:
            generation.emit(event)

    def _check_bits(self, place: Placement, shape: Shape) -> None:
        """Compiles a shape for all row counts, and finds the ones that give the bits of a full batch.

        A few examples are computed in a full batch, each in several rows, and again in smaller batches.
        """
        program, length = shape
        rng, full, params = np.random.default_rng(length), shape.full_rows, place(program.params)

        def bits(examples: Sequence[object], rows: int) -> list[bytes]:
            return [_bytes(found) for found in program.compute(params, examples, rows, length)]

        canaries = [program.canary(length, rng) for _ in range(max(1, min(full // 2, CANARIES)))]
        found = bits(list(itertools.islice(itertools.cycle(canaries), full)), full)
        expected = found[: len(canaries)]
        is_exact = found == list(itertools.islice(itertools.cycle(expected), full))
        # One example is enough where results are large.
        compared = canaries[:1] if len(expected[0]) >= ENOUGH_BYTES else canaries
        rows = [full]
        for count in [count for count in ROWS if count < full]:
            groups = (compared[i : i + count] for i in range(0, len(compared), count))
            if [each for group in groups for each in bits(group, count)] == expected[: len(compared)]:
                rows.append(count)
        with self._changed:
            reference = self._canaries.setdefault(shape, expected)
            self.exact[shape] = self.exact.get(shape, True) and is_exact and expected == reference
            self.rows[shape] = tuple(count for count in sorted(rows) if count in self.rows.get(shape, rows))


def _resolve(tickets: Sequence[Ticket]) -> None:
    for ticket in tickets:
        if ticket.future.done():
            continue
        if ticket.answers and isinstance(error := ticket.answers[0], Exception):
            ticket.future.set_exception(error)
        else:
            ticket.future.set_result(ticket.answers)


def _bytes(result: object) -> bytes:
    return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(result))
