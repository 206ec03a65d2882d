"""BERT (Devlin et al. 2018): a bidirectional Transformer trained to fill masks and to tell whether B follows A.

Reference: google-research/bert, modeling.py and run_pretraining.py. Divergences:
- The GELU is the erf form, with which the published checkpoints were trained; the reference's later code has tanh.
- Attention is masked by segments (equal and not 0) instead of by padding alone, so that rows may be packed.
- The vocabulary table has a multiple of 128 rows; those past `vocab_size` are never looked up and never win.
- Each loss is divided by the weight of the whole global batch; the reference divides on each replica.
"""

import dataclasses
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from prelm_jax.models.attention import attention_mask
from prelm_jax.models.cross_entropy import cross_entropy, tied_logits
from prelm_jax.models.layers import (
    Dense,
    Dropout,
    Embedding,
    LayerNorm,
    check_rows,
    gelu,
    padded_vocabulary,
    truncated_normal,
)
from prelm_jax.models.transformer import Transformer, TransformerConfig, check_heads

Params = dict[str, Any]
Batch = dict[str, Array]
Sums = dict[str, tuple[Array, Array]]


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """BERT's sizes; the defaults are BERT-base. `vocab_size` None: as many as the tokenizer has."""

    model_type: ClassVar[str] = "bert"
    vocab_size: int | None = None
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02

    def __post_init__(self):
        check_heads(self.hidden_size, self.num_heads)

    def build(self, dtype: jnp.dtype = jnp.float32) -> "Bert":
        """The model, computing in `dtype`."""
        return Bert(self, dtype)


class Bert(nn.Module):
    """Embeddings, encoder, pooler and the two pretraining heads."""

    config: BertConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        c = self.config
        initializer = truncated_normal(c.initializer_range)
        dense = partial(Dense, initializer=initializer)
        self.word_embeddings = Embedding(padded_vocabulary(c.vocab_size), c.hidden_size, initializer)
        self.position_embeddings = Embedding(c.max_position_embeddings, c.hidden_size, initializer)
        self.token_type_embeddings = Embedding(c.type_vocab_size, c.hidden_size, initializer)
        self.embeddings_layer_norm = LayerNorm(c.layer_norm_eps)
        self.embeddings_dropout = Dropout(c.hidden_dropout)
        self.encoder = Transformer(
            TransformerConfig(
                num_layers=c.num_layers,
                hidden_size=c.hidden_size,
                num_heads=c.num_heads,
                intermediate_size=c.intermediate_size,
                activation=gelu,
                layer_norm_eps=c.layer_norm_eps,
                hidden_dropout=c.hidden_dropout,
                attention_dropout=c.attention_dropout,
                initializer=initializer,
            )
        )
        self.pooler = dense(c.hidden_size)
        self.masked_lm_transform = dense(c.hidden_size)
        self.masked_lm_layer_norm = LayerNorm(c.layer_norm_eps)
        self.masked_lm_bias = self.param("masked_lm_bias", nn.initializers.zeros, (padded_vocabulary(c.vocab_size),))
        self.next_sentence = dense(2)

    # The forward pass, in pieces; call them with `apply(..., method="hidden_states")`.

    def hidden_states(self, tokens_BT: Array, token_types_BT: Array, positions_BT: Array, segments_BT: Array):
        """The `num_layers` + 1 hidden states [B, T, D]: after the embeddings and after each layer."""
        # Two rows of types: a one-hot product has a dense gradient, where a lookup would add B·T rows into two.
        types = jax.nn.one_hot(token_types_BT, self.config.type_vocab_size, dtype=jnp.float32)
        x_BTD = self.word_embeddings(tokens_BT) + self.position_embeddings(positions_BT)
        x_BTD = x_BTD + jnp.einsum("BTK,KD->BTD", types, self.token_type_embeddings.table)
        x_BTD = self.embeddings_dropout(self.embeddings_layer_norm(x_BTD).astype(self.dtype))
        return self.encoder(x_BTD, attention_mask(segments_BT))

    def pooled(self, last_hidden_BTD: Array, positions_BK: Array) -> Array:
        """[B, K, D]: tanh of a dense layer over the first token of each pair ([CLS])."""
        return jnp.tanh(self.pooler(jnp.take_along_axis(last_hidden_BTD, positions_BK[..., None], 1)))

    def masked_lm_logits(self, hidden_BMD: Array) -> Array:
        """[B, M, padded vocabulary], fp32: the transform, then the product with the word embeddings and a bias."""
        return self._masked_lm_logits(hidden_BMD).reshape(*hidden_BMD.shape[:-1], -1)

    def _masked_lm_logits(self, hidden_BMD: Array) -> Array:
        x_BMD = self.masked_lm_layer_norm(gelu(self.masked_lm_transform(hidden_BMD)))
        x_GD, table_VD = x_BMD.reshape(-1, x_BMD.shape[-1]), self.word_embeddings.table
        return tied_logits(x_GD, table_VD, self.config.vocab_size, self.masked_lm_bias)

    def next_sentence_logits(self, pooled_BKD: Array) -> Array:
        """[B, K, 2], fp32: index 0 says that B follows A (the reference's polarity)."""
        return self.next_sentence(pooled_BKD).astype(jnp.float32)

    def _losses(self, batch: Batch) -> tuple[Sums, Sums]:
        last_BTD = self.hidden_states(batch["tokens"], batch["token_types"], batch["positions"], batch["segments"])[-1]
        masked_BMD = jnp.take_along_axis(last_BTD, batch["masked_positions"][..., None], 1)
        # Of all rows together: where M is no multiple of 8, a TPU would write the logits anew to part them by rows.
        nll_G, correct_G = cross_entropy(self._masked_lm_logits(masked_BMD), batch["masked_targets"].reshape(-1))
        weights_BM = batch["masked_weights"]
        losses = {"masked_lm_loss": _sum(nll_G.reshape(weights_BM.shape), weights_BM)}
        metrics = {"masked_lm_accuracy": _sum(correct_G.reshape(weights_BM.shape), weights_BM)}
        if "next_sentence_labels" in batch:
            pooled_BKD = self.pooled(last_BTD, batch["next_sentence_positions"])
            nll_BK, correct_BK = cross_entropy(self.next_sentence_logits(pooled_BKD), batch["next_sentence_labels"])
            losses["next_sentence_loss"] = _sum(nll_BK, batch["next_sentence_weights"])
            metrics["next_sentence_accuracy"] = _sum(correct_BK, batch["next_sentence_weights"])
        return losses, metrics

    # The contract with the training room.

    def init_params(self, key: Array) -> Params:
        """Fresh fp32 parameters."""
        one = jnp.zeros((1, 1), jnp.int32)
        batch = dict.fromkeys(("tokens", "token_types", "positions", "segments", "masked_positions"), one)
        batch |= dict.fromkeys(("masked_targets", "next_sentence_positions", "next_sentence_labels"), one)
        batch |= dict.fromkeys(("masked_weights", "next_sentence_weights"), one.astype(jnp.float32))
        return self.init(key, batch, method=Bert._losses)["params"]

    def init_carry(self, batch_size: int) -> Params:
        """What one step hands to the next: nothing."""
        return {}

    def check(self, batch: dict[str, np.ndarray]) -> None:
        """Raises InputError where a batch asks for rows that the tables lack."""
        c = self.config
        positions = (c.max_position_embeddings, "max_position_embeddings")
        check_rows(batch, tokens=(c.vocab_size, "vocab_size"), positions=positions)

    def loss(self, params: Params, carry: Params, batch: Batch, key: Array, train: bool) -> tuple[Sums, Sums, Params]:
        """(losses, metrics, carry): names to (sum, weight). `key` None: evaluation, without dropout."""
        rngs = {"dropout": key} if train else {}
        return *self.apply({"params": params}, batch, rngs=rngs, method=Bert._losses), carry

    def weights(self, batch: Batch) -> dict[str, Array]:
        """The weight of each loss, from the batch alone."""
        weights = {"masked_lm_loss": batch["masked_weights"].sum()}
        if "next_sentence_labels" in batch:
            weights["next_sentence_loss"] = batch["next_sentence_weights"].sum()
        return weights

    @property
    def replicated(self) -> tuple[str, ...]:
        """Regular expressions of the parameter paths that are never sharded."""
        return ()

    @property
    def coefficients(self) -> dict[str, float]:
        """The objective is the sum of coefficient · sum / weight: both losses count alike."""
        return {"masked_lm_loss": 1.0, "next_sentence_loss": 1.0}

    def tokens(self, batch: Batch) -> Array:
        """[2]: the tokens of a batch that are not padding, and all its places."""
        return jnp.array([(batch["segments"] != 0).sum(), batch["segments"].size])

    def flops(self, batch: Batch) -> float:
        """Matmul operations of one training step on a batch of these shapes: forward, and twice that for backward.

        Per token and layer 8·D² (projections) + 4·D·F (feed-forward) + 4·D·T (scores and sums); per masked position
        2·D² + 2·D·V. Padding counts, elementwise work does not.
        """
        c, (batch_size, length), masked = self.config, batch["tokens"].shape, batch["masked_positions"].size
        layer = 8 * c.hidden_size**2 + 4 * c.hidden_size * c.intermediate_size + 4 * c.hidden_size * length
        head = 2 * c.hidden_size**2 + 2 * c.hidden_size * c.vocab_size
        return 3.0 * (batch_size * length * c.num_layers * layer + masked * head)


def _sum(x: Array, weights: Array) -> tuple[Array, Array]:
    return (x * weights).sum(), weights.sum()
