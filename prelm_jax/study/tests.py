"""Tests by name: what is asked of a subject, one row an item."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal, Protocol

from prelm_jax.bounds import NotNegative
from prelm_jax.errors import InputError
from prelm_jax.study import geometry, neighbors, pairs, probes, replacement, senses, structural, words
from prelm_jax.study.records import Row
from prelm_jax.study.subjects import Subject

Verb = Literal["score", "embed"]


def _open_nothing(argument: str) -> Subject:
    raise InputError(f"{argument}: a test that reads another subject needs Settings.open_subject")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Where the tests find their data, and how much of it they use."""

    data: Path  # Folder with the test sets, each in a folder of its own.
    pairs: NotNegative = 100  # Minimal pairs of each paradigm, the first ones; 0: all.
    open_subject: Callable[[str], Subject] = _open_nothing  # For a test that compares with another subject.


class Test(Protocol):
    """A test. The same subject gives the same rows each time."""

    @property
    def name(self) -> str:
        """As on the command line."""

    @property
    def needs(self) -> Verb: ...

    @property
    def metric(self) -> str:
        """How the rows become a number: a name in `statistics.METRICS`."""

    @property
    def settings(self) -> Mapping[str, object]:
        """What the rows depend on besides the data and the subject, for the header of the record."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the data."""

    @property
    def num_texts(self) -> int:
        """How many texts or sentences the subject is asked about in all, for the progress."""

    def measure(self, subject: Subject) -> Iterator[Row]:
        """The rows of a subject."""


Make = Callable[[Settings, str], Test]


def _of_data(makes: Mapping[str, Callable[[Path, str], Test]]) -> dict[str, Make]:
    """The same, which need no settings but the folder of the data."""
    return {name: functools.partial(_make, make) for name, make in makes.items()}


def _make(make: Callable[[Path, str], Test], settings: Settings, argument: str) -> Test:
    return make(settings.data, argument)


# Each makes a test of the settings and of what follows the colon in its name: `pairs:FILE`.
TESTS: Mapping[str, Make] = {
    "blimp": lambda settings, _: pairs.blimp(settings.data, settings.pairs),
    "supplement": lambda settings, _: pairs.supplement(settings.data, settings.pairs),
    "zorro": lambda settings, _: pairs.zorro(settings.data, settings.pairs),
    "agreement": lambda settings, _: pairs.agreement(settings.data, settings.pairs),
    "climp": lambda settings, _: pairs.climp(settings.data, settings.pairs),
    "pairs": lambda settings, files: pairs.own(files, settings.pairs),
    **_of_data(probes.TESTS),
    **_of_data(structural.TESTS),
    **_of_data(senses.TESTS),
    **_of_data(words.TESTS),
    **_of_data(geometry.TESTS),
    **_of_data(neighbors.TESTS),
    **_of_data(replacement.TESTS),
    "cka": lambda settings, other: geometry.cka_test(settings.data, settings.open_subject(other) if other else None),
}


def make_test(name: str, settings: Settings) -> Test:
    """The test of a name. Raises InputError for an unknown one, and where its data is missing."""
    kind, _, argument = name.partition(":")
    if kind not in TESTS:
        raise InputError(f"there is no test {name!r}: choose among {', '.join(TESTS)}")
    return TESTS[kind](settings, argument)
