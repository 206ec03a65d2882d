"""Replacement maps: how far the vector of each word of a sentence moves when another word is replaced by a neutral one.

A picture of what a model reads, for any family: a left-to-right model has zeros where a word would look to its right.
A row is `SENTENCE MOVED REPLACED`: its number, and the positions of two words. Its value is the distance that the
vector of the first of them moves in the top layer, relative to its length.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from prelm_jax.cache import digest
from prelm_jax.study.records import Row
from prelm_jax.study.subjects import Subject

# Agreement over a distance, and a word whose sense is told by the words after it.
SENTENCES = ("the keys that the man lost were on the table .", "the bank of the river was steep and full of reeds .")
NEUTRAL = "something"


@dataclasses.dataclass(frozen=True)
class Replacement:
    """The test `replacement`."""

    name: str = "replacement"
    metric: str = "mean"
    needs: Literal["embed"] = "embed"

    @property
    def settings(self) -> Mapping[str, object]:
        """What the rows depend on besides the data and the subject."""
        return {"neutral": NEUTRAL}

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the sentences."""
        return digest(list(SENTENCES))

    @property
    def num_texts(self) -> int:
        """The number of sentences."""
        return sum(1 + len(sentence.split()) for sentence in SENTENCES)

    def measure(self, subject: Subject) -> Iterator[Row]:
        """A row for each pair of words of each sentence."""
        for number, sentence in enumerate(SENTENCES):
            words = sentence.split()
            replaced = [[*words[:i], NEUTRAL, *words[i + 1 :]] for i in range(len(words))]
            own, *others = (states_LTD[-1] for states_LTD in subject.embed([words, *replaced]))
            lengths_T = np.maximum(np.linalg.norm(own, axis=-1), 1e-12)
            for j, other in enumerate(others):
                for i, moved in enumerate((np.linalg.norm(other - own, axis=-1) / lengths_T).tolist()):
                    yield Row(f"{number} {i} {j}", sentence, moved)


# Each makes a test of the folder of the data, which this test does not need, and of what follows the colon in its name.
TESTS: Mapping[str, Callable[[Path, str], Replacement]] = {"replacement": lambda *_: Replacement()}
