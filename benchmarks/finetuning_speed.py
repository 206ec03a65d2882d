"""Speed of fine-tuning: an epoch of SST-2 by our loop and by Hugging Face's Trainer, in turns; and our compilation.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/finetuning_speed.py --init-from DIR \
        --data ../shared/data/tasks [--json FILE]

Both train the same pretrained BERT on the same 8,000 examples, in batches of 32, with dropout, clipping and AdamW: the
Trainer's padded to their longest row, ours packed. `prelm` sets the tunable itself. The loops are those of `prelm
finetune` and of the Trainer, each in a thread that waits while the other trains: a round is some steps of ours, then
some of the Trainer's. The first round, in which ours compiles, is left out.

Then a fine-tuning of two epochs counts the programs that are compiled without a cache, how long that takes, and how
many of them are compiled in the second epoch. Needs the extra `test`, and `pip install accelerate`.
"""

import dataclasses
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import finetuning
import harness
import jax
import numpy as np
import transformers
import tyro

from prelm_jax.cli.experiments import load_run_or_task
from prelm_jax.finetuning import finetune
from prelm_jax.finetuning.config import FineTuning
from prelm_jax.finetuning.task import prepare_task
from prelm_jax.train import placed_batches
from prelm_jax.training import loop
from prelm_jax.training.metrics import MetricsWriter
from prelm_jax.training.optimizer import AdamW
from prelm_jax.training.step import abstract_state, make_train_step, new_state
from prelm_jax.workdir import WorkDir

EXAMPLES, TEST_EXAMPLES = 8000, 872
COMPILATION = "/jax/core/compile/"


@dataclasses.dataclass(frozen=True)
class Settings:
    """On what, and how long the turns are."""

    init_from: str  # Directory of a BERT.
    data: Path = Path("../shared/data/tasks")
    examples: int = EXAMPLES
    steps: int = 25  # Of each contender in a round.
    compile_examples: int = 640  # Of each of the two epochs whose compilations are counted.
    batch_size: int = 32
    threads: int = 2
    json: Path | None = None


class Turns:
    """Lets threads run one after the other; `seconds` by contender and round."""

    def __init__(self, names: tuple[str, ...]):
        self._names, self._condition = names, threading.Condition()
        self._now, self._began = 0, 0.0
        self.seconds: dict[str, list[float]] = {name: [] for name in names}

    def begin(self, name: str) -> None:
        """Waits for the turn of a contender."""
        with self._condition:
            self._condition.wait_for(lambda: self._names[self._now] == name)
        self._began = time.perf_counter()

    def end(self, name: str) -> None:
        """Ends its turn."""
        self.seconds[name].append(time.perf_counter() - self._began)
        with self._condition:
            self._now = (self._now + 1) % len(self._names)
            self._condition.notify_all()


def task_run(s: Settings, data: finetuning.Data, epochs: int) -> FineTuning:
    """The fine-tuning of ours, by the recipe of the Trainer."""
    recipe = finetuning.Settings()
    optimizer = AdamW(
        recipe.learning_rate,
        warmup_steps=0,
        decay_steps=1,
        eps=finetuning.EPS,
        weight_decay=finetuning.WEIGHT_DECAY,
        clip_norm=finetuning.CLIP_NORM,
    )
    run = cast(FineTuning, load_run_or_task("finetuning:classify")[1])
    files = {"train": data.train, "dev": data.test, "columns": data.columns, "init_from": s.init_from}
    return dataclasses.replace(run, optimizer=optimizer, batch_size=s.batch_size, epochs=epochs, **files)


def train_ours(run: FineTuning, steps: int, turns: Turns, directory: Path) -> None:
    """An epoch in the loop of `prelm finetune`, without evaluation."""
    task = prepare_task(run)
    run, model = task.run, task.config.build()
    batches = task.batches(jax.device_count())
    mesh = run.loop.mesh.build()
    workdir = WorkDir(directory)
    newest: list[Any] = []
    with jax.set_mesh(mesh):
        abstract = abstract_state(model, run.optimizer, run.batch_size, mesh, "replicated")
        state = new_state(model, run.optimizer, run.batch_size, run.seed, abstract, task.initial_params)
        train_step = make_train_step(model, run.optimizer, 1, batches.layout, abstract)

        def step(*arguments: Any) -> Any:
            newest[:] = train_step(*arguments)
            return tuple(newest)

        def in_turns() -> Iterator[Any]:
            for number, item in enumerate(placed_batches(batches, 0, run.loop.steps, mesh)):
                if number % steps == 0:
                    turns.begin(harness.OURS)
                yield item
                if number % steps == steps - 1:
                    jax.block_until_ready(newest)
                    turns.end(harness.OURS)

        writer = MetricsWriter(directory / "metrics.jsonl", 0)
        checkpoints = workdir.open_checkpoints(1)
        loop.train(run, model, state, step, in_turns(), None, checkpoints, writer, directory, 1.0)
        writer.close()
        checkpoints.close()


class TrainerInTurns(transformers.TrainerCallback):
    """Lets the Trainer train in its turns only."""

    def __init__(self, steps: int, turns: Turns):
        self._steps, self._turns = steps, turns

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._steps == 0:
            self._turns.begin("trainer")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._steps == 0:
            self._turns.end("trainer")


def compare(s: Settings, directory: Path) -> dict[str, Any]:
    """Seconds of each round but the first, and examples per second."""
    steps = s.examples // s.batch_size // s.steps * s.steps
    limit = (steps * s.batch_size, 64)
    recipe = finetuning.Settings(
        data=s.data, epochs=1, batch_size=s.batch_size, directory=directory, limit=limit, seeds=1
    )
    data = finetuning.read_data(recipe, "sst2")
    turns = Turns((harness.OURS, "trainer"))
    peer = finetuning.trainer(recipe, data, s.init_from, 0, [TrainerInTurns(s.steps, turns)])
    other = threading.Thread(target=peer.train, daemon=True)
    other.start()
    (directory / "run").mkdir()
    train_ours(task_run(s, data, 1), s.steps, turns, directory / "run")
    other.join()
    seconds = {name: np.array(values[1:]) for name, values in turns.seconds.items()}
    ratio = np.percentile(seconds["trainer"] / seconds[harness.OURS], (25, 50, 75))
    for name, values in seconds.items():
        speeds = ", ".join(f"{s.steps * s.batch_size / x:.1f}" for x in np.percentile(values, (25, 50, 75)))
        print(f"{name}: {s.steps * s.batch_size * len(values) / values.sum():.1f} examples/s (quartiles {speeds})")
    print(f"ours is {ratio[1]:.2f} × as fast ({ratio[0]:.2f} to {ratio[2]:.2f}) over {len(values)} rounds")
    return turns.seconds | {"ratio": ratio.tolist()}


def count_programs(s: Settings, directory: Path) -> dict[str, Any]:
    """What is compiled in a fine-tuning of two epochs, with an evaluation after each."""
    recipe = finetuning.Settings(data=s.data, directory=directory, limit=(s.compile_examples, TEST_EXAMPLES))
    data = finetuning.read_data(recipe, "sst2")
    events: list[tuple[str, str, float]] = []
    evaluated: list[int] = []

    def listen(event: str, duration: float, fun_name: str = "", **_: Any) -> None:
        if event.startswith(COMPILATION):
            events.append((event.removeprefix(COMPILATION), fun_name, duration))

    class Counting(finetune.DevEvaluation):
        def __call__(self, *arguments: Any) -> dict[str, float]:
            found = super().__call__(*arguments)
            evaluated.append(len(events))
            return found

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listen)
    original, finetune.DevEvaluation = finetune.DevEvaluation, Counting
    try:
        finetune.finetune(task_run(s, data, 2), directory / "compiled", seeds=1)
    finally:
        finetune.DevEvaluation = original
    compiled = [place for place, (event, _, _) in enumerate(events) if event == "backend_compile_duration"]
    names = [events[place][1] for place in compiled]
    seconds = {event: sum(each[2] for each in events if each[0] == event) for event, _, _ in events}
    after = [events[place][1] for place in compiled if place >= evaluated[0]]
    large = [name for name in names if "train_step" in name or "predict" in name]
    print(f"compiled: {len(names)} programs, {len(large)} of them train or evaluation steps: {large}")
    print(f"seconds: {', '.join(f'{event} {value:.1f}' for event, value in seconds.items())}")
    print(f"compiled after the first epoch: {after or 'none'}")
    return {"programs": names, "seconds": seconds, "after_the_first_epoch": after}


def main(s: Settings) -> None:
    transformers.logging.set_verbosity_error()
    harness.limit_threads(s.threads)
    record = {"machine": harness.machine(), "settings": dataclasses.asdict(s) | {"json": None, "data": None}}
    harness.print_machine(record["machine"])
    harness.torch_device()
    with tempfile.TemporaryDirectory() as name:
        record["compilation"] = count_programs(s, Path(name))
        harness.write_json(s.json, record)
        record["speed"] = compare(s, Path(name))
        harness.write_json(s.json, record)


if __name__ == "__main__":
    main(tyro.cli(Settings))
