"""Hostile requests over raw sockets, each with its status; slow clients; keys, hosts and bodies."""

import concurrent.futures
import contextlib
import json
import re
import socket
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="needs the extra serve: pip install 'prelm_jax[serve]'")

from prelm_jax.serving import app, handlers
from prelm_jax.serving.app import content_security_policy, host_name
from prelm_jax.serving.connections import LimitedProtocol
from prelm_jax.serving.model import ServedModel
from prelm_jax.serving.service import Service

DOCS = Path(__file__).parents[2] / "docs/serving.md"
HEAD = "POST /embed HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


NO_TYPE = HEAD.replace("content-type: application/json\r\n", "")


def ask(port: int, *parts: bytes | str) -> tuple[int | None, str]:
    """Sends parts of a request and reads until the server closes: the status (None without an answer), the rest."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for part in parts:
                connection.sendall(part.encode() if isinstance(part, str) else part)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while chunk := connection.recv(2**16):
                received += chunk
                head, _, body = received.partition(b"\r\n\r\n")
                if b"content-length: %d\r\n" % len(body) in head.lower() + b"\r\n":
                    break
    return (int(received[9:12]) if received else None), received.decode()


def body_request(body: bytes | str, head: str = HEAD) -> bytes:
    body = body.encode() if isinstance(body, str) else body
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


@pytest.fixture(scope="module")
def impatient(serving_without_model):
    """A server that gives requests little time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LimitedProtocol, "header_seconds", 0.2)
        patch.setattr(LimitedProtocol, "request_seconds", 0.4)
        with serving_without_model(Service("loading")) as client:
            yield client


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ("GET /health HTTP/1.1\r\n\r\n", 400),  # No host.
        ("GET /health HTTP/1.1\r\nhost: localhost\r\nhost: evil\r\n\r\n", 400),
        ("GET /health HTTP/1.1\r\nhost: evil.example\r\n\r\n", 421),
        ("GET /health HTTP/1.1\r\nhost: localhost.evil.example\r\n\r\n", 421),
        ("GET /health HTTP/1.1\r\nhost: LOCALHOST:8000\r\n\r\n", 503),  # It is loading.
        ("nonsense\r\n\r\n", 400),
        ("GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + "y" * 100_000, 431),
        ("GET /health HTTP/1.1\r\nhost: localhost\r\n" + "x: y\r\n" * 20_000, 431),
        ("GET /" + "x" * 100_000, 431),
        ("GET /nowhere HTTP/1.1\r\nhost: localhost\r\n\r\n", 404),
        ("GET /embed HTTP/1.1\r\nhost: localhost\r\n\r\n", 405),
        ("OPTIONS /embed HTTP/1.1\r\nhost: localhost\r\norigin: http://evil\r\n\r\n", 405),
        (HEAD + "content-length: 2\r\ncontent-length: 3\r\n\r\n{}", 400),
        (HEAD + "content-length: -1\r\n\r\n{}", 400),
        (HEAD + "content-length: 99999999999999999999999\r\n\r\n{}", 400),
        (HEAD + "content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (HEAD + "content-length: 900000000\r\n\r\n{}", 413),
        (HEAD + "content-length: +2\r\n\r\n{}", 400),
        (HEAD + "transfer-encoding: chunked\r\n\r\n0x2\r\n{}\r\n0\r\n\r\n", 400),
        (HEAD + "transfer-encoding: chunked\r\n\r\n10000000000000002\r\n{}\r\n0\r\n\r\n", 400),
        (HEAD + "transfer-encoding: chunked\r\n\r\n2;" + "x" * 100_000, 431),
        (HEAD + "transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nx: " + "y" * 100_000, 431),
        # Trailers are no headers: a proxy has not seen them.
        (NO_TYPE + "transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\ncontent-type: application/json\r\n\r\n", 415),
        (HEAD + "transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nhost: evil\r\n\r\n", 400),
        ("GET /health/ HTTP/1.1\r\nhost: localhost\r\n\r\n", 404),
        (body_request('{"texts": "a"}', HEAD.replace("/embed", "/embed/")), 404),
        ("GET /health HTTP/1.0\r\n\r\n", 400),
        ("GET /health\r\n\r\n", 400),
        ("GET /%68ealth HTTP/1.1\r\nhost: localhost\r\n\r\n", 503),
        ("GET /%2e%2e/health HTTP/1.1\r\nhost: localhost\r\n\r\n", 404),
        ("GET http://localhost/health HTTP/1.1\r\nhost: evil.example\r\n\r\n", 421),
        ("GET /health HTTP/1.1\r\nhost: x@localhost\r\n\r\n", 421),
        (HEAD + "expect: 100-continue\r\ncontent-length: 900000000\r\n\r\n", 413),
        ("POST /embed HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\n\r\n{}", 415),
        ("POST /embed HTTP/1.1\r\nhost: localhost\r\ncontent-type: text/plain\r\ncontent-length: 2\r\n\r\n{}", 415),
        (body_request("[1, 2]"), 400),
        (body_request("{"), 400),
        (body_request(b'{"texts": "\xff"}'), 400),
        (body_request('{"texts": "\\ud800"}'), 400),
        (body_request('{"texts": NaN}'), 400),
        (body_request('{"a":' * 100_000), 400),
        (body_request('{"texts": "a"}'), 503),
    ],
)
def test_status_of_a_hostile_request(impatient, request_, status):
    found, answer = ask(impatient.port, request_)
    assert found == status
    assert "access-control" not in answer.lower() and "traceback" not in answer.lower()
    assert "\r\nserver:" not in answer.lower()
    assert json.loads(answer.partition("\r\n\r\n")[2]).keys() & {"error", "status"}


@pytest.mark.parametrize(
    "parts",
    [
        [],  # Silent.
        ["GET /hea"],
        ["GET /health HTTP/1.1\r\nhost: localhost\r\n"],
        [HEAD + "content-length: 100\r\n\r\n{"],
        [HEAD + "transfer-encoding: chunked\r\n\r\n5\r\n{}"],
    ],
)
def test_a_request_that_does_not_end_is_ended(impatient, parts):
    began = time.monotonic()
    status, _ = ask(impatient.port, *parts)
    assert status == 408 and time.monotonic() - began < 20


def test_a_connection_is_kept_for_further_requests(impatient):
    request = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=30) as connection:
        for times in (1, 1, 2):  # The last two at once.
            connection.sendall(request * times)
            received = b""
            while received.count(b'"loading"') < times:
                received += connection.recv(2**16)
            assert received.count(b"HTTP/1.1 503") == times


def test_the_parts_of_an_answer_do_not_wait_for_one_another(impatient, monkeypatch):
    """Without TCP_NODELAY the body follows its headers after 40 ms, when the client has acknowledged those."""
    made, found = LimitedProtocol.connection_made, []

    def connection_made(self, transport):
        made(self, transport)
        found.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(LimitedProtocol, "connection_made", connection_made)
    assert impatient.get("/health")[0] == 503 and found == [1]


def test_chunked_bodies_are_limited(impatient, monkeypatch):
    monkeypatch.setattr(app, "MAX_BODY", 1000)
    chunk = b"3e8\r\n" + b" " * 1000 + b"\r\n"
    status, _ = ask(impatient.port, HEAD + "transfer-encoding: chunked\r\n\r\n", chunk, chunk, b"0\r\n\r\n")
    assert status == 413


def test_chunks_may_be_small(impatient):
    """Their lengths are no more than the text that they carry."""
    body = b'{"texts": "' + b"a" * 50_000 + b'"}'
    chunks = b"".join(b"4\r\n%s\r\n" % body[i : i + 4] for i in range(0, len(body) // 4 * 4, 4))
    rest = body[len(body) // 4 * 4 :]
    end = b"%x\r\n%s\r\n0\r\n\r\n" % (len(rest), rest) if rest else b"0\r\n\r\n"
    assert ask(impatient.port, HEAD + "transfer-encoding: chunked\r\n\r\n", chunks, end)[0] == 503


def test_an_upgrade_is_refused_with_its_body(impatient):
    """The parser reads no body after it; Java's client asks for one with each request unless it is told not to."""
    head = HEAD + "connection: upgrade, http2-settings\r\nupgrade: h2c\r\n"
    status, answer = ask(impatient.port, body_request('{"texts": "a"}', head))
    assert status == 400 and json.loads(answer.partition("\r\n\r\n")[2])["error"]["code"] == "upgrade"
    assert "connection: close" in answer


def test_too_many_connections(impatient, monkeypatch):
    monkeypatch.setattr(LimitedProtocol, "max_connections", 1)
    with socket.create_connection(("127.0.0.1", impatient.port)):
        for _ in range(2):
            status, _ = ask(impatient.port, "GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
    assert status == 503


def test_a_key_is_asked_for(serving_without_model):
    key = "a-key-of-sixteen-letters"
    with serving_without_model(Service("loading", key)) as client:
        assert client.get("/health")[0] == 503
        assert client.request("GET", "/")[0] == 200
        for path in ("/info", "/metrics", "/v1/models"):
            assert client.request("GET", path)[0] == 401
            assert client.request("GET", path, authorization="Bearer wrong")[0] == 401
            assert client.request("GET", path, authorization=f"Bearer {key}")[0] == 200
        assert client.error("/embed", texts="a")[0] == 401


def test_host_name():
    assert [host_name(host) for host in ("Localhost", "127.0.0.1:80", "[::1]:8000", "a:b:c", "x:999999", "")] == [
        *("localhost", "127.0.0.1", "[::1]", "", "", "")
    ]


def test_the_page_may_run_its_own_scripts_alone(impatient):
    status, headers, page = impatient.request("GET", "/")
    assert status == 200 and headers["content-type"].startswith("text/html")
    policy = headers["content-security-policy"]
    assert policy == content_security_policy(page) and "unsafe" not in policy and "connect-src 'self'" in policy
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/embed", {}, "texts"),
        ("/embed", {"texts": []}, "texts"),
        ("/embed", {"texts": ["a", 1]}, "texts"),
        ("/embed", {"texts": ["a"] * 2049}, "texts"),
        ("/embed", {"texts": "a", "surprise": 1}, "surprise"),
        ("/embed", {"texts": " "}, "texts"),
        ("/embed", {"texts": "a", "layers": 2}, "layers"),
        ("/embed", {"texts": "a", "layers": [True]}, "layers"),
        ("/embed", {"texts": "a", "layers": [-1, -1]}, "layers"),
        ("/embed", {"texts": "a", "layers": [2**40]}, "layers"),
        ("/embed", {"texts": "a", "layers": [0] * 10_000}, "layers"),
        ("/embed", {"texts": "a", "pooling": "median"}, "pooling"),
        ("/embed", {"texts": "a", "pooling": "mean+mean"}, "pooling"),
        ("/encode", {"texts": "a", "id": [[1]]}, "id"),
        ("/embed", {"texts": "a", "truncate": "yes"}, "truncate"),
        ("/embed", {"texts": "a" * 10_000}, "texts"),
        ("/fill", {"texts": "no mask"}, "texts"),
        ("/fill", {"texts": "[MASK]" + "a" * 10_000}, "texts"),
        ("/fill", {"texts": "[MASK]", "top_k": 101}, "top_k"),
        ("/fill", {"texts": "[MASK]", "top_k": -1}, "top_k"),
        ("/fill", {"texts": "[MASK]", "top_k": True}, "top_k"),
        ("/v1/embeddings", {"input": [[1, 2], ["a"]]}, "input"),
        ("/v1/embeddings", {"input": [10**6]}, "input"),
        ("/v1/embeddings", {"input": [-1]}, "input"),
        ("/v1/embeddings", {"input": "a", "dimensions": 8}, "dimensions"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, "encoding_format"),
    ],
)
def test_a_wrong_field_is_named(bert, path, fields, param):
    status, found, message = bert.error(path, **fields)
    assert (status, found) == (400, param) and param in message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": "a", "max_tokens": 10**6}, "max_tokens"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "logprobs": 6}, "logprobs"),
        ({"prompt": "a", "n": 17}, "n"),
        ({"prompt": ["a"] * 200, "n": 16}, "n"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "stop": [""]}, "stop"),
        ({"prompt": " "}, "prompt"),
    ],
)
def test_a_wrong_field_of_a_completion_is_named(gpt, fields, param):
    assert gpt.error("/v1/completions", **fields)[:2] == (400, param)


def test_every_route_is_described(bert):
    status, found = bert.get("/openapi.json")
    assert status == 200 and found["openapi"].startswith("3.1")
    assert {"/embed", "/v1/completions", "/health", "/answer"} <= found["paths"].keys()
    for path, methods in found["paths"].items():
        for method, operation in methods.items():
            assert operation["summary"].endswith("."), path
            other = "GET" if method == "post" else "POST"
            assert bert.request(other, path)[0] == 405


def test_fields_are_described_with_types_defaults_and_limits(bert):
    paths = bert.get("/openapi.json")[1]["paths"]
    bodies = {path: each["post"]["requestBody"] for path, each in paths.items() if "post" in each}
    found = {path: body["content"]["application/json"]["schema"] for path, body in bodies.items()}
    assert found["/fill"]["required"] == ["texts"] and found["/fill"]["additionalProperties"] is False
    assert found["/fill"]["properties"]["top_k"] == {"type": "integer", "minimum": 1, "maximum": 100, "default": 5}
    assert found["/fill"]["properties"]["texts"]["anyOf"][1]["maxItems"] == 2048
    completions = found["/v1/completions"]["properties"]
    assert completions["temperature"] == {"type": "number", "minimum": 0, "maximum": 2, "default": 1}
    assert completions["stop"]["anyOf"][1] == {
        "type": "array",
        "items": {"type": "string", "minLength": 1},
        "minItems": 1,
        "maxItems": 4,
    }
    assert found["/v1/embeddings"]["properties"]["encoding_format"]["enum"] == ["float", "base64"]


def test_the_fields_of_the_documentation(bert):
    """The table of docs/serving.md has the fields of each route, but for `model` and what is not supported."""
    paths = bert.get("/openapi.json")[1]["paths"]
    table = re.findall(r"^\| `(/[^` ]*)` \| (`.*?) \|", DOCS.read_text(), re.MULTILINE)
    assert {"/embed", "/v1/completions"} <= dict(table).keys()
    for path, body in table:
        described = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
        named = {name for name, schema in described.items() if "const" not in schema}
        assert named - {"model"} == set(re.findall(r"`(\w+)`", body)), path


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/embed", {"texts": ["a cat", "a dog"]}),
        ("/embed", {"texts": ["a cat"], "pooling": "none", "layers": [0, 1]}),
        ("/similarity", {"texts": ["a"] * 6}),
        ("/v1/embeddings", {"input": ["a cat", "a dog"]}),
        ("/encode", {"id": 1, "texts": ["a cat", "a dog"]}),
    ],
)
def test_answers_are_limited(bert, monkeypatch, path, fields):
    """All of them are computed and written at once: a short request could ask for gigabytes."""
    monkeypatch.setattr(handlers, "MAX_NUMBERS", 31)  # Vectors have 16.
    status, answer = bert.post(path, **fields)
    assert status == 413 and "31" in answer["error"]["message"] and answer["error"]["code"] == "answer_too_large"
    name = "input" if "input" in fields else "texts"
    assert bert.post(path, **{name: ["a"]})[0] == 200


def test_others_are_answered_while_a_text_is_tokenized(bert, monkeypatch):
    answered, made = threading.Event(), ServedModel.offsets
    in_time = []

    def offsets(self, *arguments):
        in_time.append(answered.wait(10))
        return made(self, *arguments)

    monkeypatch.setattr(ServedModel, "offsets", offsets)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        tokenized = pool.submit(bert.post, "/tokenize", texts="the cat")
        while not bert.service.body_bytes:
            time.sleep(0.001)
        assert bert.get("/health")[0] == 200
        answered.set()
        assert tokenized.result()[0] == 200 and in_time == [True]


def test_the_text_that_is_too_long_is_named(bert):
    """And a remedy, where the route has one."""
    texts = ["[MASK]", "[MASK] " * 15]
    status, param, message = bert.error("/fill", texts=texts)
    assert (status, param) == (400, "texts") and "texts[1]" in message and "truncate" not in message
    assert "truncate" in bert.error("/score", texts=texts)[2]


def test_a_blank_text_is_named(bert):
    assert bert.error("/similarity", texts=["a"], others=["b", " "])[1] == "others"


def test_what_is_not_read_counts_as_cut(bert):
    """Of a very long text only the beginning is tokenized, here less than fills the model."""
    text = "the " + " " * 10_000 + "cat"
    _, answer = bert.post("/embed", texts=[text], truncate=True)
    assert answer["results"][0]["truncated"] is True
    _, answer = bert.post("/embed", texts=[text], truncate=True, pooling="none")
    assert answer["results"][0]["truncated"] is True
    assert answer["results"][0]["tokens"] == ["[CLS]", "the", "[SEP]"]
    assert len(answer["results"][0]["vectors"]) == 3


@pytest.mark.parametrize("fields", [{"prompt": "query"}, {"normalize": False}])
def test_what_says_nothing_about_tokens_is_refused(bert, fields):
    (name,) = fields
    assert bert.error("/embed", texts=["a"], pooling="none", **fields)[:2] == (400, name)


def test_a_list_of_ids_is_one_text(bert, monkeypatch):
    monkeypatch.setattr(bert.service.batcher, "max_queue_tokens", 16)
    assert bert.post("/v1/embeddings", input=[5] * 12)[0] == 200
    assert bert.error("/v1/embeddings", input=[[5]] * 12)[0] == 413


def test_routes_are_counted_by_their_names(bert):
    """Not by what was asked for, of which there is no end."""
    assert bert.get("/v1/models/%22x")[0] == 404
    metrics = bert.service.metrics().decode()
    assert 'path="/v1/models/{name}",status="404"' in metrics and '"x' not in metrics


def test_bodies_count_while_they_arrive(bert, monkeypatch):
    """Also those whose length is not known before."""
    monkeypatch.setattr(app, "MAX_BODIES", 1000)
    head = b"POST /embed HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    chunk = b"transfer-encoding: chunked\r\n\r\n" + b"258\r\n" + b" " * 0x258 + b"\r\n"
    with contextlib.ExitStack() as ends:
        address = ("127.0.0.1", bert.port)
        one, two = (ends.enter_context(socket.create_connection(address, 60)) for _ in range(2))
        one.sendall(head + chunk)
        while bert.service.body_bytes < 0x258:
            time.sleep(0.001)
        two.sendall(head + chunk)
        assert two.recv(100).startswith(b"HTTP/1.1 503 ")
        assert bert.service.body_bytes == 0x258
    while bert.service.body_bytes:
        time.sleep(0.001)


def test_an_error_of_the_server_is_answered_and_logged(bert, monkeypatch, capsys):
    monkeypatch.setattr(ServedModel, "offsets", lambda *arguments: 1 / 0)
    status, answer = bert.post("/tokenize", texts="the cat")
    assert (status, answer["error"]["code"]) == (500, "failed") and "ZeroDivisionError" in answer["error"]["message"]
    assert "test_limits.py" in capsys.readouterr().err


def test_another_model_is_not_served(bert):
    assert bert.error("/v1/embeddings", model="gpt-5", input="a")[:2] == (404, "model")
