"""Dispatch, exit codes and errors: one line that names what is wrong and what to do."""

import os
import runpy
import signal
import subprocess
import sys

import pytest

import prelm_jax
from prelm_jax.cli import dispatch
from prelm_jax.cli.main import ask_for_huge_pages, console, main
from prelm_jax.errors import Preempted


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out.split() == ["prelm_jax", prelm_jax.__version__]


def test_misspelt_commands(fails):
    assert "'pretrian'. Did you mean pretrain? prelm --help" in fails("pretrian", "bert:demo")
    assert "'tokenizer trian'. Did you mean tokenizer train? prelm tokenizer --help" in fails("tokenizer", "trian")
    assert "'xyzzy'. prelm --help" in fails("xyzzy")
    assert "tokenize?" not in fails("tokenizer", "foo")


def test_misspelt_options(folder, fails):
    tiny = f"{folder}/tiny.py:tiny"
    assert "--lerning-rate. Did you mean --optimizer.learning-rate?" in fails("pretrain", tiny, "--lerning-rate", 1)
    assert "--model.layers. Did you mean --model.num-layers?" in fails("pretrain", tiny, "--model.layers", 4)
    assert "--topk. Did you mean --top-k?" in fails("fill", folder / "model", "[MASK]", "--topk", 3)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (Preempted("saved step 7"), 75, "prelm: saved step 7\n"),
        (PermissionError(13, "Permission denied", "/x"), 1, "prelm: cannot write /x: Permission denied\n"),
        (OSError(28, "No space left on device"), 1, "prelm: cannot write a file: No space left on device\n"),
        (OSError(36, "File name too long", "/y"), 1, "prelm: cannot use /y: File name too long\n"),
        (IsADirectoryError(21, "Is a directory", "/a\nb"), 1, "prelm: cannot write /a\\nb: Is a directory\n"),
        (KeyboardInterrupt(), 128 + signal.SIGINT, "prelm: interrupted\n"),
    ],
)
def test_exit_codes(monkeypatch, capsys, error, code, message):
    def command():
        raise error

    monkeypatch.setitem(dispatch.COMMANDS, "experiments", command)
    with pytest.raises(SystemExit) as stopped:
        main(["experiments"])
    assert stopped.value.code == code
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("arguments", [["caf\udce9"], ["fill", "m", "caf\udce9 [MASK]"], ["fill", "\ud800", "x"]])
def test_arguments_are_utf8(fails, arguments):
    """Bytes of an argument that are not UTF-8 are surrogates in Python."""
    assert r"\ud" in fails(*arguments) and "must be UTF-8" in fails(*arguments)


def test_defects_are_not_hidden(monkeypatch):
    def command():
        raise ZeroDivisionError

    monkeypatch.setitem(dispatch.COMMANDS, "experiments", command)
    with pytest.raises(ZeroDivisionError):
        main(["experiments"])


def test_python_m_prelm_jax(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prelm", "--help"])
    runpy.run_module("prelm_jax", run_name="__main__")
    assert "pretrain" in capsys.readouterr().out


def test_training_starts_again_with_huge_pages_unless_the_allocator_is_set(monkeypatch):
    class Replaced(BaseException):
        pass

    def execve(path, arguments, environment):
        raise Replaced(path, arguments, environment)

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "prelm_jax", "pretrain", "--help"])
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "argv", ["prelm", "pretrain", "--help"])
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    with pytest.raises(Replaced) as found:
        console()
    path, arguments, environment = found.value.args
    assert (path, arguments) == (sys.executable, sys.orig_argv)
    assert environment == os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}

    monkeypatch.setattr(sys, "argv", ["prelm", "evaluate", "--help"])
    ask_for_huge_pages()
    monkeypatch.setattr(sys, "argv", ["prelm", "pretrain", "--help"])
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    ask_for_huge_pages()


def test_an_error_does_not_wait_for_the_threads_of_libraries():
    code = """
import sys, threading
from prelm_jax.cli.main import console
threading.Thread(target=threading.Event().wait).start()
sys.argv = ["prelm", "xyzzy"]
console()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "'xyzzy'" in done.stderr
