"""A pretrained ELMo: hidden states and log-probabilities of words."""

import sys
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from typing import Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from prelm_jax.errors import InputError
from prelm_jax.inference import batching
from prelm_jax.inference.base import Embedding, Embeddings, Pretrained, Sample, Scores, SentenceScore
from prelm_jax.inference.compiling import compiled
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

    scoring = "log-probability forward + backward"

    def embed(
        self,
        texts: Collection[str],
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
            seen in training, where a text continues a corpus.
            "carry": the final state of the text `batch_size` before. This is what bilm-tf and AllenNLP do, whose
            batches continue the batch before row by row. Blank texts are read too.
        batch_size: with "carry", the number of rows (default 1); the last batch may have fewer.
        """
        if state not in ("zero", "warm", "carry"):
            raise InputError(f"state is {state!r}; choose zero, warm or carry")
        if batch_size is not None and (state != "carry" or batch_size < 1):
            raise InputError(f"batch_size is {batch_size}; it must be at least 1, and needs the state carry")
        rows = batch_size or 1
        carry = self.config.build().init_carry(rows)
        if state == "warm":
            *_, ends_2P = self._encode([[]])
            _, carry = self._hidden_states(ends_2P, *batching.batch([[0, 1]], 1, batching.SHORTEST), carry)
        for window in batching.windows(map(Splitter(tokenize), texts), rows):
            if state == "carry":
                carry = yield from self._embed_on(window, rows, carry)
            else:
                yield from self._embed_each(window, carry)

    def sample(self, texts: Sequence[str], count: int) -> list[Sample]:
        """The longest word of a text, and the three words of the other texts whose top layer is nearest to it."""
        embedded = [
            (words, hidden[-1] / np.linalg.norm(hidden[-1], axis=1, keepdims=True))
            for words, hidden in self.embed(texts)
        ]
        samples = []
        for i, (words, vectors_TD) in enumerate(embedded[:count]):
            if not words:
                continue
            query = max(range(len(words)), key=lambda position: len(words[position]))
            others = [
                (float(cosine), position, other)
                for number, (other, others_TD) in enumerate(embedded)
                if number != i
                for position, cosine in enumerate(others_TD @ vectors_TD[query])
            ]
            nearest = sorted(others, key=lambda each: -each[0])[:3]
            found = " · ".join(f"{_in_context(other, position)} {cosine:.2f}" for cosine, position, other in nearest)
            samples.append(Sample(_in_context(words, query, len(words)), "", found))
        return samples

    def score(self, texts: Collection[str]) -> Scores:
        """For each text, in order, the sum of its words' natural-log probabilities and the number of its words.

        The sum is the mean of both directions. Texts are split as in training and read from a zero state. <S> and </S>
        are not counted; words outside of the vocabulary count as <UNK>.
        """
        for scored in self.score_sentences(texts):
            yield scored.total / 2, scored.tokens

    def score_sentences(self, texts: Collection[str]) -> Iterator[SentenceScore]:
        """The sum of both directions for each text, and each of them; what is read and counted is that of `score`."""
        if self.missing or self.tokenizer is None:
            raise InputError("a published ELMo has no softmax to predict words with; give the work directory of a run")
        for window in batching.windows(map(Splitter(self.tokenizer.tokenize), texts)):
            yield from self._score(window, self.tokenizer)

    def embed_words(self, sentences: Iterable[Sequence[str]]) -> Iterator[np.ndarray]:
        """For each sentence, a sequence of words, their hidden states, f32 [L + 1, words, 2 · P], from a zero state."""
        carry = self.config.build().init_carry(1)
        for window in batching.windows(map(list, sentences)):
            yield from (states for _, states in self._embed_each(window, carry))

    def _score(self, texts: Sequence[list[str]], vocabulary: WordVocabulary) -> Iterator[SentenceScore]:
        numbered, words, encodings_UP = self._encode(texts)
        targets_U = np.array([vocabulary.ids.get(word, vocabulary.unknown_id) for word in words], np.int32)

        def compute(numbers_BT: np.ndarray, segments_BT: np.ndarray) -> Array:
            state = self.config.build().init_carry(len(numbers_BT))
            inputs = encodings_UP[numbers_BT], segments_BT.sum(1), state, targets_U[numbers_BT]
            return _neighbors_nll(self.config, self.params, *inputs)

        for numbers, nll_T2 in batching.in_order(numbered, compute, sys.maxsize):
            count = len(numbers) - 2
            forward, backward = nll_T2[:count, 0].sum(dtype=np.float64), nll_T2[2:, 1].sum(dtype=np.float64)
            directions = {"forward": 0.0 - float(forward), "backward": 0.0 - float(backward)}
            unknown = int((targets_U[numbers[1:-1]] == vocabulary.unknown_id).sum())
            yield SentenceScore(0.0 - float(forward + backward), count, unknown, directions)

    def _encode(self, texts: Sequence[Sequence[str]]) -> tuple[list[list[int]], list[str], np.ndarray]:
        """Texts as numbers of distinct words, <S> and </S> included; these words; their encodings [U, P].

        A word is encoded once, however often it occurs; lower-cased if the model was trained so.
        """
        numbers = {BEGIN_SENTENCE: 0, END_SENTENCE: 1}
        if self.tokenizer is not None and self.tokenizer.lowercase:
            texts = [[word.lower() for word in words] for words in texts]
        numbered = [[0, *(numbers.setdefault(word, len(numbers)) for word in words), 1] for words in texts]
        words = list(numbers)
        encodings_UP = np.empty((len(words), self.config.projection_size), np.float32)
        for start in range(0, len(words), WORDS_PER_CHUNK):
            chunk = words[start : start + WORDS_PER_CHUNK]
            ids_UC = np.zeros((WORDS_PER_CHUNK, MAX_CHARACTERS), np.int32)
            ids_UC[: len(chunk)] = characters(chunk)
            encodings_UP[start : start + len(chunk)] = _encode(self.config, self.params, ids_UC)[: len(chunk)]
        return numbered, words, encodings_UP

    def _embed_each(self, texts: Sequence[list[str]], first: Params) -> Embeddings:
        """`embed` of texts that all begin in the state `first`, of one row."""
        numbered, words, encodings_UP = self._encode(texts)

        def compute(numbers_BT: np.ndarray, segments_BT: np.ndarray) -> Array:
            carry = jax.tree.map(lambda x: jnp.repeat(x, len(numbers_BT), axis=0), first)
            return self._hidden_states(encodings_UP, numbers_BT, segments_BT, carry)[0]

        for numbers, states_TLD in batching.in_order(numbered, compute, sys.maxsize):
            yield _without_ends(words, numbers, states_TLD)

    def _embed_on(self, texts: Sequence[list[str]], rows: int, carry: Params) -> Generator[Embedding, None, Params]:
        """`embed` of texts of which each begins where that `rows` before has ended; returns the last states."""
        numbered, words, encodings_UP = self._encode(texts)
        for start in range(0, len(numbered), rows):
            some = numbered[start : start + rows]
            length = batching.padded_length(max(map(len, some)), sys.maxsize)
            states_BTLD, carry = self._hidden_states(encodings_UP, *batching.batch(some, rows, length), carry)
            for numbers, states_TLD in zip(some, np.asarray(states_BTLD), strict=False):
                yield _without_ends(words, numbers, states_TLD)
        return carry

    def _hidden_states(
        self, encodings_UP: np.ndarray, numbers_BT: np.ndarray, segments_BT: np.ndarray, carry: Params
    ) -> tuple[Array, Params]:
        """([B, T, L + 1, 2 · P], the new state) of numbered texts."""
        return _hidden_states(self.config, self.params, encodings_UP[numbers_BT], segments_BT.sum(1), carry)


def _in_context(words: Sequence[str], position: int, reach: int = 2) -> str:
    """A word in brackets, with up to `reach` neighbors on each side."""
    before, after = words[max(0, position - reach) : position], words[position + 1 : position + 1 + reach]
    return " ".join([*before, f"[{words[position]}]", *after])


def _without_ends(words: list[str], numbers: list[int], states_TLD: np.ndarray) -> Embedding:
    """The words of a text and their hidden states [L + 1, words, D], without <S> and </S>."""
    return [words[number] for number in numbers[1:-1]], states_TLD[1 : len(numbers) - 1].swapaxes(0, 1)


@compiled(static=(0,))
def _encode(config: ELMoConfig, params: Params, characters_UC: Array) -> Array:
    """[U, P]."""
    with jax.default_matmul_precision("highest"):
        return cast("Array", config.encoder().apply({"params": params}, characters_UC, method="encode"))


def _layers(config: ELMoConfig, params: Params, words_BTP: Array, lengths_B: Array, carry: Params) -> Layers:
    """({direction: [L, B, T, P]}, the new state) of encoded words."""
    encoder = config.encoder()
    return cast("Layers", encoder.apply({"params": params}, words_BTP, lengths_B, carry, method="apply_layers"))


@compiled(static=(0,))
def _hidden_states(
    config: ELMoConfig, params: Params, words_BTP: Array, lengths_B: Array, carry: Params
) -> tuple[Array, Params]:
    """([B, T, L + 1, 2 · P], the new state) of encoded words."""
    with jax.default_matmul_precision("highest"):
        layers, carry = _layers(config, params, words_BTP, lengths_B, carry)
        both = [jnp.concatenate([words_BTP[None], layers[direction]]) for direction in DIRECTIONS]
        return jnp.concatenate(both, -1).transpose(1, 2, 0, 3), carry


@compiled(static=(0,))
def _neighbors_nll(
    config: ELMoConfig, params: Params, words_BTP: Array, lengths_B: Array, carry: Params, targets_BT: Array
) -> Array:
    """[B, T, 2]: the negative log-likelihoods of the word after each position, and of the word before it."""
    with jax.default_matmul_precision("highest"):
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
