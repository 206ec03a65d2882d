"""Probes: what a linear classifier can read from the hidden states of a layer.

A probe is trained on some sentences of a treebank with the states of one layer; its penalty is chosen on the dev part,
and so should be the layer. Kinds of rows: "" is the test part, and

    dev        the dev part
    control    words labeled by a random but fixed label of their type: what the probe can learn by heart
               (Hewitt and Liang 2019); accuracy less control accuracy is the selectivity
    majority   the most frequent label of the word (of a sentence: of all) in the training part

A causal model has not read what is right of a word: its probes of words are another task than a bidirectional model's.

Reference: Conneau et al. 2018 (SentEval's probing tasks).
"""

import abc
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from prelm_jax.errors import InputError
from prelm_jax.study import treebank
from prelm_jax.study.annotations import Tree
from prelm_jax.study.base import Make, Settings
from prelm_jax.study.records import Row
from prelm_jax.study.subjects import Subject
from prelm_jax.study.treebank import SEED, SENTENCES, Split, TreebankTest
from prelm_jax.study.vectors import States, embed

VERSION = 1  # Raise it when the same data and subject would give other rows.
# Labelled words that a probe reads.
WORDS: Mapping[Split, int] = {"train": 20_000, "dev": 4_000, "test": 8_000}
PENALTIES = (0.01, 0.1, 1.0)  # scikit-learn's C: the inverse of the penalty.
ITERATIONS = 100
SENTENCE_LENGTHS = range(5, 29)  # Of the tasks about sentences, as SentEval.

# ---- Labels of words and sentences -----------------------------------------------------------------------------------

Labels = list[str | None]  # None: no example.


def _verb_numbers(tree: Tree) -> Labels:
    """Of finite verbs and auxiliaries singular or plural, which the form of many does not show."""
    return [
        features.get("Number") if tag in ("VERB", "AUX") and features.get("VerbForm") == "Fin" else None
        for tag, features in zip(tree.tags, tree.features, strict=True)
    ]


WORD_LABELS: dict[str, Callable[[Tree], Labels]] = {
    "upos": lambda tree: list(tree.tags),
    "deprel": lambda tree: list(tree.relations),
    "verb-number": _verb_numbers,
}


def _length(tree: Tree) -> str:
    """SentEval's six bins."""
    return str(np.searchsorted([9, 13, 17, 21, 26], len(tree.words), side="right"))


def _depth(tree: Tree) -> str:
    """Edges from the root to the deepest word, 7 for all that are deeper."""
    return str(min(7, tree.distances()[tree.root].max()))


def _tense(tree: Tree) -> str | None:
    return tree.features[tree.root].get("Tense") if tree.tags[tree.root] == "VERB" else None


def _number_of(relation: str, tree: Tree) -> str | None:
    """The number of the noun that has a relation to the root, a verb."""
    if tree.tags[tree.root] != "VERB":
        return None
    nouns = [i for i, head in enumerate(tree.heads) if head == tree.root and tree.relations[i] == relation]
    nouns = [i for i in nouns if tree.tags[i] == "NOUN"]
    return tree.features[nouns[0]].get("Number") if len(nouns) == 1 else None


SENTENCE_LABELS: dict[str, Callable[[Tree], str | None]] = {
    "length": _length,
    "depth": _depth,
    "tense": _tense,
    "subject-number": functools.partial(_number_of, "nsubj"),
    "object-number": functools.partial(_number_of, "obj"),
}


class Examples(NamedTuple):
    """What a probe reads of a part: rows of the hidden states, and the label of each."""

    rows: np.ndarray  # The word in the part, or the sentence.
    labels: np.ndarray  # Strings.
    items: list[str]
    groups: list[str]  # The number of the sentence, by which words depend on each other.
    types: list[str]  # Lower-cased words; of sentences all the same.


def word_examples(trees: Sequence[Tree], labels_of: Callable[[Tree], Labels], limit: int) -> Examples:
    """The first words that have a label."""
    found = []
    begin = 0
    for number, tree in enumerate(trees):
        for position, label in enumerate(labels_of(tree)):
            if label is not None:
                item = f"{number}:{position}"
                found.append((begin + position, label, item, str(number), tree.words[position].lower()))
        begin += len(tree.words)
    return _examples(found[:limit])


def sentence_examples(trees: Sequence[Tree], labels: Iterable[str | None]) -> Examples:
    """The sentences of usual length that have a label."""
    return _examples(
        [
            (i, label, str(i), str(i), "")
            for i, (tree, label) in enumerate(zip(trees, labels, strict=True))
            if label is not None and len(tree.words) in SENTENCE_LENGTHS
        ]
    )


def _examples(found: list[tuple[int, str, str, str, str]]) -> Examples:
    rows, labels, items, groups, types = zip(*found, strict=True) if found else ((), (), (), (), ())
    return Examples(np.array(rows, int), np.array(labels, str), list(items), list(groups), list(types))


# ---- Linear probes ---------------------------------------------------------------------------------------------------


def control_labels(types: Sequence[str], labels: np.ndarray) -> dict[str, str]:
    """A random label for each type, drawn from the distribution of labels; the same for a type each time."""
    drawn = np.random.default_rng(SEED).choice(labels, len(set(types)))
    return dict(zip(sorted(set(types)), drawn.tolist(), strict=True))


def majority_labels(train: Examples, types: Sequence[str]) -> list[str]:
    """The most frequent label of each type in the training part, of an unseen one that of all words."""
    overall = Counter(train.labels.tolist()).most_common(1)[0][0]
    counts: dict[str, Counter[str]] = {}
    for word, label in zip(train.types, train.labels.tolist(), strict=True):
        counts.setdefault(word, Counter())[label] += 1
    return [counts[word].most_common(1)[0][0] if word in counts else overall for word in types]


class Probe(NamedTuple):
    """A trained classifier and the scale of what it reads."""

    mean_D: np.ndarray
    scale_D: np.ndarray
    predict_scaled: Callable[[np.ndarray], np.ndarray]

    def predict(self, vectors_ND: np.ndarray) -> np.ndarray:
        """The label of each vector."""
        return self.predict_scaled((vectors_ND - self.mean_D) / self.scale_D)


def fit(vectors_ND: np.ndarray, labels: np.ndarray, penalty: float) -> Probe:
    """A logistic regression on standardized features; C is `penalty`."""
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from threadpoolctl import threadpool_limits
    except ImportError:
        raise InputError('probes need a package: pip install "prelm_jax[study]"') from None
    mean_D, scale_D = vectors_ND.mean(0), vectors_ND.std(0) + 1e-6
    classifier = LogisticRegression(C=penalty, max_iter=ITERATIONS)
    # One thread: several wait for each other, which costs more than they save, and their number changes the last bits.
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)  # The last iterations hardly change what it predicts.
        classifier.fit((vectors_ND - mean_D) / scale_D, labels)
    return Probe(mean_D, scale_D, classifier.predict)


class LinearProbe(TreebankTest):
    """The test of one task about the words or sentences of a treebank."""

    settings: Mapping[str, object] = {
        "version": VERSION,
        "sentences": dict(SENTENCES),
        "words": dict(WORDS),
        "penalties": list(PENALTIES),
    }
    # (states, layer, numbers of words or sentences) -> f32 [numbers, D]: what the probe reads of them.
    read: ClassVar[Callable[[States, int, np.ndarray], np.ndarray]]
    has_control: ClassVar[bool] = False

    def __init__(self, name: str, directory: Path):
        super().__init__(directory)
        self.name = name

    def measure(self, subject: Subject) -> Iterator[Row]:
        """The rows of the majority, then those of each layer."""
        train, dev, test = (self.examples(split) for split in SENTENCES)
        if len(set(train.labels)) < 2 or not (len(dev.labels) and len(test.labels)):
            raise InputError(f"{self.treebank}: {self.name} needs two labels in the training part and examples in all")
        yield from _scored(test, np.array(majority_labels(train, test.types)), test.labels, "majority", None)
        states = self.states(subject)
        for layer in range(subject.num_layers):
            parts = zip(SENTENCES, (train, dev, test), strict=True)
            vectors = {split: self.read(states[split], layer, examples.rows) for split, examples in parts}
            probes = {penalty: fit(vectors["train"], train.labels, penalty) for penalty in PENALTIES}
            predicted = {penalty: probe.predict(vectors["dev"]) for penalty, probe in probes.items()}
            best = max(PENALTIES, key=lambda penalty: np.mean(predicted[penalty] == dev.labels))
            yield from _scored(dev, predicted[best], dev.labels, "dev", layer)
            yield from _scored(test, probes[best].predict(vectors["test"]), test.labels, "", layer)
            if self.has_control:
                random = control_labels([*train.types, *test.types], train.labels)
                labels, gold = (np.array([random[word] for word in each.types]) for each in (train, test))
                control = fit(vectors["train"], labels, best)
                yield from _scored(test, control.predict(vectors["test"]), gold, "control", layer)

    @abc.abstractmethod
    def examples(self, split: Split) -> Examples:
        """The examples of a part."""


class WordProbe(LinearProbe):
    """A label of a word, from its own hidden states."""

    read = staticmethod(States.layer)
    has_control = True

    def examples(self, split: Split) -> Examples:
        return word_examples(self.trees[split], WORD_LABELS[self.name], WORDS[split])


class SentenceProbe(LinearProbe):
    """A label of a sentence, from the mean of its words' hidden states."""

    read = staticmethod(States.means)

    def examples(self, split: Split) -> Examples:
        return sentence_examples(self.trees[split], map(SENTENCE_LABELS[self.name], self.trees[split]))


class ShiftProbe(SentenceProbe):
    """Whether two words next to each other have changed places (SentEval's BShift), in half of the sentences."""

    def examples(self, split: Split) -> Examples:
        labels = ("kept" if shift is None else "shifted" for shift in shifts(self.trees[split]))
        return sentence_examples(self.trees[split], labels)

    def states(self, subject: Subject) -> dict[Split, States]:
        return {split: embed(subject, shifted(trees)) for split, trees in self.trees.items()}


def shifts(trees: Sequence[Tree]) -> list[int | None]:
    """For a random half of the sentences the position of a word that changes places with the next one, else None."""
    rng = np.random.default_rng(SEED)
    drawn = [(rng.random() < 0.5, int(rng.integers(max(1, len(tree.words) - 1)))) for tree in trees]
    return [position if chosen else None for chosen, position in drawn]


def shifted(trees: Sequence[Tree]) -> list[list[str]]:
    """The words of the sentences, after their shifts."""
    sentences = [list(tree.words) for tree in trees]
    for words, position in zip(sentences, shifts(trees), strict=True):
        if position is not None:
            words[position : position + 2] = reversed(words[position : position + 2])
    return sentences


def _scored(examples: Examples, predicted: np.ndarray, gold: np.ndarray, kind: str, layer: int | None) -> Iterator[Row]:
    for item, group, right in zip(examples.items, examples.groups, predicted == gold, strict=True):
        yield Row(item, group, float(right), layer, kind)


def _make(kind: type[LinearProbe], name: str) -> Make:
    def make(settings: Settings, _: str) -> LinearProbe:
        return kind(name, treebank.folder(settings))

    return make


TESTS: Mapping[str, Make] = {
    **{name: _make(WordProbe, name) for name in WORD_LABELS},
    **{name: _make(SentenceProbe, name) for name in SENTENCE_LABELS},
    "bigram-shift": _make(ShiftProbe, "bigram-shift"),
}
