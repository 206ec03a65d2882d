"""Experiments by name: `bert:mini` of those that come with the package, or FILE.py:NAME of anybody's."""

import ast
import contextlib
import dataclasses
import importlib.util
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

from prelm_jax.cli.options import Choice, Chosen, suggestion
from prelm_jax.errors import InputError

if TYPE_CHECKING:
    from prelm_jax.finetuning.config import FineTuning
    from prelm_jax.run import Run

Experiment = TypeVar("Experiment")

ADVICE = """\
Every field of the experiment is an option. To change the class of its model, tokenizer, data or optimizer, edit a copy:
`prelm experiments --copy {file}`."""


def experiments(copy: str | None = None) -> None:
    """List the experiments that come with prelm_jax: what each is for, its target and its cost.

    Args:
        copy: Write this file of experiments (bert.py, …) to the current directory, for you to edit, instead of listing.
    """
    if copy is not None:
        source, target = _shipped_file(copy.removesuffix(".py")), Path(Path(copy).name).with_suffix(".py")
        try:
            with open(target, "xb") as file:
                file.write(source.read_bytes())
        except FileExistsError:
            raise InputError(f"{target} already exists. Move it, or copy from another directory.") from None
        name, docstring = next(iter(docstrings(source).items()))
        print(f"wrote {target}. Edit it, then: prelm {_command(docstring)} {target}:{name}")
        return
    for file in shipped_files():
        for name, docstring in docstrings(file).items():
            print(f"{file.stem}:{name}")
            for line in (docstring.partition("\n")[0], *_facts(docstring)):
                print(textwrap.fill(line, 100, initial_indent="    ", subsequent_indent="    "))
            print()
    print("prelm pretrain EXPERIMENT and prelm finetune TASK start one; with --help after it they explain its options.")


def shipped_files() -> list[Path]:
    """The experiments of the package: inside of it where it is installed, next to it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "experiments"
    return sorted((installed if installed.is_dir() else package.parent / "experiments").glob("[!_]*.py"))


def docstrings(file: Path) -> dict[str, str]:
    """The docstrings of the public functions in a file that need no arguments. The file is not executed."""
    found = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            required = len(node.args.posonlyargs) + len(node.args.args) - len(node.args.defaults)
            if required == 0 and None not in node.args.kw_defaults:
                found[node.name] = ast.get_docstring(node) or ""
    return found


def load_run(reference: str) -> tuple[str, "Run", str]:
    """Executes the file of an experiment and calls its function: the name of the run, the Run, and a description.

    Raises InputError for every mistake in the reference or in the file, naming the line.

        load_run("bert:base_512")[0] is "bert-base-512"
    """
    from prelm_jax.run import Run

    path, name, run, description = _load(reference, Run)
    return f"{path.stem}-{name}".replace("_", "-"), run, description


def load_task(reference: str) -> tuple[str, "FineTuning", str]:
    """Like `load_run`, for a function that returns a FineTuning: its name, the FineTuning, and a description."""
    from prelm_jax.finetuning.config import FineTuning

    return _load(reference, FineTuning)[1:]


def load_run_or_task(reference: str) -> tuple[str, "Run | FineTuning", str]:
    """Like `load_run`, for a function that returns a Run or a FineTuning."""
    from prelm_jax.finetuning.config import FineTuning
    from prelm_jax.run import Run

    return _load(reference, Run, FineTuning)[1:]


def _load(reference: str, *kinds: type[Experiment]) -> tuple[Path, str, Experiment, str]:
    """The file, the name of the function, what it returns, and its description."""
    file, name = reference.rsplit(":", 1) if ":" in reference else (reference, "")
    path = Path(file) if file.endswith(".py") or Path(file).exists() else _shipped_file(file)
    if not path.is_file():
        neighbors = [*map(str, path.parent.glob("*.py")), *(file.stem for file in shipped_files())]
        raise InputError(f"there is no experiment file {file}.{suggestion(file, neighbors)}{_HINT}")
    if path.suffix != ".py":
        raise InputError(f"{file} is not a Python file: give FILE.py:NAME.")
    module, found = _execute(path), docstrings(path)
    if name not in found:
        known = ", ".join(f"{file}:{known}" for known in found) or "no function without arguments"
        missing = f"has no experiment {name!r}.{suggestion(name, found)}"
        mistake = missing if name else "holds several experiments: name one."
        raise InputError(f"{file} {mistake} It holds {known}.")
    with _one_line_errors(path):
        run = getattr(module, name)()
    if not isinstance(run, kinds):
        wanted = " or a ".join(kind.__name__ for kind in kinds)
        raise InputError(f"{reference} returns {type(run).__name__}: it must return a {wanted}.")
    for component in ("tokenizer", "model", "data", "head", "optimizer"):
        config = getattr(run, component, run)  # A Run has no head, a FineTuning no data.
        if not dataclasses.is_dataclass(config):
            raise InputError(f"{reference}: {component} is {config!r}: must be a config, an instance of a dataclass")
    description = f"{reference}: {found[name] or 'no docstring.'}\n\n{ADVICE.format(file=path.name)}"
    return path, name, run, description


def catalog(command: str, title: str) -> str:
    """A line for each experiment of the package that a command takes, after a title."""
    lines = [
        f"  {f'{file.stem}:{name}':26} {docstring.partition(chr(10))[0]}"
        for file in shipped_files()
        for name, docstring in docstrings(file).items()
        if _command(docstring) == command
    ]
    return "\n".join([f"{title} (`prelm experiments` says more):", *lines])


def _command(docstring: str) -> str:
    """The command that takes an experiment, by its docstring: pretrain, unless it says `prelm finetune`."""
    return "finetune" if re.search(r"^ *prelm finetune ", docstring, re.MULTILINE) else "pretrain"


def _choice(noun: str, command: str, returns: str, load: Callable[[str], tuple[str, object, str]]) -> Choice:
    return Choice(
        name=noun.split()[-1],
        help=f"Name of {noun}, or FILE.py:NAME: a function without arguments that returns a {returns}. Followed by "
        f"--help, its description and its options, one for each field of the {returns}.",
        choose=lambda reference: Chosen(*load(reference)),
        catalog=partial(catalog, command, f"{noun.split()[-1]}s"),
        placeholder="FILE-NAME",
    )


EXPERIMENT = _choice("an experiment", "pretrain", "Run", load_run)
TASK = _choice("a task", "finetune", "FineTuning", load_task)

EXPERIMENT_OR_TASK = Choice(
    name="experiment",
    help="Name of an experiment or a task, or FILE.py:NAME: a function without arguments that returns a Run or a "
    "FineTuning. Followed by --help, its description and its options, one for each field.",
    choose=lambda reference: Chosen(*load_run_or_task(reference)),
    catalog=lambda: f"{EXPERIMENT.catalog()}\n\n{TASK.catalog()}",
    placeholder="FILE-NAME",
)

_HINT = " prelm experiments lists those that come with the package; your own are FILE.py:NAME."


def _facts(docstring: str) -> Iterator[str]:
    """`Target: …` and `Cost: …` of a docstring, a line each."""
    for paragraph in re.split(r"\n\s*\n|\n(?=[A-Z]\w+: )", docstring):
        if re.match("(Target|Cost): ", paragraph):
            yield " ".join(paragraph.split())


def _shipped_file(name: str) -> Path:
    """The file of the experiments `bert`; InputError if there is none."""
    names = {file.stem: file for file in shipped_files()}
    if name not in names:
        raise InputError(f"there are no experiments {name!r}.{suggestion(name, names)}{_HINT}")
    return names[name]


def _execute(path: Path) -> ModuleType:
    """The module of a file.

    It is in `sys.modules`, where tyro finds the comments behind the fields of its classes. Worker processes cannot
    import it: they receive its objects by value.
    """
    import cloudpickle

    name = f"prelm_experiments_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    cloudpickle.register_pickle_by_value(module)
    with _one_line_errors(path):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    """Turns whatever the code of an experiment raises into an InputError with the file, the line and the error."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit() too.
        file = str(path.absolute())
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        if isinstance(error, SyntaxError) and error.filename == file:
            lines = [error.lineno]
        where = f"{path}, line {lines[-1]}" if lines else str(path)
        message = f"{error}" if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        raise InputError(f"{where}: {' '.join(message.split())}") from None
