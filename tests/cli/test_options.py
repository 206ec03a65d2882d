"""Suggestions, complaints in one line, and what a command receives."""

import dataclasses
from typing import Annotated, Any, Literal

import pytest
import tyro

from prelm_jax.bounds import Size
from prelm_jax.cli.options import AnyPath, Choice, Chosen, Positional, Remainder, Step, call, suggestion
from prelm_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Mesh:
    devices: int = 0  # Number of devices.


@dataclasses.dataclass(frozen=True)
class Loop:
    """Settings of the loop."""

    steps: int  # Steps to train.
    save_every: int = 1000  # Steps between checkpoints.
    mesh: Mesh = Mesh()


@dataclasses.dataclass(frozen=True)
class Adam:
    learning_rate: float = 0.1  # Rate at the first step.
    decay: Literal["linear", "cosine"] = "linear"  # Shape of the schedule.


@dataclasses.dataclass(frozen=True)
class Toy:
    """A run."""

    corpus: tuple[str, ...]  # Sources of text.
    optimizer: Any
    loop: Annotated[Loop, tyro.conf.arg(name="")]
    # Seed of everything:
    # model and data.
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class LargerToy(Toy):
    """A subclass with a field of its own."""

    task: str = "copy"  # Task to learn.


received = {}


def choose(name: str) -> Chosen:
    kind = LargerToy if name == "larger" else Toy
    return Chosen(name, kind(("a.txt",), Adam(), Loop(10)), f"The toy {name}.")


TOY = Choice("toy", "Which toy to play with.", choose, lambda: "toys: small, larger", "NAME")


def play(
    toy: Annotated[Toy, TOY], workdir: AnyPath = "runs/{name}", beam: Annotated[tuple[str, ...], Remainder()] = ()
):
    """Play with a toy.

    Args:
        workdir: Where it is.
        beam: Options for somebody else.
    """
    received.update(toy=toy, workdir=workdir, beam=beam)


def read(model: Positional[AnyPath], step: Step = "newest"):
    """Read a model."""
    received.update(model=model, step=step)


def test_fields_of_nested_configurations_are_options():
    """Those of a field whose name is "" without a prefix."""
    call(play, ["small", "--steps", "3", "--mesh.devices", "4", "--optimizer.learning-rate", "2", "--corpus", "b"], "x")
    assert received["toy"] == Toy(("b",), Adam(2.0), Loop(3, mesh=Mesh(4)))
    call(play, ["larger", "--task", "sort", "--save_every", "5"], "x")
    assert received["toy"] == LargerToy(("a.txt",), Adam(), Loop(10, save_every=5), task="sort")


def test_comments_behind_fields_are_their_help(help_of, capsys):
    with pytest.raises(SystemExit) as stopped:
        call(play, ["larger", "--help"], "x")
    assert stopped.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    for help in ("Play with a toy. The toy larger.", "Steps to train. (default: 10)", "Task to learn. (default: copy)"):
        assert help in out
    assert "Seed of everything: model and data. (default: 0)" in out
    assert "Where it is. (default: runs/larger)" in out


def test_the_name_of_the_choice_is_in_defaults():
    call(play, ["small"], "x")
    assert str(received["workdir"]) == "runs/small"
    call(play, ["small", "--workdir", "gs://bucket/run"], "x")
    assert received["workdir"] == "gs://bucket/run"


def test_an_option_for_all_that_follows():
    call(play, ["small", "--steps", "3", "--beam", "--runner=X", "--steps", "9", "--help"], "x")
    assert received["beam"] == ("--runner=X", "--steps", "9", "--help")
    assert received["toy"].loop.steps == 3


@pytest.mark.parametrize(("word", "step"), [("newest", "newest"), ("best", "best"), ("0", 0), ("1200", 1200)])
def test_steps(word, step):
    call(read, ["somewhere", "--step", word], "x")
    assert received["step"] == step


def sized(size: Size | None = None):
    """Take a size."""


def test_a_value_of_no_type_is_refused_without_the_types_of_python():
    with pytest.raises(InputError, match=r"--size: .*\['many'\]\. x --help") as error:
        call(sized, ["--size", "many"], "x")
    assert "Annotated" not in str(error.value)


@pytest.mark.parametrize(
    ("misspelt", "nearest"),
    [
        ("--lerning-rate", "--optimizer.learning-rate"),
        ("--learning_rat", "--optimizer.learning-rate"),
        ("--optimiser.decay", "--optimizer.decay"),
        ("--stpes", "--steps"),
        ("--devices", "--mesh.devices"),
        ("--mesh.device", "--mesh.devices"),
    ],
)
def test_a_misspelt_option_gets_the_nearest(misspelt, nearest):
    for arguments in ([misspelt, "1"], [f"{misspelt}=1"], ["--seed", "x", misspelt]):
        with pytest.raises(InputError) as error:
            call(play, ["small", *arguments], "prelm play")
        message = str(error.value)
        assert f"no option {misspelt}. Did you mean {nearest}? prelm play small --help" in message
        assert "\n" not in message and message.endswith(".")


def test_nothing_is_suggested_for_what_is_not_near():
    assert suggestion("--frobnicate", ["--steps", "--optimizer.decay"]) == ""
    assert suggestion("--x", []) == ""
    with pytest.raises(InputError, match=r"no option --frobnicate\. x small --help"):
        call(play, ["small", "--frobnicate"], "x")


def test_the_class_of_a_component_is_no_option():
    for option in ("--optimizer", "--optimizer=adagrad"):
        with pytest.raises(InputError, match=r"--optimizer is not an option, but --optimizer\.learning-rate is"):
            call(play, ["small", option], "x")


@pytest.mark.parametrize(
    ("command", "arguments", "expected"),
    [
        (play, ["small", "--steps", "many"], "--steps: invalid literal for int() with base 10: 'many'."),
        (play, ["small", "--steps"], "'--steps'. Expected 1 values."),
        (play, ["small", "--optimizer.decay", "slow"], "'slow' for argument '--optimizer.decay'"),
        (play, ["small", "surplus"], "surplus."),
        (play, ["--steps", "3"], "usage: x TOY [options]."),
        (read, ["--step", "3"], "MODEL must be given."),
        (read, ["somewhere", "--step", "last"], "--step: last is neither a number nor best nor newest."),
        (read, ["somewhere", "--step", "-1"], "--step"),
    ],
)
def test_complaints_are_one_line_of_sentences(command, arguments, expected, monkeypatch):
    for columns in ("30", "300"):
        monkeypatch.setenv("COLUMNS", columns)
        with pytest.raises(InputError) as error:
            call(command, arguments, "x")
        message = str(error.value)
        assert expected in message and ("x --help" in message or "x small --help" in message)
        assert not set(message) & set("\n\x1b│─╭╰") and message.endswith(".")


def test_what_the_command_raises_is_not_a_complaint():
    def fails(model: Positional[str]):
        """Fail."""
        raise ValueError(model)

    with pytest.raises(ValueError, match=r"^m$"):
        call(fails, ["m"], "x")
