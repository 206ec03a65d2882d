"""The LSTM of ELMo, with projection (Sak et al. 2014) and clipping, as TensorFlow's LSTMCell; with a VJP of its own.

One step, gates in TensorFlow's order i, j, f, o:

    z = [x, h] kernel + bias
    c' = clip(σ(f + 1) · c + σ(i) · tanh(j), cell_clip)
    h' = clip((σ(o) · tanh(c')) projection, projection_clip)

The products with x are computed for all steps at once, before the scan, and the gradients of the weights after the scan
of the backward pass, as one product over all steps: autodiff of the scan would read and write them in every step.
Several LSTMs side by side, the two directions of ELMo, go through one scan. Inside, rows are the last axis: XLA's CPU
backend computes weights [Z, P] times states [P, B] at twice the speed of states [B, P] times weights [P, Z].
"""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from prelm_jax.models.layers import add_bias, uniform

Weights = dict[str, Array]  # kernel [P + P, Z], the rows of the input first; bias [Z]; projection [E, P]
State = dict[str, Array]  # cell [B, E], hidden [B, P]; fp32, whatever the dtype of the inputs


class Kernel(nn.Module):
    """A matrix, with the initial values that TensorFlow gives where none are asked for (Glorot & Bengio 2010)."""

    shape: tuple[int, int]

    @nn.compact
    def __call__(self) -> Array:
        return self.param("kernel", uniform(math.sqrt(6 / sum(self.shape))), self.shape)


class LSTMLayer(nn.Module):
    """The weights of one layer. The 1 that is added to the forget gate is not in its bias."""

    hidden_size: int
    projection_size: int

    def setup(self):
        shape = (2 * self.projection_size, 4 * self.hidden_size)
        self.kernel = self.param("kernel", uniform(math.sqrt(6 / sum(shape))), shape)
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


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def lstm(
    weights: list[Weights], inputs: list[Array], states: list[State], cell_clip: float, projection_clip: float
) -> tuple[list[Array], list[State], list[Array]]:
    """LSTMs side by side, each over its own inputs [B, T, P] and from its own state.

    Of each: the hidden states [B, T, P], in the dtype of the input; the last state; the cells [B, T, E] after every
    step, fp32, through which there is no gradient.
    """
    outputs, _ = _forward(weights, inputs, states, cell_clip, projection_clip)
    return outputs


def _forward(weights, inputs, states, cell_clip, projection_clip):
    hoisted, kernels = [], []
    for w, x_BTP in zip(weights, inputs, strict=True):
        input_PZ, recurrent_PZ, projection_EP = _kernels(w, x_BTP)
        z_GZ = add_bias(_flat(x_BTP) @ input_PZ, w["bias"].astype(x_BTP.dtype))
        hoisted.append(z_GZ.reshape(*x_BTP.shape[:2], -1).transpose(1, 2, 0))
        kernels.append((recurrent_PZ.T, projection_EP.T))

    def step(states, steps):
        each = zip(states, steps, kernels, strict=True)
        return _unzip(_step(state, z_ZB, *kernel, cell_clip, projection_clip) for state, z_ZB, kernel in each)

    last, kept = jax.lax.scan(step, [_transposed(state) for state in states], hoisted)
    hidden, cells = [], []
    for x_BTP, (_, cell_TEB, raw_TPB) in zip(inputs, kept, strict=True):
        hidden.append(jnp.clip(raw_TPB, -projection_clip, projection_clip).astype(x_BTP.dtype).transpose(2, 0, 1))
        cells.append(cell_TEB.transpose(2, 0, 1))
    return (hidden, [_transposed(state) for state in last], cells), (weights, inputs, states, kept)


def _backward(cell_clip, projection_clip, residuals, cotangents):
    weights, inputs, states, kept = residuals
    dhidden, dlast, _ = cotangents
    kernels = [_kernels(*each)[1:] for each in zip(weights, inputs, strict=True)]

    def step(dstates, steps):
        each = zip(dstates, steps, kernels, strict=True)
        return _unzip(_step_back(dstate, *x, *kernel, cell_clip, projection_clip) for dstate, x, kernel in each)

    steps = [
        (dy_BTP.transpose(1, 2, 0), jnp.concatenate([state["cell"].T[None], values[1][:-1]]), *values)
        for dy_BTP, state, values in zip(dhidden, states, kept, strict=True)
    ]
    dstates, gradients = jax.lax.scan(step, [_transposed(dstate) for dstate in dlast], steps, reverse=True)
    each = zip(weights, inputs, states, kept, gradients, strict=True)
    dweights, dinputs = _unzip(_after_steps_back(*values, projection_clip) for values in each)
    return dweights, dinputs, [_transposed(dstate) for dstate in dstates]


lstm.defvjp(_forward, _backward)


def _step(state, z_ZB, recurrent_ZP, projection_PE, cell_clip, projection_clip):
    """The next state, and what the backward pass needs: the gates, the cell, and h' as it is before it is clipped."""
    dtype = z_ZB.dtype
    z_ZB = _wide(z_ZB) + _product(recurrent_ZP, state["hidden"].astype(dtype))
    i, j, f, o = jnp.split(z_ZB, 4)
    i, j, f, o = jax.nn.sigmoid(i), jnp.tanh(j), jax.nn.sigmoid(f + 1), jax.nn.sigmoid(o)
    cell_EB = jnp.clip(f * state["cell"] + i * j, -cell_clip, cell_clip)
    raw_PB = _product(projection_PE, (o * jnp.tanh(cell_EB)).astype(dtype))
    hidden_PB = jnp.clip(raw_PB, -projection_clip, projection_clip)
    return {"cell": cell_EB, "hidden": hidden_PB}, (jnp.concatenate([i, j, f, o]).astype(dtype), cell_EB, raw_PB)


def _step_back(
    dstate, dhidden_PB, before_EB, gates_ZB, cell_EB, raw_PB, recurrent_PZ, projection_EP, cell_clip, projection_clip
):
    """The gradient by the state before; those by z, and by h' as it is before it is clipped.

    What is clipped passes no gradient; what lies on the bound does, as in tf.clip_by_value.
    """
    dtype = gates_ZB.dtype
    i, j, f, o = jnp.split(_wide(gates_ZB), 4)
    draw_PB = jnp.where(jnp.abs(raw_PB) <= projection_clip, dstate["hidden"] + _wide(dhidden_PB), 0)
    draw_PB = draw_PB.astype(dtype)
    dout_EB = _product(projection_EP, draw_PB)
    squashed_EB = jnp.tanh(cell_EB)
    dcell_EB = dstate["cell"] + dout_EB * o * (1 - squashed_EB**2)
    dcell_EB = jnp.where(jnp.abs(f * before_EB + i * j) <= cell_clip, dcell_EB, 0)
    di, dj, df = dcell_EB * j * i * (1 - i), dcell_EB * i * (1 - j**2), dcell_EB * before_EB * f * (1 - f)
    dz_ZB = jnp.concatenate([di, dj, df, dout_EB * squashed_EB * o * (1 - o)]).astype(dtype)
    return {"cell": dcell_EB * f, "hidden": _product(recurrent_PZ, dz_ZB)}, (dz_ZB, draw_PB)


def _after_steps_back(weights, x_BTP, state, kept, gradients, projection_clip):
    """The gradients of the weights, each as one product over all steps, and that of the input."""
    (gates_TZB, cell_TEB, raw_TPB), (dz_TZB, draw_TPB) = kept, gradients
    dtype, size = x_BTP.dtype, cell_TEB.shape[1]
    hidden_TPB = jnp.clip(raw_TPB[:-1], -projection_clip, projection_clip)
    hidden_BTP = jnp.concatenate([state["hidden"][:, None], hidden_TPB.transpose(2, 0, 1)], 1).astype(dtype)
    out_TEB = (_wide(gates_TZB[:, -size:]) * jnp.tanh(cell_TEB)).astype(dtype)
    dz_GZ, draw_GP = _flat(dz_TZB.transpose(2, 0, 1)), _flat(draw_TPB.transpose(2, 0, 1))
    dweights = {
        "kernel": _product(jnp.concatenate([_flat(x_BTP).T, _flat(hidden_BTP).T]), dz_GZ),
        "bias": _product(jnp.ones((1, len(dz_GZ)), dtype), dz_GZ)[0],
        "projection": _product(out_TEB.transpose(1, 2, 0).reshape(size, -1), draw_GP),
    }
    input_PZ, _, _ = _kernels(weights, x_BTP)
    return dweights, _product(dz_GZ, input_PZ.T).astype(dtype).reshape(x_BTP.shape)


def _kernels(weights: Weights, x: Array) -> tuple[Array, Array, Array]:
    """That of the input, that of the hidden state, and the projection, in the dtype of the input."""
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


def _unzip(pairs) -> tuple[list, list]:
    first, second = zip(*pairs, strict=True)
    return list(first), list(second)
