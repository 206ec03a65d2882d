"""OpenAI's completions: tokens that a device's thread samples, and their text, whole or as a stream."""

import asyncio
import contextlib
import dataclasses
import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from typing import NamedTuple, cast

import numpy as np

from prelm_jax.inference.gpt import GPTPretrained
from prelm_jax.serving.batcher import SECONDS_TO_ANSWER, Batcher
from prelm_jax.serving.lanes import Generation
from prelm_jax.serving.protocol import Refusal, dumps, failure
from prelm_jax.training.contract import Params


@dataclasses.dataclass(frozen=True)
class Token:
    """A token; where log-probabilities are asked for, its own (natural) and the most probable tokens with theirs."""

    id: int
    log_probability: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampling(NamedTuple):
    """How tokens are sampled."""

    temperature: float
    top_p: float
    seed: int


@dataclasses.dataclass(frozen=True)
class Completion:
    """The `count` tokens after a prompt, computed by a device's thread."""

    model: GPTPretrained
    ids: Sequence[int]
    count: int
    sampling: Sampling
    num_logprobs: int | None

    def __call__(self, params: Params) -> Iterator[Token]:
        temperature, top_p, seed = self.sampling
        sampled = self.model.continuation(params, self.ids, temperature, None, top_p, seed)
        for id, logits_V in itertools.islice(sampled, self.count):
            if self.num_logprobs is None:
                yield Token(id)
                continue
            log_V = _log_softmax(np.asarray(logits_V)[: self.model.tokenizer.vocab_size])
            best = np.argsort(-log_V, kind="stable")[: self.num_logprobs].tolist()
            yield Token(id, float(log_V[id]), tuple((i, float(log_V[i])) for i in best))

    async def tokens(self, batcher: Batcher) -> AsyncGenerator[Token, None]:
        """The tokens, as they are computed. The device stops when this is closed."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[object]()
        if self.count == 0:
            return

        def emit(event: object) -> None:
            with contextlib.suppress(RuntimeError):  # The loop has ended: the server was stopped.
                loop.call_soon_threadsafe(events.put_nowait, event)

        generation = Generation(self.model.params, self, emit, time.monotonic() + SECONDS_TO_ANSWER)
        batcher.generate(generation)
        try:
            while (event := await events.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield cast(Token, event)
        finally:
            generation.dead = True


class Choice:
    """The text of a completion as it grows, in OpenAI's form: whole, or in parts.

    Text that may be the beginning of a stop is held back until it is known not to be one. scored: the tokens of the
    prompt with their log-probabilities, for an echo.
    """

    def __init__(
        self,
        completion: Completion,
        index: int,
        echo: bool,
        stops: Sequence[str],
        scored: Sequence[Token] | None = None,
    ):
        self.completion, self.index, self.echo, self.stops = completion, index, echo, stops
        self.new_ids: list[int] = []
        self.reason: str | None = None if completion.count else "length"
        self._tokenizer = completion.model.tokenizer
        self._prompt = self._tokenizer.decode(completion.ids)
        self._shown = list(scored or map(Token, completion.ids)) if echo else []
        self._offsets = [len(self._tokenizer.decode(completion.ids[:i])) for i in range(len(self._shown))]
        self._sent = self._sent_tokens = 0
        self.text = self._prompt if echo else ""

    async def grow(self, batcher: Batcher) -> AsyncGenerator[None, None]:
        """Adds the tokens of the completion, up to a stop; yields after each."""
        async with contextlib.aclosing(self.completion.tokens(batcher)) as tokens:
            async for token in tokens:
                self._add(token)
                yield
                if self.reason is not None:
                    break

    def _add(self, token: Token) -> None:
        self.new_ids.append(token.id)
        self._offsets.append(len(self.text))
        self._shown.append(token)
        new = self._tokenizer.decode([*self.completion.ids, *self.new_ids])[len(self._prompt) :]
        ends = [position for stop in self.stops if (position := new.find(stop)) >= 0]
        self.text = (self._prompt if self.echo else "") + new[: min(ends, default=len(new))]
        if ends:
            self.reason = "stop"
        elif len(self.new_ids) == self.completion.count:
            self.reason = "length"

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


async def stream(batcher: Batcher, head: dict[str, object], choices: Sequence[Choice]) -> AsyncIterator[bytes]:
    """Server-sent events: one for each token, and one for the end of each choice."""
    try:
        for choice in choices:
            if choice.echo:
                yield _event(head | {"choices": [choice.part()]})
            async with contextlib.aclosing(choice.grow(batcher)) as steps:
                async for _ in steps:
                    if (part := choice.part())["text"] or part["logprobs"]:
                        yield _event(head | {"choices": [part]})
            yield _event(head | {"choices": [choice.end()]})
    except Refusal as refusal:
        yield _event(refusal.body)
    except Exception as error:
        yield _event(failure(error).body)
    yield b"data: [DONE]\n\n"


def _event(content: dict[str, object]) -> bytes:
    return b"data: " + dumps(content) + b"\n\n"


def _overlap(text: str, stop: str) -> int:
    """The length of the longest suffix of a text with which a stop begins."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def _log_softmax(logits_V: np.ndarray) -> np.ndarray:
    shifted_V = logits_V.astype(np.float64) - logits_V.max()
    return shifted_V - np.log(np.exp(shifted_V).sum())
