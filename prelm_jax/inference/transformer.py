"""What the pretrained Transformers have in common: the encoder, and embeddings and vectors of texts from it."""

from collections.abc import Collection, Iterator
from functools import partial
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from prelm_jax.errors import InputError
from prelm_jax.inference import batching
from prelm_jax.inference.base import Embeddings, Pretrained
from prelm_jax.inference.pooling import Pooling, PreparedTexts
from prelm_jax.models.bert import BertConfig
from prelm_jax.models.gpt import GPTConfig
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.training.contract import Params

Config = TypeVar("Config", bound=BertConfig | GPTConfig)


class TransformerPretrained(Pretrained[Config, Tokenizer]):
    """A pretrained Transformer."""

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

    def vectors(
        self,
        texts: Collection[str],
        truncate: bool = False,
        prompt: str | None = None,
        pooling: Pooling | None = None,
    ) -> Iterator[np.ndarray]:
        """For each text, in order, its vector, f32 [width], pooled as the directory says (see `TextVectors`).

        A text that is too long raises InputError with its line, or is cut if `truncate`; so does a text without tokens.
        prompt: name of a prompt of the directory, which is put before each text; by default the directory's default,
        if it has one. pooling: another than the directory's.

            np.stack(list(load("all-MiniLM-L6-v2").vectors(["A text.", "Another text."])))  # [2, 384]
        """
        settings, pooling, prefix = self.loaded.vectors, pooling or self.pooling, self.prompt(prompt)
        skipped = 0 if settings.include_prompt else self.prompt_length(prefix)
        compute = partial(_hidden_states, self.config, self.params)
        prepared = PreparedTexts(texts, prefix, settings.lowercase)
        room = self.longest_pooled - len(self.frame([]))
        encoded = map(self.frame, batching.encode(self.tokenizer, prepared, room, truncate))
        line = 0
        for window in batching.windows(encoded):
            for ids, states_TLD in batching.in_order(window, compute, self.config.max_position_embeddings):
                line += 1
                if len(ids) <= skipped:
                    raise InputError(f"line {line} has no tokens, and so no vector")
                yield pooling(states_TLD.swapaxes(0, 1), skipped)

    @property
    def pooling(self) -> Pooling:
        """How the directory turns hidden states into the vector of a text."""
        vectors = self.loaded.vectors
        return Pooling(vectors.modes, dense=vectors.dense, normalize=vectors.normalize)

    def frame(self, ids: list[int]) -> list[int]:
        """The ids of a text with the special tokens that the model reads around it."""
        return ids

    @property
    def longest_pooled(self) -> int:
        """The longest text that becomes a vector, in tokens with the special ones."""
        positions = self.config.max_position_embeddings
        return min(self.loaded.vectors.max_length or positions, positions)

    def prompt(self, name: str | None) -> str:
        """The text of a prompt; without a name, of the default one. Raises InputError for an unknown name."""
        settings = self.loaded.vectors
        name = settings.default_prompt if name is None else name
        if name is None:
            return ""
        if name not in settings.prompts:
            known = ", ".join(settings.prompts) or "none"
            raise InputError(f"there is no prompt {name!r}; prompts of the model: {known}")
        return settings.prompts[name]

    def prompt_length(self, prompt: str) -> int:
        """The number of the first tokens of a text that are its prompt's, with the special tokens before it."""
        if not prompt:
            return 0
        (ids,) = self.tokenizer.encode_batch([prompt])
        framed = self.frame(ids)
        return len(framed) - (framed[-1:] == [self.tokenizer.sep_id])

    def _encode(self, texts: Collection[str], truncate: bool = False) -> Iterator[list[int]]:
        """The ids of each text, as the model reads it; none for a blank text. See `batching.encode`."""
        room = self.config.max_position_embeddings - len(self.frame([]))
        for ids in batching.encode(self.tokenizer, texts, room, truncate):
            yield self.frame(ids) if ids else []


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
