"""From batches to a trained model in a work directory: what pretraining and fine-tuning share."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import jax

from prelm_jax import report
from prelm_jax.data import loader
from prelm_jax.run import Run, RunRecord
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.training import loop, memory
from prelm_jax.training.contract import Batch, Batches, Model, Params
from prelm_jax.training.memory import StepMemory
from prelm_jax.training.sharding import abstract_batch, shard_batch
from prelm_jax.training.step import Keys, TrainState, abstract_state, make_train_step, new_state
from prelm_jax.workdir import WorkDir, baseline_metrics


class Evaluation(Protocol):
    """How a model does on text that it is not trained on."""

    def __call__(self, params: Params, carry: Params, mesh: jax.sharding.Mesh) -> dict[str, float]:
        """Metrics by name."""

    def baselines(self) -> dict[str, dict[str, float]]:
        """metric -> trivial baseline -> value, on the same text."""


def train(
    run: Run,
    workdir: WorkDir,
    record: RunRecord,
    tokenizer: Tokenizer,
    model: Model,
    batches: Batches,
    evaluation: Evaluation,
    start: Callable[[Params], Params] | None = None,
    tokens_per_word: float = 1.0,
) -> dict[str, float]:
    """Trains a model up to `run.loop.steps` in a work directory; returns its last evaluation.

    Order of start: the newest checkpoint of the work directory, else `start(fresh parameters)`, else fresh parameters.
    The directory is claimed for the run (`record`, `tokenizer`) when nothing can be refused any more.

    Raises InputError for what the user can mend, and Preempted when SIGTERM stopped the run, after saving.
    """
    settings = run.loop
    mesh = settings.mesh.build()
    run.check_batch_size(mesh.size)
    example = batches[0]
    model.check(example)
    workdir.check(record)
    # The trivial baselines of a run are computed once, unless its evaluation changes.
    known = workdir.exists() and workdir.read_record().loop["evaluate_batches"] == settings.evaluate_batches
    with jax.set_mesh(mesh), contextlib.closing(workdir.open_checkpoints(settings.keep)) as checkpoints:
        abstract = abstract_state(model, run.optimizer, run.batch_size, mesh, settings.mesh.parameters)
        with memory.explained("the train state", "try --mesh.parameters fsdp or more devices"):
            restored = checkpoints.restore(abstract.items())
            if restored is None:
                state = new_state(model, run.optimizer, run.batch_size, run.seed, abstract, start)
            else:
                state = TrainState.from_items(restored[1])
        arguments = (abstract, abstract_batch(example, batches.layout, mesh), Keys.from_seed(run.seed).dropout)

        def make_step(accumulate: int) -> jax.stages.Wrapped:
            return make_train_step(model, run.optimizer, accumulate, batches.layout, abstract)

        step_memory = StepMemory(make_step, arguments, run.accumulate, run.batch_size // mesh.size, mesh)
        done = int(state.step)
        report.print_run_header(run, model, example, state.params, done, mesh)
        if done < settings.steps:
            step_memory.check()
        workdir.claim(record, tokenizer)

        def evaluate(state: TrainState) -> dict[str, float]:
            with memory.explained("an evaluation", "lower --batch-size"):
                return evaluation(state.params, state.carry, mesh)

        steps = placed_batches(batches, done, settings.steps, mesh)
        with contextlib.closing(workdir.write_metrics(done, settings.tensorboard)) as writer, step_memory:
            if jax.process_index() == 0 and not (known and workdir.read_baselines()):
                writer.write(done, baseline_metrics(evaluation.baselines()))
            state, values = loop.train(
                run, model, state, step_memory.step, steps, evaluate, checkpoints, writer, workdir.path, tokens_per_word
            )
        return values or evaluate(state)


def placed_batches(batches: Batches, start: int, stop: int, mesh: jax.sharding.Mesh) -> Iterator[tuple[int, Batch]]:
    """(step, batch on the devices) of some steps; each process builds and feeds an equal part of the rows."""
    count = batches.batch_size // jax.process_count()
    first = count * jax.process_index()
    rows = slice(first, first + count)
    return loader.prefetch(batches, start, stop, rows, partial(shard_batch, layout=batches.layout, mesh=mesh))
