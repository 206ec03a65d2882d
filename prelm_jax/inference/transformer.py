"""What the pretrained Transformers have in common: the encoder, and embeddings and vectors of texts from it."""

import collections
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import cached_property
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from prelm_jax.errors import InputError
from prelm_jax.inference import batching
from prelm_jax.inference.base import Embeddings, Pretrained
from prelm_jax.inference.batching import Example, Program, Query, Result
from prelm_jax.inference.compiling import compiled
from prelm_jax.inference.pooling import Pooling, PreparedTexts
from prelm_jax.models.bert import BertConfig
from prelm_jax.models.gpt import GPTConfig
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.training.contract import Params

Config = TypeVar("Config", bound=BertConfig | GPTConfig)
Compute = Callable[[Params, Sequence[Example], int, int], Sequence[Result]]


class TransformerPretrained(Pretrained[Config, Tokenizer]):
    """A pretrained Transformer."""

    # Ids that stand before and after those of a text.
    _before: Sequence[int] = ()
    _after: Sequence[int] = ()

    def embed(self, texts: Collection[str], truncate: bool = False) -> Embeddings:
        """For each text, in order, its tokens and its hidden states, f32 [L + 1, tokens, D].

        A blank text has no tokens. A text that is too long raises InputError with its line, or is cut if `truncate`.
        """
        encoded = batching.encode(self.tokenizer, texts, self.room, truncate)
        for window in batching.windows(map(self.frame, encoded)):
            embedded = batching.answers([self.embed_query(ids) for ids in window])
            for ids, states in zip(window, embedded, strict=True):
                yield [self.tokenizer.tokens[id] for id in ids], states

    def embed_words(self, sentences: Iterable[Sequence[str]]) -> Iterator[np.ndarray]:
        """For each sentence, a sequence of words, their hidden states, f32 [L + 1, words, D]; see `Pretrained`."""
        waiting: collections.deque[tuple[list[int], bool]] = collections.deque()

        def rows() -> Iterator[list[int]]:
            for words in sentences:
                parts = self._parts(words)
                for number, part in enumerate(parts, 1):
                    waiting.append((list(map(len, part)), number == len(parts)))
                    ids = [*itertools.chain.from_iterable(part)]
                    yield self.frame(ids)

        found: list[np.ndarray] = []
        for window in batching.windows(rows()):
            for states_LTD in batching.answers([self.embed_query(ids) for ids in window]):
                lengths, is_last = waiting.popleft()
                states_TLD = states_LTD.swapaxes(0, 1)[len(self._before) :]
                if lengths:
                    sums_WLD = np.add.reduceat(states_TLD[: sum(lengths)], np.cumsum([0, *lengths[:-1]]))
                    found.append(sums_WLD / np.array(lengths, np.float32)[:, None, None])
                if is_last:
                    none = states_TLD[:0]
                    yield np.concatenate([none, *found]).swapaxes(0, 1)
                    found = []

    def vectors(
        self,
        texts: Collection[str],
        truncate: bool = False,
        prompt: str | None = None,
        pooling: Pooling | None = None,
    ) -> Iterator[np.ndarray]:
        """For each text, in order, its vector, f32 [width], pooled as the directory says (see `TextVectors`).

        A text that is too long raises InputError with its line, or is cut if `truncate`; so does a blank text. prompt:
        name of a prompt of the directory, which is put before each text; by default the directory's default, if it has
        one. pooling: another than the directory's.

            np.stack(list(load("all-MiniLM-L6-v2").vectors(["A text.", "Another text."])))  # [2, 384]
        """
        pooling, (prepared, skipped) = pooling or self.pooling, self.prepare(texts, prompt)
        encoded = map(self.frame, batching.encode(self.tokenizer, prepared, self.vector_room, truncate))
        first = 1
        for window in batching.windows(encoded):
            if blank := [line for line, ids in enumerate(window, first) if len(ids) <= skipped]:
                raise InputError(f"line {blank[0]} is blank, so it has no vector")
            first += len(window)
            yield from batching.answers([self.vector_query(ids, pooling, skipped) for ids in window])

    def prepare(self, texts: Collection[str], prompt: str | None = None) -> tuple[Collection[str], int]:
        """Texts as their vectors are computed, and how many of the first tokens of each are not pooled.

        prompt: name of a prompt of the directory; see `vectors`. Raises InputError for an unknown name.
        """
        settings = self.loaded.vectors
        name = settings.default_prompt if prompt is None else prompt
        if name is not None and name not in settings.prompts:
            known = ", ".join(settings.prompts) or "none"
            raise InputError(f"there is no prompt {name!r}; prompts of the model: {known}")
        prefix, skipped = "" if name is None else settings.prompts[name], 0
        if prefix and not settings.include_prompt:
            (ids,) = self.tokenizer.encode_batch([prefix])
            framed = self.frame(ids)
            skipped = len(framed) - len(self._after)
        return PreparedTexts(texts, prefix, settings.lowercase), skipped

    @property
    def pooling(self) -> Pooling:
        """How the directory turns hidden states into the vector of a text."""
        vectors = self.loaded.vectors
        return Pooling(vectors.modes, dense=vectors.dense, normalize=vectors.normalize)

    @property
    def vector_room(self) -> int:
        """The tokens of the longest text that becomes a vector, without special ones."""
        longest = self.loaded.vectors.max_length
        return self.room if longest is None else min(self.room, longest - len(self._before) - len(self._after))

    @property
    def room(self) -> int:
        """The tokens of the longest text that the model can read, without special ones."""
        return self.config.max_position_embeddings - len(self._before) - len(self._after)

    def frame(self, ids: Sequence[int]) -> list[int]:
        """The ids of a text with the special tokens around it; none for a blank text."""
        return [*self._before, *ids, *self._after] if ids else []

    def split(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without special tokens."""
        return self.tokenizer.encode_batch(list(texts))

    def _parts(self, words: Sequence[str]) -> list[list[list[int]]]:
        """The words of a sentence as ids, at least one each, in as many parts as the positions of the model ask for."""
        parts: list[list[list[int]]] = [[]]
        used = 0
        for ids in self.tokenizer.encode_batch(list(words)):
            ids = ids[: self.room] or [cast(int, self.tokenizer.unknown_id)]
            if used + len(ids) > self.room:
                parts.append([])
                used = 0
            parts[-1].append(ids)
            used += len(ids)
        return parts

    def _unknown(self, ids: Sequence[int]) -> int:
        """The number of ids that stand for what the vocabulary cannot spell."""
        return sum(id == self.tokenizer.unknown_id for id in ids)

    def embed_query(self, ids: Sequence[int]) -> Query[Sequence[int], np.ndarray, np.ndarray]:
        """The hidden states [L + 1, tokens, D] of framed ids."""
        empty = np.zeros((self.config.num_layers + 1, 0, self.config.hidden_size), np.float32)
        return Query(
            self.embed_program, [ids] if ids else [], lambda found: found[0].swapaxes(0, 1).copy() if found else empty
        )

    def vector_query(
        self, ids: Sequence[int], pooling: Pooling, skipped: int = 0
    ) -> Query[Sequence[int], np.ndarray, np.ndarray]:
        """The vector of framed ids, at least one, of which the first `skipped` are not pooled."""
        # Without a copy of the states: they are pooled where they were computed.
        return Query(self.embed_program, [ids], lambda found: pooling(found[0].swapaxes(0, 1), skipped))

    @cached_property
    def embed_program(self) -> Program[Sequence[int], np.ndarray]:
        """The hidden states [tokens, L + 1, D] of framed ids."""

        def compute(params: Params, examples: Sequence[Sequence[int]], rows: int, length: int) -> list[np.ndarray]:
            states_BTLD = np.asarray(_hidden_states(self.config, params, *batching.batch(examples, rows, length)))
            return [row[: len(ids)] for ids, row in zip(examples, states_BTLD, strict=False)]

        return self.program("embed", compute, len, self.random_ids)

    def program(
        self,
        name: str,
        compute: Compute[Example, Result],
        length: Callable[[Example], int],
        canary: Callable[[int, np.random.Generator], Example],
    ) -> Program[Example, Result]:
        """A program of examples of as many tokens as `length` says."""
        longest = self.config.max_position_embeddings
        padded = batching.padded_lengths(longest)
        return Program(
            name, self.params, compute, lambda example: batching.padded_length(length(example), longest), padded, canary
        )

    def random_ids(self, length: int, rng: np.random.Generator) -> list[int]:
        """Any ids, for a canary."""
        return rng.integers(self.tokenizer.vocab_size, size=length).tolist()


def hidden_states(
    config: BertConfig | GPTConfig, params: Params, tokens_BT: Array, segments_BT: Array
) -> tuple[Array, ...]:
    """The L + 1 hidden states [B, T, D] of rows of one text each; to be called in a compiled function."""
    batch = {
        "tokens": tokens_BT,
        "token_types": jnp.zeros_like(tokens_BT),
        "positions": jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape),
        "segments": segments_BT,
    }
    return cast("tuple[Array, ...]", config.encoder().apply({"params": params}, batch, method="hidden_states"))


@compiled(static=(0,), shapes=("b, t", "b, t"))
def _hidden_states(config: BertConfig | GPTConfig, params: Params, tokens_BT: Array, segments_BT: Array) -> Array:
    """[B, T, L + 1, D]."""
    with jax.default_matmul_precision("highest"):
        return jnp.stack(hidden_states(config, params, tokens_BT, segments_BT), 2)
