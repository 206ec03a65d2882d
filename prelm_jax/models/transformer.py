"""The post-norm Transformer that BERT and GPT-1 share (Vaswani et al. 2017; BERT: modeling.py, `transformer_model`)."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from prelm_jax.bounds import Epsilon, FractionBelow1, Layers, NotNegativeFloat, OutOfBounds, Size
from prelm_jax.models.attention import Mask, attention
from prelm_jax.models.language_model import LanguageModelConfig
from prelm_jax.models.layers import Dense, Dropout, LayerNorm


@dataclasses.dataclass(frozen=True)
class TransformerConfig(LanguageModelConfig):
    """The sizes that BERT and GPT share."""

    hidden_size: Size = 768  # Width of the hidden states; a multiple of num_heads.
    num_layers: Layers = 12  # Transformer layers.
    num_heads: Size = 12  # Attention heads per layer; the papers use hidden_size / 64.
    max_position_embeddings: Size = 512  # Longest sequence that the model can read, in tokens.
    hidden_dropout: FractionBelow1 = 0.1  # Dropout on the output of each attention and feed-forward block.
    attention_dropout: FractionBelow1 = 0.1  # Dropout on the attention weights.
    layer_norm_eps: Epsilon = 1e-12  # Added to the variance in every layer norm.
    initializer_range: NotNegativeFloat = 0.02  # Standard deviation of the initial weights.

    def check_together(self) -> None:
        """Raises OutOfBounds if the heads do not divide the width."""
        if self.hidden_size % self.num_heads:
            raise OutOfBounds(("num_heads",), self.num_heads, f"must divide the hidden size, {self.hidden_size}")


class Attention(nn.Module):
    """Multi-head self-attention, its output projection, dropout, residual and norm."""

    config: TransformerConfig
    initializer: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x_BTD: Array, mask: Mask, train: bool) -> Array:
        c = self.config
        q_BTD, k_BSD, v_BSD = (
            Dense(c.hidden_size, self.initializer, name=name)(x_BTD) for name in ("query", "key", "value")
        )
        if self.has_variable("cache", "keys"):  # x continues a text whose earlier keys and values are cached.
            k_BSD, v_BSD = self._append("keys", k_BSD), self._append("values", v_BSD)
        dropout_key = Dropout(c.attention_dropout, name="weights_dropout").key(train)
        y_BTD = attention(q_BTD, k_BSD, v_BSD, c.num_heads, mask, c.attention_dropout, dropout_key)
        y_BTD = Dense(c.hidden_size, self.initializer, name="output")(y_BTD)
        return LayerNorm(c.layer_norm_eps, name="layer_norm")(x_BTD + Dropout(c.hidden_dropout)(y_BTD, train))

    def _append(self, name: str, new_BTD: Array) -> Array:
        """The cache of that name with the new entries at its end; its oldest T entries drop out."""
        cached_BSD: Array = self.get_variable("cache", name)
        cached_BSD = jnp.concatenate([cached_BSD, new_BTD], 1)[:, new_BTD.shape[1] :]
        self.put_variable("cache", name, cached_BSD)
        return cached_BSD


class Layer(nn.Module):
    """Attention, then the feed-forward block; no dropout between its two dense layers (BERT: modeling.py)."""

    config: TransformerConfig
    intermediate_size: int
    activation: Callable[[Array], Array]
    initializer: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x_BTD: Array, mask: Mask, train: bool) -> Array:
        c = self.config
        x_BTD = Attention(c, self.initializer, name="attention")(x_BTD, mask, train)
        y_BTF = self.activation(Dense(self.intermediate_size, self.initializer, name="intermediate")(x_BTD))
        y_BTD = Dense(c.hidden_size, self.initializer, name="output")(y_BTF)
        return LayerNorm(c.layer_norm_eps, name="layer_norm")(x_BTD + Dropout(c.hidden_dropout)(y_BTD, train))


class Transformer(nn.Module):
    """The stack of layers. Returns `num_layers` + 1 hidden states [B, T, D]: the input, then the output of each."""

    config: TransformerConfig
    intermediate_size: int
    activation: Callable[[Array], Array]
    initializer: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x_BTD: Array, mask: Mask, train: bool) -> tuple[Array, ...]:
        sizes = (self.config, self.intermediate_size, self.activation, self.initializer)
        hidden = [x_BTD]
        for i in range(self.config.num_layers):
            hidden.append(Layer(*sizes, name=f"layer_{i}")(hidden[-1], mask, train))
        return tuple(hidden)
