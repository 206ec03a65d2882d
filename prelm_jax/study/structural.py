"""The structural probe: whether a linear map turns distances between hidden states into distances in the tree.

The squared distance of two words is |B (h_i - h_j)|², with B [D, R] trained on the mean absolute error (Hewitt and
Manning 2019; john-hewitt/structural-probes). Two tests read it:

    uuas    the fraction of the tree's edges in the minimum spanning tree of the distances, without punctuation
    dspr    Spearman's correlation of the distances from each word with those in the tree, its mean over the words of a
            sentence; to be averaged by length of sentence (the group), then over the lengths 5 to 50

Kinds of rows: "" is the test part, dev the dev part, and linear a tree in which each word hangs on the one before.

Divergences: features are standardized; rank 64; sentences of at most 50 words in training too.
"""

import abc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from prelm_jax.study import treebank
from prelm_jax.study.annotations import Tree
from prelm_jax.study.base import Make
from prelm_jax.study.records import Row
from prelm_jax.study.subjects import Subject
from prelm_jax.study.treebank import SEED, SENTENCES, Split, TreebankTest
from prelm_jax.study.vectors import States

VERSION = 1  # Raise it when the same data and subject would give other rows.
TREES: Mapping[Split, int] = {"train": 3000, "dev": 250, "test": 500}  # Sentences at most.
LENGTHS = range(5, 51)
RANK = 64
BATCH = 20
EPOCHS = 40
LEARNING_RATE = 1e-3
STEP_OF_LENGTHS = 10  # Batches are padded to a multiple of it, so that there are few programs to compile.


class Batch(NamedTuple):
    """Sentences of similar length, padded."""

    states_BTD: np.ndarray  # f32, standardized
    distances_BTT: np.ndarray  # f32: in the tree
    lengths_B: np.ndarray  # f32; 0 for a row that is padding


def squared_distances(map_DR: Array, states_BTD: Array) -> Array:
    """f32 [B, T, T]: |B (h_i - h_j)|²"""
    mapped_BTR = states_BTD @ map_DR
    squares_BT = (mapped_BTR**2).sum(-1)
    products_BTT = jnp.einsum("BTR,BSR->BTS", mapped_BTR, mapped_BTR)
    return jnp.maximum(squares_BT[:, :, None] + squares_BT[:, None, :] - 2 * products_BTT, 0.0)


def _loss(map_DR: Array, states_BTD: Array, distances_BTT: Array, lengths_B: Array) -> Array:
    """The mean over sentences of the sum of absolute errors / words²."""
    real_BT = jnp.arange(states_BTD.shape[1])[None, :] < lengths_B[:, None]
    both_BTT = real_BT[:, :, None] & real_BT[:, None, :]
    error_BTT = jnp.abs(squared_distances(map_DR, states_BTD) - distances_BTT)
    error_B = jnp.where(both_BTT, error_BTT, 0.0).sum((1, 2)) / jnp.maximum(lengths_B, 1.0) ** 2
    return error_B.sum() / jnp.maximum((lengths_B > 0).sum(), 1)


_evaluate = jax.jit(_loss)


@jax.jit
def _step(
    map_DR: Array, moments: optax.OptState, learning_rate: Array, batch: tuple[Array, Array, Array]
) -> tuple[Array, optax.OptState]:
    gradient = jax.grad(_loss)(map_DR, *batch)
    update, moments = optax.scale_by_adam().update(gradient, moments)
    return map_DR - learning_rate * cast(Array, update), moments


def train(train: Sequence[Batch], dev: Sequence[Batch]) -> np.ndarray:
    """The map [D, R] with the least loss on the dev part, after at most EPOCHS epochs.

    After an epoch that does not lower it, the learning rate is divided by ten; after five of these, training ends.
    """
    rng = np.random.default_rng(SEED)
    width = train[0].states_BTD.shape[-1]
    map_DR = jnp.asarray(rng.uniform(-0.05, 0.05, (width, min(RANK, width))), jnp.float32)
    moments, learning_rate = optax.scale_by_adam().init(map_DR), LEARNING_RATE
    best, least, failures = map_DR, np.inf, 0
    for _ in range(EPOCHS):
        for i in rng.permutation(len(train)):
            map_DR, moments = _step(map_DR, moments, jnp.float32(learning_rate), tuple(train[i]))
        loss = np.mean([float(_evaluate(map_DR, *batch)) for batch in dev])
        if loss < least:
            best, least = map_DR, loss
        else:
            failures += 1
            moments, learning_rate = optax.scale_by_adam().init(map_DR), learning_rate / 10
            if failures == 5:
                break
    return np.asarray(best)


def spanning_tree(distances: np.ndarray) -> set[tuple[int, int]]:
    """The edges (smaller, larger) of the minimum spanning tree of a matrix [N, N], by Prim's algorithm.

    Of edges of the same length, the one to the earlier word is taken.
    """
    number = len(distances)
    nearest, parent = distances[0].astype(np.float64), np.zeros(number, int)
    nearest[0] = np.inf
    edges = set()
    waiting = np.arange(number) > 0
    for _ in range(number - 1):
        word = int(np.argmin(np.where(waiting, nearest, np.inf)))
        edges.add((min(word, int(parent[word])), max(word, int(parent[word]))))
        waiting[word] = False
        closer = waiting & (distances[word] < nearest)
        nearest[closer], parent[closer] = distances[word][closer], word
    return edges


def edges_found(tree: Tree, distances: np.ndarray) -> dict[tuple[int, int], bool]:
    """Whether each edge of a tree (word, head) is in the spanning tree of the distances, without punctuation."""
    words = [i for i, tag in enumerate(tree.tags) if tag != "PUNCT"]
    if not words:
        return {}
    found = {(words[a], words[b]) for a, b in spanning_tree(distances[np.ix_(words, words)])}
    gold = [(i, tree.heads[i]) for i in words if tree.heads[i] in words]
    return {(i, head): (min(i, head), max(i, head)) in found for i, head in gold}


def distance_correlation(gold: np.ndarray, distances: np.ndarray) -> float:
    """The mean over words of Spearman's correlation between two rows of distances."""
    from scipy.stats import rankdata

    a, b = (rankdata(each, axis=1) for each in (gold, distances))
    a, b = (each - each.mean(1, keepdims=True) for each in (a, b))
    spread = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return float(np.mean(np.where(spread > 0, (a * b).sum(1) / np.where(spread > 0, spread, 1), 0)))


class Predicted(NamedTuple):
    """A sentence, its number in its part, and its distances: int or f32 [words, words]."""

    number: int
    tree: Tree
    distances: np.ndarray


Predictions = dict[tuple[Split, int], list[Predicted]]  # By part and layer.


def _predict(states: dict[Split, States], sentences: dict[Split, list[tuple[int, Tree]]], layer: int) -> Predictions:
    """Trains the probe of a layer, and applies it."""
    words_ND = states["train"].vectors_LWD[layer].astype(np.float32)
    mean_D, scale_D = words_ND.mean(0), words_ND.std(0) + 1e-6

    def read(split: Split, number: int) -> np.ndarray:
        begin, end = states[split].offsets[number : number + 2]
        return (states[split].vectors_LWD[layer, begin:end].astype(np.float32) - mean_D) / scale_D

    def batches(split: Split) -> list[Batch]:
        return make_batches([(read(split, number), tree.distances()) for number, tree in sentences[split]])

    map_DR = train(batches("train"), batches("dev"))

    def distances(split: Split, number: int) -> np.ndarray:
        mapped_TR = read(split, number) @ map_DR
        return ((mapped_TR[:, None] - mapped_TR[None]) ** 2).sum(-1)

    splits: tuple[Split, ...] = ("dev", "test")
    return {
        (split, layer): [Predicted(number, tree, distances(split, number)) for number, tree in sentences[split]]
        for split in splits
    }


def make_batches(sentences: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[Batch]:
    """Sentences, their states [T, D] and distances [T, T], in batches of similar length."""
    by_length = sorted(sentences, key=lambda each: len(each[0]))
    batches = []
    for start in range(0, len(by_length), BATCH):
        some = by_length[start : start + BATCH]
        padded = -(-len(some[-1][0]) // STEP_OF_LENGTHS) * STEP_OF_LENGTHS
        batch = Batch(
            np.zeros((BATCH, padded, some[0][0].shape[1]), np.float32),
            np.zeros((BATCH, padded, padded), np.float32),
            np.zeros(BATCH, np.float32),
        )
        for row, (states_TD, distances_TT) in enumerate(some):
            length = len(states_TD)
            batch.states_BTD[row, :length] = states_TD
            batch.distances_BTT[row, :length, :length] = distances_TT
            batch.lengths_B[row] = length
        batches.append(batch)
    return batches


class StructuralProbe(TreebankTest):
    """A test of the distances. Its rows are edges that are found, or correlations by length of sentence."""

    settings: Mapping[str, object] = {"version": VERSION, "trees": TREES, "rank": RANK, "epochs": EPOCHS}

    def measure(self, subject: Subject) -> Iterator[Row]:
        """The rows of the linear order, then those of each layer."""
        for number, tree in self._chosen("test"):
            positions = np.arange(len(tree.words))
            chain = np.abs(positions[:, None] - positions[None])
            yield from self.rows(Predicted(number, tree, chain), "linear", None)
        for (split, layer), sentences in self._predict(subject).items():
            for sentence in sentences:
                yield from self.rows(sentence, "" if split == "test" else split, layer)

    @abc.abstractmethod
    def rows(self, sentence: Predicted, kind: str, layer: int | None) -> Iterator[Row]:
        """The rows of a sentence."""

    def _chosen(self, split: Split) -> list[tuple[int, Tree]]:
        """The sentences of a part that the probe reads, with their numbers."""
        return [(i, tree) for i, tree in enumerate(self.trees[split]) if len(tree.words) in LENGTHS][: TREES[split]]

    def _predict(self, subject: Subject) -> Predictions:
        """The distances in the dev and test parts. The last subject's are kept for the second test."""
        key = subject.origin.model, self.treebank
        if key not in _KEPT:
            _KEPT.clear()
            states, sentences = self.states(subject), {split: self._chosen(split) for split in SENTENCES}
            layers = range(subject.num_layers)
            _KEPT[key] = {place: each for layer in layers for place, each in _predict(states, sentences, layer).items()}
        return _KEPT[key]


_KEPT: dict[tuple[str, Path], Predictions] = {}


class UUAS(StructuralProbe):
    """The test `uuas`."""

    name = "uuas"

    def rows(self, sentence: Predicted, kind: str, layer: int | None) -> Iterator[Row]:
        for (word, _), found in edges_found(sentence.tree, sentence.distances).items():
            yield Row(f"{sentence.number}:{word}", str(sentence.number), float(found), layer, kind)


class DSpr(StructuralProbe):
    """The test `dspr`."""

    name, metric = "dspr", "macro_accuracy"

    def rows(self, sentence: Predicted, kind: str, layer: int | None) -> Iterator[Row]:
        value = distance_correlation(sentence.tree.distances(), sentence.distances)
        yield Row(str(sentence.number), str(len(sentence.tree.words)), value, layer, kind)


TESTS: Mapping[str, Make] = {
    "uuas": lambda settings, _: UUAS(treebank.folder(settings)),
    "dspr": lambda settings, _: DSpr(treebank.folder(settings)),
}
