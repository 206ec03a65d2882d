"""Damaged files of every kind that a command reads: the same result, one line and exit 1, or (a cache) built again.

One mutation of each kind; PRELM_MUTATIONS=100 tries 100 of each, and -rP prints what they gave. `chmod` does nothing
to a process that may read every file: as root, run with `setpriv --bounding-set=-dac_override,-dac_read_search`.
"""

import bz2
import collections
import contextlib
import dataclasses
import gzip
import io
import json
import lzma
import os
import random
import shlex
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tensorflow_checkpoint
import tiny
import zstandard
from safetensors.numpy import load_file, save_file

from prelm_jax.cache import locked
from prelm_jax.cli.main import main

COUNT = int(os.environ.get("PRELM_MUTATIONS", "1"))
CONTENT = frozenset({"cut", "flip", "append", "swap"})  # Of a file that says nothing of its length or checksum.
VALUES = frozenset({"flip", "swap"})  # Of a file that is known to be cut or longer, but has no checksum.

ACTIONS = ("cut", "flip", "append", "swap", "delete", "chmod")
RESULTS = ("same", "refused", "another content")

PREPARE = "batch {tiny}:bert --corpus {folder}/corpus.txt --step 1"
TRAIN_WORDS = "tokenizer train words {out} --corpus {file}"
FILL = 'fill {copy} "The [MASK] sees a hen."'
SCORE = "score {copy} {folder}/lines.txt"
EMBED = "embed {copy} {folder}/lines.txt {out}"
EXPORT = "export {copy} {out}"
TOKENIZE = "tokenize {copy} {folder}/lines.txt"


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of file, and a command that reads it."""

    directory: str  # A directory of the world, copied for each mutation.
    files: str  # A pattern: what is mutated.
    command: str  # {copy}: the copy; {file}: the mutated file; {out}: to write.
    silent: frozenset[str] = frozenset()  # Mutations that may change the result: nothing in the format shows them.


KINDS = {
    "store": Kind("cache", "stores/*/training/*", PREPARE),
    "cached vocabulary": Kind("cache", "vocabularies/*", PREPARE),
    "cached fingerprint": Kind("cache", "contents/*", PREPARE),
    "checkpoint": Kind("run", "checkpoints/*/**/*", FILL),
    "run.json": Kind("run", "run.json", FILL, VALUES),
    "metrics": Kind("run", "metrics.jsonl", EXPORT, CONTENT | {"delete"}),
    "tokenizer of a run": Kind("run", "tokenizer/*", FILL),
    "tokenizer of a run of GPT": Kind("gpt", "tokenizer/*", EXPORT),
    "tokenizer of a run of ELMo": Kind("elmo", "tokenizer/*", EXPORT),
    "safetensors": Kind("model", "model.safetensors", FILL, VALUES),
    "config.json": Kind("model", "config.json", FILL, VALUES),
    "tokenizer.json": Kind("model", "tokenizer.json", TOKENIZE, VALUES | {"delete"}),
    "tokenizer_config.json": Kind("model", "tokenizer_config.json", TOKENIZE, VALUES | {"delete"}),
    "vocab.txt": Kind("model", "vocab.txt", TOKENIZE, CONTENT),
    "shards": Kind("sharded", "*.safetensors", FILL, VALUES),
    "index of shards": Kind("sharded", "*.index.json", FILL, VALUES),
    "safetensors of GPT": Kind("gpt-model", "model.safetensors", SCORE, VALUES),
    "config.json of GPT": Kind("gpt-model", "config.json", SCORE, VALUES),
    "tokenizer.json of GPT": Kind("gpt-model", "tokenizer.json", SCORE, VALUES | {"delete"}),
    "vocab.json": Kind("gpt-model", "vocab.json", TOKENIZE, VALUES),
    "merges.txt": Kind("gpt-model", "merges.txt", TOKENIZE, CONTENT),
    "original GPT": Kind("original-gpt", "params_*.npy", SCORE, VALUES),
    "shapes of the original GPT": Kind("original-gpt", "params_shapes.json", SCORE, VALUES),
    "vocabulary of the original GPT": Kind("original-gpt", "encoder_bpe_40000.json", SCORE, VALUES),
    "merges of the original GPT": Kind("original-gpt", "vocab_40000.bpe", SCORE, CONTENT),
    "weights of ELMo": Kind("elmo-model", "weights.hdf5", EMBED, VALUES),
    "options of ELMo": Kind("elmo-model", "options.json", EMBED, VALUES),
    "words of ELMo": Kind("elmo-model", "vocab.txt", TOKENIZE, CONTENT),
    "TensorFlow checkpoint": Kind("original-bert", "bert_model.ckpt.*", FILL),
    "bert_config.json": Kind("original-bert", "bert_config.json", FILL, VALUES),
    "vocab.txt of TensorFlow": Kind("original-bert", "vocab.txt", FILL, CONTENT),
    "SentencePiece": Kind("sentencepiece", "tokenizer.json", TOKENIZE, VALUES),
    "lines": Kind("lines", "*.txt", "tokenize {folder}/model {file}", CONTENT),
    "text": Kind("corpora", "c.txt", TRAIN_WORDS, CONTENT),
    "JSON lines": Kind("corpora", "c.jsonl", TRAIN_WORDS, CONTENT),
    "gzip": Kind("corpora", "c.txt.gz", TRAIN_WORDS),
    "xz": Kind("corpora", "c.txt.xz", TRAIN_WORDS),
    "zstd": Kind("corpora", "c.txt.zst", TRAIN_WORDS),
    "bzip2": Kind("corpora", "c.txt.bz2", TRAIN_WORDS),
    "Parquet": Kind("corpora", "c.parquet", TRAIN_WORDS, VALUES),
}


@pytest.fixture(scope="session")
def world(folder, common_directory, private_cache):
    """The runs and models of `folder`, and the same in the other formats; not to be changed."""
    world = common_directory / "world"
    with locked(world):
        if not world.exists():
            unfinished = common_directory / "unfinished"
            unfinished.mkdir()
            make(folder, unfinished)
            unfinished.rename(world)
    return world


def make(folder: Path, world: Path) -> None:
    for name in ("run", "gpt", "elmo", "model", "gpt-model", "elmo-model"):
        shutil.copytree(folder / name, world / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRELM_CACHE", str(world / "cache"))
        run(PREPARE.format(tiny=tiny.__file__, folder=folder), folder, world / "nothing")
    corpus = f"{folder}/corpus.txt"
    train = f"tokenizer train sentencepiece {world}/sentencepiece --corpus {corpus} --vocab-size 60"
    run(train, folder, world / "nothing")
    (world / "lines").mkdir()
    shutil.copy(folder / "lines.txt", world / "lines")
    make_models(world)
    make_corpora(Path(corpus).read_bytes(), world / "corpora")


def make_models(world: Path) -> None:
    """A sharded BERT, and BERT and GPT as their authors published them."""
    settings = ("config.json", "vocab.txt", "vocab.json", "merges.txt")
    for directory, source in {"sharded": "model", "original-bert": "model", "original-gpt": "gpt-model"}.items():
        (world / directory).mkdir()
        for name in settings:
            if (world / source / name).exists():
                shutil.copy(world / source / name, world / directory)
    tensors = load_file(world / "model" / "model.safetensors")
    weight_map = {name: f"model-{i % 2 + 1:05d}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == shard}, world / "sharded" / shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (world / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    variables = tensorflow_checkpoint.original_variables(tensors)
    tensorflow_checkpoint.write(world / "original-bert" / "bert_model.ckpt", variables, num_shards=2)
    (world / "original-bert" / "config.json").rename(world / "original-bert" / "bert_config.json")
    tensors, original = load_file(world / "gpt-model" / "model.safetensors"), world / "original-gpt"
    names = ["positions_embed.weight", "tokens_embed.weight"]
    for module in ("attn.c_attn", "attn.c_proj", "ln_1", "mlp.c_fc", "mlp.c_proj", "ln_2"):
        names += [f"h.0.{module}.weight", f"h.0.{module}.bias"]
    arrays = [tensors[f"transformer.{name}"] for name in names]
    (original / "params_shapes.json").write_text(json.dumps([array.shape for array in arrays]))
    for i, part in enumerate(np.array_split(np.concatenate([array.ravel() for array in arrays]), 2)):
        np.save(original / f"params_{i}.npy", part)
    (original / "config.json").write_text('{"n_head": 2}')
    (original / "vocab.json").rename(original / "encoder_bpe_40000.json")
    (original / "merges.txt").rename(original / "vocab_40000.bpe")


def make_corpora(text: bytes, directory: Path) -> None:
    """A text in every format, each in a file."""
    directory.mkdir()
    documents = [{"text": document} for document in text.decode().split("\n\n")]
    content = {
        "c.txt": text,
        "c.txt.gz": gzip.compress(text),
        "c.txt.xz": lzma.compress(text),
        "c.txt.zst": zstandard.ZstdCompressor(write_checksum=True).compress(text),
        "c.txt.bz2": bz2.compress(text),
        "c.jsonl": "".join(json.dumps(document) + "\n" for document in documents).encode(),
    }
    for name, data in content.items():
        (directory / name).write_bytes(data)
    pyarrow.parquet.write_table(pa.Table.from_pylist(documents), directory / "c.parquet")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    printed: str
    written: dict[str, bytes]
    complaints: list[str] = dataclasses.field(compare=False)  # Lines on stderr.

    def refuses(self) -> bool:
        """Whether the command ended with one line that says why."""
        messages = [line for line in self.complaints if line.startswith("prelm: ")]
        return self.code == 1 and messages == self.complaints[-1:] != []


def run(command: str, copy: Path, out: Path) -> Outcome:
    """The outcome of a command that reads `copy` and writes `out`, which is deleted; exceptions are failures."""
    code = 0
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()) as complaints:
        try:
            main(shlex.split(command))
        except SystemExit as stopped:
            assert isinstance(stopped.code, int)
            code = stopped.code
    written = {path.name: path.read_bytes() for path in (out, *out.rglob("*")) if path.is_file()}
    if out.is_dir():
        shutil.rmtree(out)
    out.unlink(missing_ok=True)
    return Outcome(code, printed.getvalue().replace(str(copy), ""), written, complaints.getvalue().splitlines())


@pytest.fixture(scope="session")
def run_on(world, folder, tmp_path_factory):
    """`run_on(kind, copy, file)` is the outcome of the command of a kind."""
    out = tmp_path_factory.mktemp("written") / "out"

    def run_on(kind: Kind, copy: Path, file: Path) -> Outcome:
        with pytest.MonkeyPatch.context() as patch:
            if kind.directory == "cache":
                patch.setenv("PRELM_CACHE", str(copy))
            return run(kind.command.format(copy=copy, file=file, out=out, folder=folder, tiny=tiny.__file__), copy, out)

    return run_on


@pytest.fixture(scope="session")
def expected(world, run_on, tmp_path_factory):
    """`expected(kind, name)` is the outcome for whole files, of which `name` is one; kinds share it."""
    known: dict[tuple[str, ...], Outcome] = {}

    def expected(kind: Kind, name: Path) -> Outcome:
        key = (kind.directory, kind.command, str(name) if "{file}" in kind.command else "")
        if key not in known:
            copy = shutil.copytree(world / kind.directory, tmp_path_factory.mktemp("whole") / "copy")
            known[key] = run_on(kind, copy, copy / name)
            assert known[key].code == 0
        return known[key]

    return expected


def mutate(file: Path, action: str, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    at = rng.randrange(len(content) + 1)
    if action == "cut":
        del content[at:]
    elif action == "flip" and content:
        content[at % len(content)] ^= 1 << rng.randrange(8)
    elif action == "append":
        content += rng.choice([rng.randbytes(rng.randint(1, 64)), content[at:], bytes(rng.randint(1, 64))])
    elif action == "swap":
        half, length = len(content) // 2, rng.randint(1, max(1, len(content) // 4))
        first, second = rng.randrange(half + 1), half + rng.randrange(half + 1)
        a, b = content[first : first + length][: half - first], content[second : second + length]
        length = min(len(a), len(b))
        content[first : first + length], content[second : second + length] = b[:length], a[:length]
    if action == "delete":
        file.unlink()
    elif action == "chmod":
        file.chmod(0)
    else:
        file.write_bytes(content)


@pytest.mark.parametrize("name", KINDS)
def test_mutations(name, world, run_on, expected, tmp_path):
    kind, counts, wrong = KINDS[name], collections.Counter(), []
    for number in range(COUNT):
        rng = random.Random(f"{name} {number}")
        copy = shutil.copytree(world / kind.directory, tmp_path / "copy")
        file = rng.choice(sorted(path for path in copy.glob(kind.files) if path.is_file()))
        relative, action = file.relative_to(copy), rng.choice(ACTIONS)
        whole = expected(kind, relative)
        mutate(file, action, rng)
        try:
            outcome = run_on(kind, copy, file)
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        else:
            result = "same" if outcome == whole else "refused" if outcome.refuses() else f"exit {outcome.code}"
            if result == "exit 0" and action in kind.silent:
                result = "another content"
            elif result.startswith("exit"):
                result += f" {outcome.complaints[-1:]} {outcome.printed[:200]!r}"
        counts[result if result in RESULTS else "wrong"] += 1
        if result not in RESULTS:
            wrong.append(f"case {number}, {action} {relative}: {result}")
        shutil.rmtree(copy)
    print(f"{name}: {dict(counts)}")
    assert not wrong, "\n".join(wrong)
