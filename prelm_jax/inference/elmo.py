"""A pretrained ELMo: hidden states and log-probabilities of words."""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from prelm_jax.errors import InputError
from prelm_jax.inference import batching
from prelm_jax.inference.base import Embeddings, Pretrained, full_precision
from prelm_jax.models.cross_entropy import cross_entropy
from prelm_jax.models.elmo import DIRECTIONS, ELMoConfig
from prelm_jax.tokenizers.characters import BEGIN_SENTENCE, END_SENTENCE, MAX_CHARACTERS, characters
from prelm_jax.tokenizers.words import Splitter, WordVocabulary
from prelm_jax.training.contract import Params

# Words are encoded in chunks of exactly this size: one program, and an encoding depends on the word alone.
WORDS_PER_CHUNK = 256
# The number of tokens whose logits over the vocabulary are in memory at once.
TOKENS_PER_CHUNK = 64

Layers = tuple[dict[str, Array], Params]  # The outputs of the layers by direction, and a state.


class ELMoPretrained(Pretrained[ELMoConfig, WordVocabulary | None]):
    """An ELMo with `embed` and `score`. A text is its words, read between <S> and </S>."""

    def embed(
        self,
        texts: Sequence[str],
        truncate: bool = False,
        tokenize: bool = False,
        state: Literal["zero", "warm", "carry"] = "zero",
        batch_size: int | None = None,
    ) -> Embeddings:
        """For each text, in order, its words and its hidden states, f32 [L + 1, words, 2 · P].

        Layer 0 is the encoding of the word, twice. The hidden states of <S> and </S> are left out.

        truncate: has no effect; texts may be of any length.
        tokenize: split at punctuation and ideographs (see `prelm_jax.tokenizers.words`), not only at white space.
        state: initial LSTM state of each text:
            "zero": zeros. The result depends on the text alone.
            "warm": the state after an empty text. The result depends on the text alone, and is closer to the states
            seen in training, where a text stands in the middle of a corpus.
            "carry": the final state of the text `batch_size` before. This is what bilm-tf and AllenNLP do, whose
            batches continue the batch before row by row. Blank texts are read too.
        batch_size: with "carry", the number of rows (default 1); the last batch may have fewer.
        """
        if state not in ("zero", "warm", "carry"):
            raise InputError(f"state is {state!r}; choose zero, warm or carry")
        if batch_size is not None and (state != "carry" or batch_size < 1):
            raise InputError(f"batch_size is {batch_size}; it must be at least 1, and needs the state carry")
        encoded = self._encoded(list(map(Splitter(tokenize), texts)))
        results = self._carried(encoded, batch_size or 1) if state == "carry" else self._alone(encoded, state == "warm")
        for numbers, states_TLD in results:
            yield [encoded.words[number] for number in numbers[1:-1]], states_TLD[1:-1].swapaxes(0, 1)

    def score(self, texts: Sequence[str]) -> list[tuple[float, int]]:
        """For each text the sum of its words' natural-log probabilities and the number of its words.

        The sum is the mean of both directions. Texts are split as in training and read from a zero state. <S> and </S>
        are not counted; words outside of the vocabulary count as <UNK>.
        """
        if self.missing or self.tokenizer is None:
            raise InputError("a published ELMo has no softmax to predict words with; give the work directory of a run")
        ids = {token: id for id, token in enumerate(self.tokenizer.tokens)}
        encoded = self._encoded(self.tokenizer.split_batch(list(texts)))
        targets_U = np.array([ids.get(word, self.tokenizer.unknown_id) for word in encoded.words], np.int32)

        def compute(numbers_BT: np.ndarray, segments_BT: np.ndarray) -> Array:
            inputs = encoded[numbers_BT], segments_BT.sum(1), self._zero_state(len(numbers_BT))
            return _neighbors_nll(self.config, self.params, *inputs, targets_U[numbers_BT])

        scores = []
        for numbers, nll_T2 in batching.in_order(encoded.texts, compute, sys.maxsize):
            count = len(numbers) - 2
            total = nll_T2[:count, 0].sum(dtype=np.float64) + nll_T2[2:, 1].sum(dtype=np.float64)
            scores.append((0.0 - float(total) / 2, count))
        return scores

    def _encoded(self, texts: Sequence[Sequence[str]]) -> "_Encoded":
        return _Encoded(texts, partial(_encode, self.config, self.params), self.config.projection_size)

    def _zero_state(self, rows: int) -> Params:
        return self.config.build().init_carry(rows)

    def _alone(self, encoded: "_Encoded", warm: bool) -> Iterator[tuple[list[int], np.ndarray]]:
        """For each text its numbers and hidden states [T, L + 1, 2 · P]; all texts start from the same state."""
        run, start = partial(_hidden_states, self.config, self.params), self._zero_state(1)
        if warm:
            numbers_BT, segments_BT = batching.batch([[0, 1]], 1, batching.SHORTEST)
            _, start = run(encoded[numbers_BT], segments_BT.sum(1), start)

        def compute(numbers_BT: np.ndarray, segments_BT: np.ndarray) -> Array:
            carry = jax.tree.map(lambda x: jnp.repeat(x, len(numbers_BT), axis=0), start)
            return run(encoded[numbers_BT], segments_BT.sum(1), carry)[0]

        return batching.in_order(encoded.texts, compute, sys.maxsize)

    def _carried(self, encoded: "_Encoded", batch_size: int) -> Iterator[tuple[list[int], np.ndarray]]:
        """Like `_alone`, but each text starts from the final state of the text `batch_size` before."""
        run, carry = partial(_hidden_states, self.config, self.params), self._zero_state(batch_size)
        for start in range(0, len(encoded.texts), batch_size):
            texts = encoded.texts[start : start + batch_size]
            length = batching.padded_length(max(map(len, texts)), sys.maxsize)
            numbers_BT, segments_BT = batching.batch(texts, batch_size, length)
            states_BTLD, carry = run(encoded[numbers_BT], segments_BT.sum(1), carry)
            for numbers, states_TLD in zip(texts, np.asarray(states_BTLD), strict=False):
                yield numbers, states_TLD[: len(numbers)]


class _Encoded:
    """Texts of words between <S> and </S>, as numbers of distinct words, and the encoding of each word.

    A word is encoded once, when it is first asked for, however often it occurs in the texts. For long texts this is as
    fast as a precomputed table of a closed vocabulary.
    """

    def __init__(self, texts: Sequence[Sequence[str]], encode: Callable[[np.ndarray], Array], width: int):
        numbers = {BEGIN_SENTENCE: 0, END_SENTENCE: 1}
        self.texts = [[0, *(numbers.setdefault(word, len(numbers)) for word in words), 1] for words in texts]
        self.words = list(numbers)
        self._encode = encode
        self._encodings_UP = np.empty((len(self.words), width), np.float32)
        self._encoded_U = np.zeros(len(self.words), bool)

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        """The encodings [..., P] of words by number [...]."""
        new = np.unique(numbers[~self._encoded_U[numbers]])
        for start in range(0, len(new), WORDS_PER_CHUNK):
            chunk = new[start : start + WORDS_PER_CHUNK]
            ids_UC = np.zeros((WORDS_PER_CHUNK, MAX_CHARACTERS), np.int32)
            ids_UC[: len(chunk)] = characters([self.words[number] for number in chunk])
            self._encodings_UP[chunk] = self._encode(ids_UC)[: len(chunk)]
            self._encoded_U[chunk] = True
        return self._encodings_UP[numbers]


@partial(jax.jit, static_argnums=0)
@full_precision
def _encode(config: ELMoConfig, params: Params, characters_UC: Array) -> Array:
    """[U, P]."""
    return cast("Array", config.encoder().apply({"params": params}, characters_UC, method="encode"))


def _layers(config: ELMoConfig, params: Params, words_BTP: Array, lengths_B: Array, carry: Params) -> "Layers":
    """({direction: [L, B, T, P]}, the new state) of encoded words."""
    encoder = config.encoder()
    return cast("Layers", encoder.apply({"params": params}, words_BTP, lengths_B, carry, method="apply_layers"))


@partial(jax.jit, static_argnums=0)
@full_precision
def _hidden_states(
    config: ELMoConfig, params: Params, words_BTP: Array, lengths_B: Array, carry: Params
) -> tuple[Array, Params]:
    """([B, T, L + 1, 2 · P], the new state) of encoded words."""
    layers, carry = _layers(config, params, words_BTP, lengths_B, carry)
    both = [jnp.concatenate([words_BTP[None], layers[direction]]) for direction in DIRECTIONS]
    return jnp.concatenate(both, -1).transpose(1, 2, 0, 3), carry


@partial(jax.jit, static_argnums=0)
@full_precision
def _neighbors_nll(
    config: ELMoConfig, params: Params, words_BTP: Array, lengths_B: Array, carry: Params, targets_BT: Array
) -> Array:
    """[B, T, 2]: the negative log-likelihoods of the word after each position, and of the word before it."""
    layers, _ = _layers(config, params, words_BTP, lengths_B, carry)

    def chunk(arguments: tuple[Array, Array]) -> Array:
        last_GP, targets_G = arguments
        logits_1GV = config.build().apply({"params": params}, last_GP[None], method="logits")
        return cross_entropy(cast("Array", logits_1GV)[0], targets_G)[0]

    def nll_BT(last_BTP: Array, targets_BT: Array) -> Array:
        chunks = last_BTP.reshape(-1, TOKENS_PER_CHUNK, last_BTP.shape[-1])
        return jax.lax.map(chunk, (chunks, targets_BT.reshape(-1, TOKENS_PER_CHUNK))).reshape(targets_BT.shape)

    after_BT = nll_BT(layers["forward"][-1], jnp.roll(targets_BT, -1, axis=1))
    before_BT = nll_BT(layers["backward"][-1], jnp.roll(targets_BT, 1, axis=1))
    return jnp.stack([after_BT, before_BT], -1)
