"""The command: what it refuses, how it starts and how it ends."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

pytest.importorskip("starlette", reason="needs the extra serve: pip install 'prelm_jax[serve]'")

from prelm_jax.cli.main import main
from prelm_jax.errors import InputError
from prelm_jax.inference.pooling import Pooling
from prelm_jax.serving.connections import in_url
from prelm_jax.serving.run import Options, choose_pooling, is_loopback, listen, run


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--host", "0.0.0.0"], ["--host 0.0.0.0", "--key-file"]),
        (["--key-file", "missing"], ["--key-file missing"]),
        (["--key-file", "short"], ["--key-file short", "16"]),
        (["--port", "65536"], ["--port 65536"]),
        (["--port", "{taken}"], ["127.0.0.1:{taken}", "--port"]),
        (["--uds", "short"], ["--uds short"]),
        (["--host", "a..b", "--key-file", "long"], ["a..b:8000", "--host"]),
    ],
)
def test_a_mistake_is_one_line(arguments, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short").write_text("secret\n")
    (tmp_path / "long").write_text("secret" * 3)
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = str(other.getsockname()[1])
        with pytest.raises(SystemExit) as end:
            main(["serve", "model", *(each.format(taken=taken) for each in arguments)])
    message = capsys.readouterr().err
    assert end.value.code == 1 and message.count("\n") == 1
    assert all(each.format(taken=taken) in message for each in named) and "secret" not in message


def test_a_unix_socket_is_for_its_user_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Paths of sockets are short.
    with listen(Options("model", uds=Path("socket"))) as listener:
        assert os.stat("socket").st_mode & 0o777 == 0o600
        listener.listen()
        with pytest.raises(InputError, match=r"--uds socket: .*another server"):
            listen(Options("model", uds=Path("socket")))
    with listen(Options("model", uds=Path("socket"))):  # The first server was killed: its file is still there.
        pass


def test_an_address_of_ipv6_has_brackets():
    assert [in_url(host) for host in ("::1", "[::1]", "localhost", "10.0.0.1")] == [
        "[::1]",
        "[::1]",
        "localhost",
        "10.0.0.1",
    ]


def test_the_model_is_called_by_its_directory(tmp_path, monkeypatch, capsys):
    """Also if it is given as ".". A model that is not there ends the server."""
    (tmp_path / "my-bert").mkdir()
    monkeypatch.chdir(tmp_path / "my-bert")
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # Of this process.
    monkeypatch.setattr("prelm_jax.serving.run.cache_compiled_programs", lambda: None)
    with pytest.raises(InputError, match=re.escape("config.json")):
        run(Options(".", port=0))
    assert "serving my-bert at http://127.0.0.1:" in capsys.readouterr().err
    with pytest.raises(InputError, match=re.escape("config.json")):
        run(Options(".", uds=Path("socket")))
    assert not Path("socket").exists()


def test_is_loopback():
    assert [is_loopback(host) for host in ("localhost", "127.0.0.2", "::1", "0.0.0.0", "::", "10.0.0.1", "name")] == [
        *(True, True, True, False, False, False, False)
    ]


def test_options_of_pooling_go_before_the_directory():
    own = Pooling(("cls",), normalize=True)
    assert choose_pooling(Options("m"), own) == own
    assert choose_pooling(Options("m", normalize=False), own) == Pooling(("cls",))
    found = choose_pooling(Options("m", pooling="mean+max", layers=(-2,)), own)
    assert found == Pooling(("mean", "max"), (-2,), normalize=True)


@pytest.mark.slow
def test_the_process_starts_and_ends(tmp_path):
    """/health answers before the model is there; SIGTERM ends it with clients attached, the accepted ones answered."""
    directory = tiny.directory(tmp_path / "model", "bert", max_position_embeddings=8)
    command = [sys.executable, "-m", "prelm_jax", "serve", str(directory), "--port", "0", "--name", "tiny"]
    with contextlib.ExitStack() as ends, subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            port = int(re.search(r":(\d+)$", line.strip())[1])
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            ends.callback(connection.close)
            seen = []
            while not seen or seen[-1] != "ready":
                connection.request("GET", "/health")
                seen.append(json.loads(connection.getresponse().read())["status"])
            assert seen[0] == "loading"
            with (
                socket.create_connection(("127.0.0.1", port)) as silent,
                socket.create_connection(("127.0.0.1", port)) as half,
            ):
                half.sendall(b"POST /embed HTTP/1.1\r\nhost: localhost\r\n")
                body = json.dumps({"texts": ["the cat"] * 40})
                connection.request("POST", "/embed", body, {"content-type": "application/json"})
                other = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
                other.request("GET", "/info")
                other.getresponse().read()
                other.close()  # By now the first request was accepted.
                process.send_signal(signal.SIGTERM)
                answer = connection.getresponse()
                assert answer.status == 200 and len(json.loads(answer.read())["results"]) == 40
                assert process.wait(30) == 0
                assert silent.recv(1) == b""
            assert process.stderr.read() == ""
        finally:
            process.kill()
