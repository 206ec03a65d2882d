"""Answers have the bits of the text alone, whoever else asks, and on every device."""

import base64
import json
import random
import socket
import threading

import numpy as np
import pytest
import tiny

pytest.importorskip("starlette", reason="needs the extra serve: pip install 'prelm_jax[serve]'")

CLIENTS, REQUESTS = 8, 500


def random_text(rng: random.Random, mask: bool = False) -> str:
    words = rng.choices(tiny.WORDS, k=rng.randint(1, 13))
    if mask:
        words[rng.randrange(len(words))] = "[MASK]"
    return " ".join(words)


def random_request(rng: random.Random) -> tuple[str, dict]:
    """A route and the fields of a request."""
    path = rng.choice(["/v1/embeddings", "/embed", "tokens", "/fill", "/score"])
    texts = [random_text(rng, path == "/fill") for _ in range(rng.choice([1, 1, 1, 2, 20]))]
    if path == "/v1/embeddings":
        return path, {"input": texts, "encoding_format": "base64"}
    if path == "tokens":
        return "/embed", {"texts": texts, "pooling": "none", "layers": [0, 1]}
    return path, {"texts": texts}


class Alone:
    """The answers of the library to one text at a time."""

    def __init__(self, model):
        self.model, self.known = model, {}

    def __call__(self, kind: str, text: str):
        if (kind, text) not in self.known:
            self.known[kind, text] = self._compute(kind, text)
        return self.known[kind, text]

    def _compute(self, kind: str, text: str):
        if kind == "vector":
            (vector,) = self.model.vectors([text])
            return vector.tobytes()
        if kind == "tokens":
            ((_, states),) = self.model.embed([text])
            return states.swapaxes(0, 1).tobytes()
        if kind == "fill":
            return self.model.fill(text)
        ((total, _),) = self.model.score([text])
        return total


def check(alone: Alone, path: str, fields: dict, answer: dict) -> None:
    """Compares every text's answer with that of the text alone."""
    if path == "/v1/embeddings":
        for text, each in zip(fields["input"], answer["data"], strict=True):
            assert base64.b64decode(each["embedding"]) == alone("vector", text)
        return
    for text, each in zip(fields["texts"], answer["results"], strict=True):
        if path == "/fill":
            assert [[(one["token"], one["probability"]) for one in mask] for mask in each["masks"]] == alone(
                "fill", text
            )
        elif path == "/score":
            assert each["log_probability"] == alone("score", text)
        elif "pooling" in fields:
            assert np.array(each["vectors"], np.float32).tobytes() == alone("tokens", text)
        else:
            assert np.array(each["vector"], np.float32).tobytes() == alone("vector", text)


def test_500_mixed_requests_have_the_bits_of_each_text_alone(bert):
    """On two devices."""
    client, alone = bert, Alone(bert.model)
    rng = random.Random(0)
    requests = [random_request(rng) for _ in range(REQUESTS)]
    answers: dict[int, tuple[int, dict]] = {}
    numbers, lock = iter(range(REQUESTS)), threading.Lock()

    def ask() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            path, fields = requests[number]
            answers[number] = client.post(path, **fields)

    threads = [threading.Thread(target=ask) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == list(range(REQUESTS))
    for number, (path, fields) in enumerate(requests):
        status, answer = answers[number]
        assert status == 200, answer
        check(alone, path, fields, answer)
    info = client.get("/info")[1]
    assert info["exact"] is True and len(info["devices"]) == 2
    metrics = client.request("GET", "/metrics")[2].decode()
    assert 'prelm_requests_total{path="/fill",status="200"}' in metrics and "prelm_queue_tokens 0" in metrics


def test_a_client_that_leaves_is_not_waited_for(bert):
    """Its texts are dropped, and others are answered."""
    body = json.dumps({"texts": [random_text(random.Random(1)) for _ in range(200)]}).encode()
    head = f"POST /score HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", bert.port)) as connection:
            connection.sendall(f"{head}\r\n\r\n".encode() + body)
    assert bert.post("/embed", texts="the cat")[0] == 200
    while bert.service.batcher.queue_tokens:
        threading.Event().wait(0.001)
