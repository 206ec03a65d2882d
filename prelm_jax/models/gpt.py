"""GPT-1 (Radford et al. 2018): a Transformer trained to predict the next token from those before it.

Reference: openai/finetune-transformer-lm, train.py, the authors' fine-tuning code; for the rest, transformers.
Divergences:
- Dropout on the embeddings drops elements of their sum, as in transformers; the reference drops the same elements of
  the whole table for every token of a step, and of the softmax with it.
- The softmax is over the vocabulary alone; the reference keeps tokens and positions in one table, and predicts both.
- Attention is masked by segments (equal and not 0) as well as by order, so that rows may be packed.
- The vocabulary table has a multiple of 128 rows; those past `vocab_size` are never looked up and never win.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from prelm_jax.models.attention import Mask, attention_mask
from prelm_jax.models.cross_entropy import tied_cross_entropy, tied_logits
from prelm_jax.models.layers import Dropout, Embedding, check_rows, gelu_tanh, normal, padded_vocabulary
from prelm_jax.models.transformer import Transformer, TransformerConfig, check_heads

Params = dict[str, Any]
Batch = dict[str, Array]
Sums = dict[str, tuple[Array, Array]]


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """GPT's sizes; the defaults are GPT-1. `vocab_size` None: as many as the tokenizer has.

    The feed-forward blocks are 4 · `hidden_size` wide: the published format has no word for anything else.
    """

    model_type: ClassVar[str] = "openai-gpt"
    vocab_size: int | None = None
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    max_position_embeddings: int = 512
    embedding_dropout: float = 0.1
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self):
        check_heads(self.hidden_size, self.num_heads)

    def build(self, dtype: jnp.dtype = jnp.float32) -> "GPT":
        """The model, computing in `dtype`."""
        return GPT(self, dtype)


class GPT(nn.Module):
    """Embeddings, decoder, and a softmax tied to the token embeddings."""

    config: GPTConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        c = self.config
        initializer = normal(c.initializer_range)  # train.py: plain, where BERT's is truncated.
        self.token_embeddings = Embedding(padded_vocabulary(c.vocab_size), c.hidden_size, initializer)
        self.position_embeddings = Embedding(c.max_position_embeddings, c.hidden_size, initializer)
        self.embeddings_dropout = Dropout(c.embedding_dropout)
        self.decoder = Transformer(
            TransformerConfig(
                num_layers=c.num_layers,
                hidden_size=c.hidden_size,
                num_heads=c.num_heads,
                intermediate_size=4 * c.hidden_size,
                activation=gelu_tanh,
                layer_norm_eps=c.layer_norm_eps,
                hidden_dropout=c.hidden_dropout,
                attention_dropout=c.attention_dropout,
                initializer=initializer,
            )
        )

    # The forward pass, in pieces; call them with `apply(..., method="hidden_states")`.

    def hidden_states(self, tokens_BT: Array, positions_BT: Array, segments_BT: Array) -> tuple[Array, ...]:
        """The `num_layers` + 1 hidden states [B, T, D]: after the embeddings and after each layer."""
        return self._decode(tokens_BT, positions_BT, attention_mask(segments_BT, causal=True))

    def logits(self, hidden_BTD: Array) -> Array:
        """[B, T, padded vocabulary], fp32: what comes after each token."""
        x_GD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        logits_GV = tied_logits(x_GD, self.token_embeddings.table, self.config.vocab_size)
        return logits_GV.reshape(*hidden_BTD.shape[:-1], -1)

    def next_logits(self, tokens_BT: Array, length: Array) -> Array:
        """[B, padded vocabulary], fp32: what comes after rows of which `tokens_BT` are the last T of `length` tokens.

        Of the tokens before, up to `max_position_embeddings` in all, keys and values stand in the collection `cache`
        (see `init_cache`), to which these are added: apply with `mutable=["cache"]`. Where `length` is less than T, the
        first T - `length` tokens are padding.
        """
        window = self.config.max_position_embeddings
        # Places in the text; those of padding, and of what the cache has no tokens for, are negative.
        places_T = length - tokens_BT.shape[1] + jnp.arange(tokens_BT.shape[1])
        places_S = length - window + jnp.arange(window)
        mask_TS = (places_S[None] >= 0) & (places_S[None] <= places_T[:, None])
        positions_BT = jnp.broadcast_to(jnp.maximum(places_T, 0)[None], tokens_BT.shape)
        last_BTD = self._decode(tokens_BT, positions_BT, Mask(mask_TS[None, None]))[-1]
        return self.logits(last_BTD[:, -1:])[:, 0]

    def _decode(self, tokens_BT: Array, positions_BT: Array, mask: Mask) -> tuple[Array, ...]:
        x_BTD = self.token_embeddings(tokens_BT) + self.position_embeddings(positions_BT)
        return self.decoder(self.embeddings_dropout(x_BTD.astype(self.dtype)), mask)

    def _losses(self, batch: Batch) -> tuple[Sums, Sums]:
        last_BTD = self.hidden_states(batch["tokens"], batch["positions"], batch["segments"])[-1]
        loss, correct = tied_cross_entropy(
            last_BTD, self.token_embeddings.table, batch["targets"], batch["weights"], self.config.vocab_size
        )
        weight = batch["weights"].sum()
        return {"lm_loss": (loss, weight)}, {"lm_accuracy": (correct, weight)}

    def init_cache(self, batch_size: int) -> Params:
        """The collection `cache` of `next_logits` before the first token."""
        c = self.config
        shape_BNSH = (batch_size, c.num_heads, c.max_position_embeddings, c.hidden_size // c.num_heads)

        def layer() -> Params:
            return {"attention": {name: jnp.zeros(shape_BNSH, self.dtype) for name in ("keys", "values")}}

        return {"decoder": {f"layer_{i}": layer() for i in range(c.num_layers)}}

    # The contract with the training room.

    def init_params(self, key: Array) -> Params:
        """Fresh fp32 parameters."""
        one = jnp.zeros((1, 1), jnp.int32)
        batch = dict.fromkeys(("tokens", "targets", "positions", "segments"), one) | {"weights": jnp.zeros((1, 1))}
        return self.init(key, batch, method=GPT._losses)["params"]

    def init_carry(self, batch_size: int) -> Params:
        """What one step hands to the next: nothing."""
        return {}

    def check(self, batch: dict[str, np.ndarray]) -> None:
        """Raises InputError where a batch asks for rows that the tables lack."""
        c = self.config
        vocabulary = (c.vocab_size, "vocab_size")
        positions = (c.max_position_embeddings, "max_position_embeddings")
        check_rows(batch, tokens=vocabulary, targets=vocabulary, positions=positions)

    def loss(self, params: Params, carry: Params, batch: Batch, key: Array, train: bool) -> tuple[Sums, Sums, Params]:
        """(losses, metrics, carry): names to (sum, weight). `key` None: evaluation, without dropout."""
        rngs = {"dropout": key} if train else {}
        return *self.apply({"params": params}, batch, rngs=rngs, method=GPT._losses), carry

    def weights(self, batch: Batch) -> dict[str, Array]:
        """The weight of the loss, from the batch alone."""
        return {"lm_loss": batch["weights"].sum()}

    @property
    def replicated(self) -> tuple[str, ...]:
        """Regular expressions of the parameter paths that are never sharded."""
        return ()

    @property
    def coefficients(self) -> dict[str, float]:
        """The objective is the sum of coefficient · sum / weight."""
        return {"lm_loss": 1.0}

    def tokens(self, batch: Batch) -> Array:
        """[2]: the tokens of a batch that are not padding, and all its places."""
        return jnp.array([(batch["segments"] != 0).sum(), batch["segments"].size])

    def flops(self, batch: Batch) -> float:
        """Matmul operations of one training step on a batch of these shapes: forward, and twice that for backward.

        Per token 24·D² (projections and feed-forward) + 4·D·T (scores and sums, later tokens included) for each layer,
        and 2·D·V for the softmax. Padding counts, elementwise work does not.
        """
        c, (batch_size, length) = self.config, batch["tokens"].shape
        layer = 24 * c.hidden_size**2 + 4 * c.hidden_size * length
        return 3.0 * batch_size * length * (c.num_layers * layer + 2 * c.hidden_size * c.vocab_size)
