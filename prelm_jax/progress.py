"""How far long work over a corpus has come."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

Advance = Callable[[float], None]  # told how many bytes of the corpus' files were dealt with since the last call

SECONDS_BETWEEN_LINES = 10


@contextlib.contextmanager
def progress(task: str | None, total: int) -> Iterator[Advance]:
    """Shows on the standard error how much of `total` bytes is done: a bar on a terminal, else a line now and then.

    Nothing is shown without a `task`, a few words that name the work.
    """
    if task is None:
        yield lambda size: None
    elif sys.stderr.isatty():
        words = TextColumn("{task.description}")
        columns = (words, BarColumn(), TaskProgressColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            identifier = bar.add_task(task, total=total)
            yield lambda size: bar.advance(identifier, size)
    else:
        started = reported = time.monotonic()
        done = 0.0

        def report(more: bool):
            speed = done / max(time.monotonic() - started, 1e-9)
            minutes, seconds = divmod(round((total - done) / max(speed, 1e-9)), 60)
            left = f", {minutes}:{seconds:02} left" if more else ""
            print(
                f"{task}: {done / 1e6:.1f} of {total / 1e6:.1f} MB read, {speed / 1e6:.1f} MB/s{left}", file=sys.stderr
            )

        def advance(size: float):
            nonlocal done, reported
            done += size
            if time.monotonic() - reported >= SECONDS_BETWEEN_LINES:
                reported = time.monotonic()
                report(more=True)

        yield advance
        report(more=False)
