"""A loaded model as the server offers it: its verbs, texts to queries, and answers to JSON."""

import asyncio
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import numpy as np

from prelm_jax.errors import InputError
from prelm_jax.inference.base import Pretrained
from prelm_jax.inference.batching import Query
from prelm_jax.inference.bert import BertPretrained
from prelm_jax.inference.gpt import GPTPretrained
from prelm_jax.inference.heads import METHODS, TaskPretrained
from prelm_jax.inference.pooling import Pooling
from prelm_jax.inference.transformer import TransformerPretrained
from prelm_jax.serving.batcher import AnyProgram, AnyQuery
from prelm_jax.serving.fields import MAX_TEXTS, is_ids, is_text, texts
from prelm_jax.serving.protocol import Refusal
from prelm_jax.training.contract import Params

CHARACTERS_PER_TOKEN = 250  # Of a text that is longer for its room, nothing is tokenized.
CHARACTERS_AT_ONCE = 20_000  # What the event loop tokenizes in a few milliseconds.


@dataclasses.dataclass(frozen=True)
class Text:
    """A text as ids without special tokens, and whether it was cut to the room of the model.

    skipped: how many of the first tokens, special ones included, are not pooled.
    """

    ids: Sequence[int]
    is_cut: bool = False
    skipped: int = 0


class ServedModel:
    """A model, and how it pools by default."""

    def __init__(self, model: Pretrained, name: str, pooling: Pooling | None = None):
        self.name, self.task = name, model if isinstance(model, TaskPretrained) else None
        encoder = model if self.task is None else self.task.pretrained
        if not isinstance(encoder, TransformerPretrained):
            raise InputError(f"{name} is a model of type {encoder.config.model_type}; only BERT and GPT are served")
        self.encoder: TransformerPretrained = encoder
        self.pooling = pooling or encoder.pooling

    @property
    def verbs(self) -> list[str]:
        """What the model can do, by the names of routes."""
        verbs = [] if self.task is None else [METHODS[self.task.kind]]
        verbs += ["embed", "similarity", "tokenize"]
        if self.bert is not None:
            verbs += ["fill", "score"]
        if self.gpt is not None:
            verbs += ["score", "complete"]
        return verbs

    @property
    def bert(self) -> BertPretrained | None:
        """The model, if it fills masks."""
        encoder = self.encoder
        return encoder if isinstance(encoder, BertPretrained) and encoder.has_masked_lm else None

    @property
    def gpt(self) -> GPTPretrained | None:
        """The model, if it generates."""
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
        """Raises a Refusal (404) if the model lacks a verb; it names those that it has."""
        if verb not in self.verbs:
            found = ", ".join(self.verbs)
            raise Refusal(404, f"{self.name} cannot {verb}; it can {found}", code="no_such_verb")

    def info(self) -> dict[str, object]:
        """What /info says of the model."""
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
        self, texts: Sequence[str], field: str, truncate: bool, prompt: str | None = None
    ) -> list[Text]:
        """Texts as ids, as their vectors are computed; see `TransformerPretrained.vectors`."""
        prepared, skipped = self.encoder.prepare(texts, prompt)
        found = await self.read(list(prepared), field, truncate, self.encoder.vector_room)
        return [dataclasses.replace(text, skipped=skipped) for text in found] if skipped else found

    async def read(self, texts: Sequence[str], field: str, truncate: bool, room: int | None = None) -> list[Text]:
        """Texts as ids. Raises a Refusal for one that is too long, unless it may be cut."""
        longest = CHARACTERS_PER_TOKEN * self.encoder.room
        for i, text in enumerate(texts):
            if len(text) > longest and not truncate:
                raise Refusal(400, f"{field}[{i}] has {len(text)} characters; cut it to {longest}", field, "too_long")
        encoded: list[list[int]] = []
        some: list[str] = []
        for text in texts:
            some.append(text[:longest])
            if sum(map(len, some)) > CHARACTERS_AT_ONCE:
                encoded += self.encoder.split(some)
                some = []
                await asyncio.sleep(0)  # Other requests go on meanwhile.
        return self.fit(encoded + self.encoder.split(some), field, truncate, room)

    def fit(self, encoded: Sequence[Sequence[int]], field: str, truncate: bool, room: int | None = None) -> list[Text]:
        """Ids, cut to the room of the model if they may be; `room`: less than that of the model."""
        room = room or self.encoder.room
        for i, ids in enumerate(encoded):
            if len(ids) > room and not truncate:
                message = f"{field}[{i}] has {len(ids)} tokens, but the model takes {room}; truncate it"
                raise Refusal(400, message, field, "too_long")
        return [Text(ids[:room], len(ids) > room) for ids in encoded]

    async def inputs(self, value: object, name: str, truncate: bool, for_vectors: bool = False) -> list[Text]:
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
        """The tokens of a prompt as `Drawn`, each with the `num_logprobs` most probable ones in its place."""
        assert self.gpt is not None
        query = self.gpt.top_query(ids)

        def finish(found: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> list[Drawn]:
            nll_T, values_TK, ids_TK = query.finish(found)
            tops = [
                tuple(zip(some[:num_logprobs], values[:num_logprobs], strict=True))
                for some, values in zip(ids_TK.tolist(), values_TK.tolist(), strict=True)
            ]
            rest = map(Drawn, ids[1:], (-nll_T).tolist(), tops)
            return [Drawn(ids[0]), *rest]

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


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A token, and if they are asked for its natural-log probability and the most probable tokens with theirs."""

    id: int
    log_probability: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Drawing(NamedTuple):
    """How tokens are drawn."""

    temperature: float
    top_p: float
    seed: int


@dataclasses.dataclass(frozen=True)
class Completion:
    """The tokens after a prompt, as a device's thread computes them."""

    model: GPTPretrained
    ids: Sequence[int]
    count: int
    drawing: Drawing
    num_logprobs: int | None

    def __call__(self, params: Params) -> Iterator[Drawn]:
        temperature, top_p, seed = self.drawing
        drawn = self.model.continuation(params, self.ids, temperature, None, top_p, seed)
        for id, logits_V in itertools.islice(drawn, self.count):
            if self.num_logprobs is None:
                yield Drawn(id)
                continue
            log_V = _log_softmax(np.asarray(logits_V)[: self.model.tokenizer.vocab_size])
            best = np.argsort(-log_V, kind="stable")[: self.num_logprobs].tolist()
            yield Drawn(id, float(log_V[id]), tuple((i, float(log_V[i])) for i in best))


class Choice:
    """The text of a completion as it grows, in OpenAI's form: whole, or in parts.

    Text that may be the beginning of a stop is held back until it is known. scored: the tokens of the prompt with their
    log-probabilities, for an echo.
    """

    def __init__(
        self,
        completion: Completion,
        index: int,
        echo: bool,
        stops: Sequence[str],
        scored: Sequence[Drawn] | None = None,
    ):
        self.completion, self.index, self.echo, self.stops = completion, index, echo, stops
        self.drawn: list[Drawn] = []
        self.reason: str | None = None if completion.count else "length"
        self._tokenizer = completion.model.tokenizer
        self._prompt = self._tokenizer.decode(completion.ids)
        self._shown = list(scored or map(Drawn, completion.ids)) if echo else []
        self._offsets = [len(self._tokenizer.decode(completion.ids[:i])) for i in range(len(self._shown))]
        self._sent = self._sent_tokens = 0
        self.text = self._prompt if echo else ""

    def add(self, drawn: Drawn) -> bool:
        """Appends a token; returns whether it was the last one."""
        self.drawn.append(drawn)
        self._offsets.append(len(self.text))
        self._shown.append(drawn)
        whole = self._tokenizer.decode([*self.completion.ids, *(each.id for each in self.drawn)])
        new = whole[len(self._prompt) :]
        ends = [position for stop in self.stops if (position := new.find(stop)) >= 0]
        self.text = (self._prompt if self.echo else "") + new[: min(ends, default=len(new))]
        if ends:
            self.reason = "stop"
        elif len(self.drawn) == self.completion.count:
            self.reason = "length"
        return self.reason is not None

    def part(self) -> dict[str, object]:
        """What was added since the last part."""
        held = 0 if self.reason else max((_overlap(self.text, stop) for stop in self.stops), default=0)
        begin, end = self._sent, max(self._sent, len(self.text) - held)
        first, self._sent, self._sent_tokens = self._sent_tokens, end, len(self._shown)
        return self._json(self.text[begin:end], first, None)

    def end(self) -> dict[str, object]:
        """The last part, which says why the text ends."""
        return self.part() | {"finish_reason": self.reason}

    def json(self) -> dict[str, object]:
        """The whole choice."""
        return self._json(self.text, 0, self.reason)

    def _json(self, text: str, first: int, reason: str | None) -> dict[str, object]:
        logprobs = None
        if self.completion.num_logprobs is not None and first < len(self._shown):
            tokens, shown = self._tokenizer.tokens, self._shown[first:]
            logprobs = {
                "tokens": [tokens[each.id] for each in shown],
                "token_logprobs": [each.log_probability for each in shown],
                "top_logprobs": [{tokens[id]: value for id, value in each.top} or None for each in shown],
                "text_offset": self._offsets[first:],
            }
        return {"text": text, "index": self.index, "logprobs": logprobs, "finish_reason": reason}


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of a text that begins a stop."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def _log_softmax(logits_V: np.ndarray) -> np.ndarray:
    shifted_V = logits_V.astype(np.float64) - logits_V.max()
    return shifted_V - np.log(np.exp(shifted_V).sum())
