"""Every option of every command is explained, and every way to ask for help answers."""

import re

import pytest

from prelm_jax.cli.dispatch import COMMANDS
from prelm_jax.cli.experiments import docstrings, shipped_files
from prelm_jax.cli.main import main
from prelm_jax.cli.tokenizers import KINDS

OF_EXPERIMENTS = ("pretrain", "prepare", "batch", "plan")
REFERENCES = [f"{file.stem}:{name}" for file in shipped_files() for name in docstrings(file)]
TASKS = [reference for reference in REFERENCES if reference.startswith("finetuning:")]
EXPERIMENTS = [reference for reference in REFERENCES if reference not in TASKS]
WITHOUT_CHOICE = [name for name in COMMANDS if name not in (*OF_EXPERIMENTS, "finetune", "tokenizer train")]


def explained(text: str) -> dict[str, str]:
    """Each option and positional argument in a help text, and its help without metavar and default."""
    found, current = {}, None
    for line in text.splitlines():
        row = line.removeprefix("│").removesuffix("│").rstrip()
        if not line.startswith("│") or row.startswith(" ──"):
            current = None
        elif re.match(r" (-|\[?[A-Z_]+\]?( {2}|$))", row):
            names, _, rest = row.strip().partition("  ")
            current = re.split("[ ,]", names)[0]
            assert current not in found
            found[current] = rest.strip()
        elif row.startswith("  ") and current is not None:
            found[current] += f" {row.strip()}"
    return {name: re.sub(r" ?\((default|required|fixed).*", "", help).strip() for name, help in found.items()}


def descriptions(text: str) -> list[str]:
    """The descriptions of the groups of options: the text of a box above its first rule.

    A comment above a field is also the help of the fields after it, up to the next comment or blank line.
    """
    boxes = re.findall(r"^╭─ \S+ options ─+╮\n((?:│.*│\n)*?)│ ─+ │$", text, re.MULTILINE)
    return [" ".join(box.replace("│", "").split()) for box in boxes]


def assert_all_explained(text: str, *expected: str) -> None:
    """Each option has help of its own, of two words or more, and more than its name."""
    found = explained(text)
    assert set(expected) <= set(found)
    del found["-h"]
    names = {name: name.strip("-[]").replace("-", " ").lower() for name in found}
    bare = [name for name, help in found.items() if len(help.split()) < 2 or help.strip(".").lower() == names[name]]
    assert not bare, f"without help: {bare}"
    shared = {name for name, help in found.items() if list(found.values()).count(help) > 1}
    assert not shared, f"with the same help: {shared}"
    leaked = [help for help in descriptions(text) if help in found.values()]
    assert not leaked, f"the help of an option describes a group: {leaked}"


def test_options_without_help_are_found():
    """The check of the tests below can fail."""
    text = """\
│ -h, --help  show it                                  │
│ --seed INT  Decides all random numbers. (default: 0) │
│ --steps INT                                          │
│   (default: 3)                                       │
"""
    assert explained(text) == {"-h": "show it", "--seed": "Decides all random numbers.", "--steps": ""}
    with pytest.raises(AssertionError, match=r"without help: \['--steps'\]"):
        assert_all_explained(text)
    with pytest.raises(AssertionError, match="with the same help"):
        assert_all_explained(text.replace("  (default: 3)", "  Decides all random numbers. (default: 3)"))


@pytest.mark.parametrize("command", WITHOUT_CHOICE)
def test_options_of_commands_are_explained(command, help_of):
    assert_all_explained(help_of(*command.split(), "--help"))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_options_of_experiments_are_explained(experiment, help_of):
    """From the comments behind the fields of the Run and of its configurations."""
    text = help_of("pretrain", experiment, "--help")
    expected = ("--workdir", "--corpus", "--steps", "--save-every", "--mesh.devices", "--optimizer.learning-rate")
    assert_all_explained(text, *expected)
    assert "(fixed to" not in text, "an option that cannot be set"
    assert f"runs/{experiment.replace(':', '-').replace('_', '-')})" in text


@pytest.mark.parametrize("task", TASKS)
def test_options_of_tasks_are_explained(task, help_of):
    text = help_of("finetune", task, "--help")
    assert_all_explained(text, "--train", "--seeds", "--columns.text", "--head.dropout", "--optimizer.learning-rate")
    assert "(fixed to" not in text, "an option that cannot be set"


@pytest.mark.parametrize(("command", "option"), [("prepare", "--beam"), ("batch", "--rows"), ("plan", "--topology")])
def test_other_commands_of_experiments(command, option, help_of):
    assert_all_explained(help_of(command, "bert:mini", "--help"), option, "--model.num-layers")


@pytest.mark.parametrize("kind", KINDS)
def test_options_of_tokenizers_are_explained(kind, help_of):
    assert_all_explained(help_of("tokenizer", "train", kind, "--help"), "DIRECTORY", "--corpus")


def test_help_of_an_experiment_shows_its_docstring(help_of):
    text = help_of("pretrain", "bert:mini", "--help")
    for part in ("BERT-mini, 4 layers of 256", "Target: ", "Cost: 20 minutes", "prelm experiments --copy bert.py"):
        assert part in text


@pytest.mark.parametrize("command", OF_EXPERIMENTS)
def test_help_without_an_experiment_lists_them(command, help_of):
    text = help_of(command, "--help")
    assert_all_explained(text, "EXPERIMENT")
    assert "--model" not in text
    assert all(re.search(rf"^  {experiment} +\w", text, re.MULTILINE) for experiment in EXPERIMENTS)
    assert help_of(command, code=1) == text


def test_help_without_a_task_lists_them(help_of):
    text = help_of("finetune", "--help")
    assert_all_explained(text, "TASK", "--seeds")
    assert re.findall(r"^  (\w+:\w+) +\w", text, re.MULTILINE) == TASKS
    assert help_of("finetune", code=1) == text


def test_help_without_a_kind_lists_them(help_of):
    text = help_of("tokenizer", "train", "--help")
    assert_all_explained(text, "KIND", "DIRECTORY", "--corpus")
    assert all(re.search(rf"^  {kind} +\w", text, re.MULTILINE) for kind in KINDS)


@pytest.mark.parametrize("command", [name for name in WITHOUT_CHOICE if name != "experiments"])
def test_a_command_without_arguments_prints_its_help_and_fails(command, help_of):
    assert help_of(*command.split(), code=1) == help_of(*command.split(), "--help")


def test_positional_arguments_have_names(help_of):
    assert "embed [-h] [OPTIONS] MODEL INPUT OUTPUT" in help_of("embed", "--help")
    assert "export [-h] [OPTIONS] WORKDIR DIRECTORY" in help_of("export", "--help")


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_lists_the_commands(arguments, capsys):
    main(arguments)
    out = capsys.readouterr().out
    for name in COMMANDS:
        assert re.search(rf"^  {name} +[A-Z]\w+ ", out, re.MULTILINE)


def test_the_group_of_tokenizer_commands(help_of):
    text = help_of("tokenizer", "--help")
    assert re.findall(r"^  (tokenizer \w+) +[A-Z]", text, re.MULTILINE) == ["tokenizer train", "tokenizer inspect"]
    assert help_of("tokenizer", code=1) == text
