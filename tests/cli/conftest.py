"""A folder with a corpus, experiments, and a run and an exported model of each family; commands that exit."""

import contextlib
import io
from pathlib import Path

import pytest

from prelm_jax.cache import locked
from prelm_jax.cli.main import main

TINY = Path(__file__).parents[1] / "tiny.py"

EXPERIMENTS = '''
"""Experiments that train for a second, and some that do not work."""
import dataclasses

import tiny as tests


def tiny():
    """As small as it gets."""
    return dataclasses.replace(tests.bert(), corpus=("CORPUS",))


def raises():
    return 1 / 0


def returns_a_number():
    return 3


def takes_arguments(size):
    return tiny()
'''


@pytest.fixture(scope="session")
def folder(bert_folder):
    """Made by the first test process that needs it; not to be changed."""
    with locked(bert_folder):
        if not (bert_folder / "elmo-model").exists():
            for name in ("gpt", "elmo"):
                train(bert_folder, name, f"{TINY}:{name}", f"{name}-model")
    return bert_folder


@pytest.fixture(scope="session")
def bert_folder(common_directory):
    """The same without `gpt` and `elmo`."""
    folder = common_directory / "folder"
    with locked(folder):
        if not folder.exists():
            folder.mkdir()
            fill(folder)
            train(folder, "run", f"{folder}/tiny.py:tiny", "model")
    return folder


def fill(folder: Path) -> None:
    """The corpus, the lines and the experiments."""
    sentences = [
        f"The {a} {b} sees a {c}." for a in ("old", "new", "big") for b in ("cat", "dog") for c in ("hen", "cow")
    ]
    documents = ["\n".join(sentences[i : i + 4]) for i in range(0, len(sentences), 2)] * 3
    documents = [f"Number {i}.\n{document}" for i, document in enumerate(documents)]
    (folder / "corpus.txt").write_text("\n\n".join(documents))
    (folder / "lines.txt").write_text("The old cat sees a hen.\n\nA dog\n")
    (folder / "tiny.py").write_text(EXPERIMENTS.replace("CORPUS", str(folder / "corpus.txt")))


def train(folder: Path, name: str, reference: str, model: str) -> None:
    """A run of three steps, and the model that is exported."""
    options = ["--corpus", f"{folder}/corpus.txt", "--workdir", f"{folder}/{name}", "--steps", "3"]
    main(["pretrain", reference, *options])
    main(["export", f"{folder}/{name}", f"{folder}/{model}"])


@pytest.fixture
def fails(capsys):
    """`fails(*arguments)` is the one line on stderr of a command that exits with 1."""

    def fails(*arguments) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(list(map(str, arguments)))
        assert stopped.value.code == 1
        lines = capsys.readouterr().err.splitlines()
        messages = [line for line in lines if line.startswith("prelm: ")]
        assert messages == lines[-1:], "one line, and nothing after it"
        return messages[0]

    return fails


class Terminal(io.StringIO):
    encoding = "utf-8"  # With another one, tyro draws no boxes.


@pytest.fixture
def help_of(monkeypatch):
    """`help_of(*arguments)` is what a command prints before it exits with `code`, as on a terminal of 100 columns."""

    def help_of(*arguments, code=0) -> str:
        monkeypatch.setenv("COLUMNS", "100")
        with contextlib.redirect_stdout(Terminal()) as output, pytest.raises(SystemExit) as stopped:
            main(list(map(str, arguments)))
        assert stopped.value.code == code
        return output.getvalue()

    return help_of
