"""The train loop. It knows models, optimizers and batches by `training.contract` only."""

import contextlib
import dataclasses
import math
import os
import signal
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P

from prelm_jax.bounds import Bounds, NotNegative, Positive
from prelm_jax.errors import InputError, Preempted
from prelm_jax.storage import is_remote
from prelm_jax.training.checkpoint import Checkpoints, Record
from prelm_jax.training.contract import Batch, Model, OptimizerConfig
from prelm_jax.training.metrics import MetricsWriter, Pending, Report, peak_flops
from prelm_jax.training.sharding import MeshConfig
from prelm_jax.training.step import Keys, TrainState

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How far to train, on which devices, and what to write down; all of it may differ between resumes."""

    steps: Positive  # Train up to this step, counted from the start; --extend-to goes past the end of the schedule.
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    # Steps between checkpoints; the last step, SIGTERM and a new best evaluation save as well.
    save_every: Positive = 1000
    keep: Positive = 3  # Number of newest checkpoints to keep; the one with the best evaluation is kept in addition.
    keep_at_steps: tuple[Positive, ...] = ()  # Keep the parameters after these steps forever (without optimizer state).
    # The same, once this many words of the corpus were seen (a learning curve).
    keep_at_words: tuple[Annotated[int, Bounds(1, 2**53)], ...] = ()
    evaluate_every: Positive = 1000  # Steps between evaluations on held-out text; the last step is evaluated as well.
    # Number of held-out batches that an evaluation during training samples; `prelm evaluate` reads all of the text.
    evaluate_batches: Positive = 32
    # Number of held-out texts to show the model's output for at each evaluation (not with fsdp); 0: none.
    samples: NotNegative = 4
    stop_after_no_gain: Positive | None = None  # Stop after this many evaluations without a new best one.
    log_every: Positive = 50  # Steps between log lines, in metrics.jsonl and on the terminal; the last step has one.
    tensorboard: bool = False  # Also write the metrics for TensorBoard.
    profile: NotNegative = 0  # Write a profiler trace of this many steps, from the 11th on, to profile/.

    def check_profile(self, directory: str | os.PathLike) -> None:
        """Raises InputError if a trace is asked for where none can be written: in a bucket."""
        if self.profile and is_remote(directory):
            raise InputError(f"--profile {self.profile}: traces are written to local directories only: {directory}")

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due after a step, whatever its evaluation says."""
        return step == self.steps or step % self.save_every == 0

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation is due after a step."""
        return step == self.steps or step % self.evaluate_every == 0

    def gains_nothing(self, step: int, best_step: int | None) -> bool:
        """Whether the training ends at a step because the best evaluation, if there was one, is too long ago."""
        if best_step is None or self.stop_after_no_gain is None:
            return False
        return step // self.evaluate_every - best_step // self.evaluate_every >= self.stop_after_no_gain


class TrainingConfig(Protocol):
    """The fields of a run that the loop reads."""

    @property
    def optimizer(self) -> OptimizerConfig: ...

    @property
    def accumulate(self) -> int: ...

    @property
    def seed(self) -> int: ...

    @property
    def precision(self) -> str: ...

    @property
    def loop(self) -> LoopConfig: ...


class Evaluation(NamedTuple):
    """An evaluation during training."""

    evaluate: Callable[[TrainState], dict[str, float]]  # Metrics by name; `loss` is one of them.
    describe: Callable[[Mapping[str, float]], str]  # These metrics as a line for people.
    written: Callable[[], None]  # Called when they have been written to metrics.jsonl.


class _Stop:
    """Whether SIGTERM has come; several processes agree on the step at which to stop.

    It is handled from `begin` on, when there is something to save; before that as outside of the loop.
    """

    def __enter__(self) -> "_Stop":
        self._asked = self._interrupting = False
        self._previous = None
        return self

    def begin(self) -> None:
        if self._previous is None and jax.process_count() == 1:
            with contextlib.suppress(ValueError):  # Not in the main thread: the program around it handles signals.
                self._previous = signal.signal(signal.SIGTERM, self._handle)

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _handle(self, *_: object) -> None:
        self._asked = True
        if self._interrupting:
            raise Preempted

    def at(self, step: int) -> bool:
        return self._asked if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(step)

    def unless_asked(self, compute: Callable[[], Result]) -> Result | None:
        """The result of `compute`; None if SIGTERM came before its end."""
        try:
            self._interrupting = True
            return None if self._asked else compute()
        except Preempted:
            return None
        finally:
            self._interrupting = False


class _Profile:
    """A profiler trace of `steps` steps, from the 11th after `start` on: the first ones compile."""

    def __init__(self, start: int, steps: int, last: int, directory: Path):
        self._first, self._end, self._directory = start + 10, min(start + 10 + steps, last), directory
        self._running = False

    def before(self, step: int) -> None:
        if step == self._first < self._end:
            self._running = True
            options = jax.profiler.ProfileOptions()
            # Tracing Python calls slows a step down, and crashes when another thread ends.
            options.python_tracer_level = 0
            jax.profiler.start_trace(str(self._directory), profiler_options=options)

    def after(self, step: int) -> None:
        if step == self._end:
            self.close()

    def close(self) -> None:
        """Writes the trace, also if the training ends in the middle of it."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


def train(
    run: TrainingConfig,
    model: Model,
    state: TrainState,
    train_step: Callable[[TrainState, Batch, Array], tuple[TrainState, dict[str, Array]]],
    batches: Iterable[tuple[int, Batch]],
    held_out: Evaluation | None,
    checkpoints: Checkpoints,
    writer: MetricsWriter,
    workdir: Path,
    tokens_per_word: float,
) -> tuple[TrainState, dict[str, float] | None]:
    """Trains from `state.step` to `run.loop.steps`; resuming gives the same bits as never having stopped.

    With `run.loop.stop_after_no_gain`, it ends after that number of evaluations without a new best one, and does not
    train on when it is called again.

    Returns the last state, and its evaluation if there was one.

    Args:
        train_step: as `make_train_step` returns it.
        batches: (step, batch on the devices) of each step left.
        held_out: the checkpoint with the lowest `loss` is the best. None: no evaluation, and so no best checkpoint.
        checkpoints: where `state` was restored from, unless it is new.
        tokens_per_word: tokens per word of the corpus, for `keep_at_words`.

    Raises:
        Preempted: after SIGTERM, once everything is saved.
        InputError: at the first loss, gradient or evaluation that is not finite; such a state is never saved.
    """
    config, start = run.loop, int(state.step)
    count_tokens = jax.jit(model.tokens, out_shardings=P())
    dropout_key = Keys.from_seed(run.seed).dropout
    profile = _Profile(start, config.profile, config.steps, workdir / "profile")
    peak = peak_flops(jnp.dtype(run.precision), jax.sharding.get_mesh().size)
    report = Report(model, writer, peak, start, config.steps, config.log_every)
    tokens_seen = checkpoints.tokens_seen(start)
    pending: Pending | None = None
    evaluation: dict[str, float] | None = None

    def evaluate_and_save(done: int, stopping: bool, keep_due: bool) -> None:
        """Evaluates and saves if that is due. Raises Preempted if SIGTERM came, which can postpone the evaluation."""
        nonlocal evaluation
        last = done == config.steps
        loss, improved, postponed, save_due = None, False, False, config.saves(done)
        if held_out is not None and config.evaluates(done):
            evaluation = stop.unless_asked(lambda: held_out.evaluate(state))
            if evaluation is None:  # The step is evaluated, and saved if that is due, when the run resumes.
                stopping, postponed, save_due = True, True, False
            elif not math.isfinite(evaluation["loss"]):
                raise InputError(
                    f"the evaluation loss is {evaluation['loss']} after step {done}, and this state is not saved: "
                    "lower the learning rate or the clip norm"
                )
            else:
                report.evaluation(done, evaluation, held_out.describe(evaluation))
                held_out.written()
                loss, improved = evaluation["loss"], checkpoints.improves(evaluation["loss"])
                last = last or (not improved and config.gains_nothing(done, checkpoints.best_step))
                save_due = save_due or last
        record = Record(tokens_seen, loss, scheduled=save_due or improved)
        if record.scheduled or stopping:
            checkpoints.save(done, state.items(), record)
        if keep_due:
            checkpoints.keep_parameters(done, state.items(), record)
        report.restart_clock()
        if stopping and (postponed or not last):
            checkpoints.wait()
            raise Preempted(f"stopped by SIGTERM after step {done}; the same command resumes from there")

    with contextlib.closing(report), contextlib.closing(profile), _Stop() as stop:
        if start and held_out is not None and config.evaluates(start) and not checkpoints.evaluated(start):
            stop.begin()
            evaluate_and_save(start, stopping=False, keep_due=False)
        for step, batch in () if config.gains_nothing(start, checkpoints.best_step) else batches:
            profile.before(step)
            with jax.transfer_guard("disallow"):  # Saving and evaluating copy arrays, a step does not.
                tokens = count_tokens(batch)  # A program of its own: done before the step is.
                state, metrics = train_step(state, batch, dropout_key)
                done = step + 1
                profile.after(done)

                # The devices work on this step while the host looks at the one before.
                report.wait(pending)
                before, tokens_seen = tokens_seen, tokens_seen + int(jax.device_get(tokens)[0])
                pending = Pending(done, metrics, batch, tokens_seen)

            stop.begin()
            stopping = stop.at(done)
            words_due = any(before < words * tokens_per_word <= tokens_seen for words in config.keep_at_words)
            keep_due = words_due or done in config.keep_at_steps
            compiled = done == start + 1  # This step included compilation: the speed is measured from here on.
            evaluation_due = held_out is not None and config.evaluates(done)
            if compiled or keep_due or evaluation_due or config.saves(done) or stopping:
                report.wait(pending)  # Checks the step: a state with NaNs is never saved.
                pending = None
                evaluate_and_save(done, stopping, keep_due)
                if config.gains_nothing(done, checkpoints.best_step):
                    report.say(f"stopped after step {done}: no gain since step {checkpoints.best_step}")
                    break
        checkpoints.wait()
    return state, evaluation
