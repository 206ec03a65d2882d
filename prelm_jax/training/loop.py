"""The train step and the loop around it. They know models, optimizers and batches by `training.contract` only."""

import contextlib
import dataclasses
import functools
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P

from prelm_jax.errors import InputError, Preempted
from prelm_jax.training.checkpoint import Checkpoints, Record
from prelm_jax.training.contract import Batch, Layout, Model, OptimizerConfig, Params, Predictor, Sums
from prelm_jax.training.metrics import MetricsWriter, Report, peak_flops
from prelm_jax.training.sharding import MeshConfig, Tree, state_sharding


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How far to train, on which devices, and what to write down; all of it may differ between resumes."""

    steps: int  # Train up to this step, counted from the start; raise it to continue a finished run.
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    save_every: int = 1000  # Steps between checkpoints; the last step, SIGTERM and a new best evaluation save as well.
    keep: int = 3  # Number of newest checkpoints to keep; the one with the best evaluation is kept in addition.
    keep_at_steps: tuple[int, ...] = ()  # Keep the parameters after these steps forever (without optimizer state).
    keep_at_words: tuple[int, ...] = ()  # The same, once this many words of the corpus were seen (a learning curve).
    evaluate_every: int = 1000  # Steps between evaluations on held-out text; the last step is evaluated as well.
    evaluate_batches: int = 32  # Number of held-out batches in an evaluation; more for a less noisy loss.
    log_every: int = 50  # Steps between lines of metrics.jsonl and of the terminal.
    tensorboard: bool = False  # Also write the metrics for TensorBoard.
    profile: int = 0  # Write a profiler trace of this many steps, from the 11th on, to profile/.

    def __post_init__(self):
        for name in ("steps", "save_every", "keep", "evaluate_every", "evaluate_batches", "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes; arrays only. `step` (int32) counts the steps done."""

    step: Array
    params: Params
    opt_state: optax.OptState
    carry: Params

    def items(self) -> dict[str, object]:
        """The items of a checkpoint; each can be restored without the others."""
        progress = {"step": self.step, "carry": self.carry}
        return {"params": self.params, "opt_state": self.opt_state, "progress": progress}

    @classmethod
    def from_items(cls, items: Mapping[str, object]) -> "TrainState":
        """The state whose `items()` were saved."""
        progress = cast(dict[str, Params], items["progress"])
        params, opt_state = cast(Params, items["params"]), cast(optax.OptState, items["opt_state"])
        return cls(cast(Array, progress["step"]), params, opt_state, progress["carry"])


class Keys(NamedTuple):
    """Independent streams of random numbers, all from one seed; the batches hash the seed themselves, in NumPy."""

    init: Array
    dropout: Array

    @classmethod
    def from_seed(cls, seed: int) -> "Keys":
        """The streams of a seed."""
        return cls(*jax.random.split(jax.random.key(seed)))


def abstract_state(
    model: Model, optimizer: OptimizerConfig, batch_size: int, mesh: jax.sharding.Mesh, parameters: str
) -> TrainState:
    """The train state as jax.ShapeDtypeStructs with shardings; computes nothing. `parameters`: see MeshConfig."""

    def fresh() -> TrainState:
        return _with_params(model, optimizer, batch_size, model.init_params(jax.random.key(0)))

    return _with_shardings(model, jax.eval_shape(fresh), mesh, parameters)


def abstract_items(model: Model, batch_size: int, mesh: jax.sharding.Mesh) -> dict[str, Params]:
    """The items of a checkpoint that an evaluation needs, in the same form, for any optimizer."""

    def fresh() -> dict[str, Params]:
        progress = {"step": jnp.zeros((), jnp.int32), "carry": model.init_carry(batch_size)}
        return {"params": model.init_params(jax.random.key(0)), "progress": progress}

    return _with_shardings(model, jax.eval_shape(fresh), mesh, "replicated")


def _with_shardings(model: Model, shapes: Tree, mesh: jax.sharding.Mesh, parameters: str) -> Tree:
    shardings = state_sharding(shapes, mesh, parameters, model.replicated)
    return jax.tree.map(lambda x, y: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=y), shapes, shardings)


def new_state(
    model: Model,
    optimizer: OptimizerConfig,
    batch_size: int,
    seed: int,
    abstract: TrainState,
    start: Callable[[Params], Params] | None = None,
) -> TrainState:
    """A fresh train state, sharded like `abstract`. `start` may replace the fresh parameters by pretrained ones."""
    init_params, init_state = make_init(model, optimizer, batch_size, abstract)
    params = init_params(Keys.from_seed(seed).init)
    if start is not None:
        params = jax.device_put(start(params), jax.tree.map(lambda leaf: leaf.sharding, abstract.params))
    return init_state(params)


def make_init(model: Model, optimizer: OptimizerConfig, batch_size: int, abstract: TrainState):
    """`key -> parameters` and `parameters -> train state of step 0`, both sharded like `abstract`."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    init_params = jax.jit(model.init_params, out_shardings=shardings.params)
    init_state = jax.jit(functools.partial(_with_params, model, optimizer, batch_size), out_shardings=shardings)
    return init_params, init_state


def _with_params(model: Model, optimizer: OptimizerConfig, batch_size: int, params: Params) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.build().init(params), model.init_carry(batch_size))


def make_train_step(
    model: Model, optimizer: OptimizerConfig, accumulate: int, layout: Mapping[str, Layout], state: TrainState
):
    """`(state, batch, key) -> (state, metrics)`; the state is donated, the new one sharded like `state`.

    The batch is split into `accumulate` micro-batches, whose sums are divided by the weight of the whole batch, so that
    every token weighs the same with any split and mesh. Metrics stay on the device: means by name, and `tokens` [2].
    """
    transformation = optimizer.build()
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)

    def objective(params: Params, carry: Params, batch: Batch, weights: dict[str, Array], key: Array):
        losses, metrics, carry = model.loss(params, carry, batch, key, True)
        total = sum(model.coefficients[name] * _mean(x, weights[name]) for name, (x, _) in losses.items())
        return total, (losses | metrics, carry)

    differentiate = jax.value_and_grad(objective, has_aux=True)

    def gradients(params: Params, carry: Params, batch: Batch, weights: dict[str, Array], key: Array):
        if accumulate == 1:
            (_, (sums, carry)), grads = differentiate(params, carry, batch, weights, key)
            return sums, carry, grads

        # Row r is in micro-batch r % accumulate, so that every device keeps its rows.
        def split(x: Array) -> Array:
            return x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1)

        def merge(x: Array) -> Array:
            return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

        rows = {name: split(x) for name, x in batch.items() if layout[name] == "rows"}
        whole = {name: x for name, x in batch.items() if layout[name] != "rows"}

        def micro_step(grads: Params, micro: tuple[Array, Params, dict[str, Array]]):
            i, carry, rows = micro
            micro_key = jax.random.fold_in(key, i)
            (_, (sums, carry)), g = differentiate(params, carry, rows | whole, weights, micro_key)
            return jax.tree.map(jnp.add, grads, g), (sums, carry)

        zeros = jax.tree.map(jnp.zeros_like, params)
        micros = (jnp.arange(accumulate), jax.tree.map(split, carry), rows)
        grads, (sums, carry) = jax.lax.scan(micro_step, zeros, micros)
        return jax.tree.map(lambda x: x.sum(0), sums), jax.tree.map(merge, carry), grads

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def train_step(state: TrainState, batch: Batch, key: Array) -> tuple[TrainState, dict[str, Array]]:
        weights = model.weights(batch)
        key = jax.random.fold_in(key, state.step)
        # Gathers each sharded parameter when it is needed; left to itself, XLA would shard the activations instead.
        gathered = jax.lax.with_sharding_constraint(state.params, P())
        sums, carry, grads = gradients(gathered, state.carry, batch, weights, key)
        updates, opt_state = transformation.update(grads, state.opt_state, state.params)
        params = cast(Params, optax.apply_updates(state.params, updates))
        metrics = means(model, sums) | {
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": optimizer.schedule(state.step),
            "tokens": model.tokens(batch),
        }
        return TrainState(state.step + 1, params, opt_state, carry), metrics

    return train_step


def _mean(total: Array, weight: Array) -> Array:
    # A loss without weight in this batch (no sentence pair, say) is zero, not NaN.
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), 0)


def means(model: Model, sums: Sums) -> dict[str, Array]:
    """The mean of each loss and metric, and the objective as `loss`."""
    values = {name: _mean(*x) for name, x in sums.items()}
    terms = [coefficient * values[name] for name, coefficient in model.coefficients.items() if name in values]
    return {"loss": sum(terms, start=jnp.zeros(()))} | values


def make_evaluate(model: Model):
    """`(params, carry, batches) -> {name: mean}` over all batches, without dropout.

    Models that sample inside their loss get a fixed key for each batch, so the same parameters give the same numbers
    under any seed.
    """

    @jax.jit
    def evaluate_step(params: Params, carry: Params, batch: Batch, index: Array) -> tuple[Sums, Params, Array]:
        key = jax.random.fold_in(jax.random.key(0), index)
        losses, metrics, carry = model.loss(params, carry, batch, key, False)
        return losses | metrics, carry, index + 1

    first_index, all_means = jax.jit(lambda: jnp.zeros((), jnp.int32)), jax.jit(functools.partial(means, model))

    def evaluate(params: Params, carry: Params, batches: Iterable[Batch]) -> dict[str, float]:
        index, totals = first_index(), None
        for batch in batches:
            sums, carry, index = evaluate_step(params, carry, batch, index)
            totals = sums if totals is None else jax.tree.map(jnp.add, totals, sums)
        values = jax.device_get(all_means(totals))
        return {name: value.item() for name, value in values.items()}

    return evaluate


def make_predict(model: Predictor):
    """`(params, carry, batches) -> iterator`, over the predictions for each batch, gathered from all devices and hosts.

    Each item maps names to NumPy arrays whose first axis is the rows of the global batch, in order. Every process must
    exhaust the iterator, because gathering is a collective operation.
    """
    predict_step = jax.jit(model.predict, out_shardings=P())

    def predict(params: Params, carry: Params, batches: Iterable[Batch]) -> Iterator[dict[str, np.ndarray]]:
        for batch in batches:
            yield jax.device_get(predict_step(params, carry, batch))

    return predict


class _Stop:
    """Whether SIGTERM has come; several processes agree on the step at which to stop."""

    def __enter__(self) -> "_Stop":
        self._asked = False
        self._previous = None
        if jax.process_count() == 1:
            with contextlib.suppress(ValueError):  # Not in the main thread: the program around it handles signals.
                self._previous = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "_asked", True))
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def at(self, step: int) -> bool:
        return self._asked if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(step)


class _Profile:
    """A profiler trace of `steps` steps, from the 11th after `start` on: the first ones compile."""

    def __init__(self, start: int, steps: int, last: int, directory: Path):
        self._first, self._end, self._directory = start + 10, min(start + 10 + steps, last), directory

    def before(self, step: int) -> None:
        if step == self._first < self._end:
            options = jax.profiler.ProfileOptions()
            # Tracing Python calls slows a step down, and crashes when another thread ends.
            options.python_tracer_level = 0
            jax.profiler.start_trace(str(self._directory), profiler_options=options)

    def after(self, step: int) -> None:
        if step == self._end > self._first:
            jax.profiler.stop_trace()


def train(
    run: TrainingConfig,
    model: Model,
    state: TrainState,
    batches: Iterable[tuple[int, Batch]],
    layout: Mapping[str, Layout],
    evaluate: Callable[[TrainState], dict[str, float]],
    checkpoints: Checkpoints,
    writer: MetricsWriter,
    workdir: Path,
    tokens_per_word: float,
) -> tuple[TrainState, dict[str, float] | None]:
    """Trains from `state.step` to `run.loop.steps`; resuming gives the same bits as never having stopped.

    Returns the last state and its evaluation, or None instead of it if no step was left.

    Args:
        batches: (step, batch on the devices) of each step left.
        evaluate: the means by name over held-out text; the checkpoint with the lowest `loss` is the best.
        checkpoints: where `state` was restored from, unless it is new.
        tokens_per_word: tokens per word of the corpus, for `keep_at_words`.

    Raises:
        Preempted: after SIGTERM, once everything is saved.
        InputError: at the first loss or gradient that is not finite; such a state is never saved.
    """
    config, start = run.loop, int(state.step)
    train_step = make_train_step(model, run.optimizer, run.accumulate, layout, state)
    count_tokens = jax.jit(model.tokens, out_shardings=P())
    dropout_key = Keys.from_seed(run.seed).dropout
    profile = _Profile(start, config.profile, config.steps, workdir / "profile")
    peak = peak_flops(jnp.dtype(run.precision), jax.sharding.get_mesh().size)
    report = Report(model, writer, peak, start, config.steps, config.log_every)
    tokens_seen = checkpoints.tokens_seen(start)
    pending = evaluation = None
    with contextlib.closing(report), _Stop() as stop, jax.transfer_guard("disallow"):
        for step, batch in batches:
            profile.before(step)
            tokens = count_tokens(batch)  # A program of its own: done before the step is.
            state, metrics = train_step(state, batch, dropout_key)
            done = step + 1
            profile.after(done)

            # The devices work on this step while the host looks at the one before.
            report.wait(pending)
            before, tokens_seen = tokens_seen, tokens_seen + int(jax.device_get(tokens)[0])
            pending = (done, metrics, batch, tokens_seen)

            last, stopping = done == config.steps, stop.at(done)
            words_due = any(before < words * tokens_per_word <= tokens_seen for words in config.keep_at_words)
            keep_due = words_due or done in config.keep_at_steps
            evaluation_due = last or done % config.evaluate_every == 0
            save_due = last or done % config.save_every == 0
            if not (keep_due or evaluation_due or save_due or stopping):
                continue

            report.wait(pending)  # Checks the step: a state with NaNs is never saved.
            pending, loss, improved = None, None, False
            if evaluation_due:
                evaluation = evaluate(state)
                report.evaluation(done, evaluation)
                loss, improved = evaluation["loss"], checkpoints.improves(evaluation["loss"])
            record = Record(tokens_seen, loss, scheduled=save_due or improved)
            if record.scheduled or stopping:
                checkpoints.save(done, state.items(), record)
            if keep_due:
                checkpoints.keep_parameters(done, state.items(), record)
            report.restart_clock()
            if stopping and not last:
                checkpoints.wait()
                raise Preempted(f"stopped by SIGTERM after step {done}; the same command resumes from there")
    checkpoints.wait()
    return state, evaluation
