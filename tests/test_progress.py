"""Progress: a bar on a terminal, plain lines elsewhere, nothing without a description."""

import sys
import types

import pytest

from prelm_jax import progress as progress_module
from prelm_jax.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """Sets the time of this module alone, for a server in another thread needs the real one: `clock(seconds)`."""
    now = [0.0]
    monkeypatch.setattr(progress_module, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    return lambda seconds: now.__setitem__(0, seconds)


def pretend_terminal(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")


def test_a_line_every_ten_seconds_and_at_the_end(clock, capsys):
    with Progress("read", 10e6, "bytes") as progress:
        for seconds in (5, 9, 10, 15, 20):
            clock(seconds)
            progress.advance(1e6)
        progress.advance(5e6)
    captured = capsys.readouterr()
    assert captured.out == ""
    # From 5 to 10 s 2 MB were read, from 5 to 20 s 4 MB.
    assert captured.err.splitlines() == [
        "read: 3.0/10.0 MB  0:18 left",
        "read: 5.0/10.0 MB  0:19 left",
        "read: 10.0/10.0 MB",
    ]


def test_reports_are_the_lines_of_work_that_reports(clock, capsys):
    """From the first report on. The time left is estimated from the steps after the first of this process."""
    with Progress("train", 140, "steps", done=20) as progress:
        for step in range(21, 141):
            clock(step / 5)
            progress.advance(1)
            if step % 60 == 0:
                progress.report(f"loss {step / 100:.2f}")
                progress.say("held-out  loss 2")
    assert capsys.readouterr().err.splitlines() == [
        "train: 50/140 steps  0:18 left",
        "train: 60/140 steps  loss 0.60  0:16 left",
        "held-out  loss 2",
        "train: 120/140 steps  loss 1.20  0:04 left",
        "held-out  loss 2",
    ]


def test_work_that_fails_is_not_reported_as_done(capsys):
    with pytest.raises(KeyboardInterrupt), Progress("embed", 2, "lines") as progress:
        progress.advance(1)
        raise KeyboardInterrupt
    assert capsys.readouterr().err == ""


def test_without_a_description_it_is_silent(capsys, monkeypatch):
    pretend_terminal(monkeypatch)
    with Progress(None, 2, "lines") as progress:
        progress.advance(1)
        progress.report("loss 1")
        progress.say("a line")
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(capsys, monkeypatch):
    pretend_terminal(monkeypatch)
    with Progress("train [x]", 4, "steps", done=1) as progress:
        progress.advance(1)
        progress.report("loss 1.25 [bold]")
        progress.say("held-out [loss] 2")
        progress.advance(2)
    shown = capsys.readouterr().err
    assert all(text in shown for text in ("train [x]", "4/4 steps", "100%", "loss 1.25 [bold]", "held-out [loss] 2\n"))


def test_plain_lines_where_rich_is_missing(capsys, monkeypatch):
    pretend_terminal(monkeypatch)
    monkeypatch.setitem(sys.modules, "rich", None)
    with Progress("embed", 1, "lines") as progress:
        progress.advance(1)
    assert capsys.readouterr().err == "embed: 1/1 lines\n"
