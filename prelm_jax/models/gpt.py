"""GPT-1 (Radford et al. 2018): a Transformer trained to predict the next token.

Reference: openai/finetune-transformer-lm, train.py, the authors' fine-tuning code; for the rest, transformers.
Divergences:
- Dropout on the embeddings drops elements of their sum, as in transformers; the reference drops the same elements of
  the whole table for every token of a step, and of the softmax with it.
- The softmax is over the vocabulary alone; the reference keeps tokens and positions in one table, and predicts both.
- Attention is masked by segments (equal and not 0) as well as by order, so that rows may be packed.
- The vocabulary table has a multiple of 128 rows; padding rows are never looked up and never win.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from prelm_jax.bounds import Epsilon, FractionBelow1
from prelm_jax.models.attention import Mask, attention_mask
from prelm_jax.models.cross_entropy import tied_cross_entropy, tied_logits
from prelm_jax.models.language_model import Encoder, LanguageModel, continues
from prelm_jax.models.layers import (
    Dropout,
    Embedding,
    activation_dtype,
    check_rows,
    gelu_tanh,
    normal,
    padded_vocabulary,
)
from prelm_jax.models.transformer import Transformer, TransformerConfig
from prelm_jax.training.contract import Batch, HostBatch, Params, Sums


@dataclasses.dataclass(frozen=True)
class GPTConfig(TransformerConfig):
    """GPT's sizes; the defaults are GPT-1.

    The feed-forward blocks are 4 · `hidden_size` wide: the published format has no setting for another width.
    """

    model_type: ClassVar[str] = "openai-gpt"
    layer_norm_eps: Epsilon = 1e-5  # Added to the variance in every layer norm.
    embedding_dropout: FractionBelow1 = 0.1  # Dropout on the sum of token and position embeddings.

    def build(self, dtype: jnp.dtype = jnp.float32) -> "GPT":
        """The pretraining model, computing in `dtype`."""
        return GPT(self, dtype)

    def encoder(self, dtype: jnp.dtype = jnp.float32) -> "GPTEncoder":
        """The model without its softmax, computing in `dtype`."""
        return GPTEncoder(self, dtype, parent=None)  # Nobody's submodule, wherever it is made.


class GPTEncoder(Encoder):
    """Embeddings and Transformer; a token attends to itself and to earlier tokens."""

    config: GPTConfig
    dtype: jnp.dtype = jnp.float32

    replicated: ClassVar[tuple[str, ...]] = ()
    matrices: ClassVar[tuple[str, ...]] = (r"(^|/)decoder/layer_\d+/.*kernel$",)
    has_summary: ClassVar[bool] = True
    reads_forward: ClassVar[bool] = True

    def setup(self):
        c = self.config
        initializer = normal(c.initializer_range)  # train.py: plain, where BERT's is truncated.
        self.token_embeddings = Embedding(padded_vocabulary(c.known_vocab_size), c.hidden_size, initializer)
        self.position_embeddings = Embedding(c.max_position_embeddings, c.hidden_size, initializer)
        self.embeddings_dropout = Dropout(c.embedding_dropout)
        self.decoder = Transformer(c, 4 * c.hidden_size, gelu_tanh, initializer)

    def hidden_states(self, batch: Batch, train: bool = False) -> tuple[Array, ...]:
        """The `num_layers` + 1 hidden states [B, T, D]: after the embeddings and after each layer.

        Reads tokens, positions and segments, all [B, T]; segment 0 is padding.
        """
        mask = attention_mask(batch["segments"], causal=True)
        return self.decode(batch["tokens"], batch["positions"], mask, train)

    def decode(self, tokens_BT: Array, positions_BT: Array, mask: Mask, train: bool) -> tuple[Array, ...]:
        """The hidden states under any mask."""
        x_BTD = self.token_embeddings(tokens_BT) + self.position_embeddings(positions_BT)
        return self.decoder(self.embeddings_dropout(x_BTD.astype(activation_dtype(self.dtype)), train), mask, train)

    def summary(self, last_BTD: Array, positions_BK: Array) -> Array:
        """[B, K, D]: the last hidden states at these positions, which a task's frame gives a token of their own."""
        return jnp.take_along_axis(last_BTD, positions_BK[..., None], 1)

    def next_token_loss(self, last_BTD: Array, batch: Batch) -> Array:
        """The sum over segments of the mean loss of a segment's tokens after its first, if it has any."""
        segments_BT = batch["segments"][:, 1:]
        weights_BT = continues(batch["segments"]).astype(jnp.float32)
        alike_BTT = segments_BT[:, :, None] == segments_BT[:, None]
        weights_BT /= jnp.maximum(1, (alike_BTT * weights_BT[:, None]).sum(2))
        targets_BT, vocab_size = batch["tokens"][:, 1:], self.config.known_vocab_size
        return tied_cross_entropy(last_BTD[:, :-1], self.token_embeddings.table, targets_BT, weights_BT, vocab_size)[0]

    def check(self, batch: HostBatch) -> None:
        """Raises InputError where a batch asks for rows that the tables lack."""
        c = self.config
        positions = (c.max_position_embeddings, "max_position_embeddings")
        check_rows(batch, tokens=(c.known_vocab_size, "vocab_size"), positions=positions)

    def flops(self, batch: Batch) -> float:
        """Matmul FLOPs of the hidden states of a batch of these shapes, forward.

        Per token and layer 24·D² (projections and feed-forward) + 4·D·T (scores and sums, later tokens included).
        Padding counts, elementwise work does not.
        """
        c, tokens = self.config, batch["tokens"]
        return float(tokens.size * c.num_layers * (24 * c.hidden_size**2 + 4 * c.hidden_size * tokens.shape[-1]))


class GPT(LanguageModel):
    """The encoder with a softmax tied to its token embeddings."""

    config: GPTConfig
    dtype: jnp.dtype = jnp.float32

    replicated, matrices = GPTEncoder.replicated, GPTEncoder.matrices

    def setup(self):
        self.gpt = GPTEncoder(self.config, self.dtype)
        nn.share_scope(self, self.gpt)

    def logits(self, hidden: Array) -> Array:
        """[..., padded vocabulary], fp32, of the token after each, from the last hidden states [..., D]."""
        return tied_logits(hidden, self.gpt.token_embeddings.table, self.config.known_vocab_size)

    def next_logits(self, tokens_BT: Array, length: Array) -> Array:
        """[B, padded vocabulary], fp32: logits of the token after `length` tokens, of which these are the last.

        The collection `cache` (see `init_cache`) holds keys and values of the last `max_position_embeddings` tokens;
        new ones are appended, so apply with `mutable=["cache"]`. Where `length` is less than T, the first T - `length`
        tokens are padding.
        """
        # With a window of 4, the last T = 2 tokens of a text of length 3: positions_T = [1, 2]; the cache then holds
        # positions_S = [-1, 0, 1, 2], and the token at 1 attends to 0 and 1. Negative positions are padding or empty.
        window = self.config.max_position_embeddings
        positions_T = length - tokens_BT.shape[1] + jnp.arange(tokens_BT.shape[1])
        positions_S = length - window + jnp.arange(window)
        mask_TS = (positions_S[None] >= 0) & (positions_S[None] <= positions_T[:, None])
        positions_BT = jnp.broadcast_to(jnp.maximum(positions_T, 0)[None], tokens_BT.shape)
        last_BTD = self.gpt.decode(tokens_BT, positions_BT, Mask(mask_TS[None, None]), train=False)[-1]
        return self.logits(last_BTD[:, -1:])[:, 0]

    def init_cache(self, batch_size: int) -> Params:
        """The collection `cache` of `next_logits` before the first token."""
        c = self.config
        shape_BSD = (batch_size, c.max_position_embeddings, c.hidden_size)

        def layer() -> Params:
            return {
                "attention": {name: jnp.zeros(shape_BSD, activation_dtype(self.dtype)) for name in ("keys", "values")}
            }

        return {"decoder": {f"layer_{i}": layer() for i in range(c.num_layers)}}

    def losses(self, batch: Batch, carry: Params, train: bool) -> tuple[Sums, Sums, Params]:
        """The loss and its accuracy."""
        last_BTD = self.gpt.hidden_states(batch, train)[-1]
        table_VD, vocab_size = self.gpt.token_embeddings.table, self.config.known_vocab_size
        loss, correct = tied_cross_entropy(last_BTD, table_VD, batch["targets"], batch["weights"], vocab_size)
        weight = batch["weights"].sum()
        return {"lm_loss": (loss, weight)}, {"lm_accuracy": (correct, weight)}, carry

    def create_parameters(self) -> None:
        one = jnp.zeros((1, 1), jnp.int32)
        self.gpt.hidden_states({"tokens": one, "positions": one, "segments": one})

    @property
    def coefficients(self) -> dict[str, float]:
        """The objective is the loss."""
        return {"lm_loss": 1.0}

    def weights(self, batch: Batch) -> dict[str, Array]:
        """The weight of the loss, from the batch alone."""
        return {"lm_loss": batch["weights"].sum()}

    def check(self, batch: HostBatch) -> None:
        """Raises InputError where a batch asks for rows that the tables lack."""
        self.config.encoder().check(batch)
        check_rows(batch, targets=(self.config.known_vocab_size, "vocab_size"))

    def flops(self, batch: Batch) -> float:
        """Matmul FLOPs of one training step on a batch of these shapes: forward, and twice that for backward.

        On top of the encoder's FLOPs, the softmax adds 2·D·V per token.
        """
        softmax = 2 * self.config.hidden_size * self.config.known_vocab_size
        return 3.0 * (self.config.encoder().flops(batch) + batch["tokens"].size * softmax)
