"""OpenAI's own client, unchanged, against the server."""

import contextlib

import numpy as np
import pytest

pytest.importorskip("openai", reason="openai is not installed")

import openai

from prelm_jax.serving.service import Service

TEXTS = ["the cat sees a dog", "a bird"]


@contextlib.contextmanager
def connect(client, key="none"):
    """The client for a server."""
    with openai.OpenAI(base_url=f"http://127.0.0.1:{client.port}/v1", api_key=key, max_retries=0) as connected:
        yield connected


@pytest.fixture
def to_bert(bert):
    with connect(bert) as connected:
        yield connected


@pytest.fixture
def to_gpt(gpt):
    with connect(gpt) as connected:
        yield connected


def test_embeddings(to_bert, bert):
    """The client asks for base64 unless it is told otherwise."""
    expected = list(bert.model.vectors(TEXTS))
    for form in (openai.omit, "float", "base64"):
        answer = to_bert.embeddings.create(model="tiny", input=TEXTS, encoding_format=form)
        assert (answer.model, [each.index for each in answer.data]) == ("tiny", [0, 1])
        assert answer.usage.total_tokens == sum(map(len, bert.model.split(TEXTS)))
        if form == "base64":
            assert isinstance(answer.data[0].embedding, str)  # As it came.
        else:
            np.testing.assert_array_equal(np.array([each.embedding for each in answer.data], np.float32), expected)
    (one,) = to_bert.embeddings.create(model="tiny", input=bert.model.split(TEXTS)[1], dimensions=16).data
    np.testing.assert_array_equal(np.array(one.embedding, np.float32), expected[1])


def test_models(to_bert):
    (model,) = to_bert.models.list().data
    assert (model.id, model.owned_by) == ("tiny", "prelm")
    assert to_bert.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError):
        to_bert.models.retrieve("gpt-5")


def test_completions(to_gpt, gpt):
    answer = to_gpt.completions.create(model="tiny", prompt="the cat", max_tokens=5, seed=3)
    (choice,) = answer.choices
    assert "the cat" + choice.text == gpt.model.generate("the cat", 5, seed=3)
    assert choice.finish_reason == "length" and choice.logprobs is None
    assert answer.usage is not None and answer.usage.completion_tokens == 5


def test_a_stream(to_gpt):
    options = {"model": "tiny", "prompt": ["the cat", "a"], "max_tokens": 4, "seed": 1, "logprobs": 2}
    whole = to_gpt.completions.create(**options)
    parts = [chunk.choices[0] for chunk in to_gpt.completions.create(**options, stream=True)]
    for i, choice in enumerate(whole.choices):
        own = [part for part in parts if part.index == i]
        assert "".join(part.text for part in own) == choice.text
        assert [token for part in own if part.logprobs for token in part.logprobs.tokens] == choice.logprobs.tokens
        assert own[-1].finish_reason == choice.finish_reason == "length"


def test_an_echo_with_log_probabilities(to_gpt, gpt):
    """How evaluation harnesses score a text."""
    answer = to_gpt.completions.create(model="tiny", prompt="the cat sees", max_tokens=0, echo=True, logprobs=1)
    (choice,) = answer.choices
    first, *rest = choice.logprobs.token_logprobs
    ((total, count),) = gpt.model.score(["the cat sees"])
    assert choice.text == "the cat sees" and first is None and len(rest) == count
    assert sum(rest) == pytest.approx(total, abs=1e-5)


def test_several_choices(to_gpt):
    """Each is drawn with a seed of its own: that of the request, and the next ones."""
    options = {"model": "tiny", "prompt": ["the cat", "a"], "max_tokens": 6}
    several = to_gpt.completions.create(**options, seed=4, n=3)
    assert [choice.index for choice in several.choices] == list(range(6))
    alone = [to_gpt.completions.create(**options, seed=4 + j).choices for j in range(3)]
    texts = [alone[j][i].text for i in range(2) for j in range(3)]
    assert [choice.text for choice in several.choices] == texts and len(set(texts)) > 2


def test_a_stop(to_gpt):
    options = {"model": "tiny", "prompt": "the cat", "max_tokens": 8, "seed": 1}
    text = to_gpt.completions.create(**options).choices[0].text
    (choice,) = to_gpt.completions.create(**options, stop=text[3:5]).choices
    assert choice.text == text[: text.index(text[3:5])] and choice.finish_reason == "stop"


@pytest.mark.parametrize(
    ("create", "options", "error", "param"),
    [
        ("embeddings", {"input": ""}, openai.BadRequestError, "input"),
        ("embeddings", {"input": "the " * 15}, openai.BadRequestError, "input"),
        ("embeddings", {"input": "a", "dimensions": 3}, openai.BadRequestError, "dimensions"),
        ("embeddings", {"input": "a", "model": "other"}, openai.NotFoundError, "model"),
        ("completions", {"prompt": "a", "best_of": 2}, openai.BadRequestError, "best_of"),
        ("completions", {"prompt": "a", "stream": True, "temperature": 3}, openai.BadRequestError, "temperature"),
    ],
)
def test_errors(create, options, error, param, request):
    connected = request.getfixturevalue("to_bert" if create == "embeddings" else "to_gpt")
    with pytest.raises(error) as refused:
        getattr(connected, create).create(**{"model": "tiny"} | options)
    assert refused.value.param == param and param in refused.value.message
    assert refused.value.type and refused.value.status_code in (400, 404)


def test_a_key(serving_without_model):
    key = "a-key-of-sixteen-letters"
    with serving_without_model(Service("loading", key)) as client:
        with connect(client, key) as connected:
            assert connected.models.list().data[0].id == "loading"
            with pytest.raises(openai.InternalServerError) as refused:
                connected.embeddings.create(model="loading", input="a")
            assert refused.value.status_code == 503 and refused.value.code == "loading"
        with connect(client, "wrong") as connected, pytest.raises(openai.AuthenticationError) as refused:
            connected.models.list()
        assert refused.value.code == "invalid_api_key"
