"""The handlers of the routes: they turn the fields of a request into queries, and the answers into JSON."""

import asyncio
import io
import secrets
import time
import uuid
from collections.abc import Sequence
from typing import cast

import numpy as np
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from prelm_jax import __version__
from prelm_jax.data.examples import Answers, Example
from prelm_jax.errors import InputError
from prelm_jax.inference.decoding import Prediction
from prelm_jax.inference.pooling import MODES, Pooling, cosines, parse_modes
from prelm_jax.serving import fields as of
from prelm_jax.serving.completions import Choice, Completion, Sampling, Token, stream
from prelm_jax.serving.fields import Fields
from prelm_jax.serving.lanes import AnyQuery
from prelm_jax.serving.model import Text
from prelm_jax.serving.protocol import Refusal, in_base64, reply
from prelm_jax.serving.service import Service

NPY = "application/x-npy"
MAX_NUMBERS = 2**24  # Of an answer: one text in all layers of a large model, or many in one. JSON takes 10 bytes each.


class Handlers:
    """The handlers of the routes."""

    def __init__(self, service: Service):
        self.service = service

    def health(self, request: Request) -> Response:
        """200 once requests are answered, before that 503; and the progress of the start, from 0 to 1."""
        service = self.service
        status = 200 if service.is_ready else 503
        return reply({"status": service.state, "progress": round(service.progress, 3)}, status)

    def info(self, request: Request) -> Response:
        """The model, what it can do, and the limits."""
        service = self.service
        content: dict[str, object] = {"version": __version__, "status": service.state, "model": service.name}
        if service.model is not None and service.batcher is not None:
            batcher = service.batcher
            content |= service.model.info()
            content |= {
                "exact": all(batcher.exact.values()) if batcher.exact else None,
                "shapes": batcher.shapes(),
                "precision": "float32",
                "devices": batcher.device_names,
                "max_queue_tokens": batcher.max_queue_tokens,
            }
        return reply(content)

    def models(self, request: Request) -> Response:
        """A list of the one model, in OpenAI's form."""
        return reply({"object": "list", "data": [self._listed]})

    def one_model(self, request: Request) -> Response:
        """The model of this name, in OpenAI's form."""
        self._check_model(request.path_params["name"])
        return reply(self._listed)

    @property
    def _listed(self) -> dict[str, object]:
        return {"id": self.service.name, "object": "model", "created": int(self.service.started), "owned_by": "prelm"}

    def metrics(self, request: Request) -> Response:
        """Counters and histograms for Prometheus."""
        return Response(self.service.metrics(), media_type="text/plain; version=0.0.4")

    async def openai_embeddings(self, fields: Fields, request: Request) -> Response:
        """OpenAI's embeddings."""
        model, _ = self.service.ready
        self._check_model(fields[of.MODEL])
        width = model.pooling.width(model.encoder.config.hidden_size)
        if fields[of.DIMENSIONS] not in (None, width):
            raise Refusal(400, f"dimensions must be {width}, as the model has them", "dimensions", "unsupported")
        texts = await model.inputs(fields[of.EMBEDDED], "input", fields[of.TRUNCATE], for_vectors=True)
        vectors = await self._vectors(texts, model.pooling)
        data = [
            {
                "object": "embedding",
                "index": i,
                "embedding": in_base64(vector) if fields[of.ENCODING] == "base64" else vector,
            }
            for i, vector in enumerate(vectors)
        ]
        used = sum(len(text.ids) for text in texts)
        usage = {"prompt_tokens": used, "total_tokens": used}
        content = {"object": "list", "data": data, "model": self.service.name, "usage": usage}
        cut = ",".join(str(i) for i, text in enumerate(texts) if text.is_cut)
        return reply(content, headers={"x-truncated": cut} if cut else {})

    async def embed(self, fields: Fields, request: Request) -> Response:
        """Vectors of texts, or of their tokens."""
        model, _ = self.service.ready
        own = model.pooling
        layers = tuple(fields[of.LAYERS] or own.layers)
        model.check_layers(layers)
        name = fields[of.POOLING] or "+".join(own.modes)
        if name == "none":
            for other, value in (("normalize", fields[of.NORMALIZE]), ("prompt", fields[of.PROMPT_NAME])):
                if value is not None:
                    raise Refusal(400, f"{other} is for vectors of texts, not of tokens: leave it out", other)
            return await self._embed_tokens(fields[of.TEXTS], layers, fields[of.TRUNCATE])
        modes = parse_modes(name)
        if modes is None:
            raise Refusal(400, f"pooling must be none or different ones of {', '.join(MODES)}, joined by +", "pooling")
        if (normalize := fields[of.NORMALIZE]) is None:
            normalize = own.normalize
        is_own = (modes, layers) == (own.modes, own.layers)
        pooling = Pooling(modes, layers, own.dense if is_own else (), normalize)
        texts = await model.read_for_vectors(fields[of.TEXTS], "texts", fields[of.TRUNCATE], fields[of.PROMPT_NAME])
        vectors = await self._vectors(texts, pooling)
        if request.headers.get("accept") == NPY:
            return Response(npy(np.stack(vectors)), media_type=NPY)
        results = [
            {"vector": vector, "num_tokens": len(text.ids), "truncated": text.is_cut}
            for vector, text in zip(vectors, texts, strict=True)
        ]
        return reply({"layers": layers, "pooling": name, "normalize": normalize, "results": results})

    async def _embed_tokens(self, given: Sequence[str], layers: Sequence[int], truncate: bool) -> Response:
        """The tokens of texts with their vectors in these layers."""
        model, batcher = self.service.ready
        texts = await model.read(given, "texts", truncate)
        num_tokens = sum(len(model.encoder.frame(text.ids)) for text in texts)
        check_size(num_tokens * len(layers) * model.encoder.config.hidden_size)
        answers = await batcher.submit([model.states_query(text, layers) for text in texts])
        results = []
        for whole, text, states_LTD in zip(given, texts, cast(list[np.ndarray], answers), strict=True):
            tokens, offsets = await asyncio.to_thread(model.framed_tokens, whole, states_LTD.shape[1])
            vectors = np.ascontiguousarray(states_LTD.swapaxes(0, 1))
            results.append({"tokens": tokens, "offsets": offsets, "vectors": vectors, "truncated": text.is_cut})
        return reply({"layers": layers, "results": results})

    async def similarity(self, fields: Fields, request: Request) -> Response:
        """Cosines of the vectors of texts: of each pair in `texts`, or of each of `texts` with each of `others`."""
        model, _ = self.service.ready
        given, others, truncate = fields[of.TEXTS], fields[of.OTHERS], fields[of.TRUNCATE]
        check_size(len(given) * len(given if others is None else others))
        texts = await model.read_for_vectors(given, "texts", truncate)
        texts += await model.read_for_vectors(others or [], "others", truncate)
        vectors = np.stack(await self._vectors(texts, model.pooling))
        one, two = vectors[: len(given)], vectors if others is None else vectors[len(given) :]
        found = (await asyncio.to_thread(cosines, one, two)).round(7)
        return reply({"cosines": np.ascontiguousarray(found), "truncated": [text.is_cut for text in texts]})

    async def tokenize(self, fields: Fields, request: Request) -> Response:
        """The ids and tokens of texts, and the characters at which each token begins and ends."""
        model, _ = self.service.ready
        texts = fields[of.TEXTS]
        results = []
        for text in texts:  # In a thread, for one text may take seconds.
            ids, tokens, offsets = await asyncio.to_thread(model.offsets, text, fields[of.SPECIAL_TOKENS])
            results.append({"ids": ids, "tokens": tokens, "offsets": offsets})
        return reply({"results": results})

    async def fill(self, fields: Fields, request: Request) -> Response:
        """The most probable tokens for each mask of each text."""
        model, batcher = self.service.ready
        model.require("fill")
        bert = model.bert
        assert bert is not None
        texts = fields[of.TEXTS]
        model.check_characters(map(len, texts), "texts")
        split = []
        for i, text in enumerate(texts):
            try:
                split.append(bert.split_at_masks(text))
            except InputError as error:
                raise Refusal(400, f"texts[{i}]: {error}", "texts", "no_mask") from None
            await asyncio.sleep(0)
        model.fit([ids for ids, _ in split], "texts")
        queries = [bert.fill_query(ids, positions, fields[of.TOP_K]) for ids, positions in split]
        answers = await batcher.submit(cast(list[AnyQuery], queries))
        results = [
            [[{"token": token, "probability": p} for token, p in candidates] for candidates in masks]
            for masks in cast(list[list[list[tuple[str, float]]]], answers)
        ]
        return reply({"results": [{"masks": masks} for masks in results]})

    async def score(self, fields: Fields, request: Request) -> Response:
        """The log-probability of texts and of their tokens."""
        model, batcher = self.service.ready
        model.require("score")
        scorer = model.bert or model.gpt
        assert scorer is not None
        texts = await model.read(fields[of.TEXTS], "texts", fields[of.TRUNCATE])
        answers = await batcher.submit(cast(list[AnyQuery], [scorer.score_query(text.ids) for text in texts]))
        results = []
        for text, found in zip(texts, cast(list[Sequence[float]], answers), strict=True):
            # GPT gives the first token no probability.
            known: list[float | None] = [None] * (len(text.ids) - len(found)) + [float(each) for each in found]
            results.append(
                {
                    "log_probability": float(sum(each for each in known if each is not None)),
                    "num_tokens": len(found),
                    "tokens": [model.encoder.tokenizer.tokens[id] for id in text.ids],
                    "log_probabilities": known,
                    "truncated": text.is_cut,
                }
            )
        return reply({"results": results})

    async def encode(self, fields: Fields, request: Request) -> Response:
        """bert-as-service's form of `embed`."""
        model, _ = self.service.ready
        texts = await model.read_for_vectors(fields[of.TEXTS], "texts")
        vectors = await self._vectors(texts, model.pooling)
        return reply({"id": fields[of.ID], "result": vectors, "status": 200})

    async def classify(self, fields: Fields, request: Request) -> Response:
        """The label, the labels or the number that the model predicts for texts or pairs of texts."""
        self._require("classify")
        parts = [(each,) if isinstance(each, str) else tuple(each) for each in fields[of.CLASSIFIED]]
        found = await self._predict([Example(str(i), (each,)) for i, each in enumerate(parts)], "texts")
        return reply({"results": [self._labelled(prediction, is_cut) for prediction, is_cut in found]})

    async def tag(self, fields: Fields, request: Request) -> Response:
        """A tag for each word of texts, which are split at white space or given as lists of words."""
        self._require("tag")
        words = [tuple(each.split() if isinstance(each, str) else each) for each in fields[of.TAGGED]]
        found = await self._predict([Example(str(i), ((each,),)) for i, each in enumerate(words)], "texts")
        results = [
            {"words": each, "tags": prediction.label, "probabilities": prediction.probabilities}
            for each, (prediction, _) in zip(words, found, strict=True)
        ]
        return reply({"results": results})

    async def answer(self, fields: Fields, request: Request) -> Response:
        """The answers to questions from passages: pairs [question, passage]."""
        self._require("answer")
        examples = [Example(str(i), (tuple(each),)) for i, each in enumerate(fields[of.QUESTIONS])]
        results = []
        for prediction, is_cut in await self._predict(examples, "questions", fields[of.NULL_THRESHOLD]):
            answers = cast(Answers, prediction.label)
            best = prediction.candidates[: fields[of.NUM_ANSWERS]]
            results.append(
                {
                    "answer": next(iter(answers.texts), None),
                    "start": next(iter(answers.starts), None),
                    "candidates": [{"answer": each.text, "probability": each.probability} for each in best],
                    "truncated": is_cut,
                }
            )
        return reply({"results": results})

    async def choose(self, fields: Fields, request: Request) -> Response:
        """The number, from 0, of the best option for a text: pairs [text, options]."""
        self._require("choose")
        examples = [
            Example(str(i), tuple((text, option) for option in options))
            for i, (text, options) in enumerate(fields[of.CHOICES])
        ]
        found = await self._predict(examples, "choices")
        return reply({"results": [self._labelled(prediction, is_cut) for prediction, is_cut in found]})

    def _require(self, verb: str) -> None:
        model, _ = self.service.ready
        model.require(verb)

    async def _predict(
        self, examples: Sequence[Example], field: str, null_threshold: float = 0.0
    ) -> list[tuple[Prediction, bool]]:
        """The predictions for examples, and whether each was cut. Refuses texts that are too long to be tokenized."""
        model, batcher = self.service.ready
        assert model.task is not None
        model.check_characters(map(_longest, examples), field)
        queries: list[object] = []
        for i, example in enumerate(examples):
            try:
                queries.append(model.task.query(example, null_threshold))
            except InputError as error:
                raise Refusal(400, f"{field}[{i}]: {error}", field) from None
            await asyncio.sleep(0)
        return cast(list[tuple[Prediction, bool]], await batcher.submit(cast(list[AnyQuery], queries)))

    def _labelled(self, prediction: Prediction, is_cut: bool) -> dict[str, object]:
        model, _ = self.service.ready
        assert model.task is not None
        probabilities: object = prediction.probabilities
        if len(model.task.labels) == len(prediction.probabilities):
            probabilities = dict(zip(model.task.labels, prediction.probabilities, strict=True))
        return {"label": prediction.label, "probabilities": probabilities, "truncated": is_cut}

    async def openai_completions(self, fields: Fields, request: Request) -> Response:
        """OpenAI's completions. An option that is not supported is refused, unless its value changes nothing."""
        model, batcher = self.service.ready
        model.require("complete")
        gpt = model.gpt
        assert gpt is not None
        self._check_model(fields[of.MODEL])
        count, num_choices, num_logprobs = fields[of.MAX_TOKENS], fields[of.NUM_CHOICES], fields[of.LOGPROBS]
        if count > model.encoder.room:
            raise Refusal(400, f"max_tokens must be at most {model.encoder.room}", "max_tokens")
        if (seed := fields[of.SEED]) is None:
            seed = secrets.randbits(32)
        prompts = await model.inputs(fields[of.PROMPT], "prompt")
        if not all(prompt.ids for prompt in prompts):
            raise Refusal(400, "a prompt is blank; give at least one word to continue", "prompt", "blank")
        if len(prompts) * num_choices > of.MAX_TEXTS:
            raise Refusal(400, f"n: {len(prompts)} prompts have more than {of.MAX_TEXTS} choices", "n")
        scored: list[object] = [None] * len(prompts)
        if fields[of.ECHO] and num_logprobs is not None:
            scored = await batcher.submit([model.scored_query(prompt.ids, num_logprobs) for prompt in prompts])
        choices = list[Choice]()
        for prompt, tokens in zip(prompts, cast(list[Sequence[Token] | None], scored), strict=True):
            for j in range(num_choices):
                sampling = Sampling(fields[of.TEMPERATURE], fields[of.TOP_P], (seed + j) % 2**32)
                completion = Completion(gpt, prompt.ids, count, sampling, num_logprobs)
                choices.append(Choice(completion, len(choices), fields[of.ECHO], fields[of.STOP] or [], tokens))
                await asyncio.sleep(0)
        head: dict[str, object] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.service.name,
        }
        if fields[of.STREAM]:
            return StreamingResponse(stream(batcher, head, choices), media_type="text/event-stream")
        for choice in choices:
            async for _ in choice.grow(batcher):
                pass
        used, new = sum(len(prompt.ids) for prompt in prompts), sum(len(choice.new_ids) for choice in choices)
        usage = {"prompt_tokens": used, "completion_tokens": new, "total_tokens": used + new}
        return reply(head | {"choices": [choice.json() for choice in choices], "usage": usage})

    async def _vectors(self, texts: Sequence[Text], pooling: Pooling) -> list[np.ndarray]:
        model, batcher = self.service.ready
        check_size(len(texts) * pooling.width(model.encoder.config.hidden_size))
        answers = await batcher.submit([model.vector_query(text, pooling) for text in texts])
        return cast(list[np.ndarray], answers)

    def _check_model(self, name: str | None) -> None:
        """Raises a Refusal (404) for the name of another model."""
        if name not in (None, self.service.name):
            message = f"there is no model {str(name)[:100]!r} here; this is {self.service.name!r}"
            raise Refusal(404, message, "model", "model_not_found")


def check_size(numbers: int) -> None:
    """Raises a Refusal (413) for an answer of too many numbers."""
    if numbers > MAX_NUMBERS:
        message = f"the answer would have {numbers} numbers, more than {MAX_NUMBERS}; ask for fewer texts or layers"
        raise Refusal(413, message, code="answer_too_large")


def _longest(example: Example) -> int:
    """The characters of the longest text of an example, or of all words of a sentence."""
    parts = [part for sequence in example.sequences for part in sequence]
    return max(len(part) if isinstance(part, str) else sum(map(len, part)) for part in parts)


def npy(array: np.ndarray) -> bytes:
    """An array as the bytes of an .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()
