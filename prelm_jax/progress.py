"""Progress of long work, on the standard error: a bar on a terminal, else a plain line now and then."""

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Self

if TYPE_CHECKING:  # At run time rich is imported only on a terminal, and may be missing.
    from rich.progress import Progress as Bar

Advance = Callable[[float], None]  # Called with the number of units done since the last call.

SECONDS_BETWEEN_LINES = 10


class Progress:
    """How much of `total` units of work is done. Silent if `description` is None.

    On a terminal a bar with the description, percentage, count, a free text and the time left. Elsewhere lines of the
    same: at each `report`, or for work that does not report every 10 seconds and at the end.

        with Progress("embed", len(texts), "lines") as progress:
            for text in texts:
                embed(text)
                progress.advance(1)
    """

    def __init__(
        self,
        description: str | None,
        total: float,
        unit: Literal["batches", "bytes", "lines", "rows", "steps"],
        done: float = 0,
    ):
        self.description, self.total, self.unit, self.done = description, total, unit, done
        self._text = ""
        self._bar = self._start_bar() if description is not None and sys.stderr.isatty() else None
        self._printed = time.monotonic()
        # The time left is estimated from here on: before the first advance a program may be compiled.
        self._first_advance: tuple[float, float] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self.close(complete=error_type is None)

    def advance(self, amount: float) -> None:
        """Counts `amount` more units as done."""
        self.done += amount
        now = time.monotonic()
        if self._first_advance is None:
            self._first_advance = now, self.done
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], total=self.total, completed=self.done, count=self._count())
        elif not self._text and now - self._printed >= SECONDS_BETWEEN_LINES:
            self._print_line()

    def report(self, text: str) -> None:
        """Sets the free text. Without a terminal, prints a line at once."""
        self._text = text
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], text=text)
        else:
            self._print_line()

    def say(self, line: str) -> None:
        """Prints a line, on a terminal above the bar."""
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, soft_wrap=True, markup=False)
        elif self.description is not None:
            print(line, file=sys.stderr)

    def close(self, complete: bool = True) -> None:
        """Ends the display. If `complete`, work that does not report prints its last line."""
        if self._bar is not None:
            self._bar.stop()
        elif complete and not self._text:
            self._print_line()

    def _print_line(self) -> None:
        self._printed = now = time.monotonic()
        parts = [f"{self.description}: {self._count()}", self._text]
        if self._first_advance is not None:
            began, done = self._first_advance
            if self.total > self.done > done:
                seconds = round((self.total - self.done) * (now - began) / (self.done - done))
                parts.append(f"{seconds // 60}:{seconds % 60:02} left")
        self.say("  ".join(filter(None, parts)))

    def _count(self) -> str:
        if self.unit == "bytes":
            return f"{self.done / 1e6:.1f}/{self.total / 1e6:.1f} MB"
        return f"{self.done:.0f}/{self.total:.0f} {self.unit}"

    def _start_bar(self) -> "Bar | None":
        try:
            from rich import progress
            from rich.console import Console
        except ImportError:
            return None
        bar = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TextColumn("{task.fields[count]}", markup=False),
            progress.TextColumn("{task.fields[text]}", markup=False),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        task = bar.add_task(self.description or "", total=self.total, count=self._count(), text="")
        bar.update(task, completed=self.done)
        bar.start()
        return bar
