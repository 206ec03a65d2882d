"""ELMo's LSTM, with projection (Sak et al. 2014) and clipping like TensorFlow's LSTMCell, and a VJP of its own.

One step, gates in TensorFlow's order i, j, f, o:

    z = [x, h] kernel + bias
    c' = clip(σ(f + 1) · c + σ(i) · tanh(j), cell_clip)
    h' = clip((σ(o) · tanh(c')) projection, projection_clip)

Why a VJP: z is a sum, x kernel_x + h kernel_h, and only the second product depends on the step before. So the products
with x are computed for all steps at once before the scan, and the gradients of the weights after the scan of the
backward pass, as one product over all steps; autodiff would read and write every weight gradient in every step.

Why lists: the two directions of ELMo are independent LSTMs of one size, and a scan over both runs half the steps. The
backward direction is given its words in reverse order, so that in both, step t reads the word at index t:

    words the cat sat        step 0        step 1        step 2
    forward                  the           cat           sat
    backward                 sat           cat           the

Inside the scan rows are the last axis: XLA's CPU backend computes weights [Z, P] times states [P, B] at twice the speed
of states [B, P] times weights [P, Z].
"""

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from prelm_jax.models.layers import add_bias, glorot_uniform

Weights = dict[str, Array]  # kernel [P + P, Z], the rows of the input first; bias [Z]; projection [E, P]
State = dict[str, Array]  # cell [B, E], hidden [B, P]; fp32, whatever the dtype of the inputs

First = TypeVar("First")
Second = TypeVar("Second")


class Kernel(nn.Module):
    """A matrix alone."""

    shape: tuple[int, int]

    @nn.compact
    def __call__(self) -> Array:
        return self.param("kernel", glorot_uniform, self.shape)


class LSTMLayer(nn.Module):
    """The weights of one layer. The 1 that is added to the forget gate is not part of its bias."""

    hidden_size: int
    projection_size: int

    def setup(self):
        shape = (2 * self.projection_size, 4 * self.hidden_size)
        self.kernel = self.param("kernel", glorot_uniform, shape)
        self.bias = self.param("bias", nn.initializers.zeros, shape[1:])
        self.projection = Kernel((self.hidden_size, self.projection_size))

    def __call__(self) -> Weights:
        return {"kernel": self.kernel, "bias": self.bias, "projection": self.projection()}


class LSTMStack(nn.Module):
    """The weights of the layers of one direction."""

    num_layers: int
    hidden_size: int
    projection_size: int

    @nn.compact
    def __call__(self) -> list[Weights]:
        return [LSTMLayer(self.hidden_size, self.projection_size, name=f"layer_{i}")() for i in range(self.num_layers)]


class Steps(NamedTuple):
    """The values of every step that the backward pass needs, rows last."""

    gates_TZB: Array  # i, j, f, o after their sigmoid or tanh
    cell_TEB: Array  # c', after clipping
    raw_TPB: Array  # h', before clipping: whether it was clipped decides about its gradient


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def lstm(
    weights: list[Weights], inputs: list[Array], states: list[State], cell_clip: float, projection_clip: float
) -> tuple[list[Array], list[State], list[Array]]:
    """Several LSTMs of one size in one scan, each over its own inputs [B, T, P] and from its own state.

    Returns for each the hidden states [B, T, P], in the dtype of the input; the last state; and the cells [B, T, E]
    after every step, fp32, which pass no gradient.

    Example, the two directions of ELMo's first layer:

        hidden, last, cells = lstm([w_forward, w_backward], [x_BTP, reversed_BTP], [state, state], 3.0, 3.0)
    """
    outputs, _ = _forward(weights, inputs, states, cell_clip, projection_clip)
    return outputs


def reverse(x_BTP: Array, lengths_B: Array) -> Array:
    """The first `lengths_B` steps of each row in reverse order, the rest as they are; its own inverse."""
    # A row of length 3 in T = 5: positions [0 1 2 3 4] -> reversed [2 1 0 3 4].
    positions_BT = jnp.broadcast_to(jnp.arange(x_BTP.shape[1])[None], x_BTP.shape[:2])
    ends_B1 = lengths_B[:, None]
    reversed_BT = jnp.where(positions_BT < ends_B1, ends_B1 - 1 - positions_BT, positions_BT)
    return jnp.take_along_axis(x_BTP, reversed_BT[..., None], 1)


def _forward(
    weights: list[Weights], inputs: list[Array], states: list[State], cell_clip: float, projection_clip: float
) -> tuple[tuple[list[Array], list[State], list[Array]], tuple]:
    hoisted, kernels = [], []
    for w, x_BTP in zip(weights, inputs, strict=True):
        input_PZ, recurrent_PZ, projection_EP = _kernels(w, x_BTP)
        z_GZ = add_bias(_flat(x_BTP) @ input_PZ, w["bias"].astype(x_BTP.dtype))  # z, but for the product with h
        hoisted.append(z_GZ.reshape(*x_BTP.shape[:2], -1).transpose(1, 2, 0))
        kernels.append((recurrent_PZ.T, projection_EP.T))
    one = partial(_step, cell_clip=cell_clip, projection_clip=projection_clip)

    def step(states: list[State], z: list[Array]) -> tuple[list[State], list[Steps]]:
        return _unzip(one(state, z_ZB, *kernel) for state, z_ZB, kernel in zip(states, z, kernels, strict=True))

    last, kept = jax.lax.scan(step, [_transposed(state) for state in states], hoisted)
    hidden, cells = [], []
    for x_BTP, steps in zip(inputs, kept, strict=True):
        hidden_TPB = jnp.clip(steps.raw_TPB, -projection_clip, projection_clip)
        hidden.append(hidden_TPB.astype(x_BTP.dtype).transpose(2, 0, 1))
        cells.append(steps.cell_TEB.transpose(2, 0, 1))
    return (hidden, [_transposed(state) for state in last], cells), (weights, inputs, states, kept)


def _backward(
    cell_clip: float, projection_clip: float, residuals: tuple, cotangents: tuple
) -> tuple[list[Weights], list[Array], list[State]]:
    weights, inputs, states, kept = residuals
    dhidden, dlast, _ = cotangents
    kernels = [_kernels(*each)[1:] for each in zip(weights, inputs, strict=True)]
    one = partial(_step_back, cell_clip=cell_clip, projection_clip=projection_clip)

    def step(dstates: list[State], steps: list[tuple]) -> tuple[list[State], list[tuple[Array, Array]]]:
        return _unzip(one(*each) for each in zip(dstates, steps, kernels, strict=True))

    # A step back needs the cell before it. For T = 3: [initial, c0, c1] next to [c0, c1, c2].
    steps = [
        (dy_BTP.transpose(1, 2, 0), jnp.concatenate([state["cell"].T[None], values.cell_TEB[:-1]]), values)
        for dy_BTP, state, values in zip(dhidden, states, kept, strict=True)
    ]
    dstates, gradients = jax.lax.scan(step, [_transposed(dstate) for dstate in dlast], steps, reverse=True)
    each = zip(weights, inputs, states, kept, gradients, strict=True)
    dweights, dinputs = _unzip(_after_steps_back(*values, projection_clip=projection_clip) for values in each)
    return dweights, dinputs, [_transposed(dstate) for dstate in dstates]


lstm.defvjp(_forward, _backward)


def _step(
    state: State, z_ZB: Array, recurrent_ZP: Array, projection_PE: Array, cell_clip: float, projection_clip: float
) -> tuple[State, Steps]:
    """The next state, and the values that the backward pass needs."""
    dtype = z_ZB.dtype
    z_ZB = _wide(z_ZB) + _product(recurrent_ZP, state["hidden"].astype(dtype))
    i, j, f, o = jnp.split(z_ZB, 4)
    i, j, f, o = jax.nn.sigmoid(i), jnp.tanh(j), jax.nn.sigmoid(f + 1), jax.nn.sigmoid(o)
    cell_EB = jnp.clip(f * state["cell"] + i * j, -cell_clip, cell_clip)
    raw_PB = _product(projection_PE, (o * jnp.tanh(cell_EB)).astype(dtype))
    hidden_PB = jnp.clip(raw_PB, -projection_clip, projection_clip)
    gates_ZB = jnp.concatenate([i, j, f, o]).astype(dtype)
    return {"cell": cell_EB, "hidden": hidden_PB}, Steps(gates_ZB, cell_EB, raw_PB)


def _step_back(
    dstate: State,
    step: tuple[Array, Array, Steps],
    kernels: tuple[Array, Array],
    cell_clip: float,
    projection_clip: float,
) -> tuple[State, tuple[Array, Array]]:
    """The gradient of the state before the step; and the gradients of z and of h' before clipping.

    step: the gradient of h' from the outputs, the cell before the step, and the values that the step kept.
    Values beyond a bound pass no gradient; values on the bound do, as in tf.clip_by_value.
    """
    dhidden_PB, before_EB, (gates_ZB, cell_EB, raw_PB) = step
    recurrent_PZ, projection_EP = kernels
    dtype = gates_ZB.dtype
    i, j, f, o = jnp.split(_wide(gates_ZB), 4)
    draw_PB = jnp.where(jnp.abs(raw_PB) <= projection_clip, dstate["hidden"] + _wide(dhidden_PB), 0)
    draw_PB = draw_PB.astype(dtype)
    dout_EB = _product(projection_EP, draw_PB)
    squashed_EB = jnp.tanh(cell_EB)
    dcell_EB = dstate["cell"] + dout_EB * o * (1 - squashed_EB**2)
    # The unclipped cell is computed again rather than kept: the gates are in memory anyway.
    dcell_EB = jnp.where(jnp.abs(f * before_EB + i * j) <= cell_clip, dcell_EB, 0)
    di, dj, df = dcell_EB * j * i * (1 - i), dcell_EB * i * (1 - j**2), dcell_EB * before_EB * f * (1 - f)
    dz_ZB = jnp.concatenate([di, dj, df, dout_EB * squashed_EB * o * (1 - o)]).astype(dtype)
    return {"cell": dcell_EB * f, "hidden": _product(recurrent_PZ, dz_ZB)}, (dz_ZB, draw_PB)


def _after_steps_back(
    weights: Weights, x_BTP: Array, state: State, kept: Steps, gradients: tuple[Array, Array], projection_clip: float
) -> tuple[Weights, Array]:
    """The gradients of the weights, each as one product over all steps, and the gradient of the input."""
    dz_TZB, draw_TPB = gradients
    dtype, size = x_BTP.dtype, kept.cell_TEB.shape[1]
    # The hidden state that each step read, as the cells above: [initial, h0, h1] for T = 3.
    hidden_TPB = jnp.clip(kept.raw_TPB[:-1], -projection_clip, projection_clip)
    hidden_BTP = jnp.concatenate([state["hidden"][:, None], hidden_TPB.transpose(2, 0, 1)], 1).astype(dtype)
    out_TEB = (_wide(kept.gates_TZB[:, -size:]) * jnp.tanh(kept.cell_TEB)).astype(dtype)  # The gate o is the last.
    dz_GZ, draw_GP = _flat(dz_TZB.transpose(2, 0, 1)), _flat(draw_TPB.transpose(2, 0, 1))
    dweights = {
        "kernel": _product(jnp.concatenate([_flat(x_BTP).T, _flat(hidden_BTP).T]), dz_GZ),
        "bias": _product(jnp.ones((1, dz_GZ.shape[0]), dtype), dz_GZ)[0],
        "projection": _product(out_TEB.transpose(1, 2, 0).reshape(size, -1), draw_GP),
    }
    input_PZ, _, _ = _kernels(weights, x_BTP)
    return dweights, _product(dz_GZ, input_PZ.T).astype(dtype).reshape(x_BTP.shape)


def _kernels(weights: Weights, x: Array) -> tuple[Array, Array, Array]:
    """The kernels of the input and of the hidden state, and the projection, in the dtype of the input."""
    kernel, size = weights["kernel"].astype(x.dtype), x.shape[-1]
    return kernel[:size], kernel[size:], weights["projection"].astype(x.dtype)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _flat(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def _transposed(state: State) -> State:
    return {name: x.T for name, x in state.items()}


def _unzip(pairs: Iterable[tuple[First, Second]]) -> tuple[list[First], list[Second]]:
    first, second = zip(*pairs, strict=True)
    return list(first), list(second)
