"""Replacement maps: how far the vector of each word of a sentence moves when another word is replaced by a neutral one.

A picture of what a model reads, for any family: a left-to-right model has zeros where a word would look to its right.
A row is `SENTENCE MOVED REPLACED`: its number, and the positions of two words. Its value is the distance that the
vector of the first of them moves in the top layer, relative to its length.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from prelm_jax.cache import digest
from prelm_jax.study.base import Make, Test
from prelm_jax.study.records import Row
from prelm_jax.study.subjects import Subject

# Agreement over a distance, and a word whose sense is told by the words after it.
SENTENCES = ("the keys that the man lost were on the table .", "the bank of the river was steep and full of reeds .")
NEUTRAL = "something"


class Replacement(Test):
    """The test `replacement`."""

    name, metric = "replacement", "mean"
    settings: Mapping[str, object] = {"neutral": NEUTRAL}

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the sentences."""
        return digest(list(SENTENCES))

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


TESTS: Mapping[str, Make] = {"replacement": lambda *_: Replacement()}
