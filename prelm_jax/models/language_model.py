"""The bases of all families: of configs, of encoders, and of models, with the common part of the `Model` contract."""

import dataclasses
from typing import ClassVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from prelm_jax.bounds import VocabularySize
from prelm_jax.models.layers import products_in
from prelm_jax.training.contract import Batch, HostBatch, Params, Sums

SAMPLE = 1  # Folded into the key of a step for whatever samples inside a loss; dropout uses the key itself.


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    """The base of every family's configuration."""

    # Tokens of the vocabulary, without padding; None: as many as the tokenizer has.
    vocab_size: VocabularySize | None = None

    @property
    def known_vocab_size(self) -> int:
        """`vocab_size` of a configuration that a model is built from; ValueError if it is still open."""
        if self.vocab_size is None:
            raise ValueError("vocab_size is None; set it to the size of the tokenizer's vocabulary")
        return self.vocab_size


class Encoder(nn.Module):
    """Base of a model without its pretraining heads; a task can put another head on it (see `models.task`)."""

    replicated: ClassVar[tuple[str, ...]] = ()  # See `Model`.
    matrices: ClassVar[tuple[str, ...]] = ()
    has_summary: ClassVar[bool] = False  # Whether there is a token that sums a text up.
    reads_forward: ClassVar[bool] = False  # Whether there is a loss of the next tokens.

    def hidden_states(self, batch: Batch, train: bool = False) -> tuple[Array, ...]:
        """The layers + 1 hidden states [B, T, D]."""
        raise NotImplementedError

    def summary(self, last_BTD: Array, positions_BK: Array) -> Array:
        """[B, K, D]: what a head reads of texts, at the tokens that sum them up; only with `has_summary`."""
        raise NotImplementedError

    def next_token_loss(self, last_BTD: Array, batch: Batch) -> Array:
        """The sum over segments of the mean loss of a segment's tokens after its first; only with `reads_forward`."""
        raise NotImplementedError

    def check(self, batch: HostBatch) -> None:
        """Raises InputError where a batch asks for rows that the tables lack."""

    def flops(self, batch: Batch) -> float:
        """Matmul FLOPs of the hidden states of a batch of these shapes, forward."""
        raise NotImplementedError


def continues(segments: Array) -> Array:
    """Whether each token after the first of a row is of the segment of the one before: bool [..., T - 1]."""
    return (segments[..., 1:] == segments[..., :-1]) & (segments[..., 1:] != 0)


class LanguageModel(nn.Module):
    """Base of a pretraining model: an encoder, its heads and a loss; see `training.contract.Model`.

    A subclass defines `losses` and `create_parameters`, which run inside `apply`, and the rest of the contract.
    """

    def losses(self, batch: Batch, carry: Params, train: bool) -> tuple[Sums, Sums, Params]:
        """(losses, metrics, new carry), each loss and metric as (sum, weight)."""
        raise NotImplementedError

    def create_parameters(self) -> None:
        """Uses every parameter once, on inputs as small as possible."""
        raise NotImplementedError

    @property
    def tables(self) -> tuple[str, ...]:
        """None: the losses may read all rows of every table."""
        return ()

    def init_params(self, key: Array) -> Params:
        """Fresh fp32 parameters."""
        return cast(Params, self.init(key, method="create_parameters")["params"])

    def init_carry(self, batch_size: int) -> Params:
        """The state before the first batch: none."""
        return {}

    def loss(self, params: Params, carry: Params, batch: Batch, key: Array, train: bool) -> tuple[Sums, Sums, Params]:
        """(losses, metrics, new carry), each loss and metric as (sum, weight); dropout only if `train`."""
        rngs = {"sample": jax.random.fold_in(key, SAMPLE)} | ({"dropout": key} if train else {})
        with products_in(self.dtype):
            outputs = self.apply({"params": params}, batch, carry, train, rngs=rngs, method="losses")
        return cast(tuple[Sums, Sums, Params], outputs)

    def rate(self, path: str) -> float:
        """Factor of the learning rate of the parameter at a path: 1."""
        return 1.0

    def tokens(self, batch: Batch) -> Array:
        """int32 [2]: the tokens of a batch that are not padding, and all its positions."""
        return jnp.array([(batch["segments"] != 0).sum(), batch["segments"].size])
