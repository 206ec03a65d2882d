"""The command line, `prelm COMMAND …`: dispatch, errors, exit codes (0 done, 1 user error, 75 stopped by SIGTERM)."""

import errno
import inspect
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

from prelm_jax import __version__
from prelm_jax.bounds import check
from prelm_jax.cli import models, options, tokenizers, training
from prelm_jax.cli.experiments import experiments
from prelm_jax.errors import InputError, Preempted

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

USER_ERROR = 1
PREEMPTED = 75

# Errors of the system when it cannot write: no permission, no space, something else in the way.
UNWRITABLE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR),
}

COMMANDS = {
    "experiments": experiments,
    "pretrain": training.pretrain,
    "evaluate": training.evaluate,
    "export": training.export,
    "prepare": training.prepare,
    "batch": training.batch,
    "plan": training.plan,
    "embed": models.embed,
    "score": models.score,
    "fill": models.fill,
    "generate": models.generate,
    "tokenize": tokenizers.tokenize,
    "tokenizer train": tokenizers.train,
    "tokenizer inspect": tokenizers.inspect_tokenizer,
}


def main(arguments: list[str] | None = None) -> None:
    """The console script."""
    _hush_checkpoint_threads()
    try:
        _dispatch(sys.argv[1:] if arguments is None else arguments)
    except InputError as error:
        print(f"prelm: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except Preempted as stop:
        print(f"prelm: {stop}", file=sys.stderr)
        sys.exit(PREEMPTED)
    except BrokenPipeError:  # `prelm … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in UNWRITABLE and error.filename is None:
            raise
        verb = "write" if error.errno in UNWRITABLE else "use"
        message = InputError(f"cannot {verb} {error.filename or 'a file'}: {error.strerror}")
        print(f"prelm: {message}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        print("prelm: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _dispatch(arguments: list[str]) -> None:
    """Calls the command that the first argument names, or the first two: `tokenizer train`."""
    for argument in arguments:
        check(argument, str, ("the argument",))
    if not arguments or arguments[0] in ("-h", "--help"):
        _print_commands("prelm", COMMANDS)
        return
    if arguments[0] == "--version":
        print(f"prelm_jax {__version__}")
        return
    groups = {name.partition(" ")[0] for name in COMMANDS if " " in name}
    words = 2 if arguments[0] in groups else 1
    name, rest = " ".join(arguments[:words]), arguments[words:]
    if name in COMMANDS:
        options.call(COMMANDS[name], rest, f"prelm {name}")
    elif name in groups or (words == 2 and arguments[1] in ("-h", "--help")):
        _print_commands(f"prelm {arguments[0]}", [each for each in COMMANDS if each.startswith(f"{arguments[0]} ")])
        sys.exit(USER_ERROR if name in groups else 0)
    else:
        program = f"prelm {arguments[0]}" if words == 2 else "prelm"
        known = [each for each in COMMANDS if words == 1 or each.startswith(f"{arguments[0]} ")]
        found = options.suggestion(name, known)
        raise InputError(f"there is no command {name!r}.{found} {program} --help lists the commands.")


def _print_commands(program: str, names: Iterable[str]) -> None:
    print(f"usage: {program} COMMAND … ({program} COMMAND --help explains a command and its options)\n")
    for name in names:
        print(f"  {name:18} {(inspect.getdoc(COMMANDS[name]) or '').partition(chr(10))[0]}")
    if program == "prelm":
        print("\n  --version          Print the version.")


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
