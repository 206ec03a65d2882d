"""Hidden states of many sentences in one array."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from prelm_jax.study.subjects import Subject


class States(NamedTuple):
    """Hidden states of sentences, f16 [L, words of all sentences, D]; sentence i has words offsets[i] to [i + 1]."""

    vectors_LWD: np.ndarray
    offsets: np.ndarray

    def layer(self, layer: int, words: np.ndarray) -> np.ndarray:
        """f32 [words, D]"""
        return self.vectors_LWD[layer, words].astype(np.float32)

    def means(self, layer: int, sentences: np.ndarray) -> np.ndarray:
        """f32 [sentences, D]: the mean of the words of each sentence."""
        sums = np.add.reduceat(self.vectors_LWD[layer], self.offsets[:-1], axis=0, dtype=np.float32)
        return (sums / np.diff(self.offsets)[:, None].astype(np.float32))[sentences]


def embed(subject: Subject, sentences: Sequence[Sequence[str]]) -> States:
    """The hidden states of sentences, none of them empty."""
    offsets = np.cumsum([0, *map(len, sentences)])
    vectors_LWD = np.empty((0, 0, 0), np.float16)
    for i, states_LTD in enumerate(subject.embed(sentences)):
        if i == 0:
            layers, _, width = states_LTD.shape
            vectors_LWD = np.empty((layers, offsets[-1], width), np.float16)
        vectors_LWD[:, offsets[i] : offsets[i + 1]] = states_LTD
    return States(vectors_LWD, offsets)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors [..., D] of length 1; zeros stay."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
