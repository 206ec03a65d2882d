"""Servers of tiny models, each in a thread of the test's process, and a client that speaks plain HTTP."""

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

pytest.importorskip("starlette", reason="needs the extra serve: pip install 'prelm_jax[serve]'")

import jax

from prelm_jax.inference import batching
from prelm_jax.loading import load
from prelm_jax.serving import batcher
from prelm_jax.serving.app import make_app
from prelm_jax.serving.batcher import Batcher
from prelm_jax.serving.connections import make_server
from prelm_jax.serving.model import ServedModel
from prelm_jax.serving.service import Service

HOSTS = ("127.0.0.1", "localhost")


class Client:
    """Requests to a server, each on a connection of its own."""

    def __init__(self, port: int, model=None, service=None):
        self.port, self.model, self.service = port, model, service

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str):
        """(status, headers, body)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, path, body, named)
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def get(self, path: str, **headers: str):
        status, _, body = self.request("GET", path, **headers)
        return status, json.loads(body)

    def post(self, path: str, **fields: object):
        """(status, the JSON of the answer)."""
        body = json.dumps(fields).encode()
        status, _, answer = self.request("POST", path, body, content_type="application/json")
        return status, json.loads(answer)

    def error(self, path: str, **fields: object):
        """(status, param, message) of a refusal."""
        status, answer = self.post(path, **fields)
        return status, answer["error"]["param"], answer["error"]["message"]


@contextlib.contextmanager
def serving(service: Service) -> Iterator[Client]:
    """A server in a thread."""
    started = threading.Event()
    ports = []

    def on_start(addresses):
        ports.append(int(addresses[0].rpartition(":")[2]))
        started.set()

    server = make_server(make_app(service, HOSTS), on_start)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    assert started.wait(60)
    try:
        yield Client(ports[0], None, service)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@contextlib.contextmanager
def _serving_model(model, devices=None, **options) -> Iterator[Client]:
    """A server of a model, once it is warm."""
    service = Service("tiny", options.pop("key", None))
    served = ServedModel(model, "tiny")
    made = Batcher(devices or jax.devices()[:1], options.pop("max_queue_tokens", 10**5))
    service.start(served, made)
    try:
        with serving(service) as client:
            while made.num_cold():
                time.sleep(0.01)
            client.model = model
            yield client
    finally:
        made.stop()


@pytest.fixture(scope="session")
def serving_without_model():
    """`with serving_without_model(service) as client:` the model is never loaded."""
    return serving


@pytest.fixture(scope="session")
def serving_model():
    """`with serving_model(model, devices) as client:` a server of a model, once it is warm."""
    return _serving_model


@pytest.fixture(scope="package", autouse=True)
def few_shapes() -> Iterator[None]:
    """Batches of one row or of 64 tokens, for fewer programs to compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batcher, "ROWS", (1,))
        patch.setattr(batching, "CPU_TOKENS_PER_BATCH", 64)
        yield


def tiny_model(directory: Path, model_type: str):
    return load(tiny.directory(directory / model_type, model_type, max_position_embeddings=16))


@pytest.fixture(scope="package")
def bert(tmp_path_factory, few_shapes) -> Iterator[Client]:
    with _serving_model(tiny_model(tmp_path_factory.mktemp("bert"), "bert")) as client:
        yield client


@pytest.fixture(scope="package")
def gpt(tmp_path_factory, few_shapes) -> Iterator[Client]:
    with _serving_model(tiny_model(tmp_path_factory.mktemp("gpt"), "openai-gpt")) as client:
        yield client
