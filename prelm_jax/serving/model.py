"""A loaded model as the server offers it: what it can do, and texts as ids and queries."""

import asyncio
import dataclasses
from collections.abc import Iterable, Sequence
from typing import cast

import numpy as np

from prelm_jax.errors import InputError
from prelm_jax.inference.base import Pretrained
from prelm_jax.inference.batching import Query
from prelm_jax.inference.bert import BertPretrained
from prelm_jax.inference.gpt import GPTPretrained
from prelm_jax.inference.heads import METHODS, TaskPretrained
from prelm_jax.inference.pooling import Pooling
from prelm_jax.inference.transformer import TransformerPretrained
from prelm_jax.serving.completions import Token
from prelm_jax.serving.fields import MAX_TEXTS, is_ids, is_text, texts
from prelm_jax.serving.lanes import AnyProgram, AnyQuery
from prelm_jax.serving.protocol import Refusal

CHARACTERS_PER_TOKEN = 250  # A text that is longer, for the tokens that the model takes, is not tokenized.
CHARACTERS_AT_ONCE = 5_000  # What the event loop tokenizes in a few milliseconds.


@dataclasses.dataclass(frozen=True)
class Text:
    """A text as ids without special tokens, and whether it was cut to the length that the model takes.

    skipped: number of tokens at the beginning, special ones included, that are not pooled.
    """

    ids: Sequence[int]
    is_cut: bool = False
    skipped: int = 0


class ServedModel:
    """A model, the name that clients know it by, and its default pooling."""

    def __init__(self, model: Pretrained, name: str):
        self.name, self.task = name, model if isinstance(model, TaskPretrained) else None
        encoder = model if self.task is None else self.task.pretrained
        if not isinstance(encoder, TransformerPretrained):
            raise InputError(f"{name} is a model of type {encoder.config.model_type}; only BERT and GPT are served")
        self.encoder: TransformerPretrained = encoder
        self.pooling = encoder.pooling

    @property
    def verbs(self) -> list[str]:
        """What the model can do: names of routes, "complete" for /v1/completions."""
        verbs = [] if self.task is None else [METHODS[self.task.kind]]
        verbs += ["embed", "similarity", "tokenize"]
        if self.bert is not None:
            verbs += ["fill", "score"]
        if self.gpt is not None:
            verbs += ["score", "complete"]
        return verbs

    @property
    def bert(self) -> BertPretrained | None:
        """The model if it is a BERT that fills masks, else None."""
        encoder = self.encoder
        return encoder if isinstance(encoder, BertPretrained) and encoder.has_masked_lm else None

    @property
    def gpt(self) -> GPTPretrained | None:
        """The model if it is a GPT, else None."""
        return self.encoder if isinstance(self.encoder, GPTPretrained) else None

    @property
    def programs(self) -> list[AnyProgram]:
        """All programs, the most needed first."""
        programs: list[object] = [self.encoder.embed_program]
        if self.task is not None:
            programs.insert(0, self.task.main_program)
        if self.bert is not None:
            programs += [self.bert.fill_program, self.bert.score_program]
        if self.gpt is not None:
            programs += [self.gpt.score_program, self.gpt.top_program]
        return cast(list[AnyProgram], programs)

    def require(self, verb: str) -> None:
        """Raises a Refusal (404) that names the model's verbs if it lacks this one."""
        if verb not in self.verbs:
            found = ", ".join(self.verbs)
            raise Refusal(404, f"{self.name} cannot {verb}; it can {found}", code="no_such_verb")

    def info(self) -> dict[str, object]:
        """The model's part of /info."""
        config = self.encoder.config
        return {
            "model": self.name,
            "model_type": config.model_type,
            "verbs": self.verbs,
            "labels": [] if self.task is None else self.task.labels,
            "max_tokens": self.encoder.room,
            "max_vector_tokens": self.encoder.vector_room,
            "prompts": sorted(self.encoder.loaded.vectors.prompts),
            "vocab_size": self.encoder.tokenizer.vocab_size,
            "num_layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "lowercase": self.encoder.tokenizer.lowercase,
            "mask": None if self.bert is None else self.bert.mask,
            "pooling": {
                "modes": self.pooling.modes,
                "layers": self.pooling.layers,
                "dense": len(self.pooling.dense),
                "normalize": self.pooling.normalize,
                "width": self.pooling.width(config.hidden_size),
            },
        }

    async def read_for_vectors(
        self, texts: Sequence[str], field: str, truncate: bool | None = None, prompt: str | None = None
    ) -> list[Text]:
        """Like `read`, as `TransformerPretrained.vectors` prepares and cuts texts. Refuses blank ones."""
        prepared, skipped = self.encoder.prepare(texts, prompt)
        found = await self.read(list(prepared), field, truncate, self.encoder.vector_room)
        return [dataclasses.replace(text, skipped=skipped) for text in refuse_blank(found, field)]

    async def read(
        self, texts: Sequence[str], field: str, truncate: bool | None = None, room: int | None = None
    ) -> list[Text]:
        """Texts as ids. Raises a Refusal for one that is too long, unless it may be cut.

        truncate: whether it may be; None for a route that does not offer it.
        """
        if not truncate:
            self.check_characters(map(len, texts), field)
        encoded: list[list[int]] = []
        chunk, characters = list[str](), 0
        for text in texts:
            chunk.append(text[: self.max_characters])
            characters += len(chunk[-1])
            if characters > CHARACTERS_AT_ONCE:
                encoded += self.encoder.split(chunk)
                chunk, characters = [], 0
                await asyncio.sleep(0)  # The event loop serves other requests in between.
        found = self.fit(encoded + self.encoder.split(chunk), field, truncate, room)
        return [
            dataclasses.replace(each, is_cut=True) if len(text) > self.max_characters else each
            for text, each in zip(texts, found, strict=True)
        ]

    @property
    def max_characters(self) -> int:
        """Of a text that is tokenized; a longer one has too many tokens in any case."""
        return CHARACTERS_PER_TOKEN * self.encoder.room

    def check_characters(self, lengths: Iterable[int], field: str) -> None:
        """Raises a Refusal for a text of this many characters that is too long even to be tokenized."""
        for i, length in enumerate(lengths):
            if length > self.max_characters:
                message = f"{field}[{i}] has {length} characters, but the server takes {self.max_characters}"
                raise Refusal(400, message, field, "too_long")

    def fit(
        self, encoded: Sequence[Sequence[int]], field: str, truncate: bool | None = None, room: int | None = None
    ) -> list[Text]:
        """Ids as texts, cut to `room` tokens (by default the model's) if `truncate`, else refused if longer."""
        room = room or self.encoder.room
        for i, ids in enumerate(encoded):
            if len(ids) > room and not truncate:
                remedy = "shorten it" if truncate is None else 'shorten it, or set "truncate": true'
                message = f"{field}[{i}] has {len(ids)} tokens, but the model takes {room}; {remedy}"
                raise Refusal(400, message, field, "too_long")
        return [Text(ids[:room], len(ids) > room) for ids in encoded]

    async def inputs(
        self, value: object, name: str, truncate: bool | None = None, for_vectors: bool = False
    ) -> list[Text]:
        """OpenAI's four forms of input: a text, texts, ids, or lists of ids."""
        room = self.encoder.vector_room if for_vectors else self.encoder.room
        last = self.encoder.tokenizer.vocab_size - 1
        if is_text(value) or (isinstance(value, list) and all(map(is_text, value))):
            read = self.read_for_vectors if for_vectors else self.read
            return await read(texts(name).read(value), name, truncate)
        several = [value] if is_ids(value, 0, last) else value
        if not isinstance(several, list) or not all(is_ids(each, 0, last) and each for each in several):
            raise Refusal(400, f"{name} must be a text, texts, ids from 0 to {last}, or lists of ids", name)
        if len(several) > MAX_TEXTS:
            raise Refusal(400, f"{name} has {len(several)} lists of ids; give 1 to {MAX_TEXTS}", name)
        return self.fit(cast(list[list[int]], several), name, truncate, room)

    def check_layers(self, layers: Sequence[int]) -> None:
        """Raises a Refusal unless these are different layers of the model, counted from 0 or back from -1."""
        count = self.encoder.config.num_layers + 1
        if not all(-count <= layer < count for layer in layers):
            raise Refusal(400, f"layers must be from {-count} to {count - 1}", "layers")
        if len({layer % count for layer in layers}) < len(layers):
            raise Refusal(400, f"layers has a layer twice; -1 is layer {count - 1}", "layers")

    def vector_query(self, text: Text, pooling: Pooling) -> AnyQuery:
        """The vector of a text."""
        return cast(AnyQuery, self.encoder.vector_query(self.encoder.frame(text.ids), pooling, text.skipped))

    def states_query(self, text: Text, layers: Sequence[int]) -> AnyQuery:
        """The hidden states [layers, tokens, D] of a text."""
        query = self.encoder.embed_query(self.encoder.frame(text.ids))
        return cast(
            AnyQuery,
            Query(query.program, query.examples, lambda found: found[0].swapaxes(0, 1)[list(layers)]),
        )

    def scored_query(self, ids: Sequence[int], num_logprobs: int) -> AnyQuery:
        """The tokens of a prompt, each with the `num_logprobs` most probable ones at its position."""
        assert self.gpt is not None
        query = self.gpt.top_query(ids)

        def finish(found: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> list[Token]:
            nll_T, values_TK, ids_TK = query.finish(found)
            tops = [
                tuple(zip(some[:num_logprobs], values[:num_logprobs], strict=True))
                for some, values in zip(ids_TK.tolist(), values_TK.tolist(), strict=True)
            ]
            rest = map(Token, ids[1:], (-nll_T).tolist(), tops)
            return [Token(ids[0]), *rest]

        return cast(AnyQuery, Query(query.program, query.examples, finish))

    def offsets(self, text: str, is_framed: bool) -> tuple[list[int], list[str], list[list[int] | None]]:
        """The ids of a text, its tokens, and the characters at which each begins and ends; None for special ones."""
        tokenizer = self.encoder.tokenizer
        ids, offsets_T2 = tokenizer.encode_with_offsets(text)
        found: list[list[int] | None] = offsets_T2.tolist()
        framed = self.encoder.frame(ids.tolist()) if is_framed else ids.tolist()
        if len(framed) > len(found):
            found = [None, *found, None]
        return framed, [tokenizer.tokens[id] for id in framed], found

    def framed_tokens(self, text: str, count: int) -> tuple[list[str], list[list[int] | None]]:
        """The tokens and offsets of a text, cut to `count` tokens, special ones included, as its states are."""
        _, tokens, offsets = self.offsets(text[: self.max_characters], True)
        if len(tokens) == count:
            return tokens, offsets
        tail = (len(self.encoder.frame([0])) - 1) // 2  # Special tokens after the text.
        end = len(tokens) - tail
        return tokens[: count - tail] + tokens[end:], offsets[: count - tail] + offsets[end:]


def refuse_blank(texts: list[Text], field: str) -> list[Text]:
    """The texts. Raises a Refusal for one without tokens."""
    for i, text in enumerate(texts):
        if not text.ids:
            raise Refusal(400, f"{field}[{i}] is blank: it has no tokens", field, "blank")
    return texts
