"""Word senses: whether the same sense of a word has similar hidden states, layer by layer. Nothing is trained.

coarsewsd   CoarseWSD-20: the nearest of the means of a noun's senses in the training part, by cosine; the mean over the
            nouns of the accuracy (Loureiro et al. 2021)
semcor      the same with WordNet's senses: means over brown1, words of brown2 that have several senses in brown1
            (Peters et al. 2018; those with one sense there, or none, are the same for every subject and left out)
wic         whether two uses of a word have one sense: a threshold of their cosine, chosen on the training part
            (Pilehvar and Camacho-Collados 2019)
scws        similarity of two words in context, as people rate it: the cosine (Huang et al. 2012)

Kinds of rows: "" is the test part; dev a part to choose the layer with, which CoarseWSD-20 and SemCor leave to their
readers: here sentences of the training part that are not in the means; majority the most frequent sense in the training
part; different, of scws, the pairs of two different words, without those of one word used twice.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from prelm_jax.study import annotations
from prelm_jax.study.annotations import ContextPair, Sentence
from prelm_jax.study.base import Make, Settings, Test
from prelm_jax.study.records import Row
from prelm_jax.study.subjects import Subject
from prelm_jax.study.vectors import unit

VERSION = 1  # Raise it when the same data and subject would give other rows.
SEED = 0
# Cosines are compared after rounding, so that to vectors without context all senses are equal: the first is taken.
DECIMALS = 5
CONTEXT = 30  # Words of a sentence on each side of the word in question.
# Sentences drawn at random. Of each noun of CoarseWSD-20: at most COARSE_TRAIN of a sense for the means, and at most a
# third of the training part for dev.
COARSE_TRAIN, COARSE_DEV, COARSE_TEST = 50, 50, 100
SEMCOR_TRAIN, SEMCOR_DEV, SEMCOR_TEST = 5000, 500, 1500

Parts = Mapping[Literal["train", "dev", "test"], list[Sentence]]


class SensesTest(Test):
    """The nearest mean of a sense: `coarsewsd` or `semcor`; `read` reads the sentences of each part."""

    def __init__(
        self, name: str, metric: str, files: Sequence[Path], settings: Mapping[str, object], read: Callable[[], Parts]
    ):
        self.name, self.metric, self.files, self.settings = name, metric, files, {"version": VERSION, **settings}
        self._read = read

    @functools.cached_property
    def _parts(self) -> Parts:
        return self._read()

    def measure(self, subject: Subject) -> Iterator[Row]:
        """The rows of the most frequent sense, then those of all layers, of each word in turn."""
        senses_of = ambiguous_senses(self._parts["train"])
        for number, sentence in enumerate(self._parts["test"]):
            for span in sentence.spans:
                if span.lemma in senses_of:
                    right = senses_of[span.lemma][0] == span.sense
                    yield Row(f"{number}:{span.begin}", span.lemma, float(right), None, "majority")
        means_of = _sense_means(subject, self._parts["train"], senses_of)
        yield from _nearest(subject, self._parts["dev"], senses_of, means_of, "dev")
        yield from _nearest(subject, self._parts["test"], senses_of, means_of, "")


def ambiguous_senses(sentences: Sequence[Sentence]) -> dict[str, list[str]]:
    """The senses of each lemma that has several, the most frequent first (of equal ones the first by name)."""
    counts: dict[str, Counter[str]] = {}
    for span in (span for sentence in sentences for span in sentence.spans):
        counts.setdefault(span.lemma, Counter())[span.sense] += 1
    return {
        lemma: sorted(senses, key=lambda sense: (-senses[sense], sense))
        for lemma, senses in counts.items()
        if len(senses) > 1
    }


def _sense_means(
    subject: Subject, sentences: Sequence[Sentence], senses: Mapping[str, list[str]]
) -> dict[str, np.ndarray]:
    """For each lemma the means of its senses' vectors, of length 1: f32 [L, senses, D]."""
    sums: dict[str, np.ndarray] = {}
    for sentence, states_LTD in zip(sentences, _embed(subject, sentences), strict=True):
        layers, _, width = states_LTD.shape
        for span in sentence.spans:
            if span.lemma in senses:
                names = senses[span.lemma]
                if span.lemma not in sums:
                    sums[span.lemma] = np.zeros((layers, len(names), width), np.float32)
                vector_LD = states_LTD[:, span.begin : span.end].mean(1)
                sums[span.lemma][:, names.index(span.sense)] += vector_LD
    return {lemma: unit(sums_LSD) for lemma, sums_LSD in sums.items()}


def _nearest(
    subject: Subject,
    sentences: Sequence[Sentence],
    senses_of: Mapping[str, list[str]],
    means_of: Mapping[str, np.ndarray],
    kind: str,
) -> Iterator[Row]:
    """Whether the nearest mean is that of the right sense."""
    for number, (sentence, states_LTD) in enumerate(zip(sentences, _embed(subject, sentences), strict=True)):
        for span in sentence.spans:
            if span.lemma not in senses_of:
                continue
            vector_LD = unit(states_LTD[:, span.begin : span.end].mean(1))
            cosines_LS = np.einsum("LSD,LD->LS", means_of[span.lemma], vector_LD).round(DECIMALS)
            for layer, nearest in enumerate(cosines_LS.argmax(1)):
                right = senses_of[span.lemma][nearest] == span.sense
                yield Row(f"{number}:{span.begin}", span.lemma, float(right), layer, kind)


def _embed(subject: Subject, sentences: Sequence[Sentence]) -> Iterator[np.ndarray]:
    return iter(subject.embed([sentence.words for sentence in sentences]))


def _coarse_senses(folder: Path) -> Parts:
    rng = np.random.default_rng(SEED)
    parts: Parts = {"train": [], "dev": [], "test": []}
    for path in annotations.matching(folder, "*.train.tsv*"):
        sentences = _shuffled(map(_cropped, annotations.read_coarse_senses(path)), rng)
        held_out = min(COARSE_DEV, len(sentences) // 3)
        parts["dev"].extend(sentences[:held_out])
        counts: Counter[str] = Counter()
        for sentence in sentences[held_out:]:
            counts[sentence.spans[0].sense] += 1
            if counts[sentence.spans[0].sense] <= COARSE_TRAIN:
                parts["train"].append(sentence)
    for path in annotations.matching(folder, "*.test.tsv*"):
        parts["test"].extend(_shuffled(map(_cropped, annotations.read_coarse_senses(path)), rng)[:COARSE_TEST])
    return parts


def _cropped(sentence: Sentence) -> Sentence:
    span = sentence.spans[0]
    words, begin = annotations.crop(sentence.words, span.begin, span.end, CONTEXT)
    return Sentence(words, (span._replace(begin=begin, end=begin + span.end - span.begin),))


def _shuffled(sentences: Iterable[Sentence], rng: np.random.Generator) -> list[Sentence]:
    listed = list(sentences)
    return [listed[i] for i in rng.permutation(len(listed))]


def _coarsewsd(settings: Settings, _: str) -> SensesTest:
    folder = annotations.folder(settings.data, "coarsewsd20")
    of_rows = {"sentences": [COARSE_TRAIN, COARSE_DEV, COARSE_TEST], "context": CONTEXT}
    files = annotations.matching(folder, "*.tsv*")
    return SensesTest("coarsewsd", "macro_accuracy", files, of_rows, lambda: _coarse_senses(folder))


def _semcor(settings: Settings, _: str) -> SensesTest:
    folder = annotations.folder(settings.data, "semcor")
    files = [annotations.matching(folder, part)[0] for part in ("brown1.sgml*", "brown2.sgml*")]

    def read() -> Parts:
        rng = np.random.default_rng(SEED)
        train, test = (_shuffled(annotations.read_semcor(path), rng) for path in files)
        held_out = min(SEMCOR_DEV, len(train) // 3)
        dev, train = train[:held_out], train[held_out:]
        return {"train": train[:SEMCOR_TRAIN], "dev": dev, "test": test[:SEMCOR_TEST]}

    of_rows = {"sentences": [SEMCOR_TRAIN, SEMCOR_DEV, SEMCOR_TEST]}
    return SensesTest("semcor", "accuracy", files, of_rows, read)


# ---- Words in context ------------------------------------------------------------------------------------------------


def pair_cosines(subject: Subject, pairs: Sequence[ContextPair]) -> np.ndarray:
    """f32 [L, pairs]: the cosine of the two words of each pair, rounded; 0 where the subject does not know one."""
    cropped = [
        annotations.crop(words, position, position + 1, CONTEXT)
        for pair in pairs
        for words, position in (pair.first, pair.second)
    ]
    states = zip(subject.embed([words for words, _ in cropped]), cropped, strict=True)
    vectors = np.stack([unit(states_LTD[:, position]) for states_LTD, (_, position) in states], 1)
    return (vectors[:, ::2] * vectors[:, 1::2]).sum(-1).round(DECIMALS)


def best_threshold(values: np.ndarray, positive: np.ndarray) -> float:
    """The threshold for which `values >= threshold` agrees most often with `positive`; of several, the lowest."""
    order = np.argsort(values, kind="stable")
    ascending = values[order]
    # With the threshold at value i, the values below it are negative and the others positive.
    right = np.concatenate([[0], np.cumsum(~positive[order])]) + np.concatenate(
        [np.cumsum(positive[order][::-1])[::-1], [0]]
    )
    is_first = np.concatenate([[True], ascending[1:] > ascending[:-1], [True]])
    thresholds = np.concatenate([ascending, [np.inf]])
    return float(thresholds[np.argmax(np.where(is_first, right, -1))])


class WordsInContext(Test):
    """The test `wic`."""

    name = "wic"
    settings: Mapping[str, object] = {"version": VERSION, "context": CONTEXT}

    def __init__(self, folder: Path):
        self.folder = folder
        self.files = annotations.matching(folder, "*/*.txt")

    @functools.cached_property
    def _parts(self) -> dict[str, list[ContextPair]]:
        return {split: annotations.read_wic(self.folder, split) for split in ("train", "dev", "test")}

    def measure(self, subject: Subject) -> Iterator[Row]:
        """The rows of the more frequent answer, then those of each layer."""
        gold = {split: np.array([pair.gold == "T" for pair in pairs]) for split, pairs in self._parts.items()}
        majority = gold["train"].mean() >= 0.5
        yield from self._rows("test", gold["test"] == majority, "majority", None)
        cosines = {split: pair_cosines(subject, pairs) for split, pairs in self._parts.items()}
        for layer in range(subject.num_layers):
            threshold = best_threshold(cosines["train"][layer], gold["train"])
            for split, kind in (("dev", "dev"), ("test", "")):
                right = (cosines[split][layer] >= threshold) == gold[split]
                yield from self._rows(split, right, kind, layer)

    def _rows(self, split: str, right: np.ndarray, kind: str, layer: int | None) -> Iterator[Row]:
        for number, (pair, value) in enumerate(zip(self._parts[split], right, strict=True)):
            yield Row(str(number), pair.target, float(value), layer, kind)


class SimilarityInContext(Test):
    """The test `scws`."""

    name, metric = "scws", "spearman"
    settings: Mapping[str, object] = {"version": VERSION, "context": CONTEXT}

    def __init__(self, path: Path):
        self.files = [path]

    def measure(self, subject: Subject) -> Iterator[Row]:
        """The rows of each layer; `gold` is what people say."""
        pairs = annotations.read_scws(self.files[0])
        for layer, cosines in enumerate(pair_cosines(subject, pairs)):
            for number, (pair, cosine) in enumerate(zip(pairs, cosines.tolist(), strict=True)):
                row = Row(str(number), f"{number} {pair.target}", cosine, layer, gold=float(pair.gold))
                yield row
                if len(set(pair.target.lower().split())) == 2:
                    yield row._replace(kind="different")


TESTS: Mapping[str, Make] = {
    "coarsewsd": _coarsewsd,
    "semcor": _semcor,
    "wic": lambda settings, _: WordsInContext(annotations.folder(settings.data, "wic")),
    "scws": lambda settings, _: SimilarityInContext(
        annotations.matching(annotations.folder(settings.data, "scws"), "ratings.tsv*")[0]
    ),
}
