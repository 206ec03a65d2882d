"""Metrics of a training: JSON lines, progress on the terminal, and the fraction of the hardware's peak FLOP/s."""

import functools
import io
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from prelm_jax.errors import InputError
from prelm_jax.progress import Progress
from prelm_jax.storage import is_remote, opened, write_file
from prelm_jax.training.chips import find_chip
from prelm_jax.training.contract import Batch, Model

EVALUATION = "evaluation/"  # Before the names of an evaluation's metrics.

NOT_FINITE = ("inf", "-inf", "nan")


def peak_flops(dtype: jnp.dtype, devices: int) -> float:
    """Peak matmul FLOP/s of a number of devices: for bf16 on a known chip its data sheet's, else measured (0.1 s)."""
    chip = find_chip(jax.devices()[0].device_kind)
    if chip is not None and dtype == jnp.bfloat16:
        return chip.flops * devices
    x = jnp.ones((1024, 1024), dtype)
    # With sums in fp32, as in the models: a CPU has no fast product of bf16 whose result is rounded.
    matmul = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))
    matmul(x, x).block_until_ready()
    times = []
    for _ in range(10):
        start = time.perf_counter()
        matmul(x, x).block_until_ready()
        times.append(time.perf_counter() - start)
    # The virtual devices of a CPU share its cores.
    return 2 * 1024**3 / min(times) * (1 if jax.default_backend() == "cpu" else devices)


class _RemoteFile(io.StringIO):
    """A text file in a bucket, where nothing can be appended to: each flush rewrites it."""

    def __init__(self, path: Path, text: str):
        super().__init__()
        self.write(text)
        self._path = path

    def flush(self) -> None:
        self._path.write_text(self.getvalue())


class MetricsWriter:
    """Appends to a file of JSON lines, one object with its `step` a line; to TensorBoard (next to the file) if asked.

    Only process 0 writes. Lines of steps after `resume_at` are dropped, because the training will write them again.
    """

    def __init__(self, path: Path, resume_at: int, tensorboard: bool = False):
        self._file = self._tensorboard = None
        if jax.process_index() != 0:
            return
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise InputError('--tensorboard needs a package: pip install "prelm_jax[tensorboard]"') from None
            self._tensorboard = SummaryWriter(str(path.parent), purge_step=resume_at)
        text = "".join(_encode(line) for line in read_metrics(path) if line["step"] <= resume_at)
        if is_remote(path):
            self._file = _RemoteFile(path, text)
            return
        write_file(path, text.encode())
        self._file = path.open("a")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line."""
        if self._file is None:
            return
        self._file.write(_encode({"step": step, **values}))
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the files."""
        for file in (self._file, self._tensorboard):
            if file is not None:
                file.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a file of metrics, oldest first.

    Drops lines that a kill has cut off, lines that `MetricsWriter` cannot have written, and lines that a later one of
    the same step and kind (train, evaluation, …) replaces.
    """
    found: dict[tuple[float, str], dict[str, float]] = {}
    for metrics in stream_metrics(path):
        kind = next((name.partition("/")[0] for name in metrics if name != "step"), "")
        found.pop((metrics["step"], kind), None)
        found[metrics["step"], kind] = metrics
    return list(found.values())


def stream_metrics(path: Path) -> Iterator[dict[str, float]]:
    """The lines of `read_metrics` one by one, with the lines that a later one of the same step and kind replaces."""
    if path.exists():
        with opened(path) as file:
            for line in file:
                try:
                    metrics = _decode(line)
                except (ValueError, RecursionError):
                    continue
                yield metrics


def _encode(metrics: Mapping[str, float]) -> str:
    """A line of metrics.jsonl. JSON has no infinity and no NaN: they become strings."""
    return json.dumps({name: x if math.isfinite(x) else str(x) for name, x in metrics.items()}) + "\n"


def _decode(line: bytes) -> dict[str, float]:
    """The metrics in a line of `_encode`. Raises ValueError or RecursionError for any other line."""
    metrics = json.loads(line.decode())
    if not isinstance(metrics, dict) or type(metrics.get("step")) is not int or metrics["step"] < 0:
        raise ValueError
    "".join(metrics).encode()  # A lone surrogate in a name could not be printed.
    return {name: _number(value) for name, value in metrics.items()}


def _number(value: object) -> float:
    if value in NOT_FINITE:
        return float(cast(str, value))
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
        raise ValueError
    return value


class Pending(NamedTuple):
    """A step that the devices may still be working on."""

    step: int  # Steps done after it.
    metrics: Mapping[str, jax.Array]  # As `make_train_step` returns them.
    batch: Batch
    tokens_seen: int


class Report:
    """Fetches the metrics of finished steps, checks them, and writes them to the file and the terminal."""

    def __init__(self, model: Model, writer: MetricsWriter, peak: float, start: int, steps: int, log_every: int):
        """`peak`: FLOP/s of all devices. `start`, `steps`: the steps done, and to do in all."""
        self._model, self._writer, self._peak, self._log_every = model, writer, peak, log_every
        self._progress = Progress("train" if jax.process_index() == 0 else None, steps, "steps", start)
        self._began: float | None = None  # When the counted steps began; the first, which compiles, is not counted.
        self._finished = 0.0
        self._steps, self._tokens, self._flops = 0, 0, 0.0

    def restart_clock(self) -> None:
        """Leaves the time since the last step finished out of the speed: compilation, an evaluation, a save.

        Call it while no step is running: the time that a running step has already taken would not be counted.
        """
        now = time.perf_counter()
        self._began = now if self._began is None else self._began + now - self._finished

    def wait(self, pending: Pending | None) -> None:
        """Waits for a step and writes its metrics if due.

        Raises InputError if the loss or the gradient is not finite.
        """
        if pending is None:
            return
        step = pending.step
        metrics = {name: value.tolist() for name, value in jax.device_get(pending.metrics).items()}
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            raise InputError(
                f"the loss or its gradient is not finite at step {step} (loss {metrics['loss']}, gradient norm "
                f"{metrics['grad_norm']}), and this state is not saved: lower the learning rate or the clip norm"
            )
        self._progress.advance(1)
        tokens, positions = metrics.pop("tokens")
        self._finished = now = time.perf_counter()
        if self._began is not None:
            self._steps += 1
            self._tokens += tokens
            self._flops += self._model.flops(pending.batch)
        if step % self._log_every and step != self._progress.total:
            return
        values = {f"train/{name}": value for name, value in metrics.items()}
        values |= {"train/padding": 1 - tokens / positions, "train/tokens_seen": pending.tokens_seen}
        if self._began is not None and self._steps:
            seconds = now - self._began
            speed, mfu = self._tokens / seconds, self._flops / seconds / self._peak
            values |= {"perf/seconds_per_step": seconds / self._steps, "perf/tokens_per_second": speed, "perf/mfu": mfu}
            self._began, self._steps, self._tokens, self._flops = now, 0, 0, 0.0
            losses = f"loss {metrics['loss']:.3f}  lr {metrics['learning_rate']:.1e}"
            self._progress.report(f"{losses}  {speed:,.0f} tokens/s  mfu {mfu:.0%}")
        self._writer.write(step, values)

    def evaluation(self, step: int, values: Mapping[str, float], line: str) -> None:
        """Writes an evaluation, and says the line."""
        self._writer.write(step, {f"{EVALUATION}{name}": value for name, value in values.items()})
        self._progress.say(f"step {step}  {line}")

    def say(self, line: str) -> None:
        """Prints a line."""
        self._progress.say(line)

    def close(self) -> None:
        self._progress.close(complete=False)
