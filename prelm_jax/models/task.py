"""An encoder with the head of a task: what fine-tuning trains, by the same contract as pretraining.

The parameters of the encoder have the paths that they have in its pretraining model; the paths of the head begin with
`head/`. Keys of a batch, int32 unless said; B examples, S texts of each, T tokens, K positions that are read:

    tokens, token_types, positions, segments [B, S, T]    as in pretraining; segment 0 is padding
    words [B, S, T], characters [U, C]                    ELMo's, instead of tokens
    read_positions [B, S, K]    the summaries of texts, or a token of each word to tag; -1: none
    labels                      [B, K] of classes, choices, tags or numbers (float32); [B, K, N] (float32) of several
                                labels; [B, 1, 2] of the first and the last token of an answer
    label_weights               float32 [B, K]

S is 1 but for choices and for pairs that are encoded apart. K is 1 but for tags and where rows are packed: then the
examples of a row, each a segment, are labeled in their order. A text of a choice that is not read is none.
"""

import dataclasses
import re
from typing import ClassVar, Literal, Protocol, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from prelm_jax.bounds import Fraction, NotNegativeFloat, OutOfBounds
from prelm_jax.models import heads
from prelm_jax.models.language_model import Encoder, LanguageModel, continues
from prelm_jax.models.layers import products_in
from prelm_jax.training.contract import Batch, HostBatch, Params, Sums

HEAD = "head/"


class EncoderConfig(Protocol):
    """The config of a family's model."""

    model_type: ClassVar[str]

    @property
    def vocab_size(self) -> int | None: ...

    @property
    def num_layers(self) -> int: ...

    def encoder(self, dtype: jnp.dtype = ...) -> Encoder: ...


@dataclasses.dataclass(frozen=True)
class TaskModelConfig:
    """An encoder, the head on it, and how they are trained."""

    encoder: EncoderConfig
    head: heads.Config
    # What is trained: all, or the head alone; then the encoder has neither dropout nor gradients.
    tune: Literal["all", "head"] = "all"
    # Factor of the learning rate from a layer to the one below; the head has the rate, the top layer rate · decay.
    layer_decay: Fraction = 1.0
    # Weight of the loss of the next tokens, which only GPT has; GPT-1 was fine-tuned with 0.5.
    lm_coefficient: NotNegativeFloat = 0.0

    def check_together(self) -> None:
        """Raises OutOfBounds for a loss of next tokens that the encoder lacks or does not learn from."""
        if self.lm_coefficient and (not self.encoder.encoder().reads_forward or self.tune == "head"):
            raise OutOfBounds(
                ("lm_coefficient",), self.lm_coefficient, "must be 0: only a GPT that is tuned learns next tokens"
            )

    @property
    def model_type(self) -> str:
        """That of the encoder."""
        return self.encoder.model_type

    @property
    def vocab_size(self) -> int | None:
        """That of the encoder."""
        return self.encoder.vocab_size

    def build(self, dtype: jnp.dtype = jnp.float32) -> "TaskModel":
        """The model, whose encoder computes in `dtype`."""
        return TaskModel(self, dtype)

    def depth(self, path: str) -> int:
        """How far a parameter is below the head: 0 in the head and in what it reads, 1 in the top layer, and so on.

        Embeddings are at the number of layers + 1.
        """
        if path.startswith((HEAD, "pooler/")):
            return 0
        layer = re.search(r"(?:^|/)layer_(\d+)/", path)
        return self.encoder.num_layers - int(layer[1]) if layer else self.encoder.num_layers + 1


class TaskModel(LanguageModel):
    """The encoder and the head. Fulfills `training.contract.Predictor`."""

    config: TaskModelConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        # One scope, so that the parameters of the encoder have the names that they have in pretraining.
        self.body = self.config.encoder.encoder(self.dtype)
        nn.share_scope(self, self.body)
        head = self.config.head
        self.head = heads.Head(head, head.pools or (head.reads_summary and not self.body.has_summary))

    def scores(self, batch: Batch, train: bool) -> tuple[Array, Array, Batch]:
        """The scores of the head, the last hidden states [R, T, D], and the batch with its texts as rows."""
        c, tuned = self.config, self.config.tune == "all"
        texts = batch["segments"].shape[1]
        rows = {
            name: x.reshape(-1, x.shape[-1]) if x.ndim == 3 and name != "labels" else x for name, x in batch.items()
        }
        hidden = self.body.hidden_states(rows, train and tuned)
        summary_RKD = None
        if c.head.reads_summary and not self.head.pools:
            summary_RKD = self.body.summary(hidden[-1], jnp.maximum(0, rows["read_positions"]))
        if not tuned:
            hidden, summary_RKD = jax.lax.stop_gradient((hidden, summary_RKD))
        return self.head(hidden, summary_RKD, rows, texts, train), hidden[-1], rows

    def losses(self, batch: Batch, carry: Params, train: bool) -> tuple[Sums, Sums, Params]:
        """`label_loss`, its accuracy where answers are right or wrong, and with `lm_coefficient` GPT's `lm_loss`."""
        scores, last_RTD, rows = self.scores(batch, train)
        loss_X, right_X = self.head.losses(scores, rows)
        weights = self.weights(batch)
        losses = {"label_loss": (loss_X.sum(), weights["label_loss"])}
        if "lm_loss" in weights:
            losses["lm_loss"] = (self.body.next_token_loss(last_RTD, rows), weights["lm_loss"])
        metrics = {} if right_X is None else {"label_accuracy": (right_X.sum(), weights["label_loss"])}
        return losses, metrics, carry

    def predictions(self, batch: Batch) -> dict[str, Array]:
        """See `predict`."""
        scores, _, rows = self.scores(batch, train=False)
        found = {"scores": scores}
        if isinstance(self.config.head, heads.Tags):
            found["tags"] = self.head.tags(scores, rows["read_positions"] >= 0)
        if "labels" in batch:
            found |= {"loss": self.head.losses(scores, rows)[0], "weight": heads.class_weights(self.config.head, rows)}
        return found

    def predict(self, params: Params, carry: Params, batch: Batch) -> dict[str, Array]:
        """`scores`: fp32, Label [B, N], Choice [B, S], Tags [B, K, N], Span [B, T, 2] (start and end).

        With Tags also `tags` [B, K], the best tag of each word; where the batch has labels also `loss` and `weight`
        [B], of which the quotient of the sums is the mean loss. An example a row; packed rows are for training.
        """
        with products_in(self.dtype):
            return cast(dict[str, Array], self.apply({"params": params}, batch, method="predictions"))

    def create_parameters(self) -> None:
        texts = 2 if isinstance(self.config.head, heads.Label) and self.config.head.pair else 1
        one = jnp.zeros((1, texts, 1), jnp.int32)
        batch = dict.fromkeys(("tokens", "token_types", "positions", "segments", "words", "read_positions"), one)
        self.scores(batch | {"characters": jnp.zeros((1, 8), jnp.int32)}, train=False)

    @property
    def coefficients(self) -> dict[str, float]:
        """The objective: the loss of the labels, and of the next tokens with its coefficient (GPT-1, 3.2)."""
        return {"label_loss": 1.0, "lm_loss": self.config.lm_coefficient}

    @property
    def replicated(self) -> tuple[str, ...]:
        """The replicated paths of the encoder."""
        return self.config.encoder.encoder().replicated

    @property
    def matrices(self) -> tuple[str, ...]:
        """The matrix paths of the encoder, if it is trained."""
        return self.config.encoder.encoder().matrices if self.config.tune == "all" else ()

    def rate(self, path: str) -> float:
        """Factor of the learning rate of the parameter at a path: 0 in an encoder that is not trained."""
        if self.config.tune == "head":
            return 1.0 if path.startswith(HEAD) else 0.0
        return self.config.layer_decay ** self.config.depth(path)

    def weights(self, batch: Batch) -> dict[str, Array]:
        """The weight of each loss, from the batch alone."""
        weights = {"label_loss": heads.class_weights(self.config.head, batch).sum()}
        if self.config.lm_coefficient:
            # A mean over the tokens after the first of each segment that has any.
            follows = continues(batch["segments"])
            firsts = follows & ~jnp.pad(follows, ((0, 0), (0, 0), (1, 0)))[..., :-1]
            weights["lm_loss"] = firsts.sum().astype(jnp.float32)
        return weights

    def check(self, batch: HostBatch) -> None:
        """Raises InputError where a batch asks for rows that the tables lack."""
        self.config.encoder.encoder().check(batch)

    def flops(self, batch: Batch) -> float:
        """Matmul FLOPs of one training step on a batch of these shapes, without the head.

        Forward, and twice that for backward if the encoder is trained.
        """
        return (3.0 if self.config.tune == "all" else 1.0) * self.config.encoder.encoder().flops(batch)
