"""A pretrained GPT-1: hidden states, log-probabilities, generated text."""

import itertools
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from prelm_jax.errors import InputError
from prelm_jax.inference import batching
from prelm_jax.inference.base import SENTENCE_END, Sample, Scores, SentenceScore
from prelm_jax.inference.batching import Program, Query
from prelm_jax.inference.compiling import compiled
from prelm_jax.inference.transformer import TransformerPretrained, hidden_states
from prelm_jax.models.cross_entropy import cross_entropy
from prelm_jax.models.gpt import GPTConfig
from prelm_jax.models.layers import MASKED
from prelm_jax.training.contract import Params

SAMPLED_TOKENS = 24  # of a continuation
TOP = 5  # Tokens of which `top_query` gives the probabilities.

Top = tuple[np.ndarray, np.ndarray, np.ndarray]


class GPTPretrained(TransformerPretrained[GPTConfig]):
    """A GPT with `embed`, `score` and `generate`. A text is its tokens alone."""

    scoring = f"log-probability after {SENTENCE_END!r}"

    def score(self, texts: Collection[str]) -> Scores:
        """For each text, in order, the natural-log probability of its tokens but the first, and their number.

        Nothing predicts the first token. A text that is too long raises InputError.
        """
        for window in batching.windows(batching.encode(self.tokenizer, texts, self.room)):
            for found in batching.answers([self.score_query(ids) for ids in window]):
                yield float(found.sum(dtype=np.float64)), len(found)

    def score_sentences(self, texts: Collection[str]) -> Iterator[SentenceScore]:
        """The log-probability of each text after the end of a sentence, its first token included."""
        (before,) = self.split([SENTENCE_END])
        for window in batching.windows(batching.encode(self.tokenizer, texts, self.room - len(before))):
            found = batching.answers([self.score_query([*before, *ids] if ids else []) for ids in window])
            for ids, values in zip(window, found, strict=True):
                total = float(values[max(0, len(values) - len(ids)) :].sum(dtype=np.float64))
                yield SentenceScore(total, len(ids), self._unknown(ids))

    def score_query(self, ids: Sequence[int]) -> Query[Sequence[int], np.ndarray, np.ndarray]:
        """The natural-log probability of each of the ids but the first."""

        def finish(found: Sequence[np.ndarray]) -> np.ndarray:
            return 0.0 - found[0][:-1] if found else np.zeros(0, np.float32)

        return Query(self.score_program, [ids] if ids else [], finish)

    @cached_property
    def score_program(self) -> Program[Sequence[int], np.ndarray]:
        """The negative log-likelihood of the token after each; without meaning for the last."""

        def compute(params: Params, examples: Sequence[Sequence[int]], rows: int, length: int) -> list[np.ndarray]:
            nll_BT = np.asarray(_next_nll(self.config, params, *batching.batch(examples, rows, length)))
            return [row[: len(ids)] for ids, row in zip(examples, nll_BT, strict=False)]

        return self.program("score", compute, len, self.random_ids)

    def top_query(self, ids: Sequence[int]) -> Query[Sequence[int], Top, Top]:
        """For each of the ids but the first: its negative log-likelihood, and the TOP most probable tokens there.

        (nll_T, log-probabilities [T, TOP], ids [T, TOP]).
        """

        def finish(found: Sequence[Top]) -> Top:
            nll_T, values_TK, ids_TK = (np.array(each[:-1]) for each in found[0])
            return nll_T, values_TK, ids_TK

        return Query(self.top_program, [ids], finish)

    @cached_property
    def top_program(self) -> Program[Sequence[int], Top]:
        """What `score_program` computes, and the TOP most probable tokens after each with their log-probabilities."""

        def compute(params: Params, examples: Sequence[Sequence[int]], rows: int, length: int) -> list[Top]:
            inputs = batching.batch(examples, rows, length)
            vocab_size, count = self.tokenizer.vocab_size, min(TOP, self.tokenizer.vocab_size)
            parts = map(np.asarray, _next_top(self.config, vocab_size, count, params, *inputs))
            return [
                (nll_T[: len(ids)], values_TK[: len(ids)], ids_TK[: len(ids)])
                for ids, nll_T, values_TK, ids_TK in zip(examples, *parts, strict=False)
            ]

        return self.program("top", compute, len, self.random_ids)

    def generate(
        self,
        prompt: str,
        max_tokens: int = 100,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """A prompt and its continuation by `max_tokens` tokens, as text.

        max_tokens: number of tokens to add.
        temperature: divides the logits; 0 is greedy decoding.
        top_k: draw from the k most probable tokens only.
        top_p: draw from the fewest most probable tokens whose probabilities reach `top_p` (see `restrict`).
        seed: the same seed gives the same text.

        Raises InputError for a blank prompt and for an option out of range.

            load("gpt1-mini").generate("The", max_tokens=20, temperature=0.7)
        """
        for name, value, allowed, rule in (
            ("max_tokens", max_tokens, max_tokens >= 0, "at least 0"),
            ("temperature", temperature, temperature >= 0, "at least 0"),
            ("top_k", top_k, top_k is None or top_k >= 1, "at least 1"),
            ("top_p", top_p, 0 < top_p <= 1, "above 0, at most 1"),
        ):
            if not allowed:
                raise InputError(f"{name} {value} is out of range: {rule}")
        (ids,) = self.split([prompt])
        if not ids:
            raise InputError("the prompt is blank; give at least one word to continue")
        continuation = self.continuation(self.params, ids, temperature, top_k, top_p, seed)
        return self.tokenizer.decode([*ids, *(id for id, _ in itertools.islice(continuation, max_tokens))])

    def continuation(
        self,
        params: Params,
        ids: Sequence[int],
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[tuple[int, Array]]:
        """Without end, the next token after ids, and the logits [padded vocabulary] that it was drawn from.

        For the options see `generate`.
        """
        ids, key, vocab_size = list(ids), jax.random.key(seed), self.tokenizer.vocab_size
        for logits_V in self._continue(params, ids):
            known_V = logits_V[:vocab_size]
            if temperature == 0:
                ids.append(int(known_V.argmax()))
            else:
                restricted_V = restrict(known_V, temperature, top_k or vocab_size, top_p)
                ids.append(int(jax.random.categorical(jax.random.fold_in(key, len(ids)), restricted_V)))
            yield ids[-1], logits_V

    def sample(self, texts: Sequence[str], count: int) -> list[Sample]:
        """The first half of a text, continued at temperature 0.7."""
        samples = []
        for text in texts[:count]:
            (ids,) = self.tokenizer.encode_batch([text])
            given, expected = self.tokenizer.decode(ids[: len(ids) // 2]), self.tokenizer.decode(ids[len(ids) // 2 :])
            if given.strip():
                continued = self.generate(given, SAMPLED_TOKENS, temperature=0.7)
                samples.append(Sample(given, expected, continued.removeprefix(given).strip()))
        return samples

    def _continue(self, params: Params, ids: list[int]) -> Iterator[Array]:
        """Yields the logits [padded vocabulary] of the token after `ids` each time; the caller appends it to `ids`.

        Keys and values of earlier tokens are cached while all tokens fit into the model. After that the last
        `max_position_embeddings` tokens are computed again each time, because each of them has moved to another
        position.
        """
        gpt, window = self.config.build(), self.config.max_position_embeddings
        cache = None
        while True:
            if cache is not None and len(ids) <= window:
                new = np.array([ids[-1:]], np.int32)
            else:
                cache, recent = gpt.init_cache(1), ids[-window:]
                new = np.zeros((1, batching.padded_length(len(recent), window)), np.int32)
                new[0, -len(recent) :] = recent
            logits_V, cache = _next_logits(self.config, params, cache, new, min(len(ids), window))
            yield logits_V


@jax.jit
def restrict(logits_V: Array, temperature: float, top_k: int, top_p: float) -> Array:
    """Logits divided by the temperature, -1e9 where a token is not to be drawn.

    To be drawn are the `top_k` most probable tokens, and of these the nucleus (Holtzman et al. 2020): the fewest, most
    probable first, whose probabilities reach `top_p`.
    """
    logits_V = (logits_V - logits_V.max()) / temperature
    sorted_V = -jnp.sort(-logits_V)
    sorted_V = jnp.where(jnp.arange(logits_V.shape[0]) < top_k, sorted_V, MASKED)
    probabilities_V = jax.nn.softmax(sorted_V)
    kept_V = (jnp.cumsum(probabilities_V) - probabilities_V < top_p).at[0].set(True)
    lowest = jnp.where(kept_V, sorted_V, jnp.inf).min()
    return jnp.where(logits_V >= lowest, logits_V, MASKED)


@compiled(static=(0,), shapes=("b, t", "b, t"))
def _next_nll(config: GPTConfig, params: Params, tokens_BT: Array, segments_BT: Array) -> Array:
    """[B, T]: the negative log-likelihood of the token after each position; without meaning at the last position."""
    with jax.default_matmul_precision("highest"):
        last_BTD = hidden_states(config, params, tokens_BT, segments_BT)[-1]

        def row(arguments: tuple[Array, Array]) -> Array:
            last_TD, targets_T = arguments
            logits_1TV = config.build().apply({"params": params}, last_TD[None], method="logits")
            return cross_entropy(cast("Array", logits_1TV)[0], targets_T)[0]

        # One row at a time: the logits of all rows would be by far the largest array here.
        return jax.lax.map(row, (last_BTD, jnp.roll(tokens_BT, -1, axis=1)))


@compiled(static=(0, 1, 2), shapes=("b, t", "b, t"))
def _next_top(
    config: GPTConfig, vocab_size: int, count: int, params: Params, tokens_BT: Array, segments_BT: Array
) -> tuple[Array, Array, Array]:
    """`_next_nll`, and the `count` greatest log-probabilities [B, T, K] of the token after each, and their ids."""
    with jax.default_matmul_precision("highest"):
        last_BTD = hidden_states(config, params, tokens_BT, segments_BT)[-1]

        def row(arguments: tuple[Array, Array]) -> tuple[Array, Array, Array]:
            last_TD, targets_T = arguments
            logits_1TV = config.build().apply({"params": params}, last_TD[None], method="logits")
            logits_TV = cast("Array", logits_1TV)[0]
            values_TK, ids_TK = jax.lax.top_k(jax.nn.log_softmax(logits_TV)[:, :vocab_size], count)
            return cross_entropy(logits_TV, targets_T)[0], values_TK, ids_TK

        return jax.lax.map(row, (last_BTD, jnp.roll(tokens_BT, -1, axis=1)))


@compiled(static=(0,), donated=(2,))
def _next_logits(
    config: GPTConfig, params: Params, cache: Params, tokens_1T: Array, length: Array
) -> tuple[Array, Params]:
    """(logits [padded vocabulary] of the token after `length` tokens, of which the last T are given, the new cache)."""
    with jax.default_matmul_precision("highest"):
        variables = {"params": params, "cache": cache}
        logits_1V, changed = config.build().apply(variables, tokens_1T, length, method="next_logits", mutable=["cache"])
        return logits_1V[0], cast("Params", changed["cache"])
