"""The train state and the compiled steps over it: training, evaluation, prediction."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import PartitionSpec as P
from jax.sharding import Sharding

from prelm_jax.training.contract import Batch, Layout, Model, OptimizerConfig, Params, Predictor, Sums
from prelm_jax.training.parameters import matches, path_name
from prelm_jax.training.sharding import Tree, state_sharding

Totals = dict[str, tuple[float, float]]  # by name a sum and its weight, as `Sums`, on the host


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


def fresh_carry(model: Model, batch_size: int, mesh: jax.sharding.Mesh) -> Params:
    """The carry before the first batch, sharded by rows."""
    fresh = functools.partial(model.init_carry, batch_size)
    shapes = {"carry": jax.eval_shape(fresh)}
    shardings = state_sharding(shapes, mesh, "replicated", model.replicated)
    return jax.jit(fresh, out_shardings=shardings["carry"])()


def _with_shardings(model: Model, shapes: Tree, mesh: jax.sharding.Mesh, parameters: str) -> Tree:
    shardings = state_sharding(shapes, mesh, parameters, model.replicated, model.tables)
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
    opt_state = transformation(model, optimizer, params).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, model.init_carry(batch_size))


def transformation(model: Model, optimizer: OptimizerConfig, params: Params) -> optax.GradientTransformation:
    """Gradients into updates, each parameter at the rate that the model declares; `params` may be abstract.

    Parameters of rate 0 have neither updates nor moments, and no part in the norm that is clipped.
    """
    built = optimizer.build(model.matrices)
    rates = jax.tree_util.tree_map_with_path(lambda path, _: model.rate(path_name(path)), params)
    if all(rate == 1 for rate in jax.tree.leaves(rates)):
        return built
    scaled = optax.stateless(lambda updates, _: jax.tree.map(lambda rate, x: rate * x, rates, updates))
    groups = jax.tree.map(lambda rate: "trained" if rate else "fixed", rates)
    if all(jax.tree.leaves(rates)):
        return optax.chain(built, scaled)
    return optax.partition({"trained": built, "fixed": optax.set_to_zero()}, groups)


def make_train_step(
    model: Model, optimizer: OptimizerConfig, accumulate: int, layout: Mapping[str, Layout], state: TrainState
):
    """`(state, batch, key) -> (state, metrics)`; the state is donated, the new one sharded like `state`.

    The batch is split into `accumulate` micro-batches, whose sums are divided by the weight of the whole batch, so that
    every token weighs the same with any split and mesh. Metrics stay on the device: means by name, and `tokens` [2].
    """
    update = transformation(model, optimizer, state.params).update
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)

    def in_step(path: tuple[object, ...], param: jax.ShapeDtypeStruct) -> Sharding | P:
        return param.sharding if matches(model.tables, path_name(path)) else P()

    shardings_in_step = jax.tree_util.tree_map_with_path(in_step, state.params)

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
        # Gathers each sharded parameter when it is needed, but for tables; left to itself, XLA would shard the
        # activations instead, as it would by the moments that gradients go into.
        gathered = jax.lax.with_sharding_constraint(state.params, shardings_in_step)
        sums, carry, grads = gradients(gathered, state.carry, batch, weights, key)
        grads = jax.lax.with_sharding_constraint(grads, shardings_in_step)
        updates, opt_state = update(grads, state.opt_state, state.params)
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
    """`(params, carry, batches, num_steps=None) -> {name: (sum, weight)}` over all batches, without dropout.

    The sums of all batches are added up in float64. After `num_steps` batches (None: never) the carry is the given one
    again. Models that sample inside their loss get a fixed key for each batch, so the same parameters give the same
    numbers under any seed.
    """

    @jax.jit
    def evaluate_step(params: Params, carry: Params, batch: Batch, index: Array) -> tuple[Sums, Params, Array]:
        key = jax.random.fold_in(jax.random.key(0), index)
        losses, metrics, carry = model.loss(params, carry, batch, key, False)
        return losses | metrics, carry, index + 1

    first_index = jax.jit(lambda: jnp.zeros((), jnp.int32))

    def evaluate(params: Params, carry: Params, batches: Iterable[Batch], num_steps: int | None = None) -> Totals:
        index, current, totals = first_index(), carry, collections.defaultdict(lambda: np.zeros(2))

        def add(sums: Sums) -> None:
            for name, values in jax.device_get(sums).items():
                totals[name] += np.array(values, np.float64)

        pending: Sums = {}
        for number, batch in enumerate(batches, start=1):
            sums, current, index = evaluate_step(params, current, batch, index)
            if num_steps is not None and number % num_steps == 0:
                current = carry
            add(pending)  # Of the batch before, while the devices work on this one.
            pending = sums
        add(pending)
        return {name: (float(total), float(weight)) for name, (total, weight) in totals.items()}

    return evaluate


def evaluated_means(model: Model, totals: Totals) -> dict[str, float]:
    """The mean of each loss and metric that has a weight, and the objective as `loss`."""
    values = {name: total / weight for name, (total, weight) in totals.items() if weight}
    return {"loss": sum(c * values[name] for name, c in model.coefficients.items() if name in values)} | values


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
