"""The treebank of the tests (UD-EWT), and a subject's hidden states of its sentences, which several tests share."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from prelm_jax.study import annotations
from prelm_jax.study.annotations import Tree
from prelm_jax.study.base import Settings, Test
from prelm_jax.study.subjects import Subject
from prelm_jax.study.vectors import States, embed

Split = Literal["train", "dev", "test"]

SEED = 0
TREEBANK = "ud-en-ewt"
# Sentences that are embedded, drawn at random.
SENTENCES: Mapping[Split, int] = {"train": 3000, "dev": 1000, "test": 1500}


class TreebankTest(Test):
    """A test on a treebank, a directory of CoNLL-U files."""

    def __init__(self, treebank: Path):
        self.treebank = treebank
        self.files = annotations.matching(treebank, "*.conllu")

    @property
    def trees(self) -> dict[Split, list[Tree]]:
        """The sentences of each part."""
        return read_treebank(self.treebank)

    def states(self, subject: Subject) -> dict[Split, States]:
        """The hidden states of these sentences. The last subject's are kept for the next test."""
        key = subject.origin.model, self.treebank
        if key not in _KEPT:
            _KEPT.clear()
            _KEPT[key] = {split: embed(subject, [tree.words for tree in trees]) for split, trees in self.trees.items()}
        return _KEPT[key]


_KEPT: dict[tuple[str, Path], dict[Split, States]] = {}


def folder(settings: Settings) -> Path:
    """The directory of the treebank. Raises InputError if there is none."""
    return annotations.folder(settings.data, TREEBANK)


@functools.lru_cache(maxsize=2)
def read_treebank(directory: Path) -> dict[Split, list[Tree]]:
    """Random sentences of each part of a treebank, the same each time."""
    parts: dict[Split, list[Tree]] = {}
    for split, number in SENTENCES.items():
        files = annotations.matching(directory, f"*{split}.conllu")
        trees = [tree for path in files for tree in annotations.read_trees(path)]
        order = np.random.default_rng(SEED).permutation(len(trees))[:number]
        parts[split] = [trees[i] for i in order]
    return parts
