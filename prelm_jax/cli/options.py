"""Command-line options from the signature of a function, by tyro: the glue, help, and one-line complaints.

A command is a function. Its parameters are options, unless they are `Positional`; its docstring is their help. A
parameter with a `Choice` becomes the first argument, which names a configuration (an experiment, for example), and each
field of that configuration becomes an option too. Unions of configurations are not supported: tyro turns them into
subcommands.
"""

import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro

from prelm_jax.bounds import OutOfBounds
from prelm_jax.errors import InputError
from prelm_jax.validation import check

Positional = tyro.conf.Positional
Bound = Callable[..., None]  # a command and the values of its parameters
Parse = Callable[[Sequence[str]], Bound]
Kind = TypeVar("Kind")
Value = TypeVar("Value")


def _parse_step(word: str) -> int | Literal["best", "newest"]:
    if word == "best" or word == "newest":
        return word
    if not word.isdecimal():
        raise ValueError(f"{word} is neither a number nor best nor newest")
    return int(word)


def _word(metavar: str, parse: Callable[[str], Value]) -> tyro.constructors.PrimitiveConstructorSpec[Value]:
    """How tyro reads an option of one word."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: parse(words[0]),
        is_instance=lambda value: isinstance(value, int | str),
        str_from_instance=lambda value: [str(value)],
    )


# A path stays as typed: pathlib would make gs:/bucket of gs://bucket.
AnyPath = Annotated[str, _word("PATH", str)]
Step = Annotated[
    int | Literal["best", "newest"],
    _word("N|best|newest", _parse_step),
    tyro.conf.arg(help="Checkpoint of a work directory: number of its step, best (lowest held-out loss) or newest."),
]
ModelPath = Annotated[AnyPath, Positional, tyro.conf.arg(help="Model directory, work directory or hub:OWNER/NAME.")]
TokenizerPath = Annotated[
    Path,
    Positional,
    tyro.conf.arg(help="Directory of a tokenizer or model, a vocab.txt, or a vocab.json with its merges next to it."),
]
Cased = Annotated[
    bool, tyro.conf.arg(help="Keep capitals. Only for a tokenizer without do_lower_case, such as a lone vocab.txt.")
]
TextFile = Annotated[Path, Positional, tyro.conf.arg(help="Text file in UTF-8, one text per line; lines end at LF.")]


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What the first argument named. `name` replaces {name} in the defaults of the command's own parameters."""

    name: str
    value: object  # a dataclass instance, whose fields become options
    description: str = ""


@dataclasses.dataclass(frozen=True)
class Choice:
    """Marks the parameter whose value the first argument names: `run: Annotated[Run, EXPERIMENT]`."""

    name: str  # "experiment": in usage EXPERIMENT
    help: str
    choose: Callable[[str], Chosen]
    catalog: Callable[[], str]  # what there is to choose from, for the help
    placeholder: str = ""  # replaces {name} in the help, before anything is chosen


class Remainder:
    """Marks the option that takes all arguments after it, whatever they look like."""


def call(command: Callable[..., None], arguments: Sequence[str], program: str) -> None:
    """Parses the arguments by the signature of the command, and calls it.

    Without arguments, a command that needs some prints its help and exits with 1.
    Raises InputError, one line, for arguments that do not fit.
    """
    parameters = list(inspect.signature(command).parameters.values())
    choice = next((found for parameter in parameters if (found := _metadata(parameter, Choice))), None)
    remainder = next((parameter.name for parameter in parameters if _metadata(parameter, Remainder)), None)
    description = (inspect.getdoc(command) or "").partition("\nArgs:")[0].strip()
    remainders: dict[str, tuple[str, ...]] = {}
    if remainder is not None and f"--{remainder}" in arguments:
        cut = arguments.index(f"--{remainder}")
        arguments, remainders = arguments[:cut], {remainder: tuple(arguments[cut + 1 :])}

    if not arguments and any(parameter.default is parameter.empty for parameter in parameters):
        with contextlib.suppress(SystemExit):
            call(command, ["--help"], program)
        sys.exit(1)
    chosen, helping = None, bool({"-h", "--help"} & set(arguments))
    if choice is not None and not arguments[0].startswith("-"):
        chosen = choice.choose(arguments[0])
        program, arguments = f"{program} {arguments[0]}", arguments[1:]
        description = f"{description}\n\n{chosen.description}".strip()
    elif choice is not None and not helping:
        metavar = choice.name.upper()
        raise InputError(f"usage: {program} {metavar} [options]. {metavar} comes first; {program} --help explains it.")

    interface, config = _interface(command, choice, chosen), (tyro.conf.PositionalMetavarFromFieldName,)

    def parse(words: Sequence[str]) -> Bound:
        return tyro.cli(interface, args=words, prog=program, description=description, config=config)

    if helping:
        try:
            parse(arguments)
        finally:
            if choice is not None and chosen is None:
                print(choice.catalog())
    try:
        bound, complaint = _captured(parse, arguments)
    except OutOfBounds as error:
        raise InputError(f"{_option(error.path, _known_options(parse))} {error.shown}: {error.rule}") from None
    if bound is None:
        reason = _unknown_option(arguments, _known_options(parse)) or _one_line(complaint)
        raise InputError(f"{reason} {program} --help lists the options.")
    bound(**remainders)


def suggestion(word: str, known: Iterable[str]) -> str:
    """` Did you mean …?` with the known word nearest to `word`; nothing where none is near.

    Options are compared by the last part of their names before the whole: suggestion("--lerning-rate",
    ["--optimizer.learning-rate", "--steps"]) is " Did you mean --optimizer.learning-rate?".
    """

    def ratio(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a.lstrip("-"), b.lstrip("-")).ratio()

    def similarity(other: str) -> tuple[float, float]:
        whole = ratio(word, other)
        return ratio(word.rpartition(".")[2], other.rpartition(".")[2]) if word.startswith("--") else whole, whole

    best = max(known, key=similarity, default="")
    return f" Did you mean {best}?" if similarity(best)[0] >= 0.6 else ""


def _metadata(parameter: inspect.Parameter, kind: type[Kind]) -> Kind | None:
    """The metadata of a kind in the annotation of a parameter, `Annotated[…, metadata]`."""
    found = getattr(parameter.annotation, "__metadata__", ())
    return next((each for each in found if isinstance(each, kind)), None)


def _interface(command: Callable[..., None], choice: Choice | None, chosen: Chosen | None) -> Callable[..., Bound]:
    """A function for tyro, with the docstring of the command and its parameters as this call has them.

    tyro calls it with the parsed values; it returns the command bound to them, to be called when parsing is over.
    """

    def bind(**values: object) -> Bound:
        for parameter in inspect.signature(command).parameters.values():
            path = () if _metadata(parameter, Choice) else (parameter.name,)
            check(values.get(parameter.name, parameter.default), parameter.annotation, path)
        return functools.partial(command, **values)

    name = chosen.name if chosen is not None else choice.placeholder if choice is not None else ""
    parameters, annotations = [], {}
    for parameter in inspect.signature(command).parameters.values():
        if _metadata(parameter, Choice) is None:
            annotations[parameter.name] = parameter.annotation
            if isinstance(parameter.default, str) and "{name}" in parameter.default:
                parameter = parameter.replace(default=parameter.default.format(name=name))
        elif chosen is None and choice is not None:
            annotations[choice.name] = Annotated[str, Positional, tyro.conf.arg(help=choice.help)]
            parameter = parameter.replace(name=choice.name)
        elif chosen is not None:
            chosen_type = type(chosen.value)
            annotations[parameter.name] = Annotated[chosen_type, tyro.conf.arg(name="")]
            parameter = parameter.replace(default=chosen.value)
        parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    bind.__doc__ = command.__doc__
    bind.__annotations__ = annotations
    setattr(bind, "__signature__", inspect.Signature(parameters))  # noqa: B010 (no type checker knows this attribute)
    return bind


def _known_options(parse: Parse) -> list[str]:
    """The options that the help lists."""
    _, text = _captured(parse, ["--help"])
    return [
        word
        for line in text.splitlines()
        if line.startswith("│ -")
        for word in re.findall(r"(?<!\S)--?[a-zA-Z][\w.-]*", line.strip("│ ").partition("  ")[0])
    ]


def _option(path: Sequence[str | int], known: Sequence[str]) -> str:
    """The option that sets the field at a path: --mesh.devices for loop.mesh.devices, where `loop` has no prefix."""
    names = [str(name).replace("_", "-") for name in path if isinstance(name, str)]
    options = ["--" + ".".join(names[i:]) for i in range(len(names))]
    return next((option for option in options if option in known), ".".join(map(str, path)))


def _unknown_option(arguments: Sequence[str], known: Sequence[str]) -> str | None:
    """The complaint about the first option that is not known; None if all are."""
    for argument in arguments:
        if argument.startswith("-") and os.path.lexists(argument):
            return f"{argument} is read as an option: write ./{argument} for the file of that name."
        option = argument.partition("=")[0]
        if re.match(r"--[a-zA-Z]", option) and option.replace("_", "-") not in known:
            if field := next((each for each in known if each.startswith(f"{option}.")), None):
                return f"{option} is not an option, but {field} is; to change its class, edit a copy of the experiment."
            return f"there is no option {option}.{suggestion(option.replace('_', '-'), known)}"
    return None


def _one_line(complaint: str) -> str:
    """The first section of tyro's box as one line; for missing options, their names alone."""
    title, *rows = complaint.splitlines()
    section = []
    for row in rows:
        if row.startswith(("│ ──", "│ Got errors", "╰")):  # Which has the names of Python's types.
            break
        section.append(row.removeprefix("│").removesuffix("│").rstrip())
    if "Required options" in title:
        names = [row.split()[0] for row in section if re.match(r" {5}\S", row)]
        return f"{', '.join(names)} must be given."
    return " ".join(filter(None, map(str.strip, section))).removesuffix(".") + "."


class _Output(io.StringIO):
    encoding = "utf-8"  # With another one, tyro draws no boxes.


def _captured(parse: Parse, words: Sequence[str]) -> tuple[Bound | None, str]:
    """The result of a parse, None if it exits, and what tyro prints: without colors, its boxes one below the other."""
    output, environment = _Output(), dict(os.environ)
    os.environ["COLUMNS"] = "100"
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            return parse(words), ""
    except SystemExit:
        return None, output.getvalue()
    finally:
        os.environ.pop("COLUMNS")
        os.environ.update(environment)
