"""What a test is: what it asks of a subject, one row an item."""

import abc
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from prelm_jax.bounds import NotNegative
from prelm_jax.errors import InputError
from prelm_jax.study import annotations
from prelm_jax.study.records import Row
from prelm_jax.study.subjects import Subject


class Test(abc.ABC):
    """A test. The same subject gives the same rows each time."""

    name: str  # As on the command line.
    files: Sequence[Path]  # Its data.
    settings: Mapping[str, object]  # What the rows depend on besides the data and the subject.
    metric: str = "accuracy"  # How the rows become a number: a name in `statistics.METRICS`.
    needs: Literal["score", "embed"] = "embed"

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the data."""
        return annotations.fingerprint(self.files)

    @abc.abstractmethod
    def measure(self, subject: Subject) -> Iterator[Row]:
        """The rows of a subject."""


def _open_nothing(argument: str) -> Subject:
    raise InputError(f"{argument}: a test that reads another subject needs Settings.open_subject")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Where the tests find their data, and how much of it they use."""

    data: Path  # Folder with the test sets, each in a folder of its own.
    pairs: NotNegative = 100  # Minimal pairs of each paradigm, the first ones; 0: all.
    open_subject: Callable[[str], Subject] = _open_nothing  # For a test that compares with another subject.


Make = Callable[[Settings, str], Test]  # Of what follows the colon in the test's name: `pairs:FILE`.
