"""Measures subjects with tests. What is measured already is not measured again, so that a study can be interrupted."""

import dataclasses
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from prelm_jax.errors import InputError
from prelm_jax.inference.base import SentenceScore
from prelm_jax.progress import Progress
from prelm_jax.storage import prefix_errors
from prelm_jax.study import records
from prelm_jax.study.base import Test
from prelm_jax.study.records import Header
from prelm_jax.study.subjects import Subject

Answer = TypeVar("Answer")


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
        paths += [_measure(subject, test, output) for test in tests]
        del subject  # Before the next one is opened.
    return paths


def _measure(subject: Subject, test: Test, output: Path) -> Path:
    """Measures a subject with a test, unless it is done; returns the path of the record."""
    header = _header(subject, test)
    path = records.record_path(output, header)
    if path.exists():
        return path
    began = time.monotonic()
    with (
        prefix_errors(f"{test.name}, {subject.name}"),
        Progress(f"{test.name}: {subject.name}", 0, "lines") as progress,
    ):
        rows = list(test.measure(_Counted(subject, progress)))
    return records.write(output, dataclasses.replace(header, seconds=round(time.monotonic() - began, 1)), rows)


def _check(subject: Subject, test: Test) -> None:
    if test.needs == "score" and not subject.scoring:
        raise InputError(f"{subject.name} has word vectors only, and {test.name} needs probabilities of sentences")
    if test.needs == "embed" and not subject.num_layers:
        raise InputError(f"{subject.name} has no vectors of words, and {test.name} needs them")


def _header(subject: Subject, test: Test) -> Header:
    scoring = {"scoring": subject.scoring} if test.needs == "score" else {}
    return Header(
        test=test.name,
        metric=test.metric,
        subject=subject.name,
        family=subject.family,
        data=test.fingerprint,
        settings={**test.settings, **scoring},
        **dataclasses.asdict(subject.origin),
    )


class _Counted:
    """A subject whose answers are counted as progress, of those that it was asked for so far."""

    def __init__(self, subject: Subject, progress: Progress):
        self._subject, self._progress = subject, progress
        self.name, self.family, self.scoring = subject.name, subject.family, subject.scoring
        self.num_layers, self.origin = subject.num_layers, subject.origin

    def score(self, texts: Collection[str]) -> Iterator[SentenceScore]:
        return self._counted(len(texts), self._subject.score(texts))

    def embed(self, sentences: Collection[Sequence[str]]) -> Iterator[np.ndarray]:
        return self._counted(len(sentences), self._subject.embed(sentences))

    def _counted(self, number: int, answers: Iterator[Answer]) -> Iterator[Answer]:
        self._progress.total += number
        for answer in answers:
            yield answer
            self._progress.advance(1)
