"""Experiments by name: from the package, from anybody's files, and everything that can be wrong with them."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from prelm_jax.cli.experiments import docstrings, load_run, shipped_files
from prelm_jax.cli.main import main

ROOT = Path(__file__).parents[2]


def test_by_name_and_by_file_are_the_same(monkeypatch):
    monkeypatch.chdir(ROOT)
    name, run, description = load_run("bert:base_512")
    other_name, other, _ = load_run("experiments/bert.py:base_512")
    assert name == other_name == "bert-base-512"
    assert run == other
    assert description.startswith("bert:base_512: BERT-base, phase 2")


def test_names_do_not_depend_on_the_current_directory(tmp_path, monkeypatch, fails):
    monkeypatch.chdir(tmp_path)
    assert load_run("gpt1:mini")[0] == "gpt1-mini"
    assert "experiments/gpt1.py" in fails("pretrain", "experiments/gpt1.py:mini")


def test_every_experiment_says_target_cost_and_command(capsys):
    main(["experiments"])
    out = capsys.readouterr().out
    listed = dict(re.findall(r"^(\w+:\w+)\n((?:    .*\n)+)", out, re.MULTILINE))
    for file in shipped_files():
        for name, docstring in docstrings(file).items():
            command = "finetune" if file.stem == "finetuning" else "pretrain"
            assert f"    prelm {command} {file.stem}:{name}" in docstring
            for fact in ("Target: ", "Cost: "):
                assert len(re.findall(f"^{fact}", docstring, re.MULTILINE)) == 1
                assert len(re.findall(f"^ +{fact}", listed[f"{file.stem}:{name}"], re.MULTILINE)) == 1
    assert len(listed) >= 13


def test_copy(tmp_path, monkeypatch, capsys, fails):
    monkeypatch.chdir(tmp_path)
    main(["experiments", "--copy", "bert.py"])
    assert "prelm pretrain bert.py:demo" in capsys.readouterr().out
    assert (tmp_path / "bert.py").read_bytes() == (ROOT / "experiments" / "bert.py").read_bytes()
    assert load_run("bert.py:mini")[1] == load_run("bert:mini")[1]
    (tmp_path / "bert.py").write_text("mine = 1\n")
    for name in ("bert.py", "bert"):
        assert "bert.py already exists" in fails("experiments", "--copy", name)
    assert (tmp_path / "bert.py").read_text() == "mine = 1\n"
    (tmp_path / "gpt1.py").symlink_to("elsewhere.py")
    assert "gpt1.py already exists" in fails("experiments", "--copy", "gpt1.py")
    assert not (tmp_path / "elsewhere.py").exists()
    assert "Did you mean elmo?" in fails("experiments", "--copy", "elmoo.py")


@pytest.mark.parametrize("command", ["pretrain", "batch", "prepare", "plan"])
def test_misspelt_names(folder, fails, command):
    assert "Did you mean bert?" in fails(command, "brt:mini")
    assert "Did you mean mini? It holds bert:demo, bert:mini" in fails(command, "bert:minni")
    assert "It holds bert:demo, bert:mini" in fails(command, "bert")
    assert f"Did you mean {folder}/tiny.py?" in fails(command, f"{folder}/tinny.py:tiny")
    assert "Did you mean tiny?" in fails(command, f"{folder}/tiny.py:tinny")
    assert "EXPERIMENT comes first" in fails(command, "--seed", "1")


def test_an_experiment_that_raises(folder, fails):
    line = (folder / "tiny.py").read_text().splitlines().index("    return 1 / 0") + 1
    message = fails("pretrain", f"{folder}/tiny.py:raises")
    assert message == f"prelm: {folder}/tiny.py, line {line}: ZeroDivisionError: division by zero"


def test_an_experiment_that_is_none(folder, fails):
    assert "returns_a_number returns int" in fails("pretrain", f"{folder}/tiny.py:returns_a_number")
    message = fails("pretrain", f"{folder}/tiny.py:takes_arguments")
    assert "takes_arguments" in message and message.count("takes_arguments") == 1, "it is not among those listed"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("broken.py", b"x = 1\ndef demo(:\n", "broken.py, line 2: SyntaxError"),
        ("binary.py", b"\x00\x01\xff", "binary.py: SyntaxError"),
        ("imports.py", b"\nimport not_a_package\n", "imports.py, line 2: ModuleNotFoundError"),
        ("raises.py", b"raise ValueError('two\\nlines')\n", "raises.py, line 1: ValueError: two lines"),
        ("exits.py", b"\nimport sys\nsys.exit(0)\n", "exits.py, line 3: SystemExit: 0"),
        ("escapes.py", b"class Odd(BaseException):\n    pass\nraise Odd\n", "escapes.py, line 3: Odd"),
        ("decodes.py", b"\xff\xfe", "decodes.py, line 1: SyntaxError"),
        ("endless.py", b"def demo():\n    return demo()\n", "endless.py, line 2: RecursionError"),
        ("empty.py", b"", "empty.py has no experiment 'demo'. It holds no function without arguments."),
        ("notes.txt", b"hello", "notes.txt is not a Python file"),
    ],
)
def test_a_file_of_no_experiments(tmp_path, fails, name, content, expected):
    (tmp_path / name).write_bytes(content)
    assert expected in fails("pretrain", f"{tmp_path}/{name}:demo")


def test_the_line_of_a_file_named_from_its_directory(tmp_path, fails, monkeypatch):
    (tmp_path / "raises.py").write_text("raise ValueError\n")
    monkeypatch.chdir(tmp_path)
    assert fails("pretrain", "raises.py:demo").startswith("prelm: raises.py, line 1: ValueError")


@pytest.mark.parametrize("field", ["tokenizer", "model", "data", "optimizer"])
def test_a_component_that_is_no_config(folder, tmp_path, fails, field):
    """It is named before a corpus is read."""
    code = f"\n\ndef odd():\n    return dataclasses.replace(tiny(), {field}=3)\n"
    (tmp_path / "odd.py").write_text((folder / "tiny.py").read_text() + code)
    assert f"{tmp_path}/odd.py:odd: {field} is 3: must be a config" in fails("pretrain", f"{tmp_path}/odd.py:odd")


def test_a_mistake_in_the_values_of_an_experiment(folder, tmp_path, fails):
    content = (
        folder / "tiny.py"
    ).read_text() + "\n\ndef empty():\n    return dataclasses.replace(tiny(), batch_size=0)\n"
    (tmp_path / "tiny.py").write_text(content)
    line = content.splitlines().index("def empty():") + 2
    assert f"{tmp_path}/tiny.py, line {line}: batch_size is 0" in fails("pretrain", f"{tmp_path}/tiny.py:empty")


def test_classes_of_an_experiment_file(folder, tmp_path, help_of):
    """A configuration that the file defines has its comments as help."""
    content = (folder / "tiny.py").read_text() + (
        "\n\n@dataclasses.dataclass(frozen=True)\n"
        "class Mine(type(tests.bert())):\n    spice: float = 0.5  # Degree of it.\n"
        "\n\ndef mine():\n    run = tiny()\n"
        "    return Mine(**{field.name: getattr(run, field.name) for field in dataclasses.fields(run)})\n"
    )
    (tmp_path / "mine.py").write_text(content)
    assert re.search(
        r"--spice FLOAT\s*│?\n?│?\s*Degree of it. \(default: 0.5\)",
        help_of("batch", f"{tmp_path}/mine.py:mine", "--help"),
    )


def test_the_wheel_holds_the_experiments(tmp_path):
    """Built by setuptools, unpacked, and used in an empty folder."""
    pytest.importorskip("setuptools", minversion="77")
    build = "import os, setuptools.build_meta as b; os.chdir({!r}); print(b.build_wheel({!r}))"
    source = tmp_path / "source"
    for part in ("prelm_jax", "experiments"):
        for file in (ROOT / part).rglob("*.py"):
            target = source / file.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    code = build.format(str(source), str(tmp_path))
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    assert (tmp_path / "site" / "prelm_jax" / "experiments" / "bert.py").is_file()
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "prelm_jax", "pretrain", "bert:demo", "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path / "empty",
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
    )
    assert "--model.num-layers" in done.stdout and not done.stderr
