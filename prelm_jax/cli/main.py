"""The command line, `prelm COMMAND …`: errors, exit codes (0 done, 1 user error, 75 stopped by SIGTERM)."""

import contextlib
import errno
import logging
import os
import signal
import sys
import threading
import warnings
from typing import TYPE_CHECKING

from prelm_jax.cli.signals import PREEMPTED, ending_on_signals
from prelm_jax.errors import InputError, Preempted

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

USER_ERROR = 1

# Errors of the system when it cannot write: no permission, no space, something else in the way.
UNWRITABLE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR),
}

# Commands that leave nothing half done, so that the same command resumes after a signal.
RESUMABLE = {"pretrain", "finetune", "prepare", "study"}

# Has glibc ask Linux for huge pages. It reads this variable at the start of a process, and no other setting does that.
ALLOCATOR, HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"


def console() -> None:
    """The console script: `main`, but after an error the process ends without waiting for the threads of libraries.

    Python waits for them at its end, and the threads of a failed save have taken minutes.
    """
    ask_for_huge_pages()
    try:
        main()
    except SystemExit as end:
        if end.code and any(not each.daemon for each in threading.enumerate() if each is not threading.main_thread()):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(end.code))
        raise


def ask_for_huge_pages() -> None:
    """Starts this process again, under the same id, with huge pages, where a model will be trained.

    XLA allocates new temporary arrays in each step on a CPU. In pages of 4 kB, a sixth of the step of a
    small BERT goes into them.
    """
    if sys.platform == "linux" and set(sys.argv[1:2]) & {"pretrain", "finetune"} and ALLOCATOR not in os.environ:
        os.execve(sys.executable, sys.orig_argv, os.environ | {ALLOCATOR: HUGE_PAGES})


def main(arguments: list[str] | None = None) -> None:
    """Calls the command that the arguments name; without any, the arguments of the process. Errors raise SystemExit."""
    _hush_checkpoint_threads()
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        with ending_on_signals() if RESUMABLE & set(arguments[:1]) else contextlib.nullcontext():
            from prelm_jax.cli.dispatch import dispatch  # Importing it takes a while: a signal may come.

            dispatch(arguments)
    except InputError as error:
        _exit(error, USER_ERROR)
    except Preempted as stop:
        _exit(stop, PREEMPTED)
    except BrokenPipeError:  # `prelm … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in UNWRITABLE and error.filename is None:
            raise
        verb = "write" if error.errno in UNWRITABLE else "use"
        _exit(InputError(f"cannot {verb} {error.filename or 'a file'}: {error.strerror}"), USER_ERROR)
    except KeyboardInterrupt:
        _exit("interrupted", 128 + signal.SIGINT)


def _exit(message: object, code: int) -> None:
    print(f"prelm: {message}", file=sys.stderr)
    sys.exit(code)


def _hush_checkpoint_threads() -> None:
    """Silences the tracebacks of Orbax's threads: a save or restore that fails raises one exception as well."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited")

    # TensorStore finishes in threads what Orbax no longer waits for; Python hands their exceptions to this hook.
    usual = sys.unraisablehook

    def unraisablehook(unraisable: "UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            usual(unraisable)

    sys.unraisablehook = unraisablehook
