"""Subjects: whatever can say how probable a sentence is (`score`), or give vectors of its words (`embed`), or both."""

import dataclasses
import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Protocol

import jax
import numpy as np

from prelm_jax.cache import digest
from prelm_jax.inference.base import Pretrained, SentenceScore
from prelm_jax.training.parameters import path_name


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a subject comes from; None where that is unknown or makes no sense."""

    model: str  # Fingerprint (hex) of its weights and its vocabulary.
    step: int | None = None
    words_seen: int | None = None
    flops: float | None = None
    seed: int | None = None


class Subject(Protocol):
    """What tests ask. A subject raises InputError for what it cannot do."""

    @property
    def name(self) -> str:
        """As on the command line."""

    @property
    def family(self) -> str:
        """The model_type, or "unigram", "word2vec", …"""

    @property
    def num_layers(self) -> int:
        """The layers that `embed` gives; 0: it cannot."""

    @property
    def scoring(self) -> str:
        """What `score` adds up, in a few words; "": it cannot."""

    @property
    def origin(self) -> Origin: ...

    def score(self, texts: Collection[str]) -> Iterator[SentenceScore]:
        """For each text, in order, its score, the same whatever other texts there are."""

    def embed(self, sentences: Collection[Sequence[str]]) -> Iterator[np.ndarray]:
        """For each sentence, a sequence of words, f32 [layers, words, D]; a word is the mean of its subwords."""


class PretrainedSubject:
    """A pretrained model."""

    def __init__(self, name: str, model: Pretrained, origin: Origin | None = None):
        self.name, self._model = name, model
        self.family: str = model.config.model_type
        self.num_layers: int = model.config.num_layers + 1
        self.scoring = model.scoring
        self.origin = origin or Origin(fingerprint(model))

    def score(self, texts: Collection[str]) -> Iterator[SentenceScore]:
        """See `Subject`."""
        return self._model.score_sentences(texts)

    def embed(self, sentences: Iterable[Sequence[str]]) -> Iterator[np.ndarray]:
        """See `Subject`."""
        return self._model.embed_words(sentences)


def fingerprint(model: Pretrained) -> str:
    """SHA-256 (hex) of a model: its config, its tokenizer and the bits of its weights."""
    found = hashlib.sha256()
    tokenizer = None if model.tokenizer is None else model.tokenizer.fingerprint
    found.update(digest([model.config.model_type, dataclasses.asdict(model.config), tokenizer]).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        found.update(path_name(path).encode())
        found.update(np.ascontiguousarray(leaf).data)
    return found.hexdigest()
