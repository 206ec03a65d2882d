"""Every route against the library's own answers."""

import base64
import io
import json
import math

import numpy as np
import pytest

TEXTS = ["the cat sees a dog", "a bird", "the big old house on the river", "a new cat finds the dog in the house"]


def embedded(model, text):
    ((tokens, states),) = model.embed([text])
    return tokens, states


def test_health_info_and_models(bert):
    assert bert.get("/health") == (200, {"status": "ready", "progress": 1.0})
    status, info = bert.get("/info")
    assert status == 200 and info["exact"] is True
    assert info["verbs"] == ["embed", "similarity", "tokenize", "fill", "score"]
    assert info["max_tokens"] == 14 and info["mask"] == "[MASK]"
    assert info["pooling"]["width"] == 16
    assert set(info["shapes"]) == {"embed", "fill", "score"}
    assert bert.get("/v1/models")[1]["data"][0]["id"] == "tiny"


def test_openai_embeddings_are_the_mean_of_the_last_layer(bert):
    status, answer = bert.post("/v1/embeddings", model="tiny", input=TEXTS)
    assert status == 200 and [each["index"] for each in answer["data"]] == [0, 1, 2, 3]
    for text, each in zip(TEXTS, answer["data"], strict=True):
        _, states = embedded(bert.model, text)
        np.testing.assert_allclose(each["embedding"], states[-1].mean(0), rtol=0, atol=1e-6)
    _, coded = bert.post("/v1/embeddings", model="tiny", input=TEXTS[0], encoding_format="base64")
    vector = np.frombuffer(base64.b64decode(coded["data"][0]["embedding"]), "<f4")
    assert vector.tobytes() == np.array(answer["data"][0]["embedding"], np.float32).tobytes()
    ids = bert.model.split(TEXTS[:2])
    for given, expected in ((ids, answer["data"][:2]), (ids[0], answer["data"][:1])):
        assert bert.post("/v1/embeddings", input=given)[1]["data"] == expected


def test_token_vectors_are_those_of_embed(bert):
    status, answer = bert.post("/embed", texts=TEXTS, pooling="none", layers=[0, 1])
    assert status == 200
    for text, each in zip(TEXTS, answer["results"], strict=True):
        tokens, states = embedded(bert.model, text)
        assert each["tokens"] == tokens and each["truncated"] is False
        assert np.array(each["vectors"], np.float32).swapaxes(0, 1).tobytes() == states.tobytes()
        assert each["offsets"][0] is each["offsets"][-1] is None
        assert [text[begin:end] for begin, end in each["offsets"][1:-1]] == tokens[1:-1]


@pytest.mark.parametrize("mode", ["cls", "max", "last", "mean+max", "mean-sqrt"])
def test_pooling(bert, mode):
    _, answer = bert.post("/embed", texts=TEXTS[:1], pooling=mode, layers=[-1, 0], normalize=True)
    _, states = embedded(bert.model, TEXTS[0])
    x = np.concatenate([states[-1], states[0]], -1)
    parts = {
        "cls": x[0],
        "last": x[-1],
        "max": x.max(0),
        "mean": x.mean(0),
        "mean-sqrt": x.sum(0) / math.sqrt(len(x)),
    }
    vector = np.concatenate([parts[name] for name in mode.split("+")])
    np.testing.assert_allclose(answer["results"][0]["vector"], vector / np.linalg.norm(vector), rtol=0, atol=1e-6)


def test_vectors_as_npy(bert):
    body = json.dumps({"texts": TEXTS}).encode()
    _, _, raw = bert.request("POST", "/embed", body, content_type="application/json", accept="application/x-npy")
    _, answer = bert.post("/embed", texts=TEXTS)
    expected = np.array([each["vector"] for each in answer["results"]], np.float32)
    assert np.load(io.BytesIO(raw)).tobytes() == expected.tobytes()


def test_fill_is_that_of_the_model(bert):
    texts = ["the [MASK] sees", "a [MASK] and [MASK]"]
    status, answer = bert.post("/fill", texts=texts, top_k=3)
    assert status == 200
    for text, each in zip(texts, answer["results"], strict=True):
        found = [[(one["token"], one["probability"]) for one in mask] for mask in each["masks"]]
        assert found == bert.model.fill(text, 3)


@pytest.mark.parametrize("family", ["bert", "gpt"])
def test_score_is_that_of_the_model(family, request):
    client = request.getfixturevalue(family)
    texts = ["the cat", "a bird", "house"]
    status, answer = client.post("/score", texts=texts)
    assert status == 200
    for each, (total, count) in zip(answer["results"], client.model.score(texts), strict=True):
        assert each["num_tokens"] == count
        assert each["log_probability"] == pytest.approx(total, abs=1e-9)
        known = [x for x in each["log_probabilities"] if x is not None]
        assert len(known) == count and len(each["tokens"]) == len(each["log_probabilities"])


def test_tokenize_similarity_and_encode(bert):
    _, answer = bert.post("/tokenize", texts=["the cat"], special_tokens=False)
    assert answer["results"] == [
        {"ids": bert.model.split(["the cat"])[0], "tokens": ["the", "cat"], "offsets": [[0, 3], [4, 7]]}
    ]
    _, answer = bert.post("/encode", id=7, texts=TEXTS)
    vectors = np.array(answer["result"])
    assert (answer["id"], answer["status"], vectors.shape) == (7, 200, (4, 16))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    _, answer = bert.post("/similarity", texts=TEXTS)
    np.testing.assert_allclose(answer["cosines"], unit @ unit.T, atol=1e-6)
    _, answer = bert.post("/similarity", texts=TEXTS[:1], others=TEXTS[1:])
    np.testing.assert_allclose(answer["cosines"], unit[:1] @ unit[1:].T, atol=1e-6)


def test_completions_are_those_of_generate(gpt):
    status, answer = gpt.post("/v1/completions", prompt="the cat", max_tokens=5, seed=3)
    assert status == 200
    (choice,) = answer["choices"]
    assert "the cat" + choice["text"] == gpt.model.generate("the cat", 5, seed=3)
    assert choice["finish_reason"] == "length" and choice["logprobs"] is None
    assert answer["usage"]["completion_tokens"] == 5


def test_an_echo_scores_the_prompt(gpt):
    fields = {"prompt": "the cat", "max_tokens": 0, "echo": True, "logprobs": 2}
    (choice,) = gpt.post("/v1/completions", **fields)[1]["choices"]
    _, score = gpt.post("/score", texts="the cat")
    found, expected = choice["logprobs"], score["results"][0]
    assert choice["text"] == "the cat" and found["tokens"] == expected["tokens"]
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    np.testing.assert_allclose(found["token_logprobs"][1:], expected["log_probabilities"][1:], atol=1e-5)
    assert all(len(each) == 2 for each in found["top_logprobs"][1:])
    assert [choice["text"][i:][:1] for i in found["text_offset"][:2]] == ["t", "h"]


def stream(client, **fields):
    body = json.dumps({**fields, "stream": True}).encode()
    _, headers, raw = client.request("POST", "/v1/completions", body, content_type="application/json")
    assert headers["content-type"].startswith("text/event-stream")
    *events, done, rest = raw.decode().split("\n\n")
    assert done == "data: [DONE]" and rest == ""
    return [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]


def test_a_stream_has_the_text_of_the_whole(gpt):
    fields = {"prompt": "the cat", "max_tokens": 6, "seed": 1, "logprobs": 1, "echo": True}
    (whole,) = gpt.post("/v1/completions", **fields)[1]["choices"]
    parts = stream(gpt, **fields)
    assert "".join(part["text"] for part in parts) == whole["text"]
    assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]
    tokens = [token for part in parts if part["logprobs"] for token in part["logprobs"]["tokens"]]
    assert tokens == whole["logprobs"]["tokens"]


def test_a_stop_ends_the_text_before_it(gpt):
    fields = {"prompt": "the cat", "max_tokens": 8, "seed": 1}
    (free,) = gpt.post("/v1/completions", **fields)[1]["choices"]
    stop = free["text"][3:5]
    (choice,) = gpt.post("/v1/completions", **fields, stop=stop)[1]["choices"]
    assert choice["text"] == free["text"][: free["text"].index(stop)] and choice["finish_reason"] == "stop"
    parts = stream(gpt, **fields, stop=[stop])
    assert "".join(part["text"] for part in parts) == choice["text"]


def test_what_a_family_lacks_is_named(bert, gpt):
    status, _, message = gpt.error("/fill", texts="[MASK]")
    assert status == 404 and "complete" in message
    status, _, message = bert.error("/v1/completions", prompt="the")
    assert status == 404 and "fill" in message


def test_too_long_is_refused_or_cut_and_said(bert):
    long = "the " * 15
    status, param, message = bert.error("/embed", texts=["the", long])
    assert (status, param) == (400, "texts") and "texts[1]" in message and "15" in message and "14" in message
    _, answer = bert.post("/embed", texts=["the", long], truncate=True)
    assert [each["truncated"] for each in answer["results"]] == [False, True]
    _, cut = bert.post("/embed", texts=[long], truncate=True, pooling="none")
    assert len(cut["results"][0]["tokens"]) == len(cut["results"][0]["offsets"]) == 16
    assert bert.error("/v1/embeddings", input=long)[0] == 400
    body = json.dumps({"input": ["the", long], "truncate": True}).encode()
    _, headers, _ = bert.request("POST", "/v1/embeddings", body, content_type="application/json")
    assert headers["x-truncated"] == "1"
