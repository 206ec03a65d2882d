"""ELMo (Peters et al. 2018): two LSTM language models, one for each direction, over words read by their characters.

Reference: allenai/bilm-tf, bilm/training.py. Divergences:
- Both directions of a batch may read the same words; the reference draws other sentences for each.
- The characters of a word are encoded once for all places of the batch where it stands.
- The vocabulary table has a multiple of 128 rows; those past `vocab_size` are never looked up and never win.
- There is a projection after the highways even where it changes no width, and one in every LSTM.
- The loss is that of a step; the reference's is `unroll_steps` times that (here in `training.optimizer.Adagrad`).
"""

import dataclasses
import math
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from prelm_jax.errors import InputError
from prelm_jax.models.character_cnn import CharacterCNN, CharacterCNNConfig
from prelm_jax.models.layers import (
    MASKED,
    Dropout,
    Embedding,
    add_bias,
    check_rows,
    cross_entropy,
    normal,
    padded_vocabulary,
    tied_cross_entropy,
    tied_logits,
    uniform,
)
from prelm_jax.models.lstm import LSTMStack, lstm

Params = dict[str, Any]
Batch = dict[str, Array]
Sums = dict[str, tuple[Array, Array]]

CHARACTERS = 261  # Ids of characters: 256 bytes; begin and end of a sentence, begin and end of a word, padding.
MAX_CHARACTERS = 50  # Ids of a word.
DIRECTIONS = ("forward", "backward")


@dataclasses.dataclass(frozen=True)
class ELMoConfig:
    """ELMo's sizes; the defaults are the original. `vocab_size` None: as many as the vocabulary has.

    `filters`: (width in characters, how many of them). `hidden_size` is that of an LSTM's cell, `projection_size` that
    of its output and of an encoded word. `num_negatives` 0: in training too the softmax is over the whole vocabulary.
    """

    model_type: ClassVar[str] = "elmo"
    vocab_size: int | None = None
    character_embedding_size: int = 16
    filters: tuple[tuple[int, int], ...] = ((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024))
    activation: Literal["relu", "tanh"] = "relu"
    num_highways: int = 2
    projection_size: int = 512
    hidden_size: int = 4096
    num_layers: int = 2
    cell_clip: float = 3.0
    projection_clip: float = 3.0
    use_skip_connections: bool = True
    dropout: float = 0.1
    num_negatives: int = 8192

    def build(self, dtype: jnp.dtype = jnp.float32) -> "ELMo":
        """The model, computing in `dtype`."""
        return ELMo(self, dtype)


class Softmax(nn.Module):
    """The vectors and biases of the words to predict."""

    rows: int
    features: int

    @nn.compact
    def __call__(self) -> tuple[Array, Array]:
        table = self.param("embedding", normal(1 / self.features**0.5), (self.rows, self.features))
        return table, self.param("bias", nn.initializers.zeros, (self.rows,))


class ELMo(nn.Module):
    """One encoder of words, an LSTM stack for each direction, one softmax."""

    config: ELMoConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        c = self.config
        self.characters = Embedding(CHARACTERS, c.character_embedding_size, uniform(1.0))
        self.encoder = CharacterCNN(CharacterCNNConfig(c.filters, c.activation, c.num_highways, c.projection_size))
        self.forward = LSTMStack(c.num_layers, c.hidden_size, c.projection_size)
        self.backward = LSTMStack(c.num_layers, c.hidden_size, c.projection_size)
        self.softmax = Softmax(padded_vocabulary(c.vocab_size), c.projection_size)
        self.dropout = Dropout(c.dropout)

    # The forward pass, in pieces; call them with `apply(..., method="encode")`.

    def encode(self, characters_UC: Array) -> Array:
        """[U, P]: words from the ids of their characters, 0 to 260."""
        return self.encoder(self.characters(characters_UC).astype(self.dtype))

    def run(self, words_BTP: Array, lengths_B: Array, carry: Params) -> tuple[dict[str, Array], Params]:
        """Reads encoded rows, of which the first `lengths_B` words are real, in both directions, from a state each.

        Returns for "forward" and "backward" the outputs of the layers [L, B, T, P], 0 in padding, and the new states.
        The backward direction begins at the last real word of a row. Padding leaves a state as it is.
        """
        places_BT = jnp.broadcast_to(jnp.arange(words_BTP.shape[1])[None], words_BTP.shape[:2])
        real_BT = places_BT < lengths_B[:, None]
        reversed_BT1 = jnp.where(real_BT, lengths_B[:, None] - 1 - places_BT, places_BT)[..., None]
        orders = {
            "forward": lambda x_BTP: x_BTP,
            "backward": lambda x_BTP: jnp.take_along_axis(x_BTP, reversed_BT1, 1),
        }
        inputs = {d: order(words_BTP) for d, order in orders.items()}
        outputs, carry = self._layers(inputs, carry, lengths_B)
        real_BT1 = real_BT[..., None]
        return {d: jnp.stack([jnp.where(real_BT1, orders[d](x), 0) for x in outputs[d]]) for d in DIRECTIONS}, carry

    def logits(self, hidden_BTP: Array) -> Array:
        """[B, T, padded vocabulary], fp32: the word that comes next in the direction of the LSTM that gave `hidden`."""
        table_VP, bias_V = self.softmax()
        x_GP = hidden_BTP.reshape(-1, hidden_BTP.shape[-1])
        logits_GV = tied_logits(x_GP, table_VP, self.config.vocab_size, bias_V)
        return logits_GV.reshape(*hidden_BTP.shape[:-1], -1)

    def _layers(self, x: dict[str, Array], carry: Params, lengths_B: Array | None = None):
        """The outputs [B, T, P] of every layer for inputs [B, T, P], and the new states; for each direction.

        With lengths, the new states are those after so many steps.
        """
        c = self.config
        stacks = {"forward": self.forward(), "backward": self.backward()}
        outputs, new = {d: [] for d in DIRECTIONS}, {d: {} for d in DIRECTIONS}
        for i in range(c.num_layers):
            name = f"layer_{i}"
            # The residual adds what is left after dropout, for in the reference dropout wraps the residual.
            x = {d: self.dropout(x[d]) for d in DIRECTIONS}
            states = [carry[d][name] for d in DIRECTIONS]
            weights = [stacks[d][i] for d in DIRECTIONS]
            hidden, last, cells = lstm(weights, [x[d] for d in DIRECTIONS], states, c.cell_clip, c.projection_clip)
            if lengths_B is not None:
                last = [_state_after(lengths_B, *values) for values in zip(states, hidden, cells, strict=True)]
            for d, y, state in zip(DIRECTIONS, hidden, last, strict=True):
                x[d] = x[d] + y if i and c.use_skip_connections else y
                outputs[d].append(x[d])
                new[d][name] = state
        return outputs, new

    def _losses(self, batch: Batch, carry: Params) -> tuple[Sums, Params]:
        words_UP = self.encode(batch["characters"])
        outputs, carry = self._layers({d: jnp.take(words_UP, batch[f"{d}_words"], axis=0) for d in DIRECTIONS}, carry)
        table_VP, bias_V = self.softmax()
        losses = {}
        for d in DIRECTIONS:
            x_BTP, targets_BT, weights_BT = self.dropout(outputs[d][-1]), batch[f"{d}_targets"], batch[f"{d}_weights"]
            if self.config.num_negatives and self.has_rng("dropout"):
                negatives_S, tries = batch[f"{d}_negatives"], batch[f"{d}_tries"]
                x_GP, targets_G = x_BTP.reshape(-1, x_BTP.shape[-1]), targets_BT.reshape(-1)
                nll_G = sampled_nll(x_GP, table_VP, bias_V, targets_G, negatives_S, tries, self.config.vocab_size)
                loss = (nll_G * weights_BT.reshape(-1)).sum()
            else:
                loss, _ = tied_cross_entropy(x_BTP, table_VP, targets_BT, weights_BT, self.config.vocab_size, bias_V)
            losses[f"{d}_loss"] = (loss, weights_BT.sum())
        return losses, carry

    def _use_parameters(self, characters_UC: Array) -> None:
        self.encode(characters_UC)
        for weights in (self.forward, self.backward, self.softmax):
            weights()

    # The contract with the training room.

    def init_params(self, key: Array) -> Params:
        """Fresh fp32 parameters."""
        return self.init(key, jnp.zeros((1, MAX_CHARACTERS), jnp.int32), method=ELMo._use_parameters)["params"]

    def init_carry(self, batch_size: int) -> Params:
        """The states before the first word: zeros, for each direction and layer `cell` [B, E] and `hidden` [B, P]."""
        c = self.config

        def layer() -> Params:
            sizes = {"cell": c.hidden_size, "hidden": c.projection_size}
            return {name: jnp.zeros((batch_size, size)) for name, size in sizes.items()}

        return {d: {f"layer_{i}": layer() for i in range(c.num_layers)} for d in DIRECTIONS}

    def check(self, batch: dict[str, np.ndarray]) -> None:
        """Raises InputError where a batch asks for rows that the tables lack, or has not the negatives it should."""
        c = self.config
        for d in DIRECTIONS:
            check_rows(batch, **{f"{d}_targets": (c.vocab_size, "vocab_size")})
            found = len(batch[f"{d}_negatives"]) if f"{d}_negatives" in batch else 0
            if c.num_negatives != found:
                raise InputError(
                    f"{d}_negatives are {found}, but the model's num_negatives is {c.num_negatives}: make them equal"
                )

    def loss(self, params: Params, carry: Params, batch: Batch, key: Array | None) -> tuple[Sums, Sums, Params]:
        """(losses, metrics, carry): names to (sum, weight). `key` None: evaluation, no dropout, full softmax."""
        rngs = {} if key is None else {"dropout": key}
        losses, carry = self.apply({"params": params}, batch, carry, rngs=rngs, method=ELMo._losses)
        return losses, {}, carry

    def weights(self, batch: Batch) -> dict[str, Array]:
        """The weight of each loss, from the batch alone."""
        return {f"{d}_loss": batch[f"{d}_weights"].sum() for d in DIRECTIONS}

    @property
    def coefficients(self) -> dict[str, float]:
        """The objective is the sum of coefficient · sum / weight: the mean of both directions."""
        return {f"{d}_loss": 0.5 for d in DIRECTIONS}

    def tokens(self, batch: Batch) -> Array:
        """[2]: the words of a batch that are predicted (in one direction), and all its places."""
        weights_BT = batch["forward_weights"]
        return jnp.array([(weights_BT > 0).sum(), weights_BT.size])

    def flops(self, batch: Batch) -> float:
        """Matmul operations of one training step on a batch of these shapes: forward, and twice that for backward.

        For each distinct word its convolutions, 4·F² for each highway and 2·F·P for the projection; for each place,
        direction and layer 16·P·E (gates) + 2·E·P; for each place and direction 2·P for every word in the softmax.
        """
        c, (words, length), places = self.config, batch["characters"].shape, batch["forward_words"].size
        convolutions = sum(2 * (length - w + 1) * w * c.character_embedding_size * n for w, n in c.filters)
        features = sum(n for _, n in c.filters)
        word = convolutions + 4 * c.num_highways * features**2 + 2 * features * c.projection_size
        layer = 18 * c.projection_size * c.hidden_size
        softmax = 2 * c.projection_size * (1 + c.num_negatives if c.num_negatives else c.vocab_size)
        return 3.0 * (words * word + 2 * places * (c.num_layers * layer + softmax))


def log_expected_count(ids: Array, tries: Array, sampled: int, vocab_size: int) -> Array:
    """The logarithm of how often each id is expected among `sampled` distinct ids that took `tries` log-uniform draws.

    tensorflow/core/kernels/range_sampler.cc, `ExpectedCountHelper` with the probabilities of a LogUniformSampler.
    """
    probabilities = jnp.log1p(1 / (ids.astype(jnp.float32) + 1)) / math.log1p(vocab_size)
    distinct = -jnp.expm1(tries.astype(jnp.float32) * jnp.log1p(-probabilities))
    return jnp.log(jnp.where(tries == sampled, sampled * probabilities, distinct))


def sampled_nll(
    x_GP: Array, table_VP: Array, bias_V: Array, targets_G: Array, negatives_S: Array, tries: Array, vocab_size: int
) -> Array:
    """[G], fp32: the negative log-likelihood of each target among itself and the negatives (Jean et al. 2015).

    As tf.nn.sampled_softmax_loss: logits less the logarithm of the expected count; a negative that is the target of a
    place does not count there. `negatives_S` are distinct ids, which took `tries` draws.
    """

    def row_and_bias(ids: Array) -> tuple[Array, Array]:
        count = log_expected_count(ids, tries, len(negatives_S), vocab_size)
        return jnp.take(table_VP, ids, axis=0).astype(x_GP.dtype), jnp.take(bias_V, ids) - count

    (true_GP, true_bias_G), (sampled_SP, sampled_bias_S) = row_and_bias(targets_G), row_and_bias(negatives_S)
    true_G1 = jnp.einsum("GP,GP->G", x_GP, true_GP, preferred_element_type=jnp.float32)[:, None] + true_bias_G[:, None]
    sampled_GS = jnp.einsum("GP,SP->GS", x_GP, sampled_SP, preferred_element_type=jnp.float32)
    sampled_GS = add_bias(sampled_GS, sampled_bias_S)
    sampled_GS = jnp.where(targets_G[:, None] == negatives_S[None], MASKED, sampled_GS)
    nll_G, _ = cross_entropy(jnp.concatenate([true_G1, sampled_GS], 1), jnp.zeros_like(targets_G))
    return nll_G


def _state_after(lengths_B: Array, state: Params, hidden_BTP: Array, cells_BTE: Array) -> Params:
    """The state of each row after so many steps; after none, the one before."""
    steps = {"cell": cells_BTE, "hidden": hidden_BTP.astype(jnp.float32)}
    rows = jnp.arange(len(lengths_B))
    return {name: jnp.concatenate([state[name][:, None], x], 1)[rows, lengths_B] for name, x in steps.items()}
