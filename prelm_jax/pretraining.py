"""Pretraining: corpus -> tokenizer -> token store -> batches -> train; evaluate, export."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from prelm_jax import report
from prelm_jax.corpus import prepare as preparation
from prelm_jax.corpus.documents import Corpus
from prelm_jax.corpus.store import Store
from prelm_jax.errors import InputError
from prelm_jax.families import find_family
from prelm_jax.formats.base import save
from prelm_jax.formats.transfer import initial_params, positions_note
from prelm_jax.loading import load, load_checkpoint
from prelm_jax.report import Summary
from prelm_jax.run import Run, RunRecord
from prelm_jax.storage import is_remote
from prelm_jax.tokenizers import build as tokenizers
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.train import placed_batches, train
from prelm_jax.training.checkpoint import Step
from prelm_jax.training.contract import Batches, DataConfig, Model, Params
from prelm_jax.training.sharding import MeshConfig
from prelm_jax.training.step import abstract_items, make_evaluate
from prelm_jax.workdir import WorkDir

# The held-out batches are the same in every run, whatever its seed.
EVALUATION_SEED = 0


class Prepared(NamedTuple):
    """A corpus ready for training: its tokenizer, and the token stores of both sides."""

    corpus: Corpus
    tokenizer: Tokenizer
    training: Store
    held_out: Store


def prepare(run: Run, make_shards: preparation.MakeShards | None = None, verify: bool = False) -> Prepared:
    """The vocabulary and the token stores of a run, from the cache or made now (see corpus/prepare.py)."""
    corpus = Corpus(run.corpus, run.held_out, run.deduplicate, run.errors)
    tokenizer = tokenizers.build(run.tokenizer, corpus)
    new = not preparation.store_path(corpus, tokenizer).exists()
    stores = preparation.prepare(corpus, tokenizer, make_shards=make_shards, verify=verify)
    prepared = Prepared(corpus, tokenizer, *stores)
    if new and not verify:  # `prelm prepare` prints them to stdout, new or not.
        report.print_table(report.corpus_table(corpus, *stores), stderr=True)
    return prepared


def pretrain(run: Run, workdir: str | os.PathLike) -> Summary:
    """Trains a run in a work directory, or resumes it there; returns how it does on held-out text.

    Raises InputError for what the user can mend, Preempted when SIGTERM stopped the run after saving.

        pretrain(experiments.bert.demo(), "runs/bert-demo")
    """
    directory = WorkDir(workdir)
    if run.loop.profile and is_remote(directory.path):
        raise InputError(f"--profile {run.loop.profile}: traces are written to local directories only: {workdir}")
    corpus, tokenizer, training, held_out = prepare(run)
    run = dataclasses.replace(run, model=_with_vocabulary(run.model, tokenizer))
    model = run.model.build(jnp.dtype(run.precision))
    batches = run.data.build(training, tokenizer, run.batch_size, run.seed)
    evaluation = HeldOut(run, model, tokenizer, batches, held_out)
    record = RunRecord.from_run(run, corpus.fingerprint, tokenizer.fingerprint)

    def continued(fresh: Params) -> Params:
        pretrained = load(str(run.init_from))
        format = find_family(pretrained.config.model_type, run.init_from).format
        if jax.process_index() == 0 and (note := positions_note(pretrained.config, run.model)):
            print(note, file=sys.stderr)
        return initial_params(pretrained.loaded, format, run.model, fresh, tokenizer)

    start = None if run.init_from is None else continued
    values = train(run, directory, record, tokenizer, model, batches, evaluation, start, training.tokens_per_word)
    baselines = directory.read_baselines() or {}
    return Summary(values, baselines, held_out.unknown_rate, directory.tokens_per_second())


def evaluate(
    workdir: str | os.PathLike, corpus: tuple[str, ...] = (), step: Step = "newest", experiment: Run | None = None
) -> Summary:
    """Evaluates a checkpoint of a work directory on the run's held-out text, or on all of another corpus.

    experiment: for a model from outside of the package, a run of it, which tells the classes that run.json cannot.
    """
    directory = WorkDir(workdir)
    record = directory.read_record()
    if experiment is None:
        family = find_family(record.model_type, directory.path / "run.json")
        run = record.run(family.model, family.data)
    elif experiment.model.model_type != record.model_type:
        raise InputError(
            f"{directory.path} holds a run of model_type {record.model_type}, and the experiment is of model_type "
            f"{experiment.model.model_type}: name the experiment of that run"
        )
    else:
        run = record.run(type(experiment.model), type(experiment.data))
    tokenizer = directory.read_tokenizer()
    run = dataclasses.replace(run, model=_with_vocabulary(run.model, tokenizer))
    training, held_out = preparation.prepare(Corpus(run.corpus, run.held_out, run.deduplicate, run.errors), tokenizer)
    if corpus:
        _, held_out = preparation.prepare(Corpus(corpus, 1.0, run.deduplicate, run.errors), tokenizer)
    model = run.model.build(jnp.dtype(run.precision))
    batches = run.data.build(training, tokenizer, run.batch_size, run.seed)
    evaluation = HeldOut(run, model, tokenizer, batches, held_out)
    mesh = MeshConfig(devices=1).build()
    with jax.set_mesh(mesh), contextlib.closing(directory.open_checkpoints()) as checkpoints:
        restored = checkpoints.restore(abstract_items(model, run.batch_size, mesh), step)
        if restored is None:
            raise InputError(f"{directory.path}: no checkpoint here yet")
        _, items = restored
        values = evaluation(items["params"], cast(Params, items["progress"]["carry"]), mesh)
    return Summary(values, evaluation.baselines(), held_out.unknown_rate, directory.tokens_per_second())


def export(workdir: str | os.PathLike, directory: str | os.PathLike, step: Step = "newest") -> None:
    """Writes a checkpoint of a work directory as a model directory, in the format that others read."""
    source = WorkDir(workdir)
    record = source.read_record()
    found, model = load_checkpoint(source, step)
    family = find_family(record.model_type, source.path)
    run = record.run(family.model, family.data)
    card = report.model_card(source, run, found, model.loaded, family.format, Path(directory).name)
    save(model.loaded, family.format, directory, card)


def show_batch(run: Run, step: int) -> Iterator[str]:
    """The rows of a step's batch, as text for people. Prepares vocabulary and store as `pretrain` does."""
    if step < 0:
        raise InputError(f"--step {step}: steps are counted from 0")
    _, tokenizer, training, _ = prepare(run)
    batches = run.data.build(training, tokenizer, run.batch_size, run.seed)
    yield from run.data.show(batches[step], tokenizer)


class HeldOut:
    """Evaluation on a sample of the held-out text: the first `run.loop.evaluate_batches` batches of it."""

    def __init__(self, run: Run, model: Model, tokenizer: Tokenizer, training: Batches, store: Store):
        if store.num_documents == 0:
            raise InputError("no document is held out for evaluation: raise --held-out")
        self._data: DataConfig[Batches] = run.data
        self._count, self._training, self._store = run.loop.evaluate_batches, training, store
        self._batches = self._data.build(store, tokenizer, run.batch_size, EVALUATION_SEED)
        self._evaluate = make_evaluate(model)

    def __call__(self, params: Params, carry: Params, mesh: jax.sharding.Mesh) -> dict[str, float]:
        """Losses and metrics by name, and what is derived from them (perplexity, bits per byte)."""
        placed = placed_batches(self._batches, 0, self._count, mesh)
        values = self._evaluate(params, carry, (batch for _, batch in placed))
        return values | self._derived(values)

    def baselines(self) -> dict[str, dict[str, float]]:
        """metric -> trivial baseline, fitted on the training side -> value."""
        batches = (self._batches[i] for i in range(self._count))
        baselines = self._data.baselines(self._training, batches)
        for metric, values in list(baselines.items()):
            for name, value in values.items():
                for derived, x in self._derived({metric: value}).items():
                    baselines.setdefault(derived, {})[name] = x
        return baselines

    def _derived(self, values: dict[str, float]) -> dict[str, float]:
        derived = (self._data.derived_metrics(name, value, self._store) for name, value in values.items())
        return {name: value for each in derived for name, value in each.items()}


def _with_vocabulary(model, tokenizer: Tokenizer):
    if model.vocab_size is not None and model.vocab_size < tokenizer.vocab_size:
        raise InputError(
            f"--model.vocab-size {model.vocab_size}: the tokenizer has {tokenizer.vocab_size} tokens, whose ids would "
            "fall outside of the model; leave the option out"
        )
    return dataclasses.replace(model, vocab_size=model.vocab_size or tokenizer.vocab_size)
