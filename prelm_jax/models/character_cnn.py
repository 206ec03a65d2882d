"""Words from their characters (Kim et al. 2015; Jozefowicz et al. 2016): convolutions, highways, a projection.

Reference: allenai/bilm-tf, bilm/training.py, `_build_word_char_embeddings`.
"""

import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from prelm_jax.models.layers import Dense, normal, product, uniform

ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh}


class Convolution(nn.Module):
    """[U, F]: each filter's maximum over the positions of a word where it fits entirely (padding counts)."""

    width: int
    features: int
    initializer: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x_UCD: Array) -> Array:
        kernel = self.param("kernel", self.initializer, (self.width, x_UCD.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        # As one product. Width 2 over the characters a b c d: the positions ab, bc, cd, each a row of 2 · D numbers.
        positions = x_UCD.shape[1] - self.width + 1
        windows = jnp.concatenate([x_UCD[:, k : k + positions] for k in range(self.width)], -1)
        outputs = product(windows.reshape(-1, windows.shape[-1]), kernel.astype(x_UCD.dtype).reshape(-1, self.features))
        # The bias is the same at every position: it is cheaper to add after the maximum.
        return outputs.reshape(-1, positions, self.features).max(1) + bias[None].astype(x_UCD.dtype)


class Highway(nn.Module):
    """g · relu(x W + b) + (1 - g) · x (Srivastava et al. 2015); the reference calls the layer of the gate g `carry`."""

    initializer: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x_UF: Array) -> Array:
        size = x_UF.shape[-1]
        # The bias of -2 nearly closes the gate, so that at first a word passes almost unchanged.
        gate_UF = jax.nn.sigmoid(Dense(size, self.initializer, -2.0, name="carry")(x_UF))
        return gate_UF * jax.nn.relu(Dense(size, self.initializer, name="transform")(x_UF)) + (1 - gate_UF) * x_UF


class CharacterCNN(nn.Module):
    """[U, P] from the vectors [U, C, D] of the characters of words; no dropout.

    filters: (width in characters, number of filters) of each convolution.
    """

    filters: tuple[tuple[int, int], ...]
    activation: Literal["relu", "tanh"]
    num_highways: int
    projection_size: int

    @nn.compact
    def __call__(self, x_UCD: Array) -> Array:
        words = []
        for i, (width, features) in enumerate(self.filters):
            initializer = uniform(0.05) if self.activation == "relu" else normal(1 / math.sqrt(width * x_UCD.shape[-1]))
            words.append(Convolution(width, features, initializer, name=f"convolution_{i}")(x_UCD))
        x_UF = ACTIVATIONS[self.activation](jnp.concatenate(words, -1))
        initializer = normal(1 / math.sqrt(x_UF.shape[-1]))
        for i in range(self.num_highways):
            x_UF = Highway(initializer, name=f"highway_{i}")(x_UF)
        return Dense(self.projection_size, initializer, name="projection")(x_UF)
