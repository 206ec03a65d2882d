"""BERT (Devlin et al. 2018): a bidirectional Transformer trained to fill masks and to tell whether B follows A.

Reference: google-research/bert, modeling.py and run_pretraining.py. Divergences:
- The GELU is the exact form, with which the published checkpoints were trained; the reference's later code has tanh.
- Attention is masked by segments (equal and not 0) instead of by padding alone, so that rows may be packed.
- The vocabulary table has a multiple of 128 rows; padding rows are never looked up and never win.
- Each loss is divided by the weight of the whole global batch; the reference divides on each replica.
- `embedding_size` is ELECTRA's (Clark et al. 2020; google-research/electra, model/modeling.py): narrower embeddings.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from prelm_jax.bounds import Size
from prelm_jax.models.attention import attention_mask
from prelm_jax.models.cross_entropy import accurate_sum, cross_entropy, tied_logits
from prelm_jax.models.language_model import Encoder, LanguageModel
from prelm_jax.models.layers import (
    Dense,
    Dropout,
    Embedding,
    LayerNorm,
    activation_dtype,
    check_rows,
    gelu,
    glorot_uniform,
    padded_vocabulary,
    truncated_normal,
)
from prelm_jax.models.transformer import Transformer, TransformerConfig
from prelm_jax.training.contract import Batch, HostBatch, Params, Sums


@dataclasses.dataclass(frozen=True)
class BertConfig(TransformerConfig):
    """BERT's sizes; the defaults are BERT-base."""

    model_type: ClassVar[str] = "bert"
    intermediate_size: Size = 3072  # Width of the feed-forward blocks; the paper uses 4 · hidden_size.
    type_vocab_size: Size = 2  # Token types: 0 for text A, 1 for text B.
    embedding_size: Size | None = None  # Width of the embeddings, projected to hidden_size; None: hidden_size itself.

    def build(self, dtype: jnp.dtype = jnp.float32) -> "Bert":
        """The pretraining model, computing in `dtype`."""
        return Bert(self, dtype)

    def encoder(self, dtype: jnp.dtype = jnp.float32) -> "BertEncoder":
        """The encoder alone, computing in `dtype`."""
        return BertEncoder(self, dtype, parent=None)  # Nobody's submodule, wherever it is made.

    @property
    def embedding_width(self) -> int:
        """Width of the embeddings."""
        return self.embedding_size or self.hidden_size


class BertEmbeddings(nn.Module):
    """The sum of word, position and type embeddings, normed, with dropout; `word_embeddings.table` is [V, D]."""

    config: BertConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        c = self.config
        initializer = truncated_normal(c.initializer_range)
        self.word_embeddings = Embedding(padded_vocabulary(c.known_vocab_size), c.embedding_width, initializer)
        self.position_embeddings = Embedding(c.max_position_embeddings, c.embedding_width, initializer)
        self.token_type_embeddings = Embedding(c.type_vocab_size, c.embedding_width, initializer)
        self.embeddings_layer_norm = LayerNorm(c.layer_norm_eps)
        self.embeddings_dropout = Dropout(c.hidden_dropout)

    def __call__(self, batch: Batch, train: bool) -> Array:
        """[B, T, embedding width] from the tokens, token types and positions [B, T] of a batch."""
        # Two rows of types: a one-hot product has a dense gradient, where a lookup would add B·T rows into two.
        types = jax.nn.one_hot(batch["token_types"], self.config.type_vocab_size, dtype=jnp.float32)
        x_BTD = self.word_embeddings(batch["tokens"]) + self.position_embeddings(batch["positions"])
        x_BTD = x_BTD + jnp.einsum("BTK,KD->BTD", types, self.token_type_embeddings.table)
        return self.embeddings_dropout(self.embeddings_layer_norm(x_BTD).astype(activation_dtype(self.dtype)), train)


class BertEncoder(Encoder):
    """Embeddings and Transformer.

    shared_embeddings: a module that several encoders read, whose parameters then belong to the module that made it;
    None: embeddings of its own.
    """

    config: BertConfig
    dtype: jnp.dtype = jnp.float32
    shared_embeddings: BertEmbeddings | None = None

    replicated: ClassVar[tuple[str, ...]] = ()
    matrices: ClassVar[tuple[str, ...]] = (r"(^|/)encoder/layer_\d+/.*kernel$",)
    has_summary: ClassVar[bool] = True

    def setup(self):
        c = self.config
        if self.shared_embeddings is None:
            self.embeddings = BertEmbeddings(c, self.dtype)
            nn.share_scope(self, self.embeddings)
        else:
            self.embeddings = self.shared_embeddings
        if c.embedding_width != c.hidden_size:
            self.embeddings_projection = Dense(c.hidden_size, glorot_uniform)
        self.encoder = Transformer(c, c.intermediate_size, gelu, truncated_normal(c.initializer_range))
        self.pooler = Dense(c.hidden_size, truncated_normal(c.initializer_range))  # Unused by `hidden_states`.

    def hidden_states(self, batch: Batch, train: bool = False) -> tuple[Array, ...]:
        """The `num_layers` + 1 hidden states [B, T, D]: after the embeddings and after each layer.

        Reads tokens, token_types, positions and segments, all [B, T]; segment 0 is padding.
        """
        x_BTD = self.embeddings(batch, train)
        if self.config.embedding_width != self.config.hidden_size:
            x_BTD = self.embeddings_projection(x_BTD)
        return self.encoder(x_BTD, attention_mask(batch["segments"]), train)

    def summary(self, last_BTD: Array, positions_BK: Array) -> Array:
        """[B, K, D]: tanh of a dense layer over the last hidden states of the first token of each pair ([CLS])."""
        return jnp.tanh(self.pooler(jnp.take_along_axis(last_BTD, positions_BK[..., None], 1)))

    def check(self, batch: HostBatch) -> None:
        """Raises InputError where a batch asks for rows that the tables lack."""
        c = self.config
        positions = (c.max_position_embeddings, "max_position_embeddings")
        types = (c.type_vocab_size, "type_vocab_size")
        check_rows(batch, tokens=(c.known_vocab_size, "vocab_size"), positions=positions, token_types=types)

    def flops(self, batch: Batch) -> float:
        """Matmul FLOPs of the hidden states of a batch of these shapes, forward.

        Per token and layer 8·D² (projections) + 4·D·F (feed-forward) + 4·D·T (scores and sums); with embeddings of a
        width E of their own 2·E·D per token. Padding counts, elementwise work does not.
        """
        c, length = self.config, batch["tokens"].shape[-1]
        layer = 8 * c.hidden_size**2 + 4 * c.hidden_size * c.intermediate_size + 4 * c.hidden_size * length
        projection = 2 * c.embedding_width * c.hidden_size if c.embedding_width != c.hidden_size else 0
        return float(batch["tokens"].size * (c.num_layers * layer + projection))


class MaskedLMHead(nn.Module):
    """Logits of masked tokens: a dense layer, GELU and norm, then a product with the word embeddings, and a bias."""

    config: BertConfig

    def setup(self):
        c = self.config
        self.masked_lm_transform = Dense(c.embedding_width, truncated_normal(c.initializer_range))
        self.masked_lm_layer_norm = LayerNorm(c.layer_norm_eps)
        rows = padded_vocabulary(c.known_vocab_size)
        self.masked_lm_bias = self.param("masked_lm_bias", nn.initializers.zeros, (rows,))

    def __call__(self, hidden: Array, table_VD: Array) -> Array:
        """[..., padded vocabulary], fp32, from hidden states [..., D] and the table of word embeddings."""
        x = self.masked_lm_layer_norm(gelu(self.masked_lm_transform(hidden)))
        return tied_logits(x, table_VD, self.config.known_vocab_size, self.masked_lm_bias)


class Bert(LanguageModel):
    """The encoder with the two pretraining heads."""

    config: BertConfig
    dtype: jnp.dtype = jnp.float32

    replicated, matrices = BertEncoder.replicated, BertEncoder.matrices

    def setup(self):
        c = self.config
        # One scope for all, so that the names of parameters do not say which module made them.
        self.bert = BertEncoder(c, self.dtype)
        nn.share_scope(self, self.bert)
        self.masked_lm = MaskedLMHead(c)
        nn.share_scope(self, self.masked_lm)
        self.next_sentence = Dense(2, truncated_normal(c.initializer_range))

    def masked_lm_logits(self, hidden: Array) -> Array:
        """[..., padded vocabulary], fp32, from the last hidden states [..., D] of masked tokens."""
        return self.masked_lm(hidden, self.bert.embeddings.word_embeddings.table)

    def pooled(self, last_hidden_BTD: Array, positions_BK: Array) -> Array:
        """[B, K, D]: see `BertEncoder.summary`."""
        return self.bert.summary(last_hidden_BTD, positions_BK)

    def next_sentence_logits(self, pooled_BKD: Array) -> Array:
        """[B, K, 2], fp32: index 0 says that B follows A (the reference's polarity)."""
        return self.next_sentence(pooled_BKD).astype(jnp.float32)

    def losses(self, batch: Batch, carry: Params, train: bool) -> tuple[Sums, Sums, Params]:
        """The two losses and their accuracies; the second only if the batch has pairs."""
        last_BTD = self.bert.hidden_states(batch, train)[-1]
        masked_BMD = jnp.take_along_axis(last_BTD, batch["masked_positions"][..., None], 1)
        logits_BMV = self.masked_lm_logits(masked_BMD)
        # Rows flattened: with M no multiple of 8, a TPU would copy the logits to separate them by rows.
        logits_GV = logits_BMV.reshape(-1, logits_BMV.shape[-1])
        nll_G, correct_G = cross_entropy(logits_GV, batch["masked_targets"].reshape(-1))
        weights_BM = batch["masked_weights"]
        losses = {"masked_lm_loss": _weighted(nll_G.reshape(weights_BM.shape), weights_BM, train)}
        metrics = {"masked_lm_accuracy": _weighted(correct_G.reshape(weights_BM.shape), weights_BM, train)}
        if "next_sentence_labels" in batch:
            pooled_BKD = self.pooled(last_BTD, batch["next_sentence_positions"])
            nll_BK, correct_BK = cross_entropy(self.next_sentence_logits(pooled_BKD), batch["next_sentence_labels"])
            losses["next_sentence_loss"] = _weighted(nll_BK, batch["next_sentence_weights"], train)
            metrics["next_sentence_accuracy"] = _weighted(correct_BK, batch["next_sentence_weights"], train)
        return losses, metrics, carry

    def create_parameters(self) -> None:
        one = jnp.zeros((1, 1), jnp.int32)
        batch = dict.fromkeys(("tokens", "token_types", "positions", "segments", "masked_positions"), one)
        batch |= dict.fromkeys(("masked_targets", "next_sentence_positions", "next_sentence_labels"), one)
        batch |= dict.fromkeys(("masked_weights", "next_sentence_weights"), one.astype(jnp.float32))
        self.losses(batch, {}, train=False)

    @property
    def coefficients(self) -> dict[str, float]:
        """The objective is the sum of both losses (run_pretraining.py)."""
        return {"masked_lm_loss": 1.0, "next_sentence_loss": 1.0}

    def weights(self, batch: Batch) -> dict[str, Array]:
        """The weight of each loss, from the batch alone."""
        weights = {"masked_lm_loss": batch["masked_weights"].sum()}
        if "next_sentence_labels" in batch:
            weights["next_sentence_loss"] = batch["next_sentence_weights"].sum()
        return weights

    def check(self, batch: HostBatch) -> None:
        """Raises InputError where a batch asks for rows that the tables lack."""
        self.config.encoder().check(batch)

    def flops(self, batch: Batch) -> float:
        """Matmul FLOPs of one training step on a batch of these shapes: forward, and twice that for backward.

        On top of the encoder's FLOPs, the head adds per masked position 2·D·E + 2·E·V.
        """
        c = self.config
        head = 2 * c.hidden_size * c.embedding_width + 2 * c.embedding_width * c.known_vocab_size
        return 3.0 * (c.encoder().flops(batch) + batch["masked_positions"].size * head)


def _weighted(x: Array, weights: Array, train: bool) -> tuple[Array, Array]:
    return (x * weights).sum() if train else accurate_sum(x * weights), weights.sum()
