"""A small world: a run of a second for each family, the text it reads, and what it leaves behind."""

import contextlib
import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from prelm_jax.data import loader
from prelm_jax.data.examples import Example, Label, Part
from prelm_jax.data.frames import Frame
from prelm_jax.data.pairs import PairsConfig
from prelm_jax.data.streams import StreamsConfig
from prelm_jax.data.windows import WindowsConfig
from prelm_jax.families import find_family
from prelm_jax.formats.base import LoadedModel
from prelm_jax.loading import load
from prelm_jax.models.bert import BertConfig
from prelm_jax.models.elmo import ELMoConfig
from prelm_jax.models.gpt import GPTConfig
from prelm_jax.run import Run
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.tokenizers.bpe import BPE, BPEConfig
from prelm_jax.tokenizers.wordpiece import WordPiece, WordPieceConfig
from prelm_jax.tokenizers.words import WordVocabulary, WordVocabularyConfig
from prelm_jax.training.checkpoint import Checkpoints
from prelm_jax.training.loop import LoopConfig
from prelm_jax.training.optimizer import Adagrad, AdamW
from prelm_jax.training.sharding import MeshConfig
from prelm_jax.training.step import abstract_state
from prelm_jax.workdir import WorkDir

WORDS = ["the", "a", "cat", "dog", "bird", "house", "river", "sees", "finds", "likes", "in", "on", "big", "old", "new"]


def text(seed: int, documents: int = 40) -> str:
    """Documents of two to six sentences of words, blank lines between."""
    rng = random.Random(seed)

    def sentence() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(4, 9))).capitalize() + "."

    return "\n\n".join("\n".join(sentence() for _ in range(rng.randint(2, 6))) for _ in range(documents)) + "\n"


def bert() -> Run:
    """Twelve steps of a tiny BERT, with a checkpoint every five and an evaluation every six."""
    return Run(
        corpus=("corpus.txt",),
        held_out=0.3,
        tokenizer=WordPieceConfig(vocab_size=150),
        model=BertConfig(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32, max_position_embeddings=32),
        data=PairsConfig(max_length=32, max_predictions=4, short_sequence_probability=0.1),
        optimizer=AdamW(learning_rate=1e-3, warmup_steps=3, decay_steps=100, weight_decay=0.01),
        batch_size=8,
        loop=LoopConfig(
            steps=12,
            mesh=MeshConfig(devices=1),
            evaluate_every=6,
            evaluate_batches=2,
            save_every=5,
            keep=2,
            log_every=2,
            samples=0,
        ),
    )


def gpt() -> Run:
    """The same of a tiny GPT."""
    return dataclasses.replace(
        bert(),
        tokenizer=BPEConfig(num_merges=60),
        model=GPTConfig(hidden_size=16, num_layers=1, num_heads=2, max_position_embeddings=32),
        data=WindowsConfig(max_length=32),
        optimizer=AdamW(learning_rate=1e-3, warmup_steps=3, decay_steps=100, weight_decay=0.01, decay="cosine"),
    )


def elmo() -> Run:
    """The same of a tiny ELMo."""
    return dataclasses.replace(
        bert(),
        tokenizer=WordVocabularyConfig(vocab_size=16, min_count=1),
        model=ELMoConfig(
            character_embedding_size=4,
            filters=((1, 4), (2, 12)),
            num_highways=1,
            projection_size=8,
            hidden_size=16,
        ),
        data=StreamsConfig(max_length=8, num_negatives=6),
        optimizer=Adagrad(learning_rate=0.2, unroll_steps=8),
    )


def with_loop(run: Run, **changes: object) -> Run:
    """The run with other settings of its loop."""
    return dataclasses.replace(run, loop=dataclasses.replace(run.loop, **changes))


FAMILIES = {"bert": bert, "openai-gpt": gpt, "elmo": elmo}


def tokenizer(model_type: str) -> Tokenizer:
    """A tokenizer that knows WORDS, letter by letter if it reads subwords."""
    letters = sorted({letter for word in WORDS for letter in word})
    if model_type == "bert":
        subwords = [*dict.fromkeys([*WORDS, *letters]), *(f"##{letter}" for letter in letters)]
        return WordPiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *subwords])
    if model_type == "openai-gpt":
        return BPE(["<unk>", *letters, *(f"{letter}</w>" for letter in letters)], [])
    return WordVocabulary(["<S>", "</S>", "<UNK>", *WORDS])


def frame(model_type: str, max_length: int = 32, symmetric: bool = False) -> Frame:
    """The frame of a family, for `tokenizer`."""
    family_frame = find_family(model_type, "test").frame
    return family_frame(family_frame.task_tokenizer(tokenizer(model_type)), max_length, symmetric)


def example(*parts: Part, label: Label | None = None, id: str = "0") -> Example:
    """A labelled example of one sequence."""
    return Example(id, (parts,), label)


def directory(path: Path, model_type: str, seed: int = 0, **sizes: object) -> Path:
    """A model directory with random parameters; `sizes`: other fields of the config."""
    known = tokenizer(model_type)
    config = dataclasses.replace(FAMILIES[model_type]().model, vocab_size=known.vocab_size, **sizes)
    params = jax.jit(config.build().init_params)(jax.random.key(seed))
    path.mkdir()
    find_family(model_type, path).format.write(LoadedModel(config, params, known), path)
    return path


class Crash(Exception):
    pass


def crash() -> None:
    raise Crash


@contextlib.contextmanager
def interruption(at: int, action: Callable[[], object]) -> Iterator[None]:
    """Calls `action` when a training step is about to begin."""
    original = loader.prefetch

    def prefetch(batches, start, stop, *rest):
        for step, batch in original(batches, start, stop, *rest):
            if step == at and stop > 2:  # Not the two batches of the evaluation.
                action()
            yield step, batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "prefetch", prefetch)
        yield


def change_seed(workdir) -> None:
    """Makes the run in a work directory one of another seed."""
    record = json.loads((workdir / "run.json").read_text())
    record["identity"]["seed"] += 1
    (workdir / "run.json").write_text(json.dumps(record))


def metrics(workdir) -> list[dict]:
    """The lines of metrics.jsonl without timings and baselines."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    lines = [line for line in lines if not any(name.startswith("baseline/") for name in line)]
    return [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in lines]


def assert_same_bits(workdir, other, experiment: Run | None = None) -> None:
    """The newest checkpoints and the metrics. `experiment`: of a family outside of the package."""
    assert metrics(workdir) == metrics(other)
    (step, state), (other_step, other_state) = (newest_checkpoint(each, experiment) for each in (workdir, other))
    assert step == other_step
    for a, b in zip(*map(jax.tree.leaves, (state, other_state)), strict=True):
        np.testing.assert_array_equal(a, b)


def newest_checkpoint(workdir, experiment: Run | None = None) -> tuple[int, dict]:
    """(step, items), on one device."""
    record = WorkDir(workdir).read_record()
    if "head" in record.identity:  # Of a fine-tuning.
        settings = {name: value for name, value in record.segments[0].optimizer.items() if name != "name"}
        model, optimizer = load(workdir).config.build(), AdamW(**settings)
    else:
        experiment = experiment or FAMILIES[record.model_type]()
        model = record.run(type(experiment.model), type(experiment.data)).model.build()
        optimizer = experiment.optimizer
    abstract = abstract_state(model, optimizer, 8, MeshConfig(devices=1).build(), "replicated")
    with contextlib.closing(Checkpoints(workdir / "checkpoints")) as checkpoints:
        return checkpoints.restore(abstract.items())
