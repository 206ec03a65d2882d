"""What the pretrained Transformers have in common: the encoder, and embeddings from it."""

from collections.abc import Collection, Iterator
from functools import partial
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
from jax import Array

from prelm_jax.inference import batching
from prelm_jax.inference.base import Embeddings, Pretrained
from prelm_jax.models.bert import BertConfig
from prelm_jax.models.gpt import GPTConfig
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.training.contract import Params

Config = TypeVar("Config", bound=BertConfig | GPTConfig)


class TransformerPretrained(Pretrained[Config, Tokenizer]):
    """A pretrained Transformer."""

    def embed(self, texts: Collection[str], truncate: bool = False) -> Embeddings:
        """For each text, in order, its tokens and its hidden states, f32 [L + 1, tokens, D].

        A blank text has no tokens. A text that is too long raises InputError with its line, or is cut if `truncate`.
        """
        c = self.config
        encoded, compute = self._encode(texts, truncate), partial(_hidden_states, c, self.params)
        for window in batching.windows(encoded):
            for ids, states in batching.in_order(window, compute, c.max_position_embeddings):
                states_TLD = states.reshape(len(ids), c.num_layers + 1, c.hidden_size)
                yield [self.tokenizer.tokens[id] for id in ids], states_TLD.swapaxes(0, 1)

    def _encode(self, texts: Collection[str], truncate: bool = False) -> Iterator[list[int]]:
        """The ids of each text, as the model reads it; see `batching.encode`."""
        return batching.encode(self.tokenizer, texts, self.config.max_position_embeddings, truncate)


def hidden_states(
    config: BertConfig | GPTConfig, params: Params, tokens_BT: Array, segments_BT: Array
) -> tuple[Array, ...]:
    """The L + 1 hidden states [B, T, D] of rows of one text each; to be called in a compiled function."""
    batch = {
        "tokens": tokens_BT,
        "token_types": jnp.zeros_like(tokens_BT),
        "positions": jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape),
        "segments": segments_BT,
    }
    return cast("tuple[Array, ...]", config.encoder().apply({"params": params}, batch, method="hidden_states"))


@partial(jax.jit, static_argnums=0)
def _hidden_states(config: BertConfig | GPTConfig, params: Params, tokens_BT: Array, segments_BT: Array) -> Array:
    """[B, T, L + 1, D]."""
    with jax.default_matmul_precision("highest"):
        return jnp.stack(hidden_states(config, params, tokens_BT, segments_BT), 2)
