"""A run before hours are spent on it: prepared, its step compiled and timed. Only the cache is written."""

import dataclasses
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from rich.table import Table

from prelm_jax.finetuning.config import FineTuning
from prelm_jax.finetuning.task import prepare_task
from prelm_jax.pretraining import prepare, with_vocabulary
from prelm_jax.run import Run, Training, check_batch_size
from prelm_jax.train import check_schedule, placed_batches, step_memory
from prelm_jax.training import memory
from prelm_jax.training.chips import GiB
from prelm_jax.training.contract import Batches, Model
from prelm_jax.training.step import Keys, abstract_state, new_state

TIMED_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """What a run will cost on the devices of this machine."""

    parameters: int
    reading: str  # What a step reads, and how full its rows are.
    steps: int
    tokens: float  # Of a step, without padding: the mean of those that were timed; of a task, of all.
    corpus_tokens: int  # Of the training side.
    memory_needed: float  # Bytes of a device.
    memory_available: float
    checkpoint_bytes: int
    checkpoints: int  # The largest number on disk at once.
    compile_seconds: float
    step_seconds: float
    seeds: int = 1  # Trained one after the other.

    @property
    def passes(self) -> float:
        """How often the training reads the text."""
        return self.steps * self.tokens / self.corpus_tokens

    @property
    def hours(self) -> float:
        """Of all steps, without evaluations and saves."""
        return (self.compile_seconds + self.seeds * self.steps * self.step_seconds) / 3600


def rehearse(run: Run) -> Rehearsal:
    """Prepares the corpus of a run, compiles its step, and times three steps. Raises InputError as `pretrain` does.

    print_table(rehearsal_table(rehearse(run)))
    """
    prepared = prepare(run)
    run = dataclasses.replace(run, model=with_vocabulary(run.model, prepared.tokenizer))
    batches = run.data.build(prepared.training, prepared.tokenizer, run.batch_size, run.seed)
    model, first = run.model.build(jnp.dtype(run.precision)), range(1 + TIMED_STEPS)
    return _measure(run, model, batches, [first], run.data.describe(batches), prepared.training.num_tokens)


def rehearse_task(run: FineTuning, seeds: int) -> Rehearsal:
    """Reads the files of a task, and compiles and times the steps of each width. Raises InputError as `finetune` does.

    print_table(rehearsal_table(rehearse_task(run, seeds=3)))
    """
    task = prepare_task(run)
    run, rows = task.run, task.train_rows
    batches = task.batches(run.loop.mesh.build().size)
    by_width: dict[int, list[int]] = {}
    for step in range(min(run.loop.steps, -(-len(rows) // run.batch_size))):  # Of an epoch.
        by_width.setdefault(batches.width(step), []).append(step)
    widest_first = sorted(by_width, reverse=True)
    total = sum(map(len, by_width.values()))
    shares = ", ".join(f"{width} tokens ({len(by_width[width]) / total:.0%})" for width in widest_first)
    reading = f"{len(task.train_examples):,} examples in {len(rows):,} rows; batches of {batches.batch_size} × {shares}"
    tokens = sum(len(text.ids) for row in rows for text in row.texts)
    model, groups = task.config.build(jnp.dtype(run.precision)), [by_width[width] for width in widest_first]
    measured = _measure(run, model, batches, groups, reading, tokens)
    return dataclasses.replace(measured, tokens=tokens * run.batch_size / len(rows), seeds=seeds)


def _measure(
    run: Training,
    model: Model,
    batches: Batches,
    groups: Sequence[Sequence[int]],
    reading: str,
    corpus_tokens: int,
) -> Rehearsal:
    """Compiles the steps of a run and times some of each group.

    groups: steps whose batches have one shape, the largest first, each as large as there are such steps.
    """
    settings = run.loop
    mesh = settings.mesh.build()
    check_batch_size(run, mesh.size)
    check_schedule(run, resuming=False)
    example = batches[groups[0][0]]
    model.check(example)
    count_tokens, tokens, step_seconds = jax.jit(model.tokens), 0.0, 0.0
    with jax.set_mesh(mesh), memory.explained("the train state", "try --mesh.parameters fsdp or more devices"):
        abstract = abstract_state(model, run.optimizer, run.batch_size, mesh, settings.mesh.parameters)
        program = step_memory(run, model, abstract, example, batches.layout, mesh)
        began = time.perf_counter()
        program.check()
        compile_seconds = time.perf_counter() - began
        state = new_state(model, run.optimizer, run.batch_size, run.seed, abstract)
        key = Keys.from_seed(run.seed).dropout
        for steps in groups:
            share, times = len(steps) / sum(map(len, groups)), []
            for step in [*steps, *[steps[0]] * TIMED_STEPS][: 1 + TIMED_STEPS]:
                for _, batch in placed_batches(batches, step, step + 1, mesh):
                    tokens += share * int(count_tokens(batch)[0]) / (1 + TIMED_STEPS)
                    began = time.perf_counter()
                    state, _ = jax.block_until_ready(program.step(state, batch, key))
                    times.append(time.perf_counter() - began)
            step_seconds += share * min(times)
            compile_seconds += times[0] - min(times)  # The first step of a shape is compiled.
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state.items()))
        return Rehearsal(
            parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
            reading=reading,
            steps=settings.steps,
            tokens=tokens,
            corpus_tokens=corpus_tokens,
            memory_needed=program.needed,
            memory_available=memory.available(mesh),
            checkpoint_bytes=size,
            # The best is kept as well, and one is being written.
            checkpoints=min(settings.keep + 2, 1 + settings.steps // settings.save_every),
            compile_seconds=compile_seconds,
            step_seconds=step_seconds,
        )


def rehearsal_table(rehearsal: Rehearsal) -> Table:
    """The cost of a run, for a person who is about to start it."""
    x, table = rehearsal, Table("", "nothing was trained or saved")
    table.add_row("parameters", f"{x.parameters:,}")
    table.add_row("text", x.reading)
    table.add_row("tokens", f"{x.tokens:,.0f} a step, {x.steps * x.tokens:,.0f} in {x.steps:,} steps, without padding")
    table.add_row("passes over the text", f"{x.passes:.2f}, of {x.corpus_tokens:,} tokens each")
    table.add_row("memory of a device", f"{x.memory_needed / GiB:.2f} of {x.memory_available / GiB:.2f} GiB")
    number = x.seeds * x.checkpoints
    disk = f"at most {number} × {x.checkpoint_bytes / 1e6:,.1f} MB: {number * x.checkpoint_bytes / 1e9:,.2f} GB"
    table.add_row("disk for checkpoints", disk)
    table.add_row("seconds per step", f"{x.step_seconds:.3f}, and {x.compile_seconds:.0f} to compile")
    seeds = f" for {x.seeds} seeds" if x.seeds > 1 else ""
    table.add_row("hours in all", f"{x.hours:.2f}{seeds}, without evaluations and saves")
    return table
