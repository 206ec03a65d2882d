"""What the pretrained Transformers have in common: the encoder, and embeddings from it."""

import collections
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from prelm_jax.inference import batching
from prelm_jax.inference.base import Embeddings, Pretrained
from prelm_jax.models.bert import BertConfig
from prelm_jax.models.gpt import GPTConfig
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.training.contract import Params

Config = TypeVar("Config", bound=BertConfig | GPTConfig)


class TransformerPretrained(Pretrained[Config, Tokenizer]):
    """A pretrained Transformer."""

    # Ids that stand before and after those of a text.
    _before: Sequence[int] = ()
    _after: Sequence[int] = ()

    def embed(self, texts: Collection[str], truncate: bool = False) -> Embeddings:
        """For each text, in order, its tokens and its hidden states, f32 [L + 1, tokens, D].

        A blank text has no tokens. A text that is too long raises InputError with its line, or is cut if `truncate`.
        """
        c = self.config
        encoded, compute = self._encode(texts, truncate), partial(_hidden_states, c, self.params)
        for window in batching.windows(encoded):
            for ids, states in batching.in_order(window, compute, c.max_position_embeddings):
                states_TLD = states.reshape(len(ids), c.num_layers + 1, c.hidden_size)
                yield [self.tokenizer.tokens[id] for id in ids], states_TLD.swapaxes(0, 1)

    def embed_words(self, sentences: Iterable[Sequence[str]]) -> Iterator[np.ndarray]:
        """For each sentence, a sequence of words, their hidden states, f32 [L + 1, words, D]; see `Pretrained`."""
        c, compute = self.config, partial(_hidden_states, self.config, self.params)
        waiting: collections.deque[tuple[list[int], bool]] = collections.deque()

        def rows() -> Iterator[list[int]]:
            for words in sentences:
                parts = self._parts(words)
                for number, part in enumerate(parts, 1):
                    waiting.append((list(map(len, part)), number == len(parts)))
                    ids = [*itertools.chain.from_iterable(part)]
                    yield [*self._before, *ids, *self._after] if ids else []

        found: list[np.ndarray] = []
        for window in batching.windows(rows()):
            for ids, states in batching.in_order(window, compute, c.max_position_embeddings):
                lengths, is_last = waiting.popleft()
                states_TLD = states.reshape(len(ids), c.num_layers + 1, c.hidden_size)[len(self._before) :]
                if lengths:
                    sums_WLD = np.add.reduceat(states_TLD[: sum(lengths)], np.cumsum([0, *lengths[:-1]]))
                    found.append(sums_WLD / np.array(lengths, np.float32)[:, None, None])
                if is_last:
                    none = np.zeros((0, c.num_layers + 1, c.hidden_size), np.float32)
                    yield np.concatenate([none, *found]).swapaxes(0, 1)
                    found = []

    def _parts(self, words: Sequence[str]) -> list[list[list[int]]]:
        """The words of a sentence as ids, at least one each, in as many parts as the positions of the model ask for."""
        room = self.config.max_position_embeddings - len(self._before) - len(self._after)
        parts: list[list[list[int]]] = [[]]
        used = 0
        for ids in self.tokenizer.encode_batch(list(words)):
            ids = ids[:room] or [cast(int, self.tokenizer.unknown_id)]
            if used + len(ids) > room:
                parts.append([])
                used = 0
            parts[-1].append(ids)
            used += len(ids)
        return parts

    def _unknown(self, ids: Sequence[int]) -> int:
        """The number of ids that stand for what the vocabulary cannot spell."""
        return sum(id == self.tokenizer.unknown_id for id in ids)

    def _encode(self, texts: Collection[str], truncate: bool = False) -> Iterator[list[int]]:
        """The ids of each text, as the model reads it; see `batching.encode`."""
        return batching.encode(self.tokenizer, texts, self.config.max_position_embeddings, truncate)


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


@partial(jax.jit, static_argnums=0)
def _hidden_states(config: BertConfig | GPTConfig, params: Params, tokens_BT: Array, segments_BT: Array) -> Array:
    """[B, T, L + 1, D]."""
    with jax.default_matmul_precision("highest"):
        return jnp.stack(hidden_states(config, params, tokens_BT, segments_BT), 2)
