"""Words without a sentence: how well similarity and analogy of their vectors agree with people.

ws353, simlex, men, similarity:FILE   Spearman's correlation of cosines and ratings; FILE: a TSV of word, word, rating
analogies                             Mikolov et al. 2013: "Athens Greece Oslo ?": the nearest word to Greece - Athens +
                                      Oslo among the 30,000 most frequent of a corpus; lower-cased, by cosine

Kinds of rows: "" a word by itself, as a sentence of one word; contexts the mean of some of its occurrences in a corpus,
which is the same for vectors that have no context and therefore left out there.

An analogy counts if its four words are among the most frequent, so that all subjects are asked the same.
"""

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from prelm_jax.cache import cached, digest
from prelm_jax.corpus.documents import Corpus
from prelm_jax.errors import InputError
from prelm_jax.finetuning.records import text_lines
from prelm_jax.study import annotations
from prelm_jax.study.annotations import WordPair
from prelm_jax.study.base import Make, Settings, Test
from prelm_jax.study.records import Row
from prelm_jax.study.subjects import Subject
from prelm_jax.study.vectors import unit
from prelm_jax.tokenizers.words import Splitter, count

VERSION = 1  # Raise it when the same data and subject would give other rows.
CORPUS = "simplewiki.txt.xz"  # Where contexts and frequencies come from.
CONTEXTS = 5  # Occurrences of a word, the first ones in different paragraphs.
CONTEXT = 10  # Words on each side of it.
CANDIDATES = 30_000
BLOCK = 1000  # Analogies at a time.


def corpus_path(data: Path) -> Path | None:
    """The file of contexts, in the folder `pretrain` of the data or beside it; None if there is none."""
    places = [data / "pretrain" / CORPUS, data.parent / "pretrain" / CORPUS]
    return next((place for place in places if place.is_file()), None)


def find_contexts(words: Iterable[str], path: Path) -> dict[str, list[tuple[list[str], int]]]:
    """For each word, in any case, some contexts in a text, and its position in each."""
    found: dict[str, list[tuple[list[str], int]]] = {word: [] for word in words}
    wanted: dict[str, list[str]] = {}
    for word in found:
        wanted.setdefault(word.lower(), []).append(word)
    split = Splitter(tokenize=True)
    for _, line in text_lines(str(path)):
        if wanted.keys().isdisjoint(re.findall(r"\w+", line.lower())):
            continue  # As most lines, once the frequent words have their contexts.
        sentence = split(line)
        positions: dict[str, int] = {}
        for position, word in enumerate(sentence):
            positions.setdefault(word.lower(), position)
        for word in positions.keys() & wanted.keys():
            context = annotations.crop(sentence, positions[word], positions[word] + 1, CONTEXT)
            for spelling in wanted[word]:
                found[spelling].append(context)
            if len(found[wanted[word][0]]) == CONTEXTS:
                del wanted[word]
        if not wanted:
            break
    return found


def vectors_alone(subject: Subject, words: Sequence[str]) -> np.ndarray:
    """f32 [L, words, D]: each word as a sentence by itself; of several words their mean."""
    return np.stack([states_LTD.mean(1) for states_LTD in subject.embed([word.split() for word in words])], 1)


def vectors_in_contexts(
    subject: Subject, words: Sequence[str], contexts: Mapping[str, Sequence[tuple[list[str], int]]]
) -> np.ndarray:
    """f32 [L, words, D]: the sum of each word's occurrences, as good as their mean; zeros where there are none."""
    flat = [(number, *context) for number, word in enumerate(words) for context in contexts[word]]
    sums = np.zeros((0, 0, 0), np.float32)
    states = subject.embed([sentence for _, sentence, _ in flat])
    for (number, _, position), states_LTD in zip(flat, states, strict=True):
        if not sums.size:
            sums = np.zeros((states_LTD.shape[0], len(words), states_LTD.shape[2]), np.float32)
        sums[:, number] += states_LTD[:, position]
    return sums


class Similarity(Test):
    """The similarity of pairs of words; `corpus`: the file of the contexts, None for a test without them."""

    metric = "spearman"

    def __init__(self, name: str, path: Path, corpus: Path | None):
        self.name, self.files, self.corpus = name, [path], corpus
        contexts = [CONTEXTS, CONTEXT, annotations.fingerprint([corpus])] if corpus else None
        self.settings = {"version": VERSION, "contexts": contexts}

    @functools.cached_property
    def _pairs(self) -> list[WordPair]:
        return annotations.read_word_pairs(self.files[0])

    @functools.cached_property
    def _words(self) -> list[str]:
        return sorted({word for pair in self._pairs for word in pair[:2]})

    @functools.cached_property
    def _contexts(self) -> dict[str, list[tuple[list[str], int]]]:
        return find_contexts(self._words, self.corpus) if self.corpus else {}

    def measure(self, subject: Subject) -> Iterator[Row]:
        """The rows of each layer, without contexts and with; `gold` is what people say."""
        yield from self._rows(vectors_alone(subject, self._words), "")
        if self.corpus and subject.num_layers > 1:
            yield from self._rows(vectors_in_contexts(subject, self._words, self._contexts), "contexts")

    def _rows(self, vectors: np.ndarray, kind: str) -> Iterator[Row]:
        """A pair with an unknown word has the similarity 0."""
        number_of = {word: number for number, word in enumerate(self._words)}
        for layer, vectors_ND in enumerate(map(unit, vectors)):
            known_N = np.any(vectors_ND, axis=-1)
            for number, pair in enumerate(self._pairs):
                a, b = number_of[pair.first], number_of[pair.second]
                cosine, unknown = float(vectors_ND[a] @ vectors_ND[b]), int(~known_N[a]) + int(~known_N[b])
                # A file may have a pair twice.
                group = f"{number} {pair.first} {pair.second}"
                yield Row(str(number), group, cosine, layer, kind, unknown=unknown, gold=pair.rating)


class Analogies(Test):
    """The test `analogies`; `corpus`: the file of the frequencies."""

    name = "analogies"

    def __init__(self, path: Path, corpus: Path):
        self.files, self.corpus = [path], corpus
        self.settings = {"version": VERSION, "candidates": CANDIDATES, "corpus": annotations.fingerprint([corpus])}

    def measure(self, subject: Subject) -> Iterator[Row]:
        """The rows of each layer."""
        words = frequent_words(self.corpus)
        number_of = {word: number for number, word in enumerate(words)}
        questions = [
            (number, section, [number_of[word.lower()] for word in question])
            for number, (section, question) in enumerate(annotations.read_analogies(self.files[0]))
            if all(word.lower() in number_of for word in question)
        ]
        if not questions:
            raise InputError(f"{self.files[0]}: no question has four words that are frequent in {self.corpus}")
        asked = np.array([each for _, _, each in questions])
        for layer, vectors_VD in enumerate(map(unit, vectors_alone(subject, words))):
            known_V = np.any(vectors_VD, axis=-1)
            answers = solve(vectors_VD, asked[:, :3])
            for (number, section, each), answer in zip(questions, answers.tolist(), strict=True):
                unknown = int(4 - known_V[each].sum())
                yield Row(str(number), section, float(answer == each[3] and not unknown), layer, unknown=unknown)


def solve(vectors_VD: np.ndarray, questions: np.ndarray) -> np.ndarray:
    """For rows (a, b, c) of questions [N, 3] the word nearest to b - a + c, none of the three; vectors of length 1."""
    answers = []
    for start in range(0, len(questions), BLOCK):
        some = questions[start : start + BLOCK]
        a, b, c = (vectors_VD[column] for column in some.T)
        cosines_NV = unit(b - a + c) @ vectors_VD.T
        np.put_along_axis(cosines_NV, some, -np.inf, axis=1)
        answers.append(cosines_NV.argmax(1))
    return np.concatenate(answers)


def frequent_words(path: Path) -> list[str]:
    """The most frequent lower-cased words of a corpus, split at punctuation; kept in the cache."""
    corpus = Corpus((str(path),))

    def find() -> str:
        counts: dict[str, int] = {}
        for word, number in count(corpus, tokenize=True).items():
            counts[word.lower()] = counts.get(word.lower(), 0) + number
        return json.dumps(sorted(counts, key=lambda word: (-counts[word], word))[:CANDIDATES])

    return json.loads(cached("frequent-words", digest([VERSION, CANDIDATES, corpus.fingerprint]), find))


# ---- The tests by name -----------------------------------------------------------------------------------------------

FILES = {"ws353": "EN-WS-353-ALL.txt", "simlex": "EN-SIMLEX-999.txt", "men": "EN-MEN-TR-3k.txt"}


def _similarity(name: str) -> Make:
    def make(settings: Settings, _: str) -> Similarity:
        path = annotations.matching(annotations.folder(settings.data, "wordsim"), f"{FILES[name]}*")[0]
        return Similarity(name, path, corpus_path(settings.data))

    return make


def _own_similarity(settings: Settings, file: str) -> Similarity:
    if not file:
        raise InputError("similarity needs a file: similarity:FILE, a TSV of word, word, rating")
    return Similarity(f"similarity:{file}", Path(file), corpus_path(settings.data))


def _analogies(settings: Settings, _: str) -> Analogies:
    data, corpus = settings.data, corpus_path(settings.data)
    if corpus is None:
        raise InputError(f"analogies need frequent words: {data} has no pretrain/{CORPUS} in it or beside it")
    return Analogies(annotations.matching(annotations.folder(data, "analogies"), "questions-words.txt*")[0], corpus)


TESTS: Mapping[str, Make] = {
    **{name: _similarity(name) for name in FILES},
    "similarity": _own_similarity,
    "analogies": _analogies,
}
