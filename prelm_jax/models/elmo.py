"""ELMo (Peters et al. 2018): two LSTM language models, one for each direction, over words read by their characters.

Reference: allenai/bilm-tf, bilm/training.py. Divergences:
- Both directions of a batch may read the same words; the reference draws different sentences for each.
- The characters of a distinct word are encoded once per batch.
- The vocabulary table has a multiple of 128 rows; padding rows are never looked up and never win.
- There is a projection after the highways even where it changes no width, and one in every LSTM.
- The loss is the mean over positions; the reference's is `unroll_steps` times that (see `training.optimizer.Adagrad`).
"""

import dataclasses
from functools import partial
from typing import Annotated, ClassVar, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from prelm_jax.bounds import Bounds, FractionBelow1, Layers, OutOfBounds, PositiveFloat, Size
from prelm_jax.models.character_cnn import CharacterCNN
from prelm_jax.models.cross_entropy import log_expected_count, sampled_nll, tied_cross_entropy, tied_logits
from prelm_jax.models.language_model import Encoder, LanguageModel, LanguageModelConfig
from prelm_jax.models.layers import Dropout, Embedding, activation_dtype, check_rows, normal, padded_vocabulary, uniform
from prelm_jax.models.lstm import LSTMStack, State, lstm, reverse
from prelm_jax.tokenizers.characters import MAX_CHARACTERS, NUM_CHARACTERS, PAD
from prelm_jax.training.contract import Batch, HostBatch, Params, Sums

States = dict[str, dict[str, State]]  # by direction and layer: {"forward": {"layer_0": {"cell": …, "hidden": …}}}

DIRECTIONS = ("forward", "backward")

Filter = tuple[Annotated[int, Bounds(1, MAX_CHARACTERS)], Size]


@dataclasses.dataclass(frozen=True)
class ELMoConfig(LanguageModelConfig):
    """ELMo's sizes; the defaults are the original."""

    model_type: ClassVar[str] = "elmo"
    character_embedding_size: Size = 16  # Width of a character's vector.
    # Convolutions over the characters of a word, as pairs of width (in characters) and number of filters.
    filters: tuple[Filter, ...] = ((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024))
    activation: Literal["relu", "tanh"] = "relu"  # Applied to the convolutions' maxima.
    num_highways: Annotated[int, Bounds(0, 512)] = 2  # Highway layers between the convolutions and the projection.
    projection_size: Size = 512  # Width of an encoded word and of an LSTM's output; hidden states have twice that.
    hidden_size: Size = 4096  # Width of an LSTM's cell.
    num_layers: Layers = 2  # LSTM layers in each direction.
    cell_clip: PositiveFloat = 3.0  # Bound on the absolute value of an LSTM's cell.
    projection_clip: PositiveFloat = 3.0  # Bound on the absolute value of an LSTM's output.
    use_skip_connections: bool = True  # Add the input of every LSTM layer but the first to its output.
    dropout: FractionBelow1 = 0.1  # Dropout before each LSTM layer and before the softmax.

    def check_together(self) -> None:
        """Raises OutOfBounds if there are no filters."""
        if not self.filters:
            raise OutOfBounds(("filters",), self.filters, "must be one pair or more")

    def build(self, dtype: jnp.dtype = jnp.float32) -> "ELMo":
        """The pretraining model, computing in `dtype`."""
        return ELMo(self, dtype)

    def encoder(self, dtype: jnp.dtype = jnp.float32) -> "ELMoEncoder":
        """The model without its softmax, computing in `dtype`."""
        return ELMoEncoder(self, dtype, parent=None)  # Nobody's submodule, wherever it is made.


class Softmax(nn.Module):
    """The output embedding [V, P] and bias [V] of every word that can be predicted."""

    rows: int
    features: int

    @nn.compact
    def __call__(self) -> tuple[Array, Array]:
        table = self.param("embedding", normal(1 / self.features**0.5), (self.rows, self.features))
        return table, self.param("bias", nn.initializers.zeros, (self.rows,))


class ELMoEncoder(Encoder):
    """The encoder of words and an LSTM stack for each direction."""

    config: ELMoConfig
    dtype: jnp.dtype = jnp.float32

    # Small arrays, of sizes that many devices do not divide.
    replicated: ClassVar[tuple[str, ...]] = (r"(^|/)characters/", r"(^|/)convolution_\d+/")
    matrices: ClassVar[tuple[str, ...]] = (
        r"(^|/)(forward|backward)/layer_\d+/(projection/)?kernel$",
        r"(^|/)encoder/(highway_\d+/\w+|projection)/kernel$",
    )

    def setup(self):
        c = self.config
        self.characters = Embedding(NUM_CHARACTERS, c.character_embedding_size, uniform(1.0))
        self.encoder = CharacterCNN(c.filters, c.activation, c.num_highways, c.projection_size)
        self.forward = LSTMStack(c.num_layers, c.hidden_size, c.projection_size)
        self.backward = LSTMStack(c.num_layers, c.hidden_size, c.projection_size)
        self.dropout = Dropout(c.dropout)

    def hidden_states(self, batch: Batch, train: bool = False) -> tuple[Array, ...]:
        """The `num_layers` + 1 hidden states [B, T, 2 · P], forward half first; 0 in padding.

        Reads characters [U, C] and words [B, T] (rows of `characters`); segments [B, T] are 0 in padding, which follows
        the words of a row. Every row is read from the zero state. Layer 0 is the encoding of the word, twice.
        """
        real_BT = batch["segments"] != 0
        words_BTP = jnp.take(self.encode(batch["characters"]), batch["words"], axis=0)
        words_BTP = jnp.where(real_BT[..., None], words_BTP, 0)
        carry = initial_states(self.config, words_BTP.shape[0])
        outputs, _ = self.apply_layers(words_BTP, real_BT.sum(1), carry, train)
        layers = [jnp.concatenate([outputs[d][i] for d in DIRECTIONS], -1) for i in range(self.config.num_layers)]
        return jnp.concatenate([words_BTP, words_BTP], -1), *layers

    def encode(self, characters_UC: Array) -> Array:
        """[U, P]: words from the ids of their characters, 0 to 260; C may be the length of the longest word."""
        # Pad by the width of the widest filter, whose windows then see all that they would see in 50 columns.
        columns = padded_length(self.config, characters_UC.shape[1]) - characters_UC.shape[1]
        characters_UC = jnp.pad(characters_UC, ((0, 0), (0, columns)), constant_values=PAD)
        return self.encoder(self.characters(characters_UC).astype(activation_dtype(self.dtype)))

    def apply_layers(
        self, words_BTP: Array, lengths_B: Array, carry: States, train: bool = False
    ) -> tuple[dict[str, Array], States]:
        """Reads rows of encoded words, of which the first `lengths_B` are real, in both directions, each from a state.

        Returns for "forward" and "backward" the outputs of the layers [L, B, T, P], 0 in padding, and the new states.
        The backward direction begins at the last real word of a row. Padding leaves a state as it is.
        """

        def order(direction: str, x_BTP: Array) -> Array:
            return x_BTP if direction == "forward" else reverse(x_BTP, lengths_B)

        outputs, carry = self.layers({d: order(d, words_BTP) for d in DIRECTIONS}, carry, train, lengths_B)
        real_BT1 = (jnp.arange(words_BTP.shape[1])[None] < lengths_B[:, None])[..., None]
        return {d: jnp.stack([jnp.where(real_BT1, order(d, x), 0) for x in outputs[d]]) for d in DIRECTIONS}, carry

    def layers(
        self, x: dict[str, Array], carry: States, train: bool, lengths_B: Array | None = None
    ) -> tuple[dict[str, list[Array]], States]:
        """For each direction the outputs [B, T, P] of every layer for its inputs [B, T, P], and the new states.

        `lengths_B`: words of each row after which its new state is taken; None: all of them.
        """
        c = self.config
        stacks = {"forward": self.forward(), "backward": self.backward()}
        outputs: dict[str, list[Array]] = {d: [] for d in DIRECTIONS}
        new: States = {d: {} for d in DIRECTIONS}
        for i in range(c.num_layers):
            name = f"layer_{i}"
            # The residual adds the input after dropout: in the reference, the residual wrapper is inside dropout's.
            x = {d: self.dropout(x[d], train) for d in DIRECTIONS}
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

    def flops(self, batch: Batch) -> float:
        """Matmul FLOPs of the hidden states of a batch of these shapes, forward; padding counts.

        For each distinct word its convolutions, 4·F² for each highway and 2·F·P for the projection; for each position,
        direction and layer 16·P·E (gates) + 2·E·P.
        """
        return self.word_flops(batch["characters"]) + 2.0 * batch["words"].size * self.position_flops

    def word_flops(self, characters_UC: Array) -> float:
        """Matmul FLOPs of `encode`."""
        c, (words, length) = self.config, characters_UC.shape
        length = padded_length(c, length)
        convolutions = sum(2 * (length - w + 1) * w * c.character_embedding_size * n for w, n in c.filters)
        features = sum(n for _, n in c.filters)
        word = convolutions + 4 * c.num_highways * features**2 + 2 * features * c.projection_size
        return float(words * word)

    @property
    def position_flops(self) -> int:
        """Matmul FLOPs of all layers of a direction at a position."""
        return self.config.num_layers * 18 * self.config.projection_size * self.config.hidden_size


class ELMo(LanguageModel):
    """The encoder with one softmax for both directions."""

    config: ELMoConfig
    dtype: jnp.dtype = jnp.float32

    replicated, matrices = ELMoEncoder.replicated, ELMoEncoder.matrices

    def setup(self):
        c = self.config
        self.bilm = ELMoEncoder(c, self.dtype)
        nn.share_scope(self, self.bilm)
        self.softmax = Softmax(padded_vocabulary(c.known_vocab_size), c.projection_size)

    def logits(self, hidden: Array) -> Array:
        """[..., padded vocabulary], fp32: the word that the LSTM with these outputs [..., P] reads next."""
        table_VP, bias_V = self.softmax()
        return tied_logits(hidden, table_VP, self.config.known_vocab_size, bias_V)

    def losses(self, batch: Batch, carry: Params, train: bool) -> tuple[Sums, Sums, Params]:
        """The loss of each direction: in training over the batch's negatives, if it has any, else over all words."""
        words_UP = self.bilm.encode(batch["characters"])
        inputs = {d: jnp.take(words_UP, batch[f"{d}_words"], axis=0) for d in DIRECTIONS}
        outputs, states = self.bilm.layers(inputs, cast(States, carry), train)
        last = {d: self.bilm.dropout(outputs[d][-1], train) for d in DIRECTIONS}
        weights = {d: batch[f"{d}_weights"] for d in DIRECTIONS}
        if train and "forward_negatives" in batch:
            nll = self._sampled_nll(last, batch)
            sums = {d: (nll[d] * weights[d]).sum() for d in DIRECTIONS}
        else:
            table_VP, bias_V = self.softmax()
            full = partial(tied_cross_entropy, vocab_size=self.config.known_vocab_size, bias_V=bias_V)
            sums = {d: full(last[d], table_VP, batch[f"{d}_targets"], weights[d])[0] for d in DIRECTIONS}
        return {f"{d}_loss": (sums[d], weights[d].sum()) for d in DIRECTIONS}, {}, cast(Params, states)

    def _sampled_nll(self, x: dict[str, Array], batch: Batch) -> dict[str, Array]:
        """[B, T] of each direction: `sampled_nll` of its targets."""
        (table_VP, bias_V), vocab_size = self.softmax(), self.config.known_vocab_size
        # The gradient of a lookup is as large as the table: one for the targets of both directions, one for their
        # negatives. Every device looks up the targets of all, so that they exchange gradients of targets, not of
        # tables.
        targets, negatives = (jnp.stack([batch[f"{d}_{key}"] for d in DIRECTIONS]) for key in ("targets", "negatives"))
        targets_2BT = _on_every_device(targets)
        true = _on_every_device(jnp.take(table_VP, targets_2BT, axis=0)).astype(self.dtype)
        true_bias = _on_every_device(jnp.take(bias_V, targets_2BT))
        sampled, sampled_bias = jnp.take(table_VP, negatives, axis=0).astype(self.dtype), jnp.take(bias_V, negatives)

        def flat(y: Array) -> Array:
            return y.reshape(-1, *y.shape[2:])

        nll = {}
        for i, d in enumerate(DIRECTIONS):
            targets_BT, tries = batch[f"{d}_targets"], batch[f"{d}_tries"]
            count = partial(log_expected_count, tries=tries, sampled=negatives.shape[1], vocab_size=vocab_size)
            true_bias_BT, sampled_bias_S = true_bias[i] - count(targets_BT), sampled_bias[i] - count(negatives[i])
            hits_GS = flat(targets_BT)[:, None] == negatives[i][None]
            nll_G = sampled_nll(flat(x[d]), flat(true[i]), flat(true_bias_BT), sampled[i], sampled_bias_S, hits_GS)
            nll[d] = nll_G.reshape(x[d].shape[:2])
        return nll

    @property
    def tables(self) -> tuple[str, ...]:
        """That of the softmax, if it has negatives."""
        return (r"(^|/)softmax/embedding$",)

    def create_parameters(self) -> None:
        self.bilm.encode(jnp.zeros((1, MAX_CHARACTERS), jnp.int32))
        for weights in (self.bilm.forward, self.bilm.backward, self.softmax):
            weights()

    def init_carry(self, batch_size: int) -> Params:
        """The zero state: for each direction and layer `cell` [B, E] and `hidden` [B, P]."""
        return cast(Params, initial_states(self.config, batch_size))

    def check(self, batch: HostBatch) -> None:
        """Raises InputError where a batch asks for rows that the tables lack."""
        check_rows(batch, **{f"{d}_targets": (self.config.known_vocab_size, "vocab_size") for d in DIRECTIONS})

    @property
    def coefficients(self) -> dict[str, float]:
        """The objective is the mean of both directions."""
        return {f"{d}_loss": 0.5 for d in DIRECTIONS}

    def weights(self, batch: Batch) -> dict[str, Array]:
        """The weight of each loss, from the batch alone."""
        return {f"{d}_loss": batch[f"{d}_weights"].sum() for d in DIRECTIONS}

    def tokens(self, batch: Batch) -> Array:
        """int32 [2]: the words of a batch that are predicted (in one direction), and all its positions."""
        weights_BT = batch["forward_weights"]
        return jnp.array([(weights_BT > 0).sum(), weights_BT.size])

    def flops(self, batch: Batch) -> float:
        """Matmul FLOPs of one training step on a batch of these shapes: forward, and twice that for backward.

        On top of the encoder's FLOPs, each position and direction adds 2·P for every word in the softmax.
        """
        c, encoder, positions = self.config, self.config.encoder(), batch["forward_words"].size
        negatives = batch.get("forward_negatives")
        softmax = 2 * c.projection_size * (c.known_vocab_size if negatives is None else 1 + negatives.size)
        words = encoder.word_flops(batch["characters"])
        return 3.0 * (words + 2 * positions * (encoder.position_flops + softmax))


def initial_states(config: ELMoConfig, rows: int) -> States:
    """The zero state of every row: for each direction and layer `cell` [B, E] and `hidden` [B, P]."""

    def layer() -> State:
        return {"cell": jnp.zeros((rows, config.hidden_size)), "hidden": jnp.zeros((rows, config.projection_size))}

    return {d: {f"layer_{i}": layer() for i in range(config.num_layers)} for d in DIRECTIONS}


def padded_length(config: ELMoConfig, longest: int) -> int:
    """The number of ids of each word that are encoded, if the longest has `longest`.

    To export a program with a symbolic length, bound it so that the minimum is decided: "c <= 43" for width 7.
    """
    return min(longest + max(width for width, _ in config.filters), MAX_CHARACTERS)


def _on_every_device(x: Array) -> Array:
    """The array, replicated over the mesh, and so is its gradient."""
    return x if jax.sharding.get_abstract_mesh().size <= 1 else jax.lax.with_sharding_constraint(x, PartitionSpec())


def _state_after(lengths_B: Array, state: State, hidden_BTP: Array, cells_BTE: Array) -> State:
    """The state of each row after its first `lengths_B` steps."""
    # Index 0 along T is the state before the first step, so that a row of length n takes index n.
    steps = {"cell": cells_BTE, "hidden": hidden_BTP.astype(jnp.float32)}
    rows = jnp.arange(lengths_B.shape[0])
    return {name: jnp.concatenate([state[name][:, None], x], 1)[rows, lengths_B] for name, x in steps.items()}
