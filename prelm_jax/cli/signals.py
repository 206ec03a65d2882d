"""SIGTERM and SIGINT end a command within seconds, wherever it is."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from prelm_jax.errors import Preempted

PREEMPTED = 75
STOPPED = "stopped by SIGTERM; the same command resumes"

PATIENCE_SECONDS = 5.0

Handler = Callable[[int, FrameType | None], None]


@contextlib.contextmanager
def ending_on_signals() -> Iterator[None]:
    """In the block, SIGTERM raises Preempted and SIGINT KeyboardInterrupt in the main thread, at any moment.

    Python delivers neither while the main thread compiles a program, for example. A thread therefore ends the process,
    with a line, if it still runs 5 seconds after a signal: nothing is lost, because all files are replaced in one step.
    Code that has something to save installs its own handler meanwhile, and the thread waits for its end.

    Outside of the main thread, where no handler can be installed, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    ended = threading.Event()
    came = False

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if not came:  # Later signals do not disturb the cleanup.
            came = True
            raise Preempted(STOPPED)

    previous = signal.signal(signal.SIGTERM, handler)
    previous_writer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_end_in_time, args=(reader, handler, ended), name="signals", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(previous_writer)
        signal.signal(signal.SIGTERM, previous)
        os.close(writer)


def _end_in_time(reader: int, handler: Handler, ended: threading.Event) -> None:
    """Waits for a signal, and then for the end of the block. The numbers of signals arrive as bytes."""
    with open(reader, "rb", buffering=0) as numbers:
        while (number := next(iter(numbers.read(1)), None)) not in (None, signal.SIGTERM, signal.SIGINT):
            pass
    while number is not None and not ended.wait(PATIENCE_SECONDS):
        if signal.getsignal(number) in (handler, signal.default_int_handler):
            terminated = number == signal.SIGTERM
            print(f"prelm: {STOPPED if terminated else 'interrupted'}", file=sys.stderr, flush=True)
            os._exit(PREEMPTED if terminated else 128 + number)
