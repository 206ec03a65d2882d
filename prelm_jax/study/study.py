"""Measures subjects with tests. What is measured already is not measured again, so that a study can be interrupted."""

import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from prelm_jax.errors import InputError
from prelm_jax.inference.base import SentenceScore
from prelm_jax.progress import Progress
from prelm_jax.storage import prefix_errors
from prelm_jax.study import records
from prelm_jax.study.records import Header
from prelm_jax.study.subjects import Subject
from prelm_jax.study.tests import Test


def study(subjects: Iterable[Subject], tests: Sequence[Test], output: Path) -> list[Path]:
    """Measures each subject with each test; returns the paths of all records, in that order.

    subjects: may be an iterator that opens one after the other; one at a time is kept.
    output: folder of the records; those that are in it are not measured again.

    Raises InputError for a subject that cannot do what a test asks for, before anything of it is measured.
    """
    paths = []
    for subject in subjects:
        for test in tests:
            _check(subject, test)
        counted = _Counted(subject)  # One for all tests: they keep what they have asked it, by its identity.
        paths += [_measure(counted, test, output) for test in tests]
    return paths


def _measure(subject: "_Counted", test: Test, output: Path) -> Path:
    """Measures a subject with a test, unless it is done; returns the path of the record."""
    header = _header(subject, test)
    path = records.record_path(output, header)
    if path.exists():
        return path
    began = time.monotonic()
    with (
        prefix_errors(f"{test.name}, {subject.name}"),
        Progress(f"{test.name}: {subject.name}", test.num_texts, "lines") as subject.progress,
    ):
        rows = list(test.measure(subject))
    return records.write(output, replace(header, seconds=round(time.monotonic() - began, 1)), rows)


def _check(subject: Subject, test: Test) -> None:
    if test.needs == "score" and not subject.scoring:
        raise InputError(f"{subject.name} has word vectors only, and {test.name} needs probabilities of sentences")
    if test.needs == "embed" and not subject.num_layers:
        raise InputError(f"{subject.name} has no vectors of words, and {test.name} needs them")


def _header(subject: Subject, test: Test) -> Header:
    settings = {**test.settings, **({"scoring": subject.scoring} if test.needs == "score" else {})}
    origin = subject.origin
    return Header(
        test.name,
        test.metric,
        subject.name,
        subject.family,
        origin.model,
        test.fingerprint,
        settings,
        origin.step,
        origin.words_seen,
        origin.flops,
        origin.seed,
    )


class _Counted:
    """A subject whose answers are counted as progress."""

    def __init__(self, subject: Subject):
        self._subject, self.progress = subject, Progress(None, 0, "lines")
        self.name, self.family, self.scoring = subject.name, subject.family, subject.scoring
        self.num_layers, self.origin = subject.num_layers, subject.origin

    def score(self, texts: Collection[str]) -> Iterator[SentenceScore]:
        for score in self._subject.score(texts):
            yield score
            self.progress.advance(1)

    def embed(self, sentences: Iterable[Sequence[str]]) -> Iterator[np.ndarray]:
        for vectors in self._subject.embed(sentences):
            yield vectors
            self.progress.advance(1)
