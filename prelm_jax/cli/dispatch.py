"""The commands by name, and which one the arguments name."""

import inspect
import sys
from collections.abc import Iterable

from prelm_jax import __version__
from prelm_jax.cli import finetuning, models, options, serving, tasks, tokenizers, training
from prelm_jax.cli.experiments import experiments
from prelm_jax.cli.study import study
from prelm_jax.errors import InputError
from prelm_jax.validation import check

COMMANDS = {
    "experiments": experiments,
    "pretrain": training.pretrain,
    "finetune": finetuning.finetune,
    "evaluate": training.evaluate,
    "report": training.report,
    "export": training.export,
    "prepare": training.prepare,
    "batch": training.batch,
    "plan": training.plan,
    "embed": models.embed,
    "score": models.score,
    "fill": models.fill,
    "generate": models.generate,
    "classify": tasks.classify,
    "tag": tasks.tag,
    "answer": tasks.answer,
    "choose": tasks.choose,
    "study": study,
    "serve": serving.serve,
    "tokenize": tokenizers.tokenize,
    "tokenizer train": tokenizers.train,
    "tokenizer inspect": tokenizers.inspect_tokenizer,
}


def dispatch(arguments: list[str]) -> None:
    """Calls the command that the first argument names, or the first two: `tokenizer train`."""
    for argument in arguments:
        check(argument, str, ("the argument",))
    if not arguments or arguments[0] in ("-h", "--help"):
        _print_commands("prelm", COMMANDS)
        return
    if arguments[0] == "--version":
        print(f"prelm_jax {__version__}")
        return
    group = next((arguments[0] for name in COMMANDS if name.startswith(f"{arguments[0]} ")), None)
    program, words = ("prelm", 1) if group is None else (f"prelm {group}", 2)
    name, rest = " ".join(arguments[:words]), arguments[words:]
    known = [each for each in COMMANDS if group is None or each.startswith(f"{group} ")]
    if name in COMMANDS:
        options.call(COMMANDS[name], rest, f"prelm {name}")
    elif name == group or (group is not None and arguments[1] in ("-h", "--help")):
        _print_commands(program, known)
        sys.exit(1 if name == group else 0)
    else:
        suggestion = options.suggestion(name, known)
        raise InputError(f"there is no command {name!r}.{suggestion} {program} --help lists the commands.")


def _print_commands(program: str, names: Iterable[str]) -> None:
    print(f"usage: {program} COMMAND … ({program} COMMAND --help explains a command and its options)\n")
    for name in names:
        print(f"  {name:18} {(inspect.getdoc(COMMANDS[name]) or '').partition(chr(10))[0]}")
    if program == "prelm":
        print("\n  --version          Print the version.")
