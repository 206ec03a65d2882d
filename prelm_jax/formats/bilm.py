"""ELMo in the format of its authors (allenai/bilm-tf): a directory with one `*options.json` and one `*weights.hdf5`.

Written: options.json and weights.hdf5, fp32, the datasets that bilm-tf's `dump_weights` writes and that bilm-tf and
AllenNLP read, and beside them vocab.txt, the words that the model was trained to predict. The format has no place for
the softmax that predicts them: whoever goes on from such a directory begins with a fresh one, and `score` needs a work
directory. Read: any model of that format over characters, with or without vocab.txt.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import h5py
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from prelm_jax.errors import InputError
from prelm_jax.formats import huggingface
from prelm_jax.formats.model import ELMO_OPTIONS, ELMO_WEIGHTS, Model, Params, abstract_params
from prelm_jax.inference import batching
from prelm_jax.models.cross_entropy import cross_entropy
from prelm_jax.models.elmo import ELMo, ELMoConfig
from prelm_jax.storage import read_json
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.tokenizers.characters import BEGIN_SENTENCE, END_SENTENCE, MAX_CHARACTERS, characters
from prelm_jax.tokenizers.words import SPECIAL_TOKENS, Splitter, WordVocabulary
from prelm_jax.training.parameters import path_name

# Every dataset, by the paths of ours (regular expressions). Layouts are the same, but for a first axis of 1 in theirs
# of the convolutions; the bias of the forget gate is without the 1 that is added to it, here as there.
LSTM_NAMES = {"kernel": "W_0", "bias": "B", "projection/kernel": "W_P_0"}
NAMES = {
    r"characters/embedding": r"char_embed",
    r"encoder/convolution_(\d+)/kernel": r"CNN/W_cnn_\1",
    r"encoder/convolution_(\d+)/bias": r"CNN/b_cnn_\1",
    r"encoder/highway_(\d+)/(carry|transform)/kernel": r"CNN_high_\1/W_\2",
    r"encoder/highway_(\d+)/(carry|transform)/bias": r"CNN_high_\1/b_\2",
    r"encoder/projection/kernel": r"CNN_proj/W_proj",
    r"encoder/projection/bias": r"CNN_proj/b_proj",
} | {
    rf"{direction}/layer_(\d+)/{ours}": rf"RNN_{number}/RNN/MultiRNNCell/Cell\1/LSTMCell/{theirs}"
    for number, direction in enumerate(("forward", "backward"))
    for ours, theirs in LSTM_NAMES.items()
}

SOFTMAX = frozenset({"softmax/embedding", "softmax/bias"})


def _size(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(value)
    return value


def _filters(value: Any) -> tuple[tuple[int, int], ...]:
    return tuple((_size(width), _size(number)) for width, number in value)


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise TypeError(value)
    return value


# The fields of ELMoConfig and the places in options.json, and how one is read.
FIELDS: dict[str, tuple[tuple[str, ...], Callable[[Any], Any]]] = {
    "character_embedding_size": (("char_cnn", "embedding", "dim"), _size),
    "filters": (("char_cnn", "filters"), _filters),
    "activation": (("char_cnn", "activation"), str),
    "num_highways": (("char_cnn", "n_highway"), _size),
    "hidden_size": (("lstm", "dim"), _size),
    "projection_size": (("lstm", "projection_dim"), _size),
    "num_layers": (("lstm", "n_layers"), _size),
    "cell_clip": (("lstm", "cell_clip"), float),
    "projection_clip": (("lstm", "proj_clip"), float),
    "use_skip_connections": (("lstm", "use_skip_connections"), _flag),
}
# The reader of bilm-tf counts one id more than its training, for padding between words; files say one or the other.
NUM_CHARACTERS, NUM_CHARACTERS_IN_TRAINING = 262, 261

# So many words are encoded at a time, always: one program, and a word's encoding depends on the word alone.
WORDS_PER_CHUNK = 256
# So many tokens have their logits over the vocabulary in memory at once.
TOKENS_PER_CHUNK = 64


def dataset_name(path: str) -> str | None:
    """The name of the dataset that holds the parameter at a path of ours; None for the softmax, which none does."""
    if path in SOFTMAX:
        return None
    return next(match.expand(name) for pattern, name in NAMES.items() if (match := re.fullmatch(pattern, path)))


def _only(directory: Path, pattern: str) -> Path:
    files = sorted(directory.glob(pattern))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise InputError(f"{directory}: an ELMo has exactly one file {pattern}, but here is {found}")
    return files[0]


def _read_config(source: Path) -> ELMoConfig:
    options = read_json(source)
    if not isinstance(options.get("char_cnn"), dict):
        raise InputError(f"{source}: no char_cnn; only models that read the characters of words are supported")
    huggingface.require(options, {"bidirectional": True}, source)
    huggingface.require(options["char_cnn"], {"max_characters_per_token": MAX_CHARACTERS}, source)
    if options["char_cnn"].get("n_characters", NUM_CHARACTERS) != NUM_CHARACTERS_IN_TRAINING:
        huggingface.require(options["char_cnn"], {"n_characters": NUM_CHARACTERS}, source)
    fields = {}
    for field, (place, read) in FIELDS.items():
        value = options
        for key in place:
            value = value.get(key) if isinstance(value, dict) else None
        try:
            fields[field] = read(value)
        except (TypeError, ValueError):
            found = "missing" if value is None else f"{value!r}, which is no value of it"
            raise InputError(f"{source}: {'.'.join(place)} is {found}") from None
    if fields["activation"] not in ("relu", "tanh"):
        raise InputError(f"{source}: char_cnn.activation is {fields['activation']!r}; relu and tanh are supported")
    # The softmax is not there: one over the special words alone stands in for it.
    return ELMoConfig(vocab_size=len(SPECIAL_TOKENS), **fields)


def _options(config: ELMoConfig) -> dict[str, Any]:
    options = {"char_cnn": {"max_characters_per_token": MAX_CHARACTERS, "n_characters": NUM_CHARACTERS}, "lstm": {}}
    for field, (place, _) in FIELDS.items():
        group = options
        for key in place[:-1]:
            group = group.setdefault(key, {})
        group[place[-1]] = getattr(config, field)
    return options


def read_params(source: Path, config: ELMoConfig) -> Params:
    """The parameters in a file of weights, fp32; those of the softmax are zeros."""

    def parameter(path: tuple, abstract: jax.ShapeDtypeStruct) -> Array:
        ours, shape = path_name(path), abstract.shape
        name = dataset_name(ours)
        if name is None:
            return jnp.zeros(shape)
        if name.startswith("CNN/W_"):
            shape = (1, *shape)
        dataset = file.get(name)
        if not isinstance(dataset, h5py.Dataset):
            raise InputError(f"{source}: no dataset {name} {list(shape)}; is this a whole ELMo?")
        if dataset.shape != shape or dataset.dtype.kind != "f":
            found = f"{list(dataset.shape or ())} of {dataset.dtype}"
            raise InputError(f"{source}: dataset {name} is {found}, but the options ask for {list(shape)} of float32")
        return jnp.asarray(dataset[()].astype(np.float32).reshape(abstract.shape))

    try:
        with h5py.File(source) as file:
            return jax.tree_util.tree_map_with_path(parameter, abstract_params(config))
    except (OSError, TypeError, ValueError) as error:  # All three are what h5py makes of damage.
        raise InputError(f"{source}: cannot be read as HDF5 ({error})") from error


@partial(jax.jit, static_argnums=0)
def _encode(elmo: ELMo, params: Params, characters_UC: Array) -> Array:
    """[U, P]. In full fp32, which TPUs and GPUs by default give up for speed; so below."""
    with jax.default_matmul_precision("highest"):
        return elmo.config.encoder().apply({"params": params}, characters_UC, method="encode")


@partial(jax.jit, static_argnums=0)
def _run(elmo: ELMo, params: Params, words_BTP: Array, lengths_B: Array, carry: Params) -> tuple[Array, Params]:
    """([B, T, L + 1, 2 · P], the new carry) of encoded words."""
    with jax.default_matmul_precision("highest"):
        layers, carry = elmo.config.encoder().apply(
            {"params": params}, words_BTP, lengths_B, carry, method="apply_layers"
        )
        forward_LBTP, backward_LBTP = (
            jnp.concatenate([words_BTP[None], layers[direction]]) for direction in ("forward", "backward")
        )
        return jnp.concatenate([forward_LBTP, backward_LBTP], -1).transpose(1, 2, 0, 3), carry


@partial(jax.jit, static_argnums=0)
def _neighbours_nll(
    elmo: ELMo, params: Params, words_BTP: Array, lengths_B: Array, carry: Params, targets_BT: Array
) -> Array:
    """[B, T, 2]: the negative log-likelihoods of the token after each, and of the token before each."""
    with jax.default_matmul_precision("highest"):
        layers, _ = elmo.config.encoder().apply({"params": params}, words_BTP, lengths_B, carry, method="apply_layers")

        def chunk(arguments: tuple[Array, Array]) -> Array:
            last_GP, targets_G = arguments
            return cross_entropy(elmo.apply({"params": params}, last_GP[None], method="logits")[0], targets_G)[0]

        def nll_BT(last_BTP: Array, targets_BT: Array) -> Array:
            chunks = last_BTP.reshape(-1, TOKENS_PER_CHUNK, last_BTP.shape[-1])
            return jax.lax.map(chunk, (chunks, targets_BT.reshape(-1, TOKENS_PER_CHUNK))).reshape(targets_BT.shape)

        after_BT = nll_BT(layers["forward"][-1], jnp.roll(targets_BT, -1, axis=1))
        before_BT = nll_BT(layers["backward"][-1], jnp.roll(targets_BT, 1, axis=1))
        return jnp.stack([after_BT, before_BT], -1)


class _Encoded:
    """Texts of words with <S> and </S> around them, as numbers; the different words, and the encoding of each.

    A word is encoded once, when it is first asked for, however often it stands in the texts: for a text of many lines
    that is what a table for a closed vocabulary would save.
    """

    def __init__(self, texts: Sequence[Sequence[str]], encode: Callable[[np.ndarray], Array], width: int):
        numbers = {BEGIN_SENTENCE: 0, END_SENTENCE: 1}
        self.texts = [[0, *(numbers.setdefault(word, len(numbers)) for word in words), 1] for words in texts]
        self.words = list(numbers)
        self._encode = encode
        self._encodings_UP = np.empty((len(self.words), width), np.float32)
        self._encoded_U = np.zeros(len(self.words), bool)

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        """[..., P] for [...]."""
        new = np.unique(numbers[~self._encoded_U[numbers]])
        for start in range(0, len(new), WORDS_PER_CHUNK):
            chunk = new[start : start + WORDS_PER_CHUNK]
            ids_UC = np.zeros((WORDS_PER_CHUNK, MAX_CHARACTERS), np.int32)
            ids_UC[: len(chunk)] = characters([self.words[number] for number in chunk])
            self._encodings_UP[chunk] = self._encode(ids_UC)[: len(chunk)]
            self._encoded_U[chunk] = True
        return self._encodings_UP[numbers]


@dataclasses.dataclass(frozen=True, eq=False)
class ELMoModel(Model):
    """An ELMo with what one does with it: `embed`, `score`; a text is its words, read with <S> and </S> around them."""

    config: ELMoConfig

    config_class: ClassVar[type] = ELMoConfig
    library: ClassVar[str] = "allennlp"
    settings: ClassVar[tuple[str, str]] = ("options.json", "char_cnn")
    vocabulary_tables: ClassVar[frozenset[str]] = SOFTMAX
    free_fields: ClassVar[frozenset[str]] = frozenset({"vocab_size", "dropout"})

    @classmethod
    def read(cls, directory: Path) -> Self:
        config = _read_config(_only(directory, ELMO_OPTIONS))
        params = read_params(_only(directory, ELMO_WEIGHTS), config)
        vocabulary = directory / "vocab.txt"
        tokenizer = (
            WordVocabulary.from_directory(directory) if vocabulary.is_file() and WordVocabulary.at(vocabulary) else None
        )
        return cls(config, params, tokenizer, SOFTMAX)

    def write(self, directory: Path) -> None:
        with h5py.File(directory / "weights.hdf5", "w") as file:
            for path, value in jax.tree_util.tree_leaves_with_path(self.params):
                name = dataset_name(path_name(path))
                if name is None:
                    continue
                tensor = np.asarray(value, np.float32)
                # Without the time, so that the same model is the same bytes.
                file.create_dataset(name, data=tensor[None] if name.startswith("CNN/W_") else tensor, track_times=False)
        text = json.dumps(_options(self.config), indent=2, sort_keys=True)
        (directory / "options.json").write_text(text + "\n", encoding="utf-8")
        if self.tokenizer is not None:
            self.tokenizer.save(directory)

    def continued_rows(self, tokenizer: Tokenizer) -> np.ndarray:
        """As for every model, but any vocabulary will do: a word of both goes on with its row, wherever it stands."""
        known = {} if self.tokenizer is None else {token: row for row, token in enumerate(self.tokenizer.tokens)}
        return np.array([known.get(token, -1) for token in tokenizer.tokens])

    def embed(
        self,
        texts: Sequence[str],
        truncate: bool = False,
        tokenize: bool = False,
        state: Literal["zero", "warm", "carry"] = "zero",
        batch_size: int | None = None,
    ) -> Iterator[tuple[list[str], np.ndarray]]:
        """For each text, in order, its words and its hidden states, f32 [L + 1, words, 2 · P].

        Layer 0 is the encoding of the word, twice; <S> and </S> are read, and cut from the result.

        Words stand between white space; `tokenize`: punctuation marks and ideographs too are words of their own (see
        `prelm_jax.tokenizers.words`). A text may be of any length: `truncate` has nothing to cut. `state` is what the
        LSTMs begin a text with:

        - "zero": zeros. The result depends on the text alone.
        - "warm": what an empty text leaves of zeros. Here too the result depends on the text alone, and it is nearer to
          that in the middle of a corpus, which is where the training was.
        - "carry": what the text `batch_size` (default 1) before left. So do bilm-tf and AllenNLP, whose batches go on
          from the batch before, row by row; the last may have fewer rows. A blank text is read like any other.
        """
        if state not in ("zero", "warm", "carry"):
            raise InputError(f"state is {state!r}; choose zero, warm or carry")
        if batch_size is not None and (state != "carry" or batch_size < 1):
            raise InputError(f"batch_size is {batch_size}; it is a number from 1 on, for the state carry alone")
        encoded = self._encoded(list(map(Splitter(tokenize), texts)))
        results = self._carried(encoded, batch_size or 1) if state == "carry" else self._alone(encoded, state == "warm")
        for numbers, states_TLD in results:
            yield [encoded.words[number] for number in numbers[1:-1]], states_TLD[1:-1].swapaxes(0, 1)

    def _encoded(self, texts: Sequence[Sequence[str]]) -> _Encoded:
        encode = partial(_encode, self.config.build(), self.params)
        return _Encoded(texts, encode, self.config.projection_size)

    def _alone(self, encoded: _Encoded, warm: bool) -> Iterator[tuple[list[int], np.ndarray]]:
        """For each text its numbers and hidden states [T, L + 1, 2 · P], from one state for all."""
        run, start = partial(_run, self.config.build(), self.params), self.config.build().init_carry(1)
        if warm:
            numbers_BT, segments_BT = batching.batch([[0, 1]], 1, batching.SHORTEST)
            _, start = run(encoded[numbers_BT], segments_BT.sum(1), start)

        def compute(numbers_BT: np.ndarray, segments_BT: np.ndarray) -> Array:
            carry = jax.tree.map(lambda x: jnp.repeat(x, len(numbers_BT), axis=0), start)
            return run(encoded[numbers_BT], segments_BT.sum(1), carry)[0]

        return batching.in_order(encoded.texts, compute, sys.maxsize)

    def _carried(self, encoded: _Encoded, batch_size: int) -> Iterator[tuple[list[int], np.ndarray]]:
        """The same, each from the state that the text `batch_size` before left."""
        run, carry = partial(_run, self.config.build(), self.params), self.config.build().init_carry(batch_size)
        for start in range(0, len(encoded.texts), batch_size):
            texts = encoded.texts[start : start + batch_size]
            length = batching.padded_length(max(map(len, texts)), sys.maxsize)
            numbers_BT, segments_BT = batching.batch(texts, batch_size, length)
            states_BTLD, carry = run(encoded[numbers_BT], segments_BT.sum(1), carry)
            for numbers, states_TLD in zip(texts, np.asarray(states_BTLD), strict=False):
                yield numbers, states_TLD[: len(numbers)]

    def score(self, texts: Sequence[str]) -> list[tuple[float, int]]:
        """For each text the mean of both directions' sums of its words' natural-log probabilities, and their number.

        Texts are split as those of the training were, and read from a state of zeros; <S> and </S> do not count, and
        words outside of the vocabulary count as <UNK>.
        """
        if self.missing:
            raise InputError("a published ELMo has no softmax to predict words with; give the work directory of a run")
        ids = {token: id_ for id_, token in enumerate(self.tokenizer.tokens)}
        encoded = self._encoded(self.tokenizer.split_batch(list(texts)))
        targets_U = np.array([ids.get(word, self.tokenizer.unknown_id) for word in encoded.words], np.int32)
        elmo = self.config.build()

        def compute(numbers_BT: np.ndarray, segments_BT: np.ndarray) -> Array:
            inputs = encoded[numbers_BT], segments_BT.sum(1), elmo.init_carry(len(numbers_BT))
            return _neighbours_nll(elmo, self.params, *inputs, targets_U[numbers_BT])

        scores = []
        for numbers, nll_T2 in batching.in_order(encoded.texts, compute, sys.maxsize):
            count = len(numbers) - 2
            total = nll_T2[:count, 0].sum(dtype=np.float64) + nll_T2[2:, 1].sum(dtype=np.float64)
            scores.append((0.0 - float(total) / 2, count))
        return scores
