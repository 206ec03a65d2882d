"""A Run, and what is done with it: corpus → vocabulary → token store → batches → loop. Knows every room."""

import contextlib
import dataclasses
import json
import math
import statistics
import sys
import tempfile
import typing
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from prelm_jax import load as exchange
from prelm_jax.corpus import prepare as preparation
from prelm_jax.corpus import store
from prelm_jax.corpus.documents import Corpus
from prelm_jax.corpus.readers import Errors
from prelm_jax.data import loader
from prelm_jax.data.pairs import PairsConfig
from prelm_jax.data.streams import StreamsConfig
from prelm_jax.data.windows import WindowsConfig
from prelm_jax.errors import InputError
from prelm_jax.formats.base import save
from prelm_jax.formats.transfer import initial_params
from prelm_jax.storage import copy_files, is_remote, reachable
from prelm_jax.training import loop
from prelm_jax.training.checkpoint import Checkpoints
from prelm_jax.training.metrics import MetricsWriter
from prelm_jax.training.sharding import MeshConfig, place

# What makes the batches of each model, to find it again in a work directory.
DATA = {"bert": PairsConfig, "openai-gpt": WindowsConfig, "elmo": StreamsConfig}

# The batches on which a model is evaluated are the same in every run.
EVALUATION_SEED = 0

# Fields that do not decide the bits of a run: where it reads, how far it goes, what it writes, on how many devices.
CIRCUMSTANCE = {
    "corpus",
    "deduplicate",
    "errors",
    "tokenizer",
    "steps",
    "mesh",
    "evaluate_every",
    "evaluate_batches",
    "save_every",
    "keep",
    "log_every",
    "tensorboard",
    "profile",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """An experiment. The same Run and seed give the same model, bit for bit, on the same devices and versions.

    corpus: SPECs (see text/corpus.py), of which the fraction `held_out` of the documents is only evaluated on.
    deduplicate: of documents with the same text read the first alone.
    errors: bytes that are not UTF-8 are refused (strict), or read as U+FFFD (replace).
    model, tokenizer, data, optimizer: configurations of these.
    batch_size: rows of the global batch; cut into `accumulate` micro-batches, one after the other.
    steps: to go to, counted from the start of the training; a run that stopped earlier goes on.
    precision: of activations; parameters and moments are float32.
    init_from: a model directory or work directory whose parameters to start from (continued pretraining).
    evaluate_every, save_every, log_every: in steps. `keep`: the number of newest checkpoints that stay.
    profile: a trace of so many steps, from the 11th on, goes to `profile/` in the work directory.
    """

    corpus: tuple[str, ...]
    model: Any
    tokenizer: Any
    data: Any
    optimizer: Any
    batch_size: int
    steps: int
    held_out: float = 0.01
    deduplicate: bool = False
    errors: Errors = "strict"
    seed: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    accumulate: int = 1
    init_from: str | None = None
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    evaluate_every: int = 1000
    evaluate_batches: int = 32
    save_every: int = 1000
    keep: int = 3
    log_every: int = 50
    tensorboard: bool = False
    profile: int = 0

    def __post_init__(self):
        for name in ("batch_size", "steps", "accumulate", "evaluate_every", "save_every", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")


@dataclasses.dataclass(frozen=True)
class Summary:
    """How a model does on held-out text, beside what knows next to nothing, and the median speed of its training.

    `unknown_tokens`: the share of the held-out tokens that the vocabulary cannot spell.
    """

    evaluation: dict[str, float]
    baselines: dict[str, dict[str, float]]
    unknown_tokens: float
    tokens_per_second: float


class Prepared(NamedTuple):
    """A corpus ready for training; `new` if its stores were made just now."""

    corpus: Corpus
    tokenizer: Any
    training: store.Store
    held_out: store.Store
    new: bool


def prepare(run: Run, make_shards: preparation.MakeShards | None = None, verify: bool = False) -> Prepared:
    """The vocabulary and the token stores of a run; made, if they are not in the cache (see text/preparation.py)."""
    corpus = Corpus(run.corpus, run.held_out, run.deduplicate, run.errors)
    tokenizer = run.tokenizer.build(corpus)
    new = not preparation.location(corpus, tokenizer).exists()
    stores = preparation.prepare(corpus, tokenizer, make_shards=make_shards, verify=verify)
    return Prepared(corpus, tokenizer, *stores, new)


def figures(prepared: Prepared) -> str:
    """A table of what a corpus is made of."""
    stores = (prepared.training, prepared.held_out)

    def counted(name: str) -> list[str]:
        return [f"{store.manifest[name]:,}" for store in stores]

    def share(name: str, of: str, form: str) -> list[str]:
        return [format(store.manifest[name] / max(store.manifest[of], 1), form) for store in stores]

    def lengths(unit: Literal["documents", "sentences"]) -> list[str]:
        return [" / ".join(f"{length:,}" for length in store.length_quantiles(unit)) for store in stores]

    rows = {
        "": ["training", "held out"],
        "documents": counted("documents"),
        "sentences": counted("sentences"),
        "tokens": counted("tokens"),
        "bytes of text": counted("bytes"),
        "bytes per token": share("bytes", "tokens", ".2f"),
        "unknown tokens": share("unknown_tokens", "tokens", ".3%"),
        "longest word, characters": counted("longest_word"),
        "empty documents, left out": counted("empty_documents"),
        "tokens in a document*": lengths("documents"),
        "tokens in a sentence*": lengths("sentences"),
    }
    if prepared.corpus.deduplicate:
        rows["duplicates, left out"] = [f"{prepared.corpus.duplicates:,}", "(of both)"]
    lines = [f"{name:26}{training:>32}{held_out:>32}" for name, (training, held_out) in rows.items()]
    return "\n".join([*lines, "* median / 90 % / 99 % / longest"])


def pretrain(run: Run, workdir: Path) -> Summary:
    """Trains, or goes on with, the run in `workdir`. Order of start: own checkpoint > init_from > scratch.

    Raises InputError for what the user can mend, Preempted when SIGTERM stopped the run after saving.
    """
    workdir = reachable(workdir)
    if run.profile and is_remote(workdir):
        raise InputError(f"--profile {run.profile}: traces are written to this machine only; take a local --workdir")
    prepared = prepare(run)
    corpus, tokenizer, training, held_out, _ = prepared
    run = dataclasses.replace(run, model=_with_vocabulary(run.model, tokenizer))
    batches = run.data.build(training, tokenizer, run.batch_size, run.seed)
    evaluation = _evaluation_batches(run.data, held_out, tokenizer, run.batch_size)

    mesh = run.mesh.build()
    check_batch_size(run, mesh.size)
    model = run.model.build(jnp.dtype(run.precision))
    model.check(batches[0])
    _claim(workdir, run, corpus, tokenizer)

    with jax.set_mesh(mesh), contextlib.closing(Checkpoints(workdir / "checkpoints", run.keep)) as checkpoints:
        abstract = loop.abstract_state(model, run.optimizer, run.batch_size, mesh, run.mesh.parameters)
        restored = checkpoints.restore(abstract.items())
        if restored is not None:
            _, items = restored
            state = loop.TrainState.of(items)
        else:
            start = None
            if run.init_from is not None:
                loaded = exchange.load(run.init_from).loaded
                format = exchange.family(loaded.config.model_type, run.init_from).format
                start = partial(initial_params, loaded, format, run.model, tokenizer=tokenizer)
            state = loop.new_state(model, run.optimizer, run.batch_size, run.seed, abstract, start)

        _introduce(run, prepared, state, mesh)
        evaluate = loop.make_evaluate(model)

        def evaluate_held_out(state: loop.TrainState) -> dict[str, float]:
            placed = on_devices(evaluation, 0, run.evaluate_batches, mesh)
            values = evaluate(state.params, state.carry, (batch for _, batch in placed))
            return _with_other_units(evaluation, values)

        done = int(state.step)
        steps = on_devices(batches, done, run.steps, mesh)
        with contextlib.closing(MetricsWriter(workdir, done, run.tensorboard)) as writer:
            state, values = loop.train(
                run, model, state, steps, batches.layout, evaluate_held_out, checkpoints, writer, workdir
            )
        values = values or evaluate_held_out(state)
        return _summary(workdir, values, batches, evaluation, run.evaluate_batches, held_out)


def show_batch(run: Run, step: int) -> Iterator[str]:
    """The rows of the batch of a step for people to read. Prepares vocabulary and store as `pretrain` does."""
    if step < 0:
        raise InputError(f"--step {step}: steps are counted from 0")
    _, tokenizer, training, _, _ = prepare(run)
    batches = run.data.build(training, tokenizer, run.batch_size, run.seed)
    yield from batches.show(batches[step], tokenizer)


def evaluate(workdir: Path, sources: tuple[str, ...] = ()) -> Summary:
    """Evaluates the newest checkpoint of a work directory: on the run's held-out side, or on other sources.

    The batches, as many as in the training, are drawn from all documents of that side.
    """
    workdir = reachable(workdir)
    record = exchange.read_record(workdir)
    circumstance, rows = record["circumstance"], record["batch_size"]
    tokenizer = exchange.read_tokenizer(workdir)
    # Runs of before these options have none of them.
    reading = {name: circumstance[name] for name in ("deduplicate", "errors") if name in circumstance}
    corpus = Corpus(tuple(circumstance["corpus"]), record["held_out"], **reading)
    training, held_out = preparation.prepare(corpus, tokenizer)
    if sources:
        _, held_out = preparation.prepare(Corpus(sources, 1.0, **reading), tokenizer)
    data = _from_json(DATA[record["model"]["model_type"]], record["data"])
    evaluation = _evaluation_batches(data, held_out, tokenizer, rows)
    loaded = exchange.load(workdir)
    model = loaded.config.build(jnp.dtype(record["precision"]))
    mesh = MeshConfig(devices=1).build()
    with jax.set_mesh(mesh):
        placed = on_devices(evaluation, 0, circumstance["evaluate_batches"], mesh)
        with contextlib.closing(Checkpoints(workdir / "checkpoints")) as checkpoints:
            _, items = checkpoints.restore({"progress": loop.abstract_progress(model, rows, mesh)})
        carry = items["progress"]["carry"]
        values = loop.make_evaluate(model)(loaded.params, carry, (batch for _, batch in placed))
    values = _with_other_units(evaluation, values)
    batches = data.build(training, tokenizer, rows, record["seed"])
    return _summary(workdir, values, batches, evaluation, circumstance["evaluate_batches"], held_out)


def export(workdir: Path, directory: Path) -> None:
    """Writes the newest checkpoint of a work directory as a model directory, in the format that others read."""
    workdir = reachable(workdir)
    record = exchange.read_record(workdir)
    format = exchange.family(record["model"]["model_type"], workdir).format
    save(exchange.load(workdir).loaded, format, directory, _card(workdir, record))


def check_batch_size(run: Run, devices: int) -> None:
    """Raises InputError where micro-batches and devices do not divide the batch."""
    if run.batch_size % (run.accumulate * devices):
        raise InputError(
            f"--batch-size {run.batch_size} cannot be divided into {run.accumulate} micro-batches (--accumulate) for "
            f"{devices} devices: choose a multiple of {run.accumulate * devices}"
        )


def _introduce(run: Run, prepared: Prepared, state: loop.TrainState, mesh: Any) -> None:
    """Says what is about to happen."""
    if jax.process_index() != 0:
        return
    _, tokenizer, training, held_out, new = prepared
    if new:
        print(figures(prepared), file=sys.stderr)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    lines = [
        f"{training.num_documents:,} documents of {training.num_tokens:,} tokens, {held_out.num_documents:,} documents "
        f"held out, {tokenizer.vocab_size:,} entries in the vocabulary",
        f"{run.model.model_type} of {parameters:,} parameters on {mesh.size} × {jax.devices()[0].device_kind}, "
        f"steps {int(state.step):,} to {run.steps:,}",
    ]
    if run.steps > 1 and float(run.optimizer.schedule(run.steps - 1)) == 0:
        lines.append("the learning rate is zero at the end: for more steps raise --optimizer.decay-steps too")
    print("\n".join(lines), file=sys.stderr)


def on_devices(batches: Any, start: int, stop: int, mesh: jax.sharding.Mesh) -> Iterator[tuple[int, dict]]:
    """The batches of some steps on the devices; each process builds and feeds an equal share of the rows."""
    share = batches.batch_size // jax.process_count()
    rows = slice(share * jax.process_index(), share * (jax.process_index() + 1))
    return loader.prefetch(batches, start, stop, rows, partial(place, layout=batches.layout, mesh=mesh))


def _with_vocabulary(model: Any, tokenizer: Any) -> Any:
    if model.vocab_size is not None and model.vocab_size < tokenizer.vocab_size:
        raise InputError(
            f"--model.vocab-size {model.vocab_size}: the tokenizer has {tokenizer.vocab_size} entries, whose ids would "
            "fall outside the model; leave the option out"
        )
    return dataclasses.replace(model, vocab_size=model.vocab_size or tokenizer.vocab_size)


def _evaluation_batches(data: Any, held_out: store.Store, tokenizer: Any, rows: int) -> Any:
    if held_out.num_documents == 0:
        raise InputError("no document fell on the held-out side: raise --held-out")
    return data.build(held_out, tokenizer, rows, EVALUATION_SEED)


def _with_other_units(batches: Any, values: dict[str, float]) -> dict[str, float]:
    units = (batches.in_other_units(name, value) for name, value in values.items())
    return values | {name: value for unit in units for name, value in unit.items()}


def _summary(
    workdir: Path, values: dict[str, float], batches: Any, evaluation: Any, steps: int, held_out: store.Store
) -> Summary:
    """With baselines that learned from `batches`."""
    baselines = batches.baselines(evaluation[i] for i in range(steps))
    for name, known in list(baselines.items()):
        for model, value in known.items():
            for unit, x in evaluation.in_other_units(name, value).items():
                baselines.setdefault(unit, {})[model] = x
    unknown = held_out.manifest["unknown_tokens"] / held_out.num_tokens
    return Summary(values, baselines, unknown, _tokens_per_second(workdir))


def _claim(workdir: Path, run: Run, corpus: Corpus, tokenizer: Any) -> None:
    """Makes the work directory this run's, or checks that it is."""
    record = _record(run, corpus, tokenizer)
    path = workdir / "run.json"
    if path.exists():
        there, here = (
            _flat({k: v for k, v in r.items() if k != "circumstance"}) for r in (exchange.read_record(workdir), record)
        )
        differing = sorted(name for name in there | here if there.get(name) != here.get(name))
        if differing:
            fields = ", ".join(f"{name} ({there.get(name)} there, {here.get(name)} here)" for name in differing)
            raise InputError(f"{workdir} holds another run, which differs in {fields}: choose another --workdir")
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as written:
            tokenizer.save(written)
            copy_files(Path(written), workdir / "tokenizer")
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        temporary.replace(path)


def _record(run: Run, corpus: Corpus, tokenizer: Any) -> dict[str, Any]:
    """What run.json holds: the fields that decide the bits, corpus and tokenizer by fingerprint, and the rest apart."""
    fields = {f.name: getattr(run, f.name) for f in dataclasses.fields(run)}
    identity = {name: value for name, value in fields.items() if name not in CIRCUMSTANCE}
    identity |= {"corpus_fingerprint": corpus.fingerprint, "tokenizer_fingerprint": tokenizer.fingerprint}
    circumstance = {name: value for name, value in fields.items() if name in CIRCUMSTANCE}
    record = {"format": exchange.RECORD_FORMAT, **identity, "circumstance": circumstance | {"command": sys.argv[1:]}}
    record = json.loads(json.dumps(record, default=dataclasses.asdict))
    record["model"] = {"model_type": run.model.model_type, **record["model"]}
    record["optimizer"] = {"name": type(run.optimizer).__name__, **record["optimizer"]}
    return record


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, x in value.items() for k, v in _flat(x, f"{name}.{key}" if name else key).items()}


def _from_json(cls: type, fields: dict[str, Any]) -> Any:
    types = typing.get_type_hints(cls)
    return cls(**{k: _from_json(types[k], v) if dataclasses.is_dataclass(types[k]) else v for k, v in fields.items()})


def _metrics(workdir: Path) -> list[dict[str, Any]]:
    path = workdir / "metrics.jsonl"  # Only process 0 writes it.
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _tokens_per_second(workdir: Path) -> float:
    speeds = [line["perf/tokens_per_second"] for line in _metrics(workdir) if "perf/tokens_per_second" in line]
    return statistics.median(speeds) if speeds else math.nan


def _card(workdir: Path, record: dict[str, Any]) -> str:
    """The model card: what the model was trained on, for how long, how well it does, and the command."""
    last = next(line for line in reversed(_metrics(workdir)) if "evaluation/loss" in line)
    figures = "\n".join(
        f"| {name.removeprefix('evaluation/').replace('_', ' ')} | {value:.4f} |"
        for name, value in last.items()
        if name.startswith("evaluation/")
    )
    model_type, data, circumstance = record["model"]["model_type"], record["data"], record["circumstance"]
    sources = "\n".join(f"- `{source}`" for source in circumstance["corpus"])
    places = last["step"] * record["batch_size"] * data["max_length"]
    return f"""---
library_name: {exchange.family(model_type, workdir).format.library}
tags:
- {model_type}
- prelm_jax
---

# {workdir.resolve().name}

A {model_type} pretrained with prelm_jax: {last["step"]:,} steps of {record["batch_size"]} × {data["max_length"]} tokens
({places:,} places, padding included), seed {record["seed"]}, {record["precision"]}.

Corpus (a fraction of {record["held_out"]} of the documents held out), content `{record["corpus_fingerprint"][:16]}`:

{sources}

On held-out text, after step {last["step"]:,}:

| metric | value |
|---|---|
{figures}

Command: `prelm {" ".join(circumstance["command"])}`
"""
