"""SIGTERM and SIGINT at any moment: an exit code, one line, within seconds, and nobody stays behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prelm_jax.cli import signals
from prelm_jax.cli.main import main
from prelm_jax.errors import Preempted

PATIENCE = 0.2


@pytest.fixture(autouse=True)
def little_patience(monkeypatch):
    monkeypatch.setattr(signals, "PATIENCE_SECONDS", PATIENCE)


@pytest.fixture(autouse=True)
def heeded_interrupts():
    """A shell ignores SIGINT in what it starts in the background, such as a test suite."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_sigterm_raises_in_the_main_thread_and_once():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="stopped by SIGTERM; the same command resumes"), signals.ending_on_signals():
        try:
            send(signal.SIGTERM)
        finally:
            send(signal.SIGTERM)  # What cleans up is not disturbed.
    assert signal.getsignal(signal.SIGTERM) is before and signal.set_wakeup_fd(-1) == -1


def test_an_error_handler_does_not_catch_it():
    with pytest.raises(Preempted), signals.ending_on_signals(), contextlib.suppress(Exception):
        send(signal.SIGTERM)


def test_whoever_has_something_to_save_is_waited_for():
    """A handler of the loop's own: the process goes on for longer than anybody else may."""
    asked = []
    with signals.ending_on_signals():
        signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
        send(signal.SIGTERM)
        deadline = time.monotonic() + 5 * PATIENCE
        while time.monotonic() < deadline:
            pass
    assert asked


@pytest.mark.parametrize("command", ["pretrain", "prepare"])
@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGTERM, 75, "prelm: stopped by SIGTERM; the same command resumes\n"),
        (signal.SIGINT, 130, "prelm: interrupted\n"),
    ],
)
def test_while_a_command_prepares(folder, tmp_path, monkeypatch, capsys, command, number, code, line):
    monkeypatch.setattr("prelm_jax.pretraining.prepare", lambda *_, **__: send(number))
    workdir = ["--workdir", str(tmp_path / "run")] if command == "pretrain" else []
    with pytest.raises(SystemExit) as stopped:
        main([command, f"{folder}/tiny.py:tiny", *workdir])
    assert stopped.value.code == code and capsys.readouterr().err == line
    assert not (tmp_path / "run").exists()


# As while it compiles: the main thread calls nothing of Python for long.
WAITING = """
import contextlib, hashlib, signal
from prelm_jax.cli import signals
signal.signal(signal.SIGINT, signal.default_int_handler)
signals.PATIENCE_SECONDS = 0.2
with signals.ending_on_signals():
    with contextlib.suppress(BaseException):  # The signal may come before the call.
        print("ready", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", (1 << 31) - 1)
    hashlib.pbkdf2_hmac("sha256", b"", b"", (1 << 31) - 1)
"""


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGTERM, 75, "prelm: stopped by SIGTERM; the same command resumes\n"),
        (signal.SIGINT, 130, "prelm: interrupted\n"),
    ],
)
def test_a_main_thread_that_does_not_listen(number, code, line):
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code and err == line


PREPARE = """
import sys
from pathlib import Path
from prelm_jax.cli.main import main
from prelm_jax.corpus import documents, prepare
documents.SHARD_CHARACTERS = 100
prepare.make_shard = __import__("slow_shard").make_shard
main(sys.argv[1:])
"""

SLOW_SHARD = """
import os, time
from pathlib import Path

def make_shard(shard, directory, **_):
    (Path(directory) / f"worker-{os.getpid()}").touch()
    time.sleep(1000)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_a_command(folder, tmp_path, number):
    """Nor a temporary file, not even after a SIGKILL; a SIGTERM to the whole group is no death of a worker."""
    (tmp_path / "slow_shard.py").write_text(SLOW_SHARD)
    (tmp_path / "temporary").mkdir()
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(f"The old cat sees hen number {i}. It flies." for i in range(200)))
    environment = os.environ | {
        "PRELM_CACHE": str(tmp_path / "cache"),
        "TMPDIR": str(tmp_path / "temporary"),
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
        "LOKY_MAX_CPU_COUNT": "2",
    }
    arguments = ["prepare", f"{folder}/tiny.py:tiny", "--corpus", str(corpus)]
    command = subprocess.Popen(
        [sys.executable, "-c", PREPARE, *arguments],
        env=environment,
        start_new_session=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    while len(workers := [int(path.name.partition("-")[2]) for path in tmp_path.rglob("worker-*")]) < 2:
        assert command.poll() is None, command.communicate()
        time.sleep(0.01)
    if number == signal.SIGTERM:
        os.killpg(command.pid, number)
    else:
        command.send_signal(number)
    _, err = command.communicate(timeout=60)  # Also until no worker holds its standard error.
    if number == signal.SIGTERM:
        assert command.returncode == 75
        assert err.splitlines()[-1] == "prelm: stopped by SIGTERM; the same command resumes"
        assert "died" not in err
    for worker in workers:
        while Path(f"/proc/{worker}").exists():
            time.sleep(0.01)
    assert not list((tmp_path / "temporary").glob("prelm-*"))
