"""Metrics of a training: JSON lines, progress on the terminal, and the fraction of the hardware's peak FLOP/s."""

import contextlib
import io
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from prelm_jax.errors import InputError
from prelm_jax.progress import Progress
from prelm_jax.storage import is_remote
from prelm_jax.training.chips import find_chip
from prelm_jax.training.contract import Batch, Model


def peak_flops(dtype: jnp.dtype, devices: int) -> float:
    """Peak matmul FLOP/s of a number of devices: for bf16 on a known chip its data sheet's, else measured (0.1 s)."""
    chip = find_chip(jax.devices()[0].device_kind)
    if chip is not None and dtype == jnp.bfloat16:
        return chip.flops * devices
    x = jnp.ones((1024, 1024), dtype)
    matmul = jax.jit(jnp.matmul)
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
    `evaluated` is called whenever an evaluation is written.
    """

    def __init__(
        self, path: Path, resume_at: int, tensorboard: bool = False, evaluated: Callable[[], None] = lambda: None
    ):
        self._file = self._tensorboard = None
        self._evaluated = evaluated
        if jax.process_index() != 0:
            return
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise InputError('--tensorboard needs a package: pip install "prelm_jax[tensorboard]"') from None
            self._tensorboard = SummaryWriter(str(path.parent), purge_step=resume_at)
        kept = [line for line in read_metrics(path) if line["step"] <= resume_at]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        if is_remote(path):
            self._file = _RemoteFile(path, text)
            return
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.replace(path)
        self._file = path.open("a")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line. JSON has no infinity and no NaN: they become strings."""
        if self._file is None:
            return
        line = {"step": step} | {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)

    def write_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the metrics of an evaluation."""
        self.write(step, {f"evaluation/{name}": value for name, value in values.items()})
        if self._file is not None:
            self._evaluated()

    def close(self) -> None:
        """Closes the files."""
        for file in (self._file, self._tensorboard):
            if file is not None:
                file.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a file of metrics, oldest first; lines that a kill has cut off, and foreign ones, are left out."""
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            metrics = json.loads(line)
            if isinstance(metrics, dict) and isinstance(metrics.get("step"), int):
                found.append(metrics)
    return found


class Report:
    """Fetches the metrics of finished steps, checks them, and writes them to the file and the terminal."""

    def __init__(self, model: Model, writer: MetricsWriter, peak: float, start: int, steps: int, log_every: int):
        """`peak`: FLOP/s of all devices. `start`, `steps`: the steps done, and to do in all."""
        self._model, self._writer, self._peak, self._log_every = model, writer, peak, log_every
        self._progress = Progress("train" if jax.process_index() == 0 else None, steps, "steps", start)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves compilation, evaluation and saving out of the speed: timing restarts when the next step finishes."""
        self._clock = None

    def wait(self, pending: tuple[int, Mapping[str, jax.Array], Batch, int] | None) -> None:
        """Waits for (step, metrics, batch, tokens seen) and writes the metrics if due.

        Raises InputError if the loss or the gradient is not finite.
        """
        if pending is None:
            return
        step, on_devices, batch, tokens_seen = pending
        metrics = {name: value.tolist() for name, value in jax.device_get(on_devices).items()}
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            raise InputError(
                f"the loss or its gradient is not finite at step {step} (loss {metrics['loss']}, gradient norm "
                f"{metrics['grad_norm']}), and this state is not saved: lower the learning rate or the clip norm"
            )
        self._progress.advance(1)
        tokens, positions = metrics.pop("tokens")
        now = time.perf_counter()
        if self._clock is None:
            self._clock = (now, 0, 0, 0.0)
        else:
            began, steps, counted, flops = self._clock
            self._clock = (began, steps + 1, counted + tokens, flops + self._model.flops(batch))
        if step % self._log_every:
            return
        values = {f"train/{name}": value for name, value in metrics.items()}
        values |= {"train/padding": 1 - tokens / positions, "train/tokens_seen": tokens_seen}
        began, steps, counted, flops = self._clock
        if steps:
            seconds = now - began
            speed, mfu = counted / seconds, flops / seconds / self._peak
            values |= {"perf/seconds_per_step": seconds / steps, "perf/tokens_per_second": speed, "perf/mfu": mfu}
            self._clock = (now, 0, 0, 0.0)
            losses = f"loss {metrics['loss']:.3f}  lr {metrics['learning_rate']:.1e}"
            self._progress.report(f"{losses}  {speed:,.0f} tokens/s  mfu {mfu:.0%}")
        self._writer.write(step, values)

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Writes an evaluation."""
        self._writer.write_evaluation(step, values)
        self._progress.say(f"step {step}  held-out  " + "  ".join(f"{k} {v:.4f}" for k, v in values.items()))

    def close(self) -> None:
        self._progress.close(complete=False)
