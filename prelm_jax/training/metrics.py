"""What a run tells: metrics as JSON lines, progress for people, the share of the device's peak that is used."""

import contextlib
import io
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from prelm_jax.errors import InputError
from prelm_jax.storage import is_remote
from prelm_jax.training.chips import find_chip


def peak_flops(dtype: jnp.dtype, devices: int) -> float:
    """Matmul FLOP/s of so many devices: the data sheet's for bf16 on a known one, else measured on one (0.1 s)."""
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


class MetricsWriter:
    """Appends to `metrics.jsonl`, one object a line with its `step`; to TensorBoard as well if asked.

    Only process 0 writes. `resume_at`: lines of later steps are dropped; they will be written again. In a bucket, where
    nothing can be appended to, each line writes the file anew.
    """

    def __init__(self, workdir: Path, resume_at: int, tensorboard: bool = False):
        self._file = self._tensorboard = self._remote = None
        if jax.process_index() != 0:
            return
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise InputError('--tensorboard needs a package: pip install "prelm_jax[tensorboard]"') from None
            self._tensorboard = SummaryWriter(str(workdir), purge_step=resume_at)
        path = workdir / "metrics.jsonl"
        kept = [line for line in path.read_text().splitlines() if _step(line) <= resume_at] if path.exists() else []
        text = "".join(line + "\n" for line in kept)
        if is_remote(path):
            self._remote, self._file = path, io.StringIO(text)
            self._file.seek(0, io.SEEK_END)
            return
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.replace(path)
        self._file = path.open("a")

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line; what is not finite is written as a string, for JSON has no word for it."""
        if self._file is None:
            return
        line = {"step": step} | {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._remote is not None:
            self._remote.write_text(self._file.getvalue())
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the files."""
        for file in (self._file, self._tensorboard):
            if file is not None:
                file.close()


def _step(line: str) -> float:
    # A line cut off by a kill is dropped as well.
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return json.loads(line)["step"]
    return math.inf


class TrainingProgress:
    """A bar on a terminal, else a plain line for each report; silent on all processes but the first."""

    def __init__(self, start: int, steps: int):
        self._console = Console(stderr=True, quiet=jax.process_index() != 0)
        self._steps = steps
        self._bar = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[report]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("train", total=steps, completed=start, report="compiling …")
            self._bar.start()
        self._clock = (time.monotonic(), start)

    def advance(self, step: int) -> None:
        """`step` steps are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def report(self, step: int, values: dict[str, Any]) -> None:
        """Says how the step went: loss, speed, time left."""
        text = (
            f"loss {values['train/loss']:.3f}  lr {values['train/learning_rate']:.1e}  "
            f"{_short(values['perf/tokens_per_second'])} tokens/s  mfu {values['perf/mfu']:.0%}"
        )
        if self._bar is not None:
            self._bar.update(self._task, report=text)
            return
        seconds = (self._steps - step) * values["perf/seconds_per_step"]
        self.say(f"step {step}/{self._steps}  {text}  {seconds / 60:.1f} min left")

    def say(self, line: str) -> None:
        """A line above the bar."""
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        """Takes the bar down."""
        if self._bar is not None:
            self._bar.stop()


class Report:
    """Hands the metrics of settled steps to the files and to the person; `run`, `model` as in loop.train."""

    def __init__(self, run: Any, model: Any, start: int, writer: MetricsWriter):
        self._run, self._model, self._writer = run, model, writer
        self._progress = TrainingProgress(start, run.steps)
        self._peak = peak_flops(jnp.dtype(run.precision), jax.sharding.get_mesh().size)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Times nothing until the next step has settled: not compilation, evaluation, saving."""
        self._clock = None

    def settle(self, pending: tuple[int, dict, dict] | None) -> None:
        """Waits for a step's metrics, stops at a NaN, writes them down if due."""
        if pending is None:
            return
        step, metrics, batch = pending
        metrics = {name: value.tolist() for name, value in jax.device_get(metrics).items()}
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            raise InputError(
                f"the loss or its gradient is not finite at step {step} (loss {metrics['loss']}, gradient norm "
                f"{metrics['grad_norm']}); the last checkpoint is from before: lower the learning rate or clip harder"
            )
        self._progress.advance(step)
        tokens, places = metrics.pop("tokens")
        if self._clock is None:
            self._clock = (time.perf_counter(), 0, 0, 0.0)
        else:
            began, steps, seen, flops = self._clock
            self._clock = (began, steps + 1, seen + tokens, flops + self._model.flops(batch))
        if step % self._run.log_every:
            return
        values = {f"train/{name}": value for name, value in metrics.items()} | {"train/padding": 1 - tokens / places}
        began, steps, seen, flops = self._clock
        if steps:
            seconds = time.perf_counter() - began
            values |= {
                "perf/seconds_per_step": seconds / steps,
                "perf/tokens_per_second": seen / seconds,
                "perf/mfu": flops / seconds / self._peak,
            }
            self._progress.report(step, values)
            self._clock = (time.perf_counter(), 0, 0, 0.0)
        self._writer.write(step, values)

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """Writes an evaluation down."""
        self._writer.write(step, {f"evaluation/{name}": value for name, value in values.items()})
        self._progress.say(f"step {step}  held-out  " + "  ".join(f"{k} {v:.4f}" for k, v in values.items()))

    def close(self) -> None:
        self._progress.close()


def _short(number: float) -> str:
    for unit in ("", "k"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}M"
