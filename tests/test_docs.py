"""The pages tell the truth: their commands parse; their options, links, paths and names exist. Nothing is trained."""

import contextlib
import dataclasses
import functools
import io
import pkgutil
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from prelm_jax.cli.dispatch import COMMANDS
from prelm_jax.cli.experiments import docstrings, shipped_files
from prelm_jax.cli.main import main
from prelm_jax.cli.tokenizers import KINDS
from prelm_jax.corpus import readers, spec
from prelm_jax.corpus.sentences import LANGUAGES
from prelm_jax.data.examples import Columns
from prelm_jax.errors import InputError
from prelm_jax.finetuning.files import ENDINGS, FileSpec, Format, read_examples
from prelm_jax.finetuning.predictions import read_predictions
from prelm_jax.storage import is_remote

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "tpu/README.md", "examples/electra.py")),
    *sorted((ROOT / "docs").glob("*.md")),
    *shipped_files(),
]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(text: str, language: str = "") -> Iterator[str]:
    """The code blocks of a Markdown page in a language; shell blocks name none."""
    for found, code in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if found == language:
            yield code


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of each `prelm …` in code blocks, docstrings and inline code; a name alone is complete.

    list(commands("see `prelm pretrain bert:mini`")) == [["pretrain", "bert:mini"]]
    """
    code = [*blocks(text), *re.findall(r"^ {4,}(prelm (?:.*\\\n)*.*)", text, re.MULTILINE)]
    inline = re.findall(r"`(prelm [^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))
    for line in "\n".join([*code, *inline]).replace("\\\\\n", " ").replace("\\\n", " ").splitlines():
        if not re.search(r"\bprelm ", line):
            continue
        words = shlex.split(re.sub(r" (> |# ).*", "", line))
        start = next((i for i, word in enumerate(words) if Path(word).name == "prelm"), None)
        if start is not None:
            yield [
                word.replace("EXPERIMENT", "bert:mini")
                .replace("finetuning:NAME", "finetuning:classify")
                .replace(":NAME", ":demo")
                for word in words[start + 1 :]
                if word != "OPTIONS"
            ]


def names_of_code(text: str) -> Iterator[str]:
    """Inline code outside of the columns that show another code base's names."""
    for line in text.splitlines():
        cells = line.split(" | ")
        theirs = "# Coming from" in text and line.startswith("|")
        yield from re.findall(r"`([^`]+)`", " | ".join(cells[1:]) if theirs else line)


@pytest.fixture
def parse(monkeypatch, capsys, tmp_path):
    """`parse(arguments)` is the complaint about a command, None if it parses; SPECs included. Commands do nothing."""
    page = (ROOT / "docs/reproducibility.md").read_text() + (ROOT / "docs/tokenizers.md").read_text()
    own = "\n".join(block for block in blocks(page, "python") if "-> Run" in block)
    (tmp_path / "bert.py").write_text((ROOT / "experiments/bert.py").read_text() + "\n\n" + own)
    for name in ("examples", "experiments"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    called = []

    def replace(command):
        @functools.wraps(command)
        def record(**values):
            called.append(values)

        return record

    for name, command in COMMANDS.items():
        monkeypatch.setitem(COMMANDS, name, replace(command))

    def parse(arguments: list[str]) -> str | None:
        called.clear()
        if " ".join(arguments) in COMMANDS:
            return None
        try:
            main(arguments)
        except SystemExit as stopped:
            return capsys.readouterr().err if stopped.code else None
        for values in called:
            run = values.get("run")
            corpus = getattr(run, "corpus", values.get("corpus"))
            labelled = [source for name in ("train", "dev") if (source := getattr(run, name, None))]
            try:
                for source in labelled:
                    FileSpec.parse(source)
                remote = [source.location for source in spec.parse(corpus or ["a.txt"]) if is_remote(source.location)]
            except InputError as error:
                return str(error)
            if remote:
                return f"a corpus cannot be read from a bucket: {remote}"
        return None

    return parse


@pytest.fixture(scope="module")
def options():
    """Every option of every command and of the scripts for TPUs."""
    arguments = [name.split() for name in COMMANDS]
    arguments += [["pretrain", name] for name in ("bert:mini", "gpt1:mini", "elmo:small")]
    arguments += [["finetune", "finetuning:classify"]]
    arguments += [["tokenizer", "train", kind] for kind in KINDS]
    known = "".join(path.read_text() for path in (ROOT / "tpu").glob("*.sh"))
    for words in arguments:
        with contextlib.redirect_stdout(io.StringIO()) as output, pytest.raises(SystemExit):
            main([*words, "--help"])
        known += output.getvalue()
    return set(re.findall(r"--[a-z][\w.-]*", known))


@pytest.mark.parametrize(
    "command",
    ["pretend", "export runs/a", "fill a b --depth 3", "pretrain bert:nano", "pretrain bert.py:nano"]
    + [
        f"pretrain bert:mini {wrong}"
        for wrong in ("--stepz 3", "--steps x", "3", "--corpus a.txt,lines=1", "--corpus gs://a/b")
    ]
    + ["finetune finetuning:classify --train a.txt,lines=1"],
)
def test_wrong_commands_are_found(command, parse):
    assert parse(command.split())


def test_commands_of_a_page_are_found():
    page = "```\nA=1 prelm a --b 'c d' \\\n  e  # f\n.venv/bin/prelm g\n```\nSee `prelm h` and `prelmi`.\n"
    assert list(commands(page)) == [["a", "--b", "c d", "e"], ["g"], ["h"]]


@by_page
def test_commands_parse(page, parse):
    found = list(commands(page.read_text()))
    assert found
    for arguments in found:
        assert parse(arguments) is None, arguments


@by_page
def test_options_exist(page, options):
    """Those in prose and tables too; `.b1` is the end of an option."""
    for code in names_of_code(page.read_text()):
        for name in re.findall(r"(?<![\w.-])--[a-z][\w.-]*", code):
            if "_" not in name and not name.endswith((".", "…")):  # with _, another code base's
                assert name in options, code
        if re.fullmatch(r"\.[a-z0-9-]+", code) and code not in {
            *readers.KINDS,
            *readers.FOREIGN,
            *readers.DECOMPRESSORS,
            *(ending for endings in ENDINGS.values() for ending in endings),
        }:
            assert any(name.endswith(code) for name in options), code


@by_page
def test_links_and_paths_resolve(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        assert "://" in link or (page.parent / link).exists(), link
    folders = "benchmarks|docs|examples|experiments|prelm_jax|tests|tpu"
    for path in re.findall(rf"(?<![\w/.-])(?:{folders})/[\w./-]*\w", text):
        assert (ROOT / path).exists(), path
    for script in re.findall(r"`(\w+\.sh)\b", text):
        assert (ROOT / "tpu" / script).exists(), script


@by_page
def test_names_exist(page):
    """Modules and what they hold, variables of the environment, extras, targets of make."""
    text = page.read_text()
    for name in re.findall(r"(?<![\w/.])prelm_jax(?:\.[A-Za-z]\w*)+(?!\.git)", text):
        pkgutil.resolve_name(name)
    sources = "".join(path.read_text() for folder in ("prelm_jax", "tests") for path in (ROOT / folder).rglob("*.py"))
    for variable in re.findall(r"PRELM_\w+", text):
        assert f'"{variable}"' in sources, variable
    for extra in ",".join(re.findall(r'pip install[^\n`]*?\[([\w,]+)\]"', text)).split(","):
        assert not extra or extra in EXTRAS, extra
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE):
        assert target in targets, target


@pytest.mark.parametrize("page", ["README.md", "docs/corpora.md"])
def test_table_of_spec_options(page):
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", table((ROOT / page).read_text(), "option"), re.MULTILINE)
    choices = {"documents": spec.Boundary, "sentences": spec.Splitting, "cleaning": spec.Cleaning}
    assert {name for name, _ in rows} == set(spec.OPTIONS)
    for name, values in rows:
        if name in choices:
            assert re.findall(r"`([\w-]+)`", values) == list(get_args(choices[name]))


def test_fine_tuning_page(tmp_path):
    """Its tables have every format, option and column; its files are read."""
    page = (ROOT / "docs/finetuning.md").read_text()
    assert set(re.findall(r"^\| `([\w-]+)`", table(page, "format"), re.MULTILINE)) == set(get_args(Format))
    for name, values in re.findall(r"^\| `(\w+)` \| (.*?) \|", table(page, "option"), re.MULTILINE):
        for value in re.findall(r"`([\w-]+)`", values) or ["csv"]:
            FileSpec.parse(f"a.txt,{name}={value}")
    tasks = re.findall(r"^\| `(\w+)`", table(page, "task"), re.MULTILINE)
    assert tasks == list(docstrings(ROOT / "experiments/finetuning.py"))
    flags = {f"`--columns.{field.name.replace('_', '-')}`" for field in dataclasses.fields(Columns)}
    assert set(re.findall(r"^\| (`--columns\..*?`)", table(page, "column"), re.MULTILINE)) == flags
    (tmp_path / "a.csv").write_text(next(blocks(page, "csv")))
    assert [each.label for each in read_examples(str(tmp_path / "a.csv"), "label").examples] == ["positive", "negative"]
    (tmp_path / "a.jsonl").write_text(next(blocks(page, "json")))
    assert read_predictions(tmp_path / "a.jsonl")[0].prediction == "positive"


def test_languages_of_sentences():
    """docs/corpora.md names each with its code."""
    found = re.findall(
        r"(?:([A-Z][a-z]+)\s\(`([a-z]{2})`\)|`([a-z]{2})` \(([A-Z][a-z]+)\))", (ROOT / "docs/corpora.md").read_text()
    )
    assert {code or other: name or another for name, code, other, another in found} == LANGUAGES


def test_table_of_extras():
    names = re.sub(r" \| .*", "", table((ROOT / "README.md").read_text(), "extra"))
    assert set(re.findall(r"`(\w+)`", names)) == set(EXTRAS)


def test_tree_of_the_package():
    """The tree in the README names each room."""
    tree = next(block for block in blocks((ROOT / "README.md").read_text()) if block.startswith("prelm_jax/"))
    names = set(re.findall(r"(?:^| {2})(\w+(?:/|\.py)) ", tree.partition("\nexperiments/")[0], re.MULTILINE))
    assert all((ROOT / "prelm_jax" / name).exists() for name in names), names
    folders = {path.parent.name for path in (ROOT / "prelm_jax").glob("*/__init__.py")}
    assert {f"{folder}/" for folder in folders - {"cli"}} <= names


def table(text: str, header: str) -> str:
    """The rows of the table whose first column has this header."""
    return re.search(rf"^\| {header} \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)[1]
