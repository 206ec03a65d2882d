"""LSTM with a projection (Sak et al. 2014) and clipping, as TensorFlow's LSTMCell: the layers of ELMo, with their own VJP.

One step, gates in TensorFlow's order i, j, f, o:

    z = [x, h] kernel + bias
    c' = clip(σ(f + 1) · c + σ(i) · tanh(j), cell_clip)
    h' = clip((σ(o) · tanh(c')) projection, projection_clip)

The products with x are computed for all steps at once, before the scan, and the gradients of the weights after the scan
of the backward pass, as one product over all steps: autodiff of the scan would read and write them in every step.
Several LSTMs side by side, the two directions of ELMo, go through one scan.
"""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from prelm_jax.models.layers import add_bias, uniform

Weights = dict[str, Array]  # kernel [P + P, Z], the rows of the input first; bias [Z]; projection [E, P]
State = dict[str, Array]  # cell [B, E], hidden [B, P]; fp32


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
    """LSTMs side by side, each over its own inputs [T, B, P] and from its own state.

    Of each: the hidden states [T, B, P], in the dtype of the input; the last state; the cells [T, B, E] after every
    step, fp32, through which there is no gradient.
    """
    outputs, _ = _forward(weights, inputs, states, cell_clip, projection_clip)
    return outputs


def _forward(weights, inputs, states, cell_clip, projection_clip):
    kernels = [_split(w, x) for w, x in zip(weights, inputs, strict=True)]
    hoisted = [
        _input_gates(x, kernel, w["bias"]) for x, (kernel, _, _), w in zip(inputs, kernels, weights, strict=True)
    ]

    def step(states: list[State], inputs_BZ: list[Array]):
        done = [
            _step(state, x_BZ, recurrent, projection, cell_clip, projection_clip)
            for state, x_BZ, (_, recurrent, projection) in zip(states, inputs_BZ, kernels, strict=True)
        ]
        return [state for state, _ in done], [kept for _, kept in done]

    last, kept = jax.lax.scan(step, states, hoisted)
    hidden = [jnp.clip(raw, -projection_clip, projection_clip).astype(x.dtype) for (_, _, raw), x in zip(kept, inputs)]
    return (hidden, last, [cells for _, cells, _ in kept]), (weights, inputs, states, kept)


def _step(
    state: State, x_BZ: Array, recurrent_PZ: Array, projection_EP: Array, cell_clip: float, projection_clip: float
):
    """The next state; what the backward pass needs: the gates after their activation, the cell, h' before it is clipped."""
    dtype = x_BZ.dtype
    i, j, f, o = jnp.split(x_BZ.astype(jnp.float32) + _product(state["hidden"].astype(dtype), recurrent_PZ), 4, 1)
    i, j, f, o = jax.nn.sigmoid(i), jnp.tanh(j), jax.nn.sigmoid(f + 1), jax.nn.sigmoid(o)
    cell_BE = jnp.clip(f * state["cell"] + i * j, -cell_clip, cell_clip)
    raw_BP = _product((o * jnp.tanh(cell_BE)).astype(dtype), projection_EP)
    hidden_BP = jnp.clip(raw_BP, -projection_clip, projection_clip)
    return {"cell": cell_BE, "hidden": hidden_BP}, (jnp.concatenate([i, j, f, o], 1).astype(dtype), cell_BE, raw_BP)


def _backward(cell_clip, projection_clip, residuals, cotangents):
    weights, inputs, states, kept = residuals
    dhidden, dlast, _ = cotangents
    kernels = [_split(w, x) for w, x in zip(weights, inputs, strict=True)]
    before = [jnp.concatenate([state["cell"][None], cells[:-1]]) for state, (_, cells, _) in zip(states, kept)]

    def step(dstates, steps):
        done = [
            _step_back(dstate, *values, recurrent, projection, cell_clip, projection_clip)
            for dstate, values, (_, recurrent, projection) in zip(dstates, steps, kernels, strict=True)
        ]
        return [dstate for dstate, _ in done], [gradients for _, gradients in done]

    steps = [(dy, cell, *values) for dy, cell, values in zip(dhidden, before, kept, strict=True)]
    dstates, gradients = jax.lax.scan(step, dlast, steps, reverse=True)
    done = [
        _weight_gradients(*values, projection_clip)
        for values in zip(weights, inputs, states, kept, gradients, strict=True)
    ]
    return [dweights for dweights, _ in done], [dx for _, dx in done], dstates


def _step_back(
    dstate, dhidden_BP, before_BE, gates_BZ, cell_BE, raw_BP, recurrent_PZ, projection_EP, cell_clip, projection_clip
):
    """The gradient by the state before; those by the gates before their activation and by h' before it is clipped."""
    dtype = gates_BZ.dtype
    i, j, f, o = jnp.split(gates_BZ.astype(jnp.float32), 4, 1)
    draw_BP = jnp.where(jnp.abs(raw_BP) <= projection_clip, dstate["hidden"] + dhidden_BP.astype(jnp.float32), 0)
    dout_BE = _product(draw_BP.astype(dtype), projection_EP.T)
    squashed_BE = jnp.tanh(cell_BE)
    dcell_BE = dstate["cell"] + dout_BE * o * (1 - squashed_BE**2)
    dcell_BE = jnp.where(jnp.abs(f * before_BE + i * j) <= cell_clip, dcell_BE, 0)
    dgates = (
        dcell_BE * j * i * (1 - i),
        dcell_BE * i * (1 - j**2),
        dcell_BE * before_BE * f * (1 - f),
        dout_BE * squashed_BE * o * (1 - o),
    )
    dgates_BZ = jnp.concatenate(dgates, 1).astype(dtype)
    dbefore = {"cell": dcell_BE * f, "hidden": _product(dgates_BZ, recurrent_PZ.T)}
    return dbefore, (dgates_BZ, draw_BP.astype(dtype))


def _weight_gradients(weights, x_TBP, state, kept, gradients, projection_clip):
    """Those of the weights, each as one product over all steps, and that of the input."""
    (gates_TBZ, cells_TBE, raw_TBP), (dgates_TBZ, draw_TBP) = kept, gradients
    dtype = x_TBP.dtype
    hidden_TBP = jnp.clip(jnp.concatenate([state["hidden"][None], raw_TBP[:-1]]), -projection_clip, projection_clip)
    flat = lambda x: x.astype(dtype).reshape(-1, x.shape[-1])  # noqa: E731
    dgates_GZ = flat(dgates_TBZ)
    out_GE = flat(gates_TBZ[..., -cells_TBE.shape[-1] :].astype(jnp.float32) * jnp.tanh(cells_TBE))
    dweights = {
        "kernel": _product(flat(jnp.concatenate([x_TBP, hidden_TBP.astype(dtype)], -1)).T, dgates_GZ),
        "bias": _product(jnp.ones((1, len(dgates_GZ)), dtype), dgates_GZ)[0],
        "projection": _product(out_GE.T, flat(draw_TBP)),
    }
    dx_TBP = _product(dgates_GZ, _split(weights, x_TBP)[0].T).astype(dtype).reshape(x_TBP.shape)
    return dweights, dx_TBP


lstm.defvjp(_forward, _backward)


def _input_gates(x_TBP: Array, kernel_PZ: Array, bias_Z: Array) -> Array:
    """The share of the input in the gates, of all steps at once, [T, B, Z]."""
    return add_bias(x_TBP.reshape(-1, x_TBP.shape[-1]) @ kernel_PZ, bias_Z.astype(x_TBP.dtype)).reshape(
        *x_TBP.shape[:2], -1
    )


def _split(weights: Weights, x: Array) -> tuple[Array, Array, Array]:
    """The kernel of the input, that of the hidden state, and the projection, in the dtype of the input."""
    kernel, size = weights["kernel"].astype(x.dtype), x.shape[-1]
    return kernel[:size], kernel[size:], weights["projection"].astype(x.dtype)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)
