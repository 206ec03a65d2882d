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
from functools import partial
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from prelm_jax.errors import InputError
from prelm_jax.models.character_cnn import CharacterCNN, CharacterCNNConfig
from prelm_jax.models.cross_entropy import cross_entropy, tied_cross_entropy, tied_logits
from prelm_jax.models.layers import MASKED, Dropout, Embedding, add_bias, check_rows, normal, padded_vocabulary, uniform
from prelm_jax.models.lstm import LSTMStack, lstm

Params = dict[str, Any]
Batch = dict[str, Array]
Sums = dict[str, tuple[Array, Array]]

CHARACTERS = 261  # Ids of characters: 256 bytes; begin and end of a sentence, begin and end of a word, padding.
MAX_CHARACTERS = 50  # Ids of a word.
PADDING = 260  # The id after the end of a word.
DIRECTIONS = ("forward", "backward")


@dataclasses.dataclass(frozen=True)
class ELMoConfig:
    """ELMo's sizes; the defaults are the original. `vocab_size` None: as many as the vocabulary has.

    `filters`: (width in characters, how many of them). `hidden_size` is that of an LSTM's cell, `projection_size` that
    of its output and of an encoded word.
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

    def __post_init__(self):
        # Lists, as JSON has them, would make two configurations of the same sizes differ.
        object.__setattr__(self, "filters", tuple((width, number) for width, number in self.filters))
        widest = max(width for width, _ in self.filters)
        if widest > MAX_CHARACTERS:
            raise InputError(f"--model.filters: {widest} characters are wider than a word, which has {MAX_CHARACTERS}")

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
        """[U, P]: words from the ids of their characters, 0 to 260.

        The ids may have been cut to the longest of the words.
        """
        # As much padding as the widest filter spans: with more of it the filters see nothing new.
        columns = self._columns(characters_UC.shape[1]) - characters_UC.shape[1]
        characters_UC = jnp.pad(characters_UC, ((0, 0), (0, columns)), constant_values=PADDING)
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
        last = {d: self.dropout(outputs[d][-1]) for d in DIRECTIONS}
        weights = {d: batch[f"{d}_weights"] for d in DIRECTIONS}
        if "forward_negatives" in batch and self.has_rng("dropout"):  # Only in training.
            nll = self._sampled_nll(last, batch)
            sums = {d: (nll[d] * weights[d]).sum() for d in DIRECTIONS}
        else:
            table_VP, bias_V = self.softmax()
            full = partial(tied_cross_entropy, vocab_size=self.config.vocab_size, bias_V=bias_V)
            sums = {d: full(last[d], table_VP, batch[f"{d}_targets"], weights[d])[0] for d in DIRECTIONS}
        return {f"{d}_loss": (sums[d], weights[d].sum()) for d in DIRECTIONS}, carry

    def _sampled_nll(self, x: dict[str, Array], batch: Batch) -> dict[str, Array]:
        """[B, T] of each direction: `sampled_nll` of its targets."""
        table_VP, bias_V = self.softmax()
        # The gradient of a look-up is as large as the table: one for the targets of both directions, one for their
        # negatives. Every device looks up the targets of all, so that they hand each other gradients of targets, not
        # of tables.
        targets, negatives = (jnp.stack([batch[f"{d}_{key}"] for d in DIRECTIONS]) for key in ("targets", "negatives"))
        targets_2BT = _on_every_device(targets)
        true = _on_every_device(jnp.take(table_VP, targets_2BT, axis=0)).astype(self.dtype)
        true_bias = _on_every_device(jnp.take(bias_V, targets_2BT))
        sampled, sampled_bias = jnp.take(table_VP, negatives, axis=0).astype(self.dtype), jnp.take(bias_V, negatives)
        nll = {}
        sizes = {"sampled": negatives.shape[1], "vocab_size": self.config.vocab_size}
        for i, d in enumerate(DIRECTIONS):
            counts = partial(log_expected_count, tries=batch[f"{d}_tries"], **sizes)
            flat = lambda y: y.reshape(-1, *y.shape[2:])  # noqa: E731
            nll_G = sampled_nll(
                flat(x[d]),
                flat(true[i]),
                flat(true_bias[i] - counts(batch[f"{d}_targets"])),
                sampled[i],
                sampled_bias[i] - counts(negatives[i]),
                flat(batch[f"{d}_targets"])[:, None] == negatives[i][None],
            )
            nll[d] = nll_G.reshape(x[d].shape[:2])
        return nll

    def _columns(self, longest: int) -> int:
        """The ids of a word that are encoded, where the longest has so many."""
        return min(longest + max(width for width, _ in self.config.filters), MAX_CHARACTERS)

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
        """Raises InputError where a batch asks for rows that the tables lack."""
        check_rows(batch, **{f"{d}_targets": (self.config.vocab_size, "vocab_size") for d in DIRECTIONS})

    def loss(self, params: Params, carry: Params, batch: Batch, key: Array, train: bool) -> tuple[Sums, Sums, Params]:
        """(losses, metrics, carry): names to (sum, weight).

        `key` None: evaluation, no dropout, full softmax; so it is in training on batches without negatives.
        """
        rngs = {"dropout": key} if train else {}
        losses, carry = self.apply({"params": params}, batch, carry, rngs=rngs, method=ELMo._losses)
        return losses, {}, carry

    def weights(self, batch: Batch) -> dict[str, Array]:
        """The weight of each loss, from the batch alone."""
        return {f"{d}_loss": batch[f"{d}_weights"].sum() for d in DIRECTIONS}

    @property
    def replicated(self) -> tuple[str, ...]:
        """Regular expressions of the parameter paths that are never sharded."""
        return (r"(^|/)(characters|convolution_\d+)/",)

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
        length = self._columns(length)
        convolutions = sum(2 * (length - w + 1) * w * c.character_embedding_size * n for w, n in c.filters)
        features = sum(n for _, n in c.filters)
        word = convolutions + 4 * c.num_highways * features**2 + 2 * features * c.projection_size
        layer = 18 * c.projection_size * c.hidden_size
        negatives = batch.get("forward_negatives")
        softmax = 2 * c.projection_size * (c.vocab_size if negatives is None else 1 + negatives.size)
        return 3.0 * (words * word + 2 * places * (c.num_layers * layer + softmax))


def log_expected_count(ids: Array, tries: Array, sampled: int, vocab_size: int) -> Array:
    """The logarithm of how often each id is expected among `sampled` distinct ids that took `tries` log-uniform draws.

    tensorflow/core/kernels/range_sampler.cc, `ExpectedCountHelper` with the probabilities of a LogUniformSampler.
    """
    probabilities = jnp.log1p(1 / (ids.astype(jnp.float32) + 1)) / math.log1p(vocab_size)
    distinct = -jnp.expm1(tries.astype(jnp.float32) * jnp.log1p(-probabilities))
    return jnp.log(jnp.where(tries == sampled, sampled * probabilities, distinct))


def sampled_nll(
    x_GP: Array, true_GP: Array, true_bias_G: Array, sampled_SP: Array, sampled_bias_S: Array, hits_GS: Array
) -> Array:
    """[G], fp32: the negative log-likelihood of each target among itself and the negatives (Jean et al. 2015).

    As tf.nn.sampled_softmax_loss: from the vectors of targets and negatives and their biases, less the logarithms of
    their expected counts. Where a negative is the target (`hits_GS`), it does not count.
    """
    true_G = jnp.einsum("GP,GP->G", x_GP, true_GP, preferred_element_type=jnp.float32) + true_bias_G
    sampled_GS = jnp.einsum("GP,SP->GS", x_GP, sampled_SP, preferred_element_type=jnp.float32)
    sampled_GS = jnp.where(hits_GS, MASKED, add_bias(sampled_GS, sampled_bias_S))
    nll_G, _ = cross_entropy(jnp.concatenate([true_G[:, None], sampled_GS], 1), jnp.zeros(len(x_GP), jnp.int32))
    return nll_G


def _on_every_device(x: Array) -> Array:
    """The array, whole on every device of the mesh, and so its gradient."""
    return x if jax.sharding.get_abstract_mesh().size <= 1 else jax.lax.with_sharding_constraint(x, PartitionSpec())


def _state_after(lengths_B: Array, state: Params, hidden_BTP: Array, cells_BTE: Array) -> Params:
    """The state of each row after so many steps; after none, the one before."""
    steps = {"cell": cells_BTE, "hidden": hidden_BTP.astype(jnp.float32)}
    rows = jnp.arange(len(lengths_B))
    return {name: jnp.concatenate([state[name][:, None], x], 1)[rows, lengths_B] for name, x in steps.items()}
