"""The report page during training: report.html in its work directory, which reloads itself in a browser."""

import contextlib
import os
import subprocess
import sys
import time
from typing import Literal, Self

from prelm_jax.report.page import REFRESH
from prelm_jax.storage import write_file
from prelm_jax.workdir import WorkDir

SECONDS = 30  # Between two pages at least. A run that is shorter writes none.
PROGRAM = "import sys; from prelm_jax.report import page; page.main(*sys.argv[1:])"


class Dashboard:
    """Draws the page of a work directory while its run trains, and once more when the block ends.

    Another process draws, at the lowest priority, so that the training does not wait. If that fails, a line says so,
    and the run continues. After an error in the block the last page stays, and no longer reloads itself.

        with Dashboard(workdir, active=jax.process_index() == 0) as dashboard:
            ...
            dashboard.refresh()
    """

    def __init__(self, workdir: WorkDir, active: bool):
        self._workdir, self._page, self._active = workdir.path, workdir.path / "report.html", active
        self._process: subprocess.Popen[str] | None = None
        self._due = time.monotonic() + SECONDS
        self._said: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def refresh(self) -> None:
        """Has the page drawn if the last one is old enough."""
        if not self._active or time.monotonic() < self._due:
            return
        if self._process is not None and self._process.poll() is None:
            return
        self._say(f"curves: {self._page}")
        self._complain()
        self._draw("running")

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if not self._active:
            return
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        with contextlib.suppress(Exception):  # A bucket raises anything.
            there = self._page.is_file()
            if error_type is None and (there or self._process is not None or time.monotonic() >= self._due):
                self._draw("finished")
                self._complain()
            elif there:
                write_file(self._page, self._page.read_bytes().replace(REFRESH.encode(), b""))

    def _draw(self, state: Literal["running", "finished"]) -> None:
        """Starts the process that draws."""
        self._due = time.monotonic() + SECONDS
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", PROGRAM, str(self._workdir), str(self._page), state],
                # It finds the modules that this process has found, and leaves the accelerators alone.
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C ends the run, which then ends this process.
            )
            if state == "running":
                os.setpriority(os.PRIO_PROCESS, self._process.pid, 19)
        except OSError as error:
            self._say(f"{self._page} could not be drawn: {error}")

    def _complain(self) -> None:
        """Waits for the process that draws, and says why it failed."""
        if self._process is not None:
            _, errors = self._process.communicate()
            if self._process.returncode:
                *_, reason = ["killed", *errors.strip().splitlines()]
                self._say(f"{self._page} could not be drawn: {reason}")
            self._process = None

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            print(line, file=sys.stderr)
