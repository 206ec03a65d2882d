"""From batches to a trained model in a work directory: what pretraining and fine-tuning share."""

import bisect
import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Protocol

import jax

from prelm_jax.data import loader
from prelm_jax.errors import InputError
from prelm_jax.inference.base import Sample
from prelm_jax.report import summary
from prelm_jax.report.dashboard import Dashboard
from prelm_jax.run import RunRecord, Training, TrainingT, check_batch_size
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.training import loop, memory
from prelm_jax.training.contract import Batch, Batches, HostBatch, Layout, Model, Params
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

    def describe(self, values: Mapping[str, float]) -> str:
        """Metrics as a line for people."""

    def sample(self, params: Params) -> list[Sample]:
        """What the model does with a few of the texts; process 0 asks. [] if that cannot be shown."""


def train(
    run: TrainingT,
    workdir: WorkDir,
    record: RunRecord,
    tokenizer: Tokenizer,
    model: Model,
    batches: Batches,
    evaluation: Evaluation | None,
    start: Callable[[Params], Params] | None = None,
    tokens_per_word: float = 1.0,
    extend_to: int | None = None,
    largest: HostBatch | None = None,
) -> tuple[int, dict[str, float]]:
    """Trains a model up to `run.loop.steps` in a work directory; returns its last step and its evaluation there.

    Without an `evaluation`, these metrics are {}.

    Order of start: the newest checkpoint of the work directory, else `start(fresh parameters)`, else fresh parameters.
    The directory is claimed for the run (`record`, `tokenizer`) when nothing can be refused any more.

    With `extend_to`, a run that has a checkpoint gets a new segment: from there on the optimizer of `run`, its schedule
    ending at that step. A run with extensions trains up to the end of the last one, whatever `run.loop.steps` says.

    largest: a batch of the largest shapes, whose step must fit into memory; None: all batches have the same shapes.

    Raises InputError for what the user can mend, and Preempted when SIGTERM stopped the run, after saving.
    """
    settings = run.loop
    mesh = settings.mesh.build()
    check_batch_size(run, mesh.size)
    if evaluation is None and settings.stop_after_no_gain is not None:
        raise InputError(f"--stop-after-no-gain {settings.stop_after_no_gain}: there is no text to evaluate on")
    example = batches[0] if largest is None else largest
    model.check(example)
    workdir.check(record, run, extending=extend_to is not None)
    earlier = workdir.read_record() if workdir.exists() else None
    if earlier is not None:
        record = record.resuming(earlier)
    # The trivial baselines of a run are computed once, unless its evaluation changes.
    known = earlier is not None and earlier.loop.get("evaluate_batches") == settings.evaluate_batches
    with jax.set_mesh(mesh), contextlib.closing(workdir.open_checkpoints(settings.keep)) as checkpoints:
        abstract = abstract_state(model, run.optimizer, run.batch_size, mesh, settings.mesh.parameters)
        with memory.explained("the train state", "try --mesh.parameters fsdp or more devices"):
            restored = checkpoints.restore(abstract.items())
        done = 0 if restored is None else restored[0]
        if extend_to is not None:
            if earlier is None:
                raise InputError(f"--extend-to {extend_to}: {workdir.path} holds no run to train on")
            record = record.extended(earlier, done, extend_to, run.optimizer)
        parts = record.parts(run)
        run = parts[-1]
        check_schedule(parts[-1], resuming=earlier is not None)
        with memory.explained("the train state", "try --mesh.parameters fsdp or more devices"):
            if restored is None:
                state = new_state(model, parts[0].optimizer, run.batch_size, run.seed, abstract, start)
            else:
                state = TrainState.from_items(restored[1])
        # The last part is called even if it is done: an evaluation may have been put off.
        left = [part for part in parts if done < part.loop.steps or part is parts[-1]]
        programs = [step_memory(part, model, abstract, example, batches.layout, mesh) for part in left]
        summary.print_run_header(record.model_type, run, model, example, state.params, done, mesh)
        if done < left[0].loop.steps:
            programs[0].check()
        workdir.claim(record, tokenizer)

        def evaluate(state: TrainState) -> dict[str, float]:
            assert evaluation is not None
            with memory.explained("an evaluation", "lower --batch-size"):
                values = evaluation(state.params, state.carry, mesh)
                if jax.process_index() == 0 and (samples := evaluation.sample(state.params)):
                    workdir.write_samples(int(state.step), samples)
                return values

        values = None
        dashboard = Dashboard(workdir, active=jax.process_index() == 0)
        with dashboard, contextlib.closing(workdir.write_metrics(done, settings.tensorboard)) as writer:
            if evaluation is not None and jax.process_index() == 0 and not (known and workdir.read_baselines()):
                writer.write(done, baseline_metrics(evaluation.baselines()))
            for part, program in zip(left, programs, strict=True):
                steps = placed_batches(batches, int(state.step), part.loop.steps, mesh)
                with program.explained():
                    state, values = loop.train(
                        part,
                        model,
                        state,
                        program.step,
                        steps,
                        None
                        if evaluation is None
                        else loop.Evaluation(evaluate, evaluation.describe, dashboard.refresh),
                        checkpoints,
                        writer,
                        workdir.path,
                        tokens_per_word,
                    )
        if evaluation is None:
            return int(state.step), {}
        return int(state.step), values or evaluate(state)


def check_schedule(run: Training, resuming: bool) -> None:
    """Raises InputError where steps would be trained at a learning rate of zero.

    The last thousandth of them is not looked at: there a cosine is zero in float32.
    """

    def is_zero(step: int) -> bool:
        return float(run.optimizer.schedule(step)) == 0

    steps = run.loop.steps
    if steps > 1 and is_zero(999 * steps // 1000):
        end = 1 + bisect.bisect_left(range(1, steps), True, key=is_zero)
        remedy = f"extend the run with --extend-to {steps}" if resuming else "raise --optimizer.decay-steps"
        raise InputError(f"--steps {steps}: the learning rate is zero from step {end} on; {remedy}")


def step_memory(
    run: Training,
    model: Model,
    state: TrainState,
    example: HostBatch,
    layout: Mapping[str, Layout],
    mesh: jax.sharding.Mesh,
) -> StepMemory:
    """The compiled train step of a run; `state`: abstract, with shardings."""

    def make_step(accumulate: int) -> jax.stages.Wrapped:
        return make_train_step(model, run.optimizer, accumulate, layout, state)

    arguments = (state, abstract_batch(example, layout, mesh), Keys.from_seed(run.seed).dropout)
    return StepMemory(make_step, arguments, run.accumulate, run.batch_size // mesh.size, mesh)


def placed_batches(batches: Batches, start: int, stop: int, mesh: jax.sharding.Mesh) -> Iterator[tuple[int, Batch]]:
    """(step, batch on the devices) of some steps; each process builds and feeds an equal part of the rows."""
    count = batches.batch_size // jax.process_count()
    first = count * jax.process_index()
    rows = slice(first, first + count)
    return loader.prefetch(batches, start, stop, rows, partial(shard_batch, layout=batches.layout, mesh=mesh))
