"""How an argument of the command line becomes a subject.

MODEL                   a model directory, a work directory or hub:OWNER/NAME
RUN@STEP                a checkpoint of a work directory: a number, best or newest
untrained:EXPERIMENT    the model of an experiment, of a work directory or of a model directory before its first step
unigram:EXPERIMENT      the words of the same corpus, counted, in the same vocabulary
trigram:EXPERIMENT      its triples of words, counted
word2vec:SPEC           vectors of words without context, trained on a corpus by gensim
FILE                    such vectors, in word2vec's text format
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from prelm_jax.corpus.store import Store
from prelm_jax.errors import InputError
from prelm_jax.families import find_family
from prelm_jax.formats.base import LoadedModel
from prelm_jax.hub import is_hub_name
from prelm_jax.inference.base import Pretrained
from prelm_jax.inference.heads import TaskPretrained
from prelm_jax.loading import load, load_checkpoint, load_encoder
from prelm_jax.pretraining import prepare, read_training_text, with_vocabulary
from prelm_jax.run import Run
from prelm_jax.storage import read_json
from prelm_jax.study import word2vec
from prelm_jax.study.ngrams import NgramSubject
from prelm_jax.study.subjects import Origin, PretrainedSubject, Subject, fingerprint
from prelm_jax.study.word2vec import WordVectorsSubject
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.training.checkpoint import Step
from prelm_jax.training.step import Keys
from prelm_jax.workdir import WorkDir

PLAN = "plan.json"  # In a work directory: what `prelm plan EXPERIMENT --topology local --json` printed of its run.

LoadRun = Callable[[str], Run]  # The Run of an experiment by its name. Raises InputError if there is none.
Open = Callable[[str, str, LoadRun], Subject]  # Of the whole argument, and of what follows the colon.


def open_subject(argument: str, load_run: LoadRun) -> Subject:
    """The subject that an argument names. Raises InputError where there is none."""
    argument = argument.rstrip("/")  # "runs/bert/" is no other model than "runs/bert".
    kind, colon, rest = argument.partition(":")
    if colon and kind in KINDS:
        return KINDS[kind](argument, rest, load_run)
    path, step = split_step(argument)
    if os.path.isfile(path):
        return WordVectorsSubject(argument, word2vec.read(Path(path)))
    workdir = WorkDir(path)
    if not workdir.exists():
        return PretrainedSubject(argument, _encoder(load(path, step)))
    found, model = load_checkpoint(workdir, step)
    model = _encoder(model)
    seed = workdir.read_record().identity.get("seed")
    words_seen = workdir.words_seen(found)
    flops = flops_per_step(workdir)
    origin = Origin(
        fingerprint(model),
        found,
        words_seen,
        None if flops is None else found * flops,
        seed if isinstance(seed, int) else None,
    )
    return PretrainedSubject(argument, model, origin)


def flops_per_step(workdir: WorkDir) -> float | None:
    """FLOPs of a step as compiled, of the plan.json that `prelm plan --json` printed; None if there is no such file."""
    path = workdir.path / PLAN
    if not path.is_file():
        return None
    fields = read_json(path)
    try:
        return float(fields["compiled_flops"]) * int(fields["chips"])
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path} is not what prelm plan --json prints: write it again, or delete it") from None


def _encoder(model: Pretrained) -> Pretrained:
    return model.pretrained if isinstance(model, TaskPretrained) else model


def split_step(argument: str) -> tuple[str, Step]:
    """(path, step) of RUN@STEP; the step of a path without one is newest."""
    path, separator, step = argument.rpartition("@")
    if not separator or os.path.exists(argument) or argument.startswith("hub:"):
        return argument, "newest"
    if step == "best" or step == "newest":
        return path, step
    if not step.isdecimal():
        raise InputError(f"{argument}: {step!r} is no step: give RUN@N, RUN@best or RUN@newest")
    return path, int(step)


def _open_untrained(name: str, reference: str, load_run: LoadRun) -> Subject:
    workdir = WorkDir(reference)
    if workdir.exists():
        record = workdir.read_record()
        family = find_family(record.model_type, record.source)
        run, tokenizer = record.run(family.model, family.data), workdir.read_tokenizer()
        config, seed = with_vocabulary(run.model, tokenizer), run.seed
    elif os.path.isdir(reference) or is_hub_name(reference):
        trained = load_encoder(reference)
        config, tokenizer, seed = trained.config, trained.tokenizer, 0
        family = find_family(config.model_type, reference)
    else:
        run = load_run(reference)
        family, tokenizer = find_family(run.model.model_type, reference), prepare(run).tokenizer
        config, seed = with_vocabulary(run.model, tokenizer), run.seed
    params = jax.tree.map(np.asarray, jax.jit(config.build().init_params)(Keys.from_seed(seed).init))
    model = family.pretrained(LoadedModel(config, params, tokenizer))
    return PretrainedSubject(name, model, Origin(fingerprint(model), 0, 0, 0.0, seed))


def _open_ngram(order: Literal["unigram", "trigram"]) -> Open:
    def open_ngram(name: str, reference: str, load_run: LoadRun) -> Subject:
        return NgramSubject(name, order, *_training_text(reference, load_run))

    return open_ngram


def _training_text(reference: str, load_run: LoadRun) -> tuple[Store, Tokenizer]:
    if WorkDir(reference).exists():
        return read_training_text(reference)
    prepared = prepare(load_run(reference))
    return prepared.training, prepared.tokenizer


def _open_word2vec(name: str, spec: str, load_run: LoadRun) -> Subject:
    return WordVectorsSubject(name, word2vec.train(spec))


KINDS: Mapping[str, Open] = {
    "untrained": _open_untrained,
    "unigram": _open_ngram("unigram"),
    "trigram": _open_ngram("trigram"),
    "word2vec": _open_word2vec,
}
