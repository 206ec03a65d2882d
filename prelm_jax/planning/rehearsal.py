"""A run before hours are spent on it: prepared, its step compiled and timed. Only the cache is written."""

import dataclasses
import time

import jax
import jax.numpy as jnp
from rich.table import Table

from prelm_jax.pretraining import prepare, with_vocabulary
from prelm_jax.run import Run, check_batch_size
from prelm_jax.train import check_schedule, placed_batches, step_memory
from prelm_jax.training import memory
from prelm_jax.training.chips import GiB
from prelm_jax.training.step import Keys, abstract_state, new_state

TIMED_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """What a run will cost on the devices of this machine."""

    parameters: int
    reading: str  # What a step reads, and how full its rows are.
    steps: int
    tokens: float  # Of a step, without padding: the mean of the first ones.
    corpus_tokens: int  # Of the training side.
    memory_needed: float  # Bytes of a device.
    memory_available: float
    checkpoint_bytes: int
    checkpoints: int  # The largest number on disk at once.
    compile_seconds: float
    step_seconds: float

    @property
    def passes(self) -> float:
        """How often the training reads the text."""
        return self.steps * self.tokens / self.corpus_tokens

    @property
    def hours(self) -> float:
        """Of all steps, without evaluations and saves."""
        return (self.compile_seconds + self.steps * self.step_seconds) / 3600


def rehearse(run: Run) -> Rehearsal:
    """Prepares the corpus of a run, compiles its step, and times three steps. Raises InputError as `pretrain` does.

    print_table(rehearsal_table(rehearse(run)))
    """
    settings, prepared = run.loop, prepare(run)
    mesh = settings.mesh.build()
    check_batch_size(run, mesh.size)
    check_schedule(run, resuming=False)
    run = dataclasses.replace(run, model=with_vocabulary(run.model, prepared.tokenizer))
    model = run.model.build(jnp.dtype(run.precision))
    batches = run.data.build(prepared.training, prepared.tokenizer, run.batch_size, run.seed)
    example = batches[0]
    model.check(example)
    count_tokens, tokens = jax.jit(model.tokens), 0
    with jax.set_mesh(mesh), memory.explained("the train state", "try --mesh.parameters fsdp or more devices"):
        abstract = abstract_state(model, run.optimizer, run.batch_size, mesh, settings.mesh.parameters)
        program = step_memory(run, model, abstract, example, batches.layout, mesh)
        began = time.perf_counter()
        program.check()
        compile_seconds = time.perf_counter() - began
        state = new_state(model, run.optimizer, run.batch_size, run.seed, abstract)
        key, times = Keys.from_seed(run.seed).dropout, []
        for _, batch in placed_batches(batches, 0, 1 + TIMED_STEPS, mesh):
            tokens += int(count_tokens(batch)[0])
            began = time.perf_counter()
            state, _ = jax.block_until_ready(program.step(state, batch, key))
            times.append(time.perf_counter() - began)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state.items()))
        return Rehearsal(
            parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
            reading=run.data.describe(batches),
            steps=settings.steps,
            tokens=tokens / len(times),
            corpus_tokens=prepared.training.num_tokens,
            memory_needed=program.needed,
            memory_available=memory.available(mesh),
            checkpoint_bytes=size,
            # The best is kept as well, and one is being written.
            checkpoints=min(settings.keep + 2, 1 + settings.steps // settings.save_every),
            compile_seconds=compile_seconds,
            step_seconds=min(times),
        )


def rehearsal_table(rehearsal: Rehearsal) -> Table:
    """The cost of a run, for a person who is about to start it."""
    x, table = rehearsal, Table("", "nothing was trained or saved")
    table.add_row("parameters", f"{x.parameters:,}")
    table.add_row("text", x.reading)
    table.add_row("tokens", f"{x.tokens:,.0f} a step, {x.steps * x.tokens:,.0f} in {x.steps:,} steps, without padding")
    table.add_row("passes over the text", f"{x.passes:.2f}, of {x.corpus_tokens:,} tokens each")
    table.add_row("memory of a device", f"{x.memory_needed / GiB:.2f} of {x.memory_available / GiB:.2f} GiB")
    disk = x.checkpoints * x.checkpoint_bytes
    table.add_row(
        "disk for checkpoints", f"at most {x.checkpoints} × {x.checkpoint_bytes / 1e6:,.1f} MB: {disk / 1e9:,.2f} GB"
    )
    table.add_row("seconds per step", f"{x.step_seconds:.3f}, and {x.compile_seconds:.0f} to compile")
    table.add_row("hours in all", f"{x.hours:.2f}, without evaluations and saves")
    return table
