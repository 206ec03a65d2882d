"""A pretrained GPT-1: hidden states, log-probabilities, generated text."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from prelm_jax.errors import InputError
from prelm_jax.inference import batching
from prelm_jax.inference.base import SENTENCE_END, Sample, Scores, SentenceScore
from prelm_jax.inference.transformer import TransformerPretrained, hidden_states
from prelm_jax.models.cross_entropy import cross_entropy
from prelm_jax.models.gpt import GPTConfig
from prelm_jax.models.layers import MASKED
from prelm_jax.training.contract import Params

SAMPLED_TOKENS = 24  # of a continuation


class GPTPretrained(TransformerPretrained[GPTConfig]):
    """A GPT with `embed`, `score` and `generate`. A text is its tokens alone."""

    scoring = f"log-probability after {SENTENCE_END!r}"

    def score(self, texts: Collection[str]) -> Scores:
        """For each text, in order, the natural-log probability of its tokens but the first, and their number.

        Nothing predicts the first token. A text that is too long raises InputError.
        """
        for total, ids in self._score(self._encode(texts), 1):
            yield total, max(0, len(ids) - 1)

    def score_sentences(self, texts: Collection[str]) -> Iterator[SentenceScore]:
        """The log-probability of each text after the end of a sentence, its first token included."""
        (before,) = self.tokenizer.encode_batch([SENTENCE_END])
        room = self.config.max_position_embeddings - len(before)
        encoded = ([*before, *ids] if ids else [] for ids in batching.encode(self.tokenizer, texts, room))
        for total, ids in self._score(encoded, len(before)):
            own = ids[len(before) :]
            yield SentenceScore(total, len(own), self._unknown(own))

    def _score(self, encoded: Iterable[list[int]], given: int) -> Iterator[tuple[float, list[int]]]:
        """The log-probability of each text's ids but the first `given`, at least one, and its ids."""
        compute = partial(_next_nll, self.config, self.params)
        for window in batching.windows(encoded):
            for ids, nll_T in batching.in_order(window, compute, self.config.max_position_embeddings):
                yield 0.0 - float(nll_T[given - 1 : -1].sum(dtype=np.float64)), ids

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
        (ids,) = self.tokenizer.encode_batch([prompt])
        if not ids:
            raise InputError("the prompt is blank; give at least one word to continue")
        key = jax.random.key(seed)

        def choose(logits_V: Array) -> int:
            if temperature == 0:
                return int(logits_V.argmax())
            restricted_V = restrict(logits_V, temperature, top_k or len(logits_V), top_p)
            return int(jax.random.categorical(jax.random.fold_in(key, len(ids)), restricted_V))

        for logits_V in self._continue(ids, max_tokens):
            ids.append(choose(logits_V[: self.tokenizer.vocab_size]))
        return self.tokenizer.decode(ids)

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

    def _continue(self, ids: list[int], count: int) -> Iterator[Array]:
        """Yields `count` times the logits [padded vocabulary] of the token after `ids`; the caller appends it to `ids`.

        Keys and values of earlier tokens are cached while all tokens fit into the model. After that the last
        `max_position_embeddings` tokens are computed again each time, because each of them has moved to another
        position.
        """
        gpt, window = self.config.build(), self.config.max_position_embeddings
        cache = None
        for _ in range(count):
            if cache is not None and len(ids) <= window:
                new = np.array([ids[-1:]], np.int32)
            else:
                cache, recent = gpt.init_cache(1), ids[-window:]
                new = np.zeros((1, batching.padded_length(len(recent), window)), np.int32)
                new[0, -len(recent) :] = recent
            logits_V, cache = _next_logits(self.config, self.params, cache, new, min(len(ids), window))
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


@partial(jax.jit, static_argnums=0)
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


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _next_logits(
    config: GPTConfig, params: Params, cache: Params, tokens_1T: Array, length: Array
) -> tuple[Array, Params]:
    """(logits [padded vocabulary] of the token after `length` tokens, of which the last T are given, the new cache)."""
    with jax.default_matmul_precision("highest"):
        variables = {"params": params, "cache": cache}
        logits_1V, changed = config.build().apply(variables, tokens_1T, length, method="next_logits", mutable=["cache"])
        return logits_1V[0], cast("Params", changed["cache"])
