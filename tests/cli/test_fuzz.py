"""Random values in every JSON file and option: a result, or one line and exit 1, within seconds.

By hand with more examples, or each in a process of its own:

    PRELM_FUZZ=5000 pytest tests/cli/test_fuzz.py
    PRELM_FUZZ=100 PRELM_FUZZ_PROCESSES=1 pytest tests/cli/test_fuzz.py
"""

import contextlib
import copy
import functools
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import hypothesis
import pytest
from hypothesis import strategies as st

from prelm_jax import loading, workdir
from prelm_jax.cli import options as cli_options
from prelm_jax.cli.main import main
from prelm_jax.formats import base, bilm, huggingface
from prelm_jax.training import checkpoint

EXAMPLES = int(os.environ.get("PRELM_FUZZ", 100))
PROCESSES = "PRELM_FUZZ_PROCESSES" in os.environ
SECONDS = 60 if PROCESSES else 10  # A process also imports and compiles.

fuzz = hypothesis.settings(
    max_examples=EXAMPLES,
    derandomize="PRELM_FUZZ" not in os.environ,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)

NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 16, 511, 2**16, 2**31, 2**32, 2**63, 2**64, 10**9, 10**30, 10**400])
FLOATS = st.floats() | st.sampled_from([0.0, 0.5, 1.0, 1e-300, 1e38, 1e39, 1e300])
TEXTS = st.text(max_size=5) | st.sampled_from(
    ["", "../x", "/etc/passwd", "a\0b", "[MASK]", "gelu", "\ud800", "nan", "-1"]
)
SCALARS = st.none() | st.booleans() | NUMBERS | st.integers(-3, 300) | FLOATS | TEXTS
VALUES = st.recursive(SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(TEXTS, x, max_size=3), max_leaves=5)


class Hang(BaseException):
    """A case takes too long."""


@contextlib.contextmanager
def deadline() -> Iterator[None]:
    """Raises Hang after SECONDS of processor time, which other programs do not slow down."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def run(arguments: list[str]) -> tuple[int, str]:
    """The exit code and the standard error of a command."""
    if PROCESSES:
        command = [sys.executable, "-m", "prelm_jax", *arguments]
        done = subprocess.run(command, capture_output=True, timeout=SECONDS, stdin=subprocess.DEVNULL)
        return done.returncode, done.stderr.decode()
    errors = io.StringIO()
    with deadline(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        try:
            main(arguments)
        except SystemExit as stopped:
            return int(stopped.code or 0), errors.getvalue()
    return 0, errors.getvalue()


def check(arguments: list[str]) -> None:
    code, errors = run(arguments)
    if code:
        lines = errors.splitlines()
        assert code == 1, errors
        assert [line for line in lines if line.startswith("prelm: ")] == lines[-1:], errors
        assert "Traceback" not in errors


@st.composite
def mutations(draw: st.DrawFn, original: object) -> object:
    """A JSON value with another value, one more or one less somewhere in it."""
    changed = copy.deepcopy(original)
    parent, key, value = None, None, changed
    while isinstance(value, dict | list) and value and (parent is None or draw(st.integers(0, 2))):
        parent = value
        key = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
        value = parent[key]
    action = draw(st.sampled_from(["replace", "replace", "delete", "insert"]))
    if parent is None or draw(st.integers(0, 40)) == 0:
        return draw(VALUES)
    if action == "replace":
        parent[key] = draw(VALUES)
    elif action == "delete":
        del parent[key]
    elif isinstance(parent, dict):
        parent[draw(TEXTS)] = draw(VALUES)
    else:
        parent.insert(key, draw(VALUES))
    return changed


@pytest.fixture(scope="module")
def world(folder, tmp_path_factory) -> Iterator[Path]:
    """A copy of the folder, to spoil: work directories and model directories of each family, an index of shards."""
    world = tmp_path_factory.mktemp("fuzz") / "world"
    shutil.copytree(folder, world)
    shutil.copytree(world / "model", world / "sharded")
    from safetensors import safe_open

    with safe_open(world / "model" / "model.safetensors", "np") as tensors:
        names = list(tensors.keys())
    (world / "sharded" / "model.safetensors").rename(world / "sharded" / "model-1.safetensors")
    (world / "text.txt").write_text("\n" if EXAMPLES == 100 else "The old cat sees a hen.\n")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-1.safetensors")}
    (world / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRELM_CACHE", str(world / "cache"))
        main(["batch", f"{world}/tiny.py:tiny"])
        yield world


@pytest.fixture(scope="module", autouse=True)
def shared_work() -> Iterator[None]:
    """What most cases repeat is done once: the shapes of a model's parameters, and its restored checkpoint.

    Nobody deletes checkpoints, so that readers need not wait to see whether a damaged one is about to go.
    """
    restored = {}

    def restore_params(path, abstract, step):
        key = str((path, abstract, step))
        if "/run/" not in str(path):
            return original(path, abstract, step)
        if key not in restored:
            restored[key] = original(path, abstract, step)
        return restored[key]

    shapes = functools.cache(base.abstract_params)
    with pytest.MonkeyPatch.context() as patch:
        for module in (huggingface, bilm, loading):
            patch.setattr(module, "abstract_params", shapes)
        patch.setattr(checkpoint, "DELETING_SECONDS", 0)
        original = workdir.restore_params
        patch.setattr(workdir, "restore_params", restore_params)
        yield


# A file, and the command that reads it.
FILES = {
    "BERT's config": ("model/config.json", "score {}/model {}/text.txt"),
    "GPT's config": ("gpt-model/config.json", "score {}/gpt-model {}/text.txt"),
    "ELMo's options": ("elmo-model/options.json", "embed {}/elmo-model {}/text.txt {}/vectors"),
    "WordPiece": ("model/tokenizer.json", "tokenize {}/model {}/lines.txt"),
    "WordPiece settings": ("model/tokenizer_config.json", "tokenize {}/model {}/lines.txt"),
    "BPE": ("gpt-model/tokenizer.json", "tokenize {}/gpt-model {}/lines.txt"),
    "BPE settings": ("gpt-model/tokenizer_config.json", "tokenize {}/gpt-model {}/lines.txt"),
    "vocab.json": ("gpt-model/vocab.json", "tokenize {}/gpt-model/vocab.json {}/lines.txt"),
    "index": ("sharded/model.safetensors.index.json", "score {}/sharded {}/text.txt"),
    "run.json": ("run/run.json", "score {}/run {}/text.txt"),
    "metadata": ("gpt/checkpoints/3/_CHECKPOINT_METADATA", "score {}/gpt {}/text.txt"),
    "manifest": ("cache/stores/*/training/manifest.json", "batch {}/tiny.py:tiny"),
}


@pytest.mark.parametrize("kind", FILES)
def test_files(world, kind, monkeypatch):
    name, command = FILES[kind]
    captured, parsed = cli_options._captured, []

    def parse_once(*arguments):
        """All cases of a kind have the same command line."""
        if not parsed:
            parsed.append(captured(*arguments))
        return parsed[0]

    monkeypatch.setattr(cli_options, "_captured", parse_once)
    (file,) = world.glob(name)
    original = file.read_bytes()

    @fuzz
    @hypothesis.given(mutations(json.loads(original)))
    def attempt(changed):
        file.write_text(json.dumps(changed))
        check([word.replace("{}", str(world)) for word in command.split(" ")])

    try:
        attempt()
    finally:
        file.write_bytes(original)


# Commands that end when the values of their options are valid: what they read is missing.
COMMANDS = {
    **{f"{name} bert": f"{name} bert:mini --corpus missing" for name in ("pretrain", "prepare", "batch")},
    **{f"pretrain {name}": f"pretrain {name}:demo --corpus missing" for name in ("gpt1", "elmo")},
    "evaluate": "evaluate missing",
    "export": "export missing directory",
    "embed": "embed missing missing missing/missing",
    "score": "score missing missing",
    "fill": "fill missing [MASK]",
    "generate": "generate missing --prompt x",
    "tokenize": "tokenize missing missing",
    "tokenizer inspect": "tokenizer inspect missing",
    **{
        f"tokenizer train {kind}": f"tokenizer train {kind} directory --corpus missing"
        for kind in ("wordpiece", "bpe", "sentencepiece", "words")
    },
}


@functools.cache
def options(command: str) -> list[str]:
    """The options that a command's help lists."""
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.suppress(SystemExit):
        main([*command.split(), "--help"])
    return sorted(set(re.findall(r"--[a-z][\w.-]+", output.getvalue())) - {"--help"})


@fuzz
@hypothesis.given(st.data())
def test_options(tmp_path_factory, data):
    command = COMMANDS[data.draw(st.sampled_from(sorted(COMMANDS)))]
    option = data.draw(st.sampled_from(options(command)))
    value = str(data.draw(NUMBERS | st.integers(-3, 300) | FLOATS | TEXTS | st.sampled_from(["None", "True", "best"])))
    value = value.replace("\0", "")  # No argument of a process can have one.
    if PROCESSES:  # Nor half of a surrogate pair.
        value = value.encode(errors="ignore").decode()
    with contextlib.chdir(tmp_path_factory.getbasetemp()):
        check([*command.split(), *([f"{option}={value}"] if data.draw(st.booleans()) else [option, value])])
