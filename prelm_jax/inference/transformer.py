"""What the pretrained Transformers have in common: the encoder, and embeddings from it."""

from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from prelm_jax.inference import batching
from prelm_jax.inference.base import Embeddings, Pretrained
from prelm_jax.inference.batching import Example, Program, Query, Result
from prelm_jax.inference.compiling import compiled
from prelm_jax.models.bert import BertConfig
from prelm_jax.models.gpt import GPTConfig
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.training.contract import Params

Config = TypeVar("Config", bound=BertConfig | GPTConfig)
Compute = Callable[[Params, Sequence[Example], int, int], Sequence[Result]]


class TransformerPretrained(Pretrained[Config, Tokenizer]):
    """A pretrained Transformer."""

    def embed(self, texts: Collection[str], truncate: bool = False) -> Embeddings:
        """For each text, in order, its tokens and its hidden states, f32 [L + 1, tokens, D].

        A blank text has no tokens. A text that is too long raises InputError with its line, or is cut if `truncate`.
        """
        encoded = batching.encode(self.tokenizer, texts, self.room, truncate)
        for window in batching.windows(map(self.frame, encoded)):
            embedded = batching.answers(self.params, [self.embed_query(ids) for ids in window])
            for ids, states in zip(window, embedded, strict=True):
                yield [self.tokenizer.tokens[id] for id in ids], states

    @property
    def room(self) -> int:
        """The tokens of the longest text that the model can read, without special ones."""
        return self.config.max_position_embeddings - len(self.frame([0])) + 1

    def frame(self, ids: Sequence[int]) -> list[int]:
        """The ids of a text with the special tokens around it; none for a blank text."""
        return list(ids)

    def split(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without special tokens."""
        return self.tokenizer.encode_batch(list(texts))

    def embed_query(self, ids: Sequence[int]) -> Query[Sequence[int], np.ndarray, np.ndarray]:
        """The hidden states [L + 1, tokens, D] of framed ids."""
        empty = np.zeros((self.config.num_layers + 1, 0, self.config.hidden_size), np.float32)
        return Query(
            self.embed_program, [ids] if ids else [], lambda found: found[0].swapaxes(0, 1).copy() if found else empty
        )

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
        return Program(name, compute, lambda example: batching.padded_length(length(example), longest), padded, canary)

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
