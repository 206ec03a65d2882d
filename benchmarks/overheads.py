"""Costs of a run besides its steps: real batches, checkpoints, startup.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/overheads.py --corpus 'corpus/*.txt.xz' [--json FILE]

Batches and checkpoints are measured on `experiments/bert.py:mini`, interleaved with plain steps on one constant batch;
startup on `experiments/bert.py:demo`, from the command to the first step, with a prepared corpus, without and with the
compiled programs of an earlier start.
"""

import contextlib
import dataclasses
import itertools
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import jax
import numpy as np
import tyro

from prelm_jax import train
from prelm_jax.corpus import prepare as preparation
from prelm_jax.corpus.documents import Corpus
from prelm_jax.tokenizers.build import build as build_tokenizer
from prelm_jax.training.checkpoint import Checkpoints
from prelm_jax.training.step import Keys, abstract_state, make_train_step, new_state

EXPERIMENTS = Path(__file__).parents[1] / "experiments" / "bert.py"
SAVE_EVERY = 200


@dataclasses.dataclass(frozen=True)
class Settings:
    """`rounds`: rounds of five steps on real batches and five plain ones; a fifth as many, of 20 steps, for saves.
    `starts`: number of cold and of warm starts."""

    corpus: tuple[str, ...]
    rounds: int = 40
    starts: int = 3
    threads: int = 2
    json: Path | None = None


class Mini:
    """The mini experiment, ready to run steps on any batch."""

    def __init__(self, sources: tuple[str, ...]):
        run = dataclasses.replace(runpy.run_path(str(EXPERIMENTS))["mini"](), corpus=sources)
        corpus = Corpus(run.corpus, run.held_out)
        tokenizer = build_tokenizer(run.tokenizer, corpus)
        training, _ = preparation.prepare(corpus, tokenizer)
        self.batches = run.data.build(training, tokenizer, run.batch_size, run.seed)
        model = dataclasses.replace(run.model, vocab_size=tokenizer.vocab_size).build()
        self.mesh = run.loop.mesh.build()
        jax.set_mesh(self.mesh)
        abstract = abstract_state(model, run.optimizer, run.batch_size, self.mesh, run.loop.mesh.parameters)
        self.state = new_state(model, run.optimizer, run.batch_size, run.seed, abstract)
        self._step = make_train_step(model, run.optimizer, run.accumulate, self.batches.layout, abstract)
        self._key = Keys.from_seed(run.seed).dropout
        _, self.constant = next(self.real(0, 1))
        self.seconds(lambda: None, [self.constant] * 3)

    def real(self, start: int, stop: int) -> Any:
        """Batches of the run, from its loader."""
        return train.placed_batches(self.batches, start, stop, self.mesh)

    def seconds(self, before: Callable[[], Any], batches: Any, after: Callable[[], Any] = lambda: None) -> float:
        """Seconds of a step on each batch; as in the loop, the host reads the metrics of the step before."""
        pending = None
        start = time.perf_counter()
        before()
        for batch in batches:
            self.state, metrics = self._step(self.state, batch, self._key)
            jax.device_get(pending)
            pending = metrics
        jax.block_until_ready((self.state, pending))
        after()
        return time.perf_counter() - start


def real_batches(mini: Mini, rounds: int, steps: int = 5) -> dict[str, list[float]]:
    """Quartiles over rounds of steps on a constant batch and on real ones from one loader.

    The loader stays a few batches ahead, so each round pays for as many batches as it uses.
    """
    plain, real = [], []
    with contextlib.closing(mini.real(0, (rounds + 1) * steps)) as loader:
        batches = (batch for _, batch in loader)
        for _ in range(rounds + 1):
            plain.append(mini.seconds(lambda: None, [mini.constant] * steps))
            real.append(mini.seconds(lambda: None, itertools.islice(batches, steps)))
    plain, real = np.array(plain[1:]), np.array(real[1:])
    return {"seconds_per_step": _quartiles(plain / steps), "real_batches_percent": _quartiles(100 * (real / plain - 1))}


def saves(mini: Mini, rounds: int, steps: int = 20) -> dict[str, list[float]]:
    """Quartiles over rounds of steps without a save, and with one that they wait for."""
    plain, saving, blocked = [], [], []
    with (
        tempfile.TemporaryDirectory() as directory,
        contextlib.closing(Checkpoints(Path(directory) / "checkpoints", keep=3)) as checkpoints,
    ):

        def save() -> None:
            start = time.perf_counter()
            checkpoints.save(len(plain), mini.state.items())
            blocked.append(time.perf_counter() - start)

        for _ in range(rounds):
            plain.append(mini.seconds(lambda: None, [mini.constant] * steps))
            saving.append(mini.seconds(save, [mini.constant] * steps, checkpoints.wait))
    plain, saving = np.array(plain), np.array(saving)
    return {
        "checkpoint_percent": _quartiles(100 * (saving - plain) / (plain / steps * SAVE_EVERY)),
        "save_blocks_seconds": _quartiles(np.array(blocked)),
    }


def start(starts: int) -> dict[str, list[float]]:
    """Quartiles of the seconds from the command to its report after two steps of a few milliseconds."""
    with tempfile.TemporaryDirectory() as directory:
        cache = Path(directory) / "cache"
        command = [sys.executable, "-m", "prelm_jax", "pretrain", f"{EXPERIMENTS}:demo", "--steps", "2"]

        def first_step(workdir: Path) -> float:
            began = time.perf_counter()
            with subprocess.Popen(
                [*command, "--workdir", str(workdir), "--log-every", "1"],
                env=os.environ | {"PRELM_CACHE": str(cache)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            ) as process:
                said = []
                for line in process.stderr:
                    said.append(line)
                    if line.startswith("train: 2/2 "):
                        break
                seconds = time.perf_counter() - began
                process.communicate()
            if process.returncode:
                raise SystemExit("".join(said))
            return seconds

        first_step(Path(directory) / "prepare")
        times = {"without": [], "with": []}
        for i in range(starts):
            shutil.rmtree(cache / "xla")
            for name, seconds in times.items():
                seconds.append(first_step(Path(directory) / f"{i}-{name}"))
    return {f"{name}_compiled_programs_seconds": _quartiles(np.array(t)) for name, t in times.items()}


def _quartiles(x: np.ndarray) -> list[float]:
    return np.percentile(x, (25, 50, 75)).tolist()


def main(settings: Settings) -> None:
    harness.limit_threads(settings.threads)
    record = {"machine": harness.machine(), "settings": dataclasses.asdict(settings) | {"json": None}}
    harness.print_machine(record["machine"])
    record["start"] = start(settings.starts)
    mini = Mini(settings.corpus)
    record["mini"] = real_batches(mini, settings.rounds) | saves(mini, settings.rounds // 5)
    for title, figures in record.items():
        for name, value in figures.items() if title in ("start", "mini") else ():
            low, median, high = value
            print(f"{title}, {name.replace('_', ' ')}: {median:.3f} (quartiles {low:.3f} to {high:.3f})")
    harness.write_json(settings.json, record)


if __name__ == "__main__":
    main(tyro.cli(Settings))
