"""The characters that a trained vocabulary spells."""

import itertools
import sys
from collections import Counter
from collections.abc import Iterator

import numpy as np
from tokenizers.normalizers import Normalizer

from prelm_jax.corpus.documents import Corpus

# A trained vocabulary spells the most frequent characters that make up this share of the corpus. The others, thousands
# in a web-like corpus and each seen a few times, would take the place of words; what holds one of them is unknown.
ALPHABET_COVERAGE = 0.9999


def training_texts(corpus: Corpus, task: str) -> Iterator[str]:
    """The documents that a vocabulary is learnt from: those of the training side."""
    return (document.text for document in corpus.documents("training", task))


def alphabet(corpus: Corpus, normalizer: Normalizer) -> list[str]:
    """The characters that make up ALPHABET_COVERAGE of the training side, by falling count, then code point."""
    code_points = np.zeros(sys.maxunicode + 1, np.int64)
    texts = training_texts(corpus, "counting characters")
    while batch := list(itertools.islice(texts, 1000)):
        found, counts = np.unique(np.frombuffer("".join(batch).encode("utf-32-le"), np.uint32), return_counts=True)
        code_points[found] += counts
    characters: Counter[str] = Counter()
    for code_point in np.flatnonzero(code_points):
        for character in "".join(normalizer.normalize_str(chr(code_point)).split()):
            characters[character] += int(code_points[code_point])
    ranked = sorted(characters, key=lambda character: (-characters[character], character))
    cumulative = np.cumsum([characters[character] for character in ranked])
    return ranked[: np.searchsorted(cumulative, ALPHABET_COVERAGE * cumulative[-1]) + 1] if ranked else []
