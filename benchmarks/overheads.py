"""What a run costs beside its steps: real batches, checkpoints, the start.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/overheads.py --corpus 'corpus/*.txt.xz' [--json FILE]

Batches and checkpoints are measured on `experiments/bert.py:mini`, in turns with plain steps on one constant batch; the
start on `experiments/bert.py:demo`, as its users see it: from the command to the first step, with the vocabulary and
the token store already made, without and with the compiled programs of an earlier start.
"""

import dataclasses
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

from prelm_jax import pretrain
from prelm_jax.text import store
from prelm_jax.text.corpus import Corpus
from prelm_jax.training import loop
from prelm_jax.training.checkpoint import Checkpoints

EXPERIMENTS = Path(__file__).parents[1] / "experiments" / "bert.py"
SAVE_EVERY = 200


@dataclasses.dataclass(frozen=True)
class Settings:
    """`steps` are timed together, `rounds` times; `starts`: how often the command is started cold, and warm."""

    corpus: tuple[str, ...]
    steps: int = 20
    rounds: int = 8
    starts: int = 3
    threads: int = 2
    json: Path | None = None


class Mini:
    """The mini experiment, ready to step on whatever batch."""

    def __init__(self, sources: tuple[str, ...]):
        run = dataclasses.replace(runpy.run_path(str(EXPERIMENTS))["mini"](), corpus=sources)
        corpus = Corpus(run.corpus, run.held_out)
        tokenizer = run.tokenizer.build(corpus)
        training, _ = store.prepare(corpus, tokenizer)
        self.batches = run.data.build(training, tokenizer, run.batch_size, run.seed)
        model = dataclasses.replace(run.model, vocab_size=tokenizer.vocab_size).build()
        self.mesh = run.mesh.build()
        jax.set_mesh(self.mesh)
        abstract = loop.abstract_state(model, run.optimizer, run.batch_size, self.mesh, run.mesh.parameters)
        self.state = loop.new_state(model, run.optimizer, run.batch_size, run.seed, abstract)
        self._step = loop.make_train_step(model, run.optimizer, run.accumulate, self.batches.layout)
        self._key = loop.Keys.of(run.seed).dropout
        _, self.constant = next(self.real(0, 1))
        self.seconds(lambda: None, [self.constant] * 3)

    def real(self, start: int, stop: int) -> Any:
        """The batches of a run, from its loader."""
        return pretrain._placed(self.batches, start, stop, self.mesh)

    def seconds(self, before: Callable[[], Any], batches: Any, after: Callable[[], Any] = lambda: None) -> float:
        """Of a step on each batch, as in the loop: the host looks at the metrics of the step before."""
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


def batches_and_checkpoints(s: Settings) -> dict[str, list[float]]:
    """Quartiles over rounds of `steps` steps each: plain, on real batches, with a save that they wait for."""
    mini, constant = Mini(s.corpus), lambda: [mini.constant] * s.steps
    times = {"plain": [], "real batches": [], "one save": []}
    blocked = []
    with tempfile.TemporaryDirectory() as directory:
        checkpoints = Checkpoints(Path(directory) / "checkpoints", keep=3)
        for r in range(s.rounds):

            def save(r: int = r) -> None:
                start = time.perf_counter()
                checkpoints.save(r + 1, mini.state.items())
                blocked.append(time.perf_counter() - start)

            times["plain"].append(mini.seconds(lambda: None, constant()))
            # The loader starts before the clock, and builds as many batches as are used and a few more.
            real = mini.real(r * s.steps, (r + 2) * s.steps)
            next(real)
            times["real batches"].append(
                mini.seconds(lambda: None, (batch for _, (_, batch) in zip(range(s.steps), real, strict=False)))
            )
            real.close()
            times["one save"].append(mini.seconds(save, constant(), checkpoints.settle))
        checkpoints.close()
    plain, real, saving = (np.array(t) for t in times.values())
    return {
        "seconds_per_step": _quartiles(plain / s.steps),
        "real_batches_percent": _quartiles(100 * (real / plain - 1)),
        "checkpoint_percent": _quartiles(100 * (saving - plain) / (plain / s.steps * SAVE_EVERY)),
        "save_blocks_seconds": _quartiles(np.array(blocked)),
    }


def start(starts: int) -> dict[str, list[float]]:
    """Quartiles of the seconds from the command to the report on its first steps, two of a few milliseconds."""
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
                    if line.startswith("step 2/2"):
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
    harness.introduce(record["machine"])
    record["start"] = start(settings.starts)
    record["mini"] = batches_and_checkpoints(settings)
    for title, figures in record.items():
        for name, value in figures.items() if title in ("start", "mini") else ():
            low, median, high = value
            print(f"{title}, {name.replace('_', ' ')}: {median:.3f} (quartiles {low:.3f} to {high:.3f})")
    harness.write_json(settings.json, record)


if __name__ == "__main__":
    main(tyro.cli(Settings))
