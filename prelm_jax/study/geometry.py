"""The geometry of hidden states: how much a word's vector depends on its context, and how alike two layers are.

selfsim      the mean cosine of a word's occurrences in different sentences (Ethayarajh 2019). Kinds of rows: "" the
             words; baseline pairs of random words, without which a cosine says nothing; standardized the words after
             each feature has mean 0 and variance 1
cka          linear CKA of each pair of layers (Kornblith et al. 2019): 1 if they are alike up to rotation and scale
cka:SUBJECT  the same with the layers of another subject; items are `LAYER LAYER-OF-THE-OTHER`

All read the sentences of a treebank.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from prelm_jax.study import treebank
from prelm_jax.study.base import Make, Settings
from prelm_jax.study.records import Row
from prelm_jax.study.subjects import Subject
from prelm_jax.study.treebank import SEED, TreebankTest
from prelm_jax.study.vectors import embed, unit

VERSION = 1  # Raise it when the same data and subject would give other rows.
OCCURRENCES = range(5, 21)  # Words that occur so often; of more frequent ones the first 20 occurrences.
TYPES = 500  # Words at most.
PAIRS = 1000  # Of random words.
WORDS = 10_000  # Of CKA.


def self_similarity(vectors_ND: np.ndarray) -> float:
    """The mean cosine of two different rows."""
    number = len(vectors_ND)
    return float(((vectors_ND.sum(0) ** 2).sum() - (vectors_ND**2).sum()) / (number * (number - 1)))


def cka(x_ND: np.ndarray, y_NE: np.ndarray) -> float:
    """Linear CKA: |YᵀX|² / (|XᵀX| |YᵀY|) of centered columns, with Frobenius norms; rows are the same words."""
    x_ND, y_NE = (each.astype(np.float64) - each.mean(0, dtype=np.float64) for each in (x_ND, y_NE))
    norms = np.linalg.norm(x_ND.T @ x_ND) * np.linalg.norm(y_NE.T @ y_NE)
    return float(np.linalg.norm(y_NE.T @ x_ND) ** 2 / norms) if norms else 0.0


def occurrences(sentences: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    """For frequent lower-cased words the indices of some occurrences in all words, one a sentence at most."""
    found: dict[str, list[int]] = defaultdict(list)
    begin = 0
    for words in sentences:
        for word, position in {word.lower(): position for position, word in enumerate(words)}.items():
            if len(found[word]) < OCCURRENCES[-1]:
                found[word].append(begin + position)
        begin += len(words)
    frequent = sorted(word for word, indices in found.items() if len(indices) in OCCURRENCES and word.isalpha())
    chosen = np.random.default_rng(SEED).permutation(len(frequent))[:TYPES]
    return {frequent[i]: np.array(found[frequent[i]]) for i in sorted(chosen)}


def random_pairs(offsets: np.ndarray) -> np.ndarray:
    """int [pairs, 2]: random words of different sentences."""
    rng = np.random.default_rng(SEED)
    drawn = rng.integers(offsets[-1], size=(4 * PAIRS, 2))
    sentences = np.searchsorted(offsets, drawn, side="right")
    return drawn[sentences[:, 0] != sentences[:, 1]][:PAIRS]


class SelfSimilarity(TreebankTest):
    """The test `selfsim`."""

    name, metric = "selfsim", "mean"
    settings: Mapping[str, object] = {"version": VERSION}

    def measure(self, subject: Subject) -> Iterator[Row]:
        """The rows of each layer."""
        states = self.states(subject)["train"]
        words = occurrences([tree.words for tree in self.trees["train"]])
        pairs = random_pairs(states.offsets)
        for layer in range(subject.num_layers):
            vectors_ND = states.vectors_LWD[layer].astype(np.float32)
            unit_ND = unit(vectors_ND)
            standardized_ND = unit((vectors_ND - vectors_ND.mean(0)) / (vectors_ND.std(0) + 1e-6))
            for word, indices in words.items():
                yield Row(word, word, self_similarity(unit_ND[indices]), layer)
                yield Row(word, word, self_similarity(standardized_ND[indices]), layer, "standardized")
            cosines = (unit_ND[pairs[:, 0]] * unit_ND[pairs[:, 1]]).sum(-1)
            for number, cosine in enumerate(cosines.tolist()):
                yield Row(str(number), str(number), cosine, layer, "baseline")


class CKA(TreebankTest):
    """The test `cka`; `other`: the subject to compare with, None for the layers of the same."""

    metric = "mean"

    def __init__(self, directory: Path, other: Subject | None = None):
        super().__init__(directory)
        self.other = other
        self.name = f"cka:{other.name}" if other else "cka"
        self.settings = {"version": VERSION, "words": WORDS, "other": other.origin.model if other else None}

    def measure(self, subject: Subject) -> Iterator[Row]:
        """A row for each pair of layers, the other subject's second."""
        own = self.states(subject)["test"]
        theirs = own
        if self.other:
            theirs = embed(self.other, [tree.words for tree in self.trees["test"]])
        words = np.random.default_rng(SEED).permutation(own.offsets[-1])[:WORDS]
        for i in range(len(own.vectors_LWD)):
            for j in range(len(theirs.vectors_LWD)):
                value = cka(own.layer(i, words), theirs.layer(j, words))
                yield Row(f"{i} {j}", f"{i} {j}", value)


def _cka(settings: Settings, other: str) -> CKA:
    return CKA(treebank.folder(settings), settings.open_subject(other) if other else None)


TESTS: Mapping[str, Make] = {
    "selfsim": lambda settings, _: SelfSimilarity(treebank.folder(settings)),
    "cka": _cka,
}
