"""Subjects whose hidden states are known, for the tests of what is read from hidden states."""

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from prelm_jax.inference.base import SentenceScore
from prelm_jax.study.subjects import Origin

Embed = Callable[[Sequence[str]], np.ndarray]  # The words of a sentence to [layers, words, D].


class Embedding:
    """A subject whose `embed` is a function of a sentence."""

    family = "tiny"
    scoring = ""

    def __init__(self, embed: Embed, num_layers: int, name: str = "tiny"):
        self.name, self.num_layers, self._embed = name, num_layers, embed
        self.origin = Origin(f"{name} {id(embed)}")

    def score(self, texts: Iterable[str]) -> Iterator[SentenceScore]:
        raise NotImplementedError

    def embed(self, sentences: Iterable[Sequence[str]]) -> Iterator[np.ndarray]:
        for words in sentences:
            yield np.asarray(self._embed(words), np.float32)


def word_vector(word: str, size: int = 16) -> np.ndarray:
    """A random vector that depends on the word alone."""
    return np.random.default_rng(zlib.crc32(word.encode())).normal(size=size)


def static(name: str = "static", size: int = 16) -> Embedding:
    """One layer, without context."""
    return Embedding(lambda words: np.stack([word_vector(word, size) for word in words])[None], 1, name)


def contextual(name: str = "contextual", size: int = 16) -> Embedding:
    """Layer 0 without context; in layer 1 each word has a part of the words around it."""

    def embed(words: Sequence[str]) -> np.ndarray:
        own = np.stack([word_vector(word, size) for word in words])
        return np.stack([own, own + 0.5 * np.roll(own, 1, 0) + 0.25 * own.mean(0)])

    return Embedding(embed, 2, name)


def lines(rows) -> dict:
    """The values of rows by (kind, layer)."""
    found = {}
    for row in rows:
        found.setdefault((row.kind, row.layer), []).append(row.value)
    return found
