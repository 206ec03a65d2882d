"""Pretraining: corpus -> tokenizer -> token store -> batches -> train; evaluate, export."""

import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from prelm_jax.corpus import prepare as preparation
from prelm_jax.corpus.documents import Corpus
from prelm_jax.corpus.store import Store
from prelm_jax.data.evaluation import EvaluationBatches
from prelm_jax.data.show import sentences
from prelm_jax.errors import InputError
from prelm_jax.families import FAMILIES, find_family
from prelm_jax.formats.base import LoadedModel, abstract_params, save
from prelm_jax.formats.sentence_transformers import require_bert, write_vectors
from prelm_jax.formats.transfer import initial_params, positions_note
from prelm_jax.hub import fetch, is_hub_name
from prelm_jax.inference.base import Sample
from prelm_jax.loading import load_checkpoint, load_encoder
from prelm_jax.progress import Progress
from prelm_jax.report import summary
from prelm_jax.report.summary import Summary
from prelm_jax.run import Run, RunRecord
from prelm_jax.storage import check_apart
from prelm_jax.tokenizers import build as tokenizers
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.train import placed_batches, train
from prelm_jax.training import memory
from prelm_jax.training.checkpoint import Step
from prelm_jax.training.contract import Batch, Batches, DataConfig, Model, Params
from prelm_jax.training.parameters import matches, path_name
from prelm_jax.training.sharding import MeshConfig
from prelm_jax.training.step import Totals, evaluated_means, fresh_carry, make_evaluate
from prelm_jax.workdir import WorkDir

# The held-out batches are the same in every run, whatever its seed.
EVALUATION_SEED = 0
POOL = 48  # Held-out sentences of which samples are taken; an ELMo looks for neighbors of a word among all of them.


class Prepared(NamedTuple):
    """A corpus ready for training: its tokenizer, and the token stores of both sides.

    If there is a validation text, `held_out` is its store, and nothing of the corpus is held out.
    """

    corpus: Corpus
    validation: Corpus | None
    tokenizer: Tokenizer
    training: Store
    held_out: Store


def prepare(run: Run, make_shards: preparation.MakeShards | None = None, print_new: bool = True) -> Prepared:
    """The vocabulary and the token stores of a run, from the cache or made now (see corpus/prepare.py).

    print_new: print the statistics of a corpus that was not in the cache.
    """
    corpus, validation = _corpora(run)
    if run.split and next(corpus.documents("training"), None) is None:
        _refuse_split(run, sum(1 for _ in corpus.documents()), "none is left to train on")
    tokenizer = tokenizers.build(run.tokenizer, corpus)
    new = not preparation.store_path(corpus, tokenizer).exists()
    training, held_out = preparation.prepare(corpus, tokenizer, make_shards=make_shards)
    if validation is not None:
        new = new or not preparation.store_path(validation, tokenizer).exists()
        _, held_out = preparation.prepare(validation, tokenizer, make_shards=make_shards)
    if new and print_new:
        summary.print_table(summary.corpus_table(corpus, training, held_out), stderr=True)
    return Prepared(corpus, validation, tokenizer, training, held_out)


def pretrain(run: Run, workdir: str | os.PathLike, extend_to: int | None = None, take_over: bool = False) -> Summary:
    """Trains a run in a work directory, or resumes it there; returns its evaluation on held-out text.

    extend_to: extend the run to this step, with the optimizer of `run` and a schedule that ends there (`train.train`).
    take_over: in a bucket or on a network disk, take over the lease of a dead process without waiting (lock.py).

    Raises InputError for errors that the user can fix, Preempted if SIGTERM stopped the run after saving.

        pretrain(experiments.bert.demo(), "runs/bert-demo")
    """
    run.loop.check_profile(workdir)
    directory = WorkDir(workdir)
    with directory.hold(take_over):
        return _pretrain(run, directory, extend_to)


def _pretrain(run: Run, directory: WorkDir, extend_to: int | None) -> Summary:
    if run.init_from is not None and is_hub_name(run.init_from):
        run = dataclasses.replace(run, init_from=fetch(run.init_from)[0])  # With its revision, which is recorded.
    corpus, validation, tokenizer, training, held_out = prepare(run)
    if run.split and not held_out.num_documents:
        _refuse_split(run, training.num_documents, "none is held out for evaluation")
    run = dataclasses.replace(run, model=with_vocabulary(run.model, tokenizer))
    model = run.model.build(jnp.dtype(run.precision))
    batches = run.data.build(training, tokenizer, run.batch_size, run.seed)
    if jax.process_index() == 0:
        print(run.data.describe(batches), file=sys.stderr)
    evaluation = HeldOut(run, model, tokenizer, batches, held_out) if held_out.num_documents else None
    fingerprint = None if validation is None else validation.fingerprint
    record = RunRecord.from_run(run, corpus.fingerprint, tokenizer.fingerprint, fingerprint)
    known = directory.read_record().statistics if directory.exists() else {}
    statistics = known or summary.corpus_statistics(corpus, training, held_out)
    record = dataclasses.replace(record, statistics=statistics)

    def continued(fresh: Params) -> Params:
        pretrained = load_encoder(str(run.init_from))
        format = find_family(pretrained.config.model_type, run.init_from).format
        if jax.process_index() == 0 and (note := positions_note(pretrained.config, run.model)):
            print(note, file=sys.stderr)
        return initial_params(pretrained.loaded, format, run.model, fresh, tokenizer)

    start = None if run.init_from is None else continued
    words = training.tokens_per_word
    step, values = train(run, directory, record, tokenizer, model, batches, evaluation, start, words, extend_to)
    baselines = directory.read_baselines() or {}
    return Summary(values, baselines, held_out.unknown_rate, directory.tokens_per_second(), step)


def evaluate(
    workdir: str | os.PathLike,
    corpus: tuple[str, ...] = (),
    step: Step = "newest",
    experiment: Run | None = None,
    sample: float = 1.0,
    batch_size: int | None = None,
    devices: int | None = None,
) -> Summary:
    """Evaluates a checkpoint of a work directory on the run's held-out text, or on another corpus.

    Scores each target of the text exactly once (see the `evaluation` of the data's config), so the result does not
    depend on batch size, devices and seed.

    Args:
        experiment: for a model defined outside the package, a run of it, for the classes that run.json cannot name.
        sample: fraction of the text to read, spread over it.
        batch_size: rows on all devices at once; the run's own if None.
        devices: number of devices; all of them if None.
    """
    directory = WorkDir(workdir)
    record = directory.read_record()
    run, tokenizer = _run_of(directory, record, experiment), directory.read_tokenizer()
    run = dataclasses.replace(run, model=with_vocabulary(run.model, tokenizer))
    training, text = _texts_of(directory, record, run, tokenizer, corpus)
    data: DataConfig[Batches] = run.data
    rows = data.evaluation(text, tokenizer)
    model = run.model.build(jnp.dtype(run.precision))
    mesh = MeshConfig(devices).build()
    rows_per_device = -(-min(batch_size or run.batch_size, rows.num_rows) // mesh.size)
    batches = EvaluationBatches(rows, rows_per_device * mesh.size, sample)

    found, params = directory.read_params(abstract_params(run.model), step)
    totals = _evaluate_batches(model, params, batches, mesh)
    values = evaluated_means(model, totals)
    fitted = data.build(training, tokenizer, run.batch_size, run.seed)
    if rows.num_steps > 1:  # Baselines read the targets before a target, in the batches before, of the same rows.
        batches = EvaluationBatches(rows, rows.num_rows, sample)
    baselines = data.baselines(fitted, (batches[i] for i in range(len(batches))))
    return Summary(
        values | _derived(data, values, text),
        _with_derived(data, baselines, text),
        text.unknown_rate,
        directory.tokens_per_second(),
        found,
        batches.share,
        {name: round(weight) for name, (_, weight) in totals.items()},
    )


def _run_of(directory: WorkDir, record: RunRecord, experiment: Run | None) -> Run:
    """The run in a work directory; its classes are those of its family, or of an experiment of the same model_type."""
    if experiment is None:
        family = find_family(record.model_type, record.source)
        return record.run(family.model, family.data)
    if experiment.model.model_type != record.model_type:
        raise InputError(
            f"{directory.path} holds a run of model_type {record.model_type}, and the experiment is of model_type "
            f"{experiment.model.model_type}: name the experiment of that run"
        )
    return record.run(type(experiment.model), type(experiment.data))


def _texts_of(
    directory: WorkDir, record: RunRecord, run: Run, tokenizer: Tokenizer, corpus: tuple[str, ...]
) -> tuple[Store, Store]:
    """The text that a run was trained on, and the one to evaluate it on: `corpus`, else what the run evaluates on."""
    own, validation = _corpora(run)
    training, text = preparation.prepare(own, tokenizer)
    if corpus:
        _, text = preparation.prepare(_all_of(corpus, run), tokenizer)
    else:
        found = {"corpus": own.fingerprint, "validation": None if validation is None else validation.fingerprint}
        for name, fingerprint in found.items():
            if fingerprint != record.identity.get(f"{name}_fingerprint"):
                sources = " ".join(getattr(run, name))
                raise InputError(
                    f"the {name} {sources} of {directory.path} has changed since: give a text with --corpus"
                )
        if validation is not None:
            _, text = preparation.prepare(validation, tokenizer)
    if not text.num_documents:
        reason = f"{' '.join(corpus)} is empty" if corpus else f"the run in {directory.path} holds nothing out"
        raise InputError(f"there is no text to evaluate on ({reason}): give one with --corpus")
    return training, text


def read_training_text(workdir: str | os.PathLike) -> tuple[Store, Tokenizer]:
    """The text that the run in a work directory is trained on, and its tokenizer, for baselines.

    Raises InputError if the corpus has changed since.
    """
    directory = WorkDir(workdir)
    record = directory.read_record()
    run, tokenizer = _run_of(directory, record, None), directory.read_tokenizer()
    corpus, _ = _corpora(run)
    if corpus.fingerprint != record.identity.get("corpus_fingerprint"):
        raise InputError(f"the corpus {' '.join(run.corpus)} of {directory.path} has changed since the run was trained")
    return preparation.prepare(corpus, tokenizer)[0], tokenizer


def export(
    workdir: str | os.PathLike,
    directory: str | os.PathLike,
    step: Step | None = None,
    sentence_transformers: bool = False,
) -> None:
    """Writes a checkpoint of a work directory as a model directory, in the format that others read.

    step: by default the one with the lowest held-out loss, or the newest where none was evaluated.
    sentence_transformers: whether the directory is also one of sentence-transformers; for a BERT only.
    """
    source = WorkDir(workdir)
    record = source.read_record()
    family = find_family(record.model_type, source.path)
    run = record.run(family.model, family.data)
    check_apart(directory, workdir, *filter(None, [run.init_from]))
    found, model = load_checkpoint(source, source.best_step() if step is None else step)
    card = summary.model_card(source, run, found, model.loaded, family.format, Path(directory).name)
    if sentence_transformers:
        require_bert(model.loaded)
    save(model.loaded, family.format, directory, card)
    if sentence_transformers:
        write_vectors(model.loaded, Path(directory))


def show_batch(run: Run, step: int) -> Iterator[str]:
    """The rows of a step's batch, as text for people. Prepares vocabulary and store as `pretrain` does."""
    prepared = prepare(run)
    tokenizer, training = prepared.tokenizer, prepared.training
    batches = run.data.build(training, tokenizer, run.batch_size, run.seed)
    yield from run.data.show(batches[step], tokenizer)


class HeldOut:
    """Evaluation on a sample of the held-out text: its first `run.loop.evaluate_batches` batches."""

    def __init__(self, run: Run, model: Model, tokenizer: Tokenizer, training: Batches, store: Store):
        self._data: DataConfig[Batches] = run.data
        self._count, self._training, self._store = run.loop.evaluate_batches, training, store
        try:
            self._batches = self._data.evaluated().build(store, tokenizer, run.batch_size, EVALUATION_SEED)
        except InputError as error:  # About the text, because the training side has passed.
            remedy = "give another with --validation" if run.validation else "raise --held-out, or give --validation"
            raise InputError(f"the text to evaluate on is too small ({error}): {remedy}") from None
        self._model, self._evaluate = model, make_evaluate(model)
        self._config, self._tokenizer, self._samples = run.model, tokenizer, run.loop.samples

    def __call__(self, params: Params, carry: Params, mesh: jax.sharding.Mesh) -> dict[str, float]:
        """Losses and metrics by name, and what is derived from them (perplexity, bits per byte)."""
        placed = placed_batches(self._batches, 0, self._count, mesh)
        values = evaluated_means(self._model, self._evaluate(params, carry, (batch for _, batch in placed)))
        return values | _derived(self._data, values, self._store)

    def describe(self, values: Mapping[str, float]) -> str:
        """Metrics as a line for people."""
        return "held-out sample  " + "  ".join(f"{name} {value:.4f}" for name, value in values.items())

    def sample(self, params: Params) -> list[Sample]:
        """See `Pretrained.sample`; [] for a family from outside of the package, and for sharded parameters."""
        if not self._samples or self._config.model_type not in FAMILIES:
            return []
        leaves = jax.tree_util.tree_leaves_with_path(params)
        sharded = [path_name(path) for path, leaf in leaves if not leaf.is_fully_replicated]
        if not all(matches(self._model.tables, name) for name in sharded):  # Samples read nothing of a sharded table.
            return []
        loaded = LoadedModel(self._config, jax.tree.map(lambda leaf: leaf.addressable_data(0), params), self._tokenizer)
        texts = sentences(self._store, self._tokenizer, POOL)
        with jax.set_mesh(MeshConfig().build(jax.local_devices()[:1])):
            return FAMILIES[self._config.model_type]().pretrained(loaded).sample(texts, self._samples)

    def baselines(self) -> dict[str, dict[str, float]]:
        """metric -> trivial baseline, fitted on the training side -> value."""
        batches = (self._batches[i] for i in range(self._count))
        return _with_derived(self._data, self._data.baselines(self._training, batches), self._store)


def _evaluate_batches(model: Model, params: Params, batches: EvaluationBatches, mesh: jax.sharding.Mesh) -> Totals:
    """The sums and weights of all losses and metrics over all batches; shows the progress."""
    explained = memory.explained("an evaluation", "lower --batch-size")
    with jax.set_mesh(mesh), explained, Progress("evaluate", len(batches), "batches") as progress:

        def placed() -> Iterator[Batch]:
            for _, batch in placed_batches(batches, 0, len(batches), mesh):
                yield batch
                progress.advance(1)

        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        carry = fresh_carry(model, batches.batch_size, mesh)
        return make_evaluate(model)(params, carry, placed(), batches.num_steps)


def _with_derived(
    data: DataConfig[Batches], baselines: dict[str, dict[str, float]], store: Store
) -> dict[str, dict[str, float]]:
    """The baselines of metrics, and of what is derived from these."""
    for metric, values in list(baselines.items()):
        for name, value in values.items():
            for derived, x in _derived(data, {metric: value}, store).items():
                baselines.setdefault(derived, {})[name] = x
    return baselines


def _derived(data: DataConfig[Batches], values: dict[str, float], store: Store) -> dict[str, float]:
    derived = (data.derived_metrics(name, value, store) for name, value in values.items())
    return {name: value for each in derived for name, value in each.items()}


def _corpora(run: Run) -> tuple[Corpus, Corpus | None]:
    """The corpus of a run, and its validation text if it has one."""
    corpus = Corpus(run.corpus, run.split, run.deduplicate, run.errors)
    return corpus, _all_of(run.validation, run) if run.validation else None


def _all_of(sources: tuple[str, ...], run: Run) -> Corpus:
    """A text to evaluate on: all of its documents are on the held-out side."""
    return Corpus(sources, 1.0, run.deduplicate, run.errors)


def _refuse_split(run: Run, documents: int, consequence: str) -> NoReturn:
    """Raises InputError for a corpus whose documents are all on one side."""
    sources, others = " ".join(run.corpus), "give a text with --validation, or train on everything with --held-out 0"
    if documents == 1:
        raise InputError(
            f"the corpus {sources} is one document, which --held-out {run.held_out} cannot split: end documents at "
            f"blank lines, make each line one ({run.corpus[0]},documents=line), {others}"
        )
    raise InputError(
        f"of the {documents:,} documents of the corpus {sources}, {consequence} by --held-out {run.held_out}: choose "
        f"another fraction, {others}"
    )


def with_vocabulary(model, tokenizer: Tokenizer):
    """The config of a model with the size of the tokenizer's vocabulary, unless it has a larger one of its own."""
    if model.vocab_size is not None and model.vocab_size < tokenizer.vocab_size:
        raise InputError(
            f"--model.vocab-size {model.vocab_size}: the tokenizer has {tokenizer.vocab_size} tokens, whose ids would "
            "fall outside of the model; leave the option out"
        )
    return dataclasses.replace(model, vocab_size=model.vocab_size or tokenizer.vocab_size)
