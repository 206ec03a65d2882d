"""The post-norm Transformer that BERT and GPT-1 share (Vaswani et al. 2017; BERT: modeling.py, `transformer_model`)."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from prelm_jax.errors import InputError
from prelm_jax.models.attention import Mask, MergeHeads, SplitHeads, attention
from prelm_jax.models.layers import Dense, Dropout, LayerNorm


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The stack of layers, without embeddings and heads."""

    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    activation: Callable[[Array], Array]
    layer_norm_eps: float
    hidden_dropout: float
    attention_dropout: float
    initializer: nn.initializers.Initializer


def check_heads(hidden_size: int, num_heads: int) -> None:
    """Raises InputError where the heads cannot be of one width."""
    if hidden_size % num_heads:
        raise InputError(f"--model.num-heads {num_heads} does not divide --model.hidden-size {hidden_size}")


class Attention(nn.Module):
    """Multi-head self-attention, its output projection, dropout, residual and norm."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x_BTD: Array, mask: Mask) -> Array:
        c = self.config
        q_BNTH, k_BNSH, v_BNSH = (
            SplitHeads(c.num_heads, c.hidden_size // c.num_heads, c.initializer, name=name)(x_BTD)
            for name in ("query", "key", "value")
        )
        if self.has_variable("cache", "keys"):  # These are the next tokens of a text whose others are known already.
            k_BNSH, v_BNSH = self._appended("keys", k_BNSH), self._appended("values", v_BNSH)
        y_BNTH = attention(q_BNTH, k_BNSH, v_BNSH, mask, Dropout(c.attention_dropout, name="weights_dropout"))
        y_BTD = MergeHeads(c.hidden_size, c.initializer, name="output")(y_BNTH)
        return LayerNorm(c.layer_norm_eps, name="layer_norm")(x_BTD + Dropout(c.hidden_dropout)(y_BTD))

    def _appended(self, name: str, new_BNTH: Array) -> Array:
        """The cache of that name with new entries at its end; as many fall out at its beginning."""
        cache_BNSH = jnp.concatenate([self.get_variable("cache", name), new_BNTH], 2)[:, :, new_BNTH.shape[2] :]
        self.put_variable("cache", name, cache_BNSH)
        return cache_BNSH


class Layer(nn.Module):
    """Attention, then the feed-forward block; no dropout between its two dense layers (BERT: modeling.py)."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x_BTD: Array, mask: Mask) -> Array:
        c = self.config
        x_BTD = Attention(c, name="attention")(x_BTD, mask)
        y_BTF = c.activation(Dense(c.intermediate_size, c.initializer, name="intermediate")(x_BTD))
        y_BTD = Dense(c.hidden_size, c.initializer, name="output")(y_BTF)
        return LayerNorm(c.layer_norm_eps, name="layer_norm")(x_BTD + Dropout(c.hidden_dropout)(y_BTD))


class Transformer(nn.Module):
    """The layers one after the other: the hidden state after each, first the input itself (`num_layers` + 1)."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x_BTD: Array, mask: Mask) -> tuple[Array, ...]:
        hidden = [x_BTD]
        for i in range(self.config.num_layers):
            hidden.append(Layer(self.config, name=f"layer_{i}")(hidden[-1], mask))
        return tuple(hidden)
