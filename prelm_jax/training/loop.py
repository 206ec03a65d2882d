"""The train step and the loop around it. It knows models, optimizers and batches by contract only:

model       init_params(key), init_carry(rows), loss(params, carry, batch, key), weights(batch), coefficients,
            tokens(batch), flops(batch): see models/bert.py
optimizer   build() -> optax.GradientTransformation, schedule(step): see optimizer.py
batches     layout: which keys are `rows` of the batch and which belong to all of them, see sharding.place
"""

import contextlib
import dataclasses
import functools
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P

from prelm_jax.errors import Preempted
from prelm_jax.training.checkpoint import Checkpoints
from prelm_jax.training.metrics import MetricsWriter, Report
from prelm_jax.training.sharding import state_sharding

Tree = Any


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["step", "params", "opt_state", "carry"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes; arrays only. `step` (int32) counts the steps done."""

    step: Array
    params: Tree
    opt_state: Tree
    carry: Tree

    def items(self) -> dict[str, Tree]:
        """What a checkpoint holds, in parts, for those who want one alone."""
        progress = {"step": self.step, "carry": self.carry}
        return {"params": self.params, "opt_state": self.opt_state, "progress": progress}

    @classmethod
    def of(cls, items: dict[str, Tree]) -> "TrainState":
        """The state that a checkpoint holds."""
        return cls(params=items["params"], opt_state=items["opt_state"], **items["progress"])


@dataclasses.dataclass(frozen=True)
class Keys:
    """One stream of random numbers for each purpose, from one seed; the data's is its own affair."""

    init: Array
    dropout: Array

    @classmethod
    def of(cls, seed: int) -> "Keys":
        """The streams of a seed."""
        init, dropout = jax.random.split(jax.random.key(seed))
        return cls(init, dropout)


def abstract_state(model: Any, optimizer: Any, rows: int, mesh: jax.sharding.Mesh, parameters: str) -> TrainState:
    """The train state as jax.ShapeDtypeStructs with their shardings; nothing is computed."""
    shapes = jax.eval_shape(lambda: _with_params(model, optimizer, rows, model.init_params(jax.random.key(0))))
    return _with_shardings(shapes, mesh, parameters)


def abstract_progress(model: Any, rows: int, mesh: jax.sharding.Mesh) -> Tree:
    """That part of a checkpoint in the same way, whatever optimizer the training had."""
    shapes = jax.eval_shape(lambda: {"step": jnp.zeros((), jnp.int32), "carry": model.init_carry(rows)})
    return _with_shardings(shapes, mesh, "replicated")


def _with_shardings(shapes: Tree, mesh: jax.sharding.Mesh, parameters: str) -> Tree:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_sharding(shapes, mesh, parameters),
    )


def new_state(
    model: Any, optimizer: Any, rows: int, seed: int, abstract: TrainState, start: Callable[[Tree], Tree] | None = None
) -> TrainState:
    """A fresh train state, born where it belongs. `start` may replace the fresh parameters (continued pretraining)."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    params = jax.jit(model.init_params, out_shardings=shardings.params)(Keys.of(seed).init)
    if start is not None:
        params = jax.device_put(start(params), shardings.params)
    return jax.jit(lambda params: _with_params(model, optimizer, rows, params), out_shardings=shardings)(params)


def _with_params(model: Any, optimizer: Any, rows: int, params: Tree) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.build().init(params), model.init_carry(rows))


def make_train_step(model: Any, optimizer: Any, accumulate: int, layout: dict[str, str], state: TrainState):
    """`(state, batch, key) -> (state, metrics)`, with the state donated; it comes back sharded like `state`.

    The batch is cut into `accumulate` micro-batches, whose sums are divided by the weight of the whole batch, so that
    neither the cut nor the mesh weighs a token differently. Metrics are on the device: means by name, and `tokens` (2).
    """
    transformation = optimizer.build()
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)

    def objective(params: Tree, carry: Tree, batch: dict, weights: dict, key: Array):
        losses, metrics, carry = model.loss(params, carry, batch, key, True)
        total = sum(model.coefficients[name] * _mean(x, weights[name]) for name, (x, _) in losses.items())
        return total, (losses | metrics, carry)

    def gradients(params: Tree, carry: Tree, batch: dict, weights: dict, key: Array):
        if accumulate == 1:
            (_, (sums, carry)), grads = jax.value_and_grad(objective, has_aux=True)(params, carry, batch, weights, key)
            return sums, carry, grads

        # Row r goes to micro-batch r % accumulate: every device keeps its rows.
        def split(x: Array) -> Array:
            return x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1)

        rows = {name: split(x) for name, x in batch.items() if layout[name] == "rows"}
        whole = {name: x for name, x in batch.items() if layout[name] != "rows"}

        def micro_step(grads: Tree, micro: tuple):
            i, carry, rows = micro
            (_, (sums, carry)), g = jax.value_and_grad(objective, has_aux=True)(
                params, carry, rows | whole, weights, jax.random.fold_in(key, i)
            )
            return jax.tree.map(jnp.add, grads, g), (sums, carry)

        zeros = jax.tree.map(jnp.zeros_like, params)
        micros = (jnp.arange(accumulate), jax.tree.map(split, carry), rows)
        grads, (sums, carry) = jax.lax.scan(micro_step, zeros, micros)
        merge = lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])  # noqa: E731
        return jax.tree.map(lambda x: x.sum(0), sums), jax.tree.map(merge, carry), grads

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def train_step(state: TrainState, batch: dict, key: Array) -> tuple[TrainState, dict[str, Array]]:
        weights = model.weights(batch)
        key = jax.random.fold_in(key, state.step)
        # Sharded parameters are gathered, each as it is needed: left to itself, XLA would rather cut the activations.
        gathered = jax.lax.with_sharding_constraint(state.params, P())
        sums, carry, grads = gradients(gathered, state.carry, batch, weights, key)
        updates, opt_state = transformation.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = means(model, sums) | {
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": optimizer.schedule(state.step),
            "tokens": model.tokens(batch),
        }
        return TrainState(state.step + 1, params, opt_state, carry), metrics

    return train_step


def _mean(total: Array, weight: Array) -> Array:
    # A loss that a batch has no weight for (no pair in it, say) is zero, not NaN.
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), 0)


def means(model: Any, sums: dict[str, tuple[Array, Array]]) -> dict[str, Array]:
    """The mean of each loss and metric, and the objective as `loss`."""
    values = {name: _mean(*x) for name, x in sums.items()}
    return {
        "loss": sum(model.coefficients[name] * values[name] for name in model.coefficients if name in values)
    } | values


def make_evaluate(model: Any):
    """`(params, carry, batches) -> {name: mean}` over all the batches, without dropout."""

    @jax.jit
    def evaluate_step(params: Tree, carry: Tree, batch: dict):
        losses, metrics, carry = model.loss(params, carry, batch, jax.random.key(0), False)
        return losses | metrics, carry

    def evaluate(params: Tree, carry: Tree, batches: Iterable[dict]) -> dict[str, float]:
        totals = None
        for batch in batches:
            sums, carry = evaluate_step(params, carry, batch)
            totals = sums if totals is None else jax.tree.map(jnp.add, totals, sums)
        values = jax.device_get(jax.jit(functools.partial(means, model))(totals))
        return {name: value.item() for name, value in values.items()}

    return evaluate


class _Stop:
    """Becomes true when SIGTERM comes; on several hosts, at a step on which all agree."""

    def __enter__(self) -> "_Stop":
        self._asked = False
        self._previous = None
        if jax.process_count() == 1:
            with contextlib.suppress(ValueError):  # Not the main thread: the program around it has the say.
                self._previous = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "_asked", True))
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def at(self, step: int) -> bool:
        return self._asked if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(step)


def train(
    run: Any,
    model: Any,
    state: TrainState,
    batches: Iterator[tuple[int, dict]],
    layout: dict[str, str],
    evaluate: Callable[[TrainState], dict[str, float]],
    checkpoints: Checkpoints,
    writer: MetricsWriter,
    workdir: Path,
) -> tuple[TrainState, dict[str, float] | None]:
    """Runs the steps from `state.step` to `run.steps`; the same bits as if it had never stopped before.

    Returns the last state and its evaluation, which is None if there was no step left to run.

    run: optimizer, accumulate, seed, steps, log_every, evaluate_every, save_every, profile (see pretrain.Run).
    batches: (number of the step, batch on the devices), from `state.step` on, as many as there are steps left.
    Raises Preempted after SIGTERM, when all is saved, and InputError at the first loss that is not finite.
    """
    train_step = make_train_step(model, run.optimizer, run.accumulate, layout, state)
    dropout_key = Keys.of(run.seed).dropout
    start = int(state.step)
    profile_from = start + 10
    profile_to = min(profile_from + run.profile, run.steps)
    profiling = jax.profiler.ProfileOptions()
    # The tracer of Python's own calls slows a step, and crashes where another thread comes to its end.
    profiling.python_tracer_level = 0
    report = Report(run, model, start, writer)
    pending = evaluation = None
    with contextlib.closing(report), _Stop() as stop, jax.transfer_guard("disallow"):
        for step, batch in batches:
            if step == profile_from < profile_to:
                jax.profiler.start_trace(str(workdir / "profile"), profiler_options=profiling)
            state, metrics = train_step(state, batch, dropout_key)
            done = step + 1
            if done == profile_to > profile_from:
                jax.profiler.stop_trace()
            # The device is at work on this step while the host looks at the one before.
            report.settle(pending)
            pending = (done, metrics, batch)

            last, stopping = done == run.steps, stop.at(done)
            evaluation_due, save_due = done % run.evaluate_every == 0 or last, done % run.save_every == 0 or last
            if not (evaluation_due or save_due or stopping):
                continue
            report.settle(pending)  # Before anything is kept: a NaN never becomes the newest checkpoint.
            pending = None
            if evaluation_due:
                evaluation = evaluate(state)
                report.evaluation(done, evaluation)
            if save_due or stopping:
                checkpoints.save(done, state.items())
            report.restart_clock()
            if stopping and not last:
                checkpoints.settle()
                raise Preempted(f"stopped by SIGTERM after step {done}; the same command goes on from there")
    checkpoints.settle()
    return state, evaluation
