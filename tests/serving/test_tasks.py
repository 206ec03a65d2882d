"""The routes of fine-tuned models give the predictions of the library."""

import jax
import numpy as np
import pytest

pytest.importorskip("starlette", reason="needs the extra serve: pip install 'prelm_jax[serve]'")

from prelm_jax.data.frames import BertFrame
from prelm_jax.formats.base import abstract_params
from prelm_jax.formats.heads import join, split
from prelm_jax.inference.bert import BertPretrained
from prelm_jax.inference.heads import TaskPretrained
from prelm_jax.models.heads import Choice, Label, Span, Tags
from prelm_jax.models.task import TaskModelConfig
from prelm_jax.serving.model import ServedModel
from prelm_jax.training.parameters import path_name

HEADS = {
    "label": (Label(num_labels=2), ("no", "yes")),
    "tags": (Tags(num_tags=3), ("B-X", "I-X", "O")),
    "spans": (Span(), ()),
    "choice": (Choice(), ()),
}


@pytest.fixture
def served(bert, serving_model, monkeypatch):
    """`served(kind)`: a context with a server of a task with random parameters, whose programs are not tried out."""

    def serve(kind):
        head, names = HEADS[kind]
        config = TaskModelConfig(bert.model.config, head)
        rng = np.random.default_rng(1)
        params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), abstract_params(config)["head"])
        by_path = {path_name(path): value for path, value in jax.tree_util.tree_leaves_with_path(params)}
        task = join(config, bert.model.loaded, by_path, names, 16)
        model = TaskPretrained(task, BertPretrained(split(task)[0]), BertFrame)
        monkeypatch.setattr(ServedModel, "programs", [])
        return serving_model(model)

    return serve


def test_classify(served):
    texts = ["the cat sees a dog", "a bird"]
    with served("label") as client:
        assert client.get("/info")[1]["labels"] == ["no", "yes"]
        status, answer = client.post("/classify", texts=[*texts, texts])
        expected = client.model.classify([*texts, tuple(texts)])
        assert status == 200
        for each, prediction in zip(answer["results"], expected, strict=True):
            assert each["label"] == prediction.label
            assert list(each["probabilities"].values()) == list(prediction.probabilities)
        assert client.post("/classify", texts=["the " * 30])[1]["results"][0]["truncated"] is True
        assert client.error("/classify", texts=[["a", "b", "c"]])[:2] == (400, "texts")
        status, _, message = client.error("/tag", texts="a")
        assert status == 404 and "classify" in message


@pytest.mark.slow
def test_tag(served):
    texts = ["the cat sees a dog", "bird " * 40]
    with served("tags") as client:
        status, answer = client.post("/tag", texts=[texts[0].split(), texts[1]])
        assert status == 200
        for each, prediction in zip(answer["results"], client.model.tag(texts), strict=True):
            assert tuple(each["tags"]) == prediction.label
            assert tuple(each["probabilities"]) == prediction.probabilities
        assert client.error("/tag", texts=["a", " "])[:2] == (400, "texts")
        for words in ("cat " * 2000, ["cat"] * 2000):  # Nothing of it is tokenized.
            message = "texts[1] has 6000 characters, but the server takes 3500"
            assert client.error("/tag", texts=["a", words]) == (400, "texts", message)


def test_answer(served):
    questions = [["the cat", "a bird sees the old cat in the big house on the river " * 3], ["a dog", "the house"]]
    with served("spans") as client:
        status, answer = client.post("/answer", questions=questions, null_threshold=1e9, top_k=2)
        assert status == 200, answer
        expected = client.model.answer([tuple(each) for each in questions], 1e9)
        for (_, passage), each, prediction in zip(questions, answer["results"], expected, strict=True):
            assert each["answer"] == prediction.label.texts[0]
            assert passage[each["start"] :].startswith(each["answer"])
            assert len(each["candidates"]) == 2
        assert client.error("/answer", questions=[["the cat", "a" * 10_000]])[:2] == (400, "questions")


def test_the_options_of_a_choice_are_limited_and_count(served, monkeypatch):
    """A row of the model has a text for each of them."""
    options = ["a dog"] * 16
    with served("choice") as client:
        status, param, message = client.error("/choose", choices=[["the cat", [*options, "a"]]])
        assert (status, param) == (400, "choices") and "1 to 16 options" in message
        monkeypatch.setattr(client.service.batcher, "max_queue_tokens", 100)
        status, _, message = client.error("/choose", choices=[["the cat", options]])
        assert status == 413 and "has 256 tokens" in message
        assert client.model.main_program is client.model.program(2)


@pytest.mark.slow
def test_choose(served):
    choices = [["the cat", ["a dog", "a bird", "the house"]]]
    with served("choice") as client:
        status, answer = client.post("/choose", choices=choices)
        (expected,) = client.model.choose([("the cat", ["a dog", "a bird", "the house"])])
        assert status == 200 and answer["results"][0]["label"] == expected.label
        assert answer["results"][0]["probabilities"] == list(expected.probabilities)
