"""Annotated text and word pairs, as the tests of hidden states read them.

Files may be compressed as a corpus may. A sentence is a list of words, split as its source has them.
"""

import functools
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from prelm_jax.cache import digest
from prelm_jax.errors import InputError
from prelm_jax.finetuning.conll import read_conllu
from prelm_jax.finetuning.records import Malformed, text_lines
from prelm_jax.storage import opened


def fingerprint(paths: Iterable[Path]) -> str:
    """SHA-256 (hex) of the content of files, in the given order."""
    return digest([[_file_digest(path) for path in paths]])


@functools.cache
def _file_digest(path: Path) -> str:
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder(data: Path, name: str) -> Path:
    """The folder of a data set: in the folder of the tests' data, in its `study` or `tasks`, or in a `tasks` beside it.

    Raises InputError if there is none.
    """
    places = [data / name, data / "study" / name, data / "tasks" / name, data.parent / "tasks" / name]
    for place in places:
        if place.is_dir():
            return place
    raise InputError(f"{data} has no folder {name}: give the folder of the test sets with --data")


def matching(directory: Path, pattern: str) -> list[Path]:
    """The files of a directory that match a pattern, sorted. Raises InputError if there are none."""
    if paths := sorted(directory.glob(pattern)):
        return paths
    raise InputError(f"{directory}: no file {pattern}: give the directory of the data that has it")


# ---- Trees -----------------------------------------------------------------------------------------------------------


class Tree(NamedTuple):
    """A sentence of Universal Dependencies; the lists have an item a word."""

    words: list[str]
    tags: list[str]  # Universal parts of speech.
    heads: list[int]  # The position of the head, -1 for the root.
    relations: list[str]  # Universal relations, without their subtypes.
    features: list[dict[str, str]]

    @property
    def root(self) -> int:
        """The position of the root."""
        return self.heads.index(-1)

    def distances(self) -> np.ndarray:
        """int64 [words, words]: the number of edges between two words."""
        number = len(self.words)
        # ancestors[i, j]: j is on the path from i to the root, i itself included.
        ancestors = np.eye(number, dtype=np.int64)
        for position in range(number):
            head = self.heads[position]
            while head >= 0:
                ancestors[position, head] = 1
                head = self.heads[head]
        # The paths of two words have in common what is above the lowest common ancestor, itself included.
        common, length = ancestors @ ancestors.T, ancestors.sum(1)
        return length[:, None] + length[None, :] - 2 * common


def read_trees(path: Path) -> list[Tree]:
    """The sentences of a CoNLL-U file. Raises InputError, naming the line, for a sentence that is not a tree."""
    trees = []
    for where, value in read_conllu(str(path), (), None, Counter()):
        try:
            columns = {name: list(map(str, _list(value(name)))) for name in ("form", "upos", "head", "deprel", "feats")}
        except Malformed as error:
            raise InputError(f"{error.where or where} {error}") from None
        relations = [relation.partition(":")[0] for relation in columns["deprel"]]
        features = [_features(text) for text in columns["feats"]]
        heads = _heads(where, columns["head"])
        trees.append(Tree(columns["form"], columns["upos"], heads, relations, features))
    return trees


def _list(value: object) -> list[object]:
    assert isinstance(value, list)
    return value


def _heads(where: str, column: Sequence[str]) -> list[int]:
    if not all(re.fullmatch(r"\d+", head, re.ASCII) and int(head) <= len(column) for head in column):
        raise InputError(f"{where}: a head of this sentence is not the number of one of its words, or 0")
    heads = [int(head) - 1 for head in column]
    for position in range(len(heads)):
        steps = 0
        while position >= 0 and steps <= len(heads):
            position, steps = heads[position], steps + 1
        if position >= 0:
            raise InputError(f"{where}: the heads of this sentence form a circle")
    if heads.count(-1) != 1:
        raise InputError(f"{where}: this sentence has {heads.count(-1)} roots (head 0), not one")
    return heads


def _features(text: str) -> dict[str, str]:
    return dict(each.split("=", 1) for each in text.split("|") if "=" in each)


# ---- Senses ----------------------------------------------------------------------------------------------------------


class Span(NamedTuple):
    """Some words of a sentence that have a sense. `lemma` says which senses they can have."""

    begin: int
    end: int
    lemma: str
    sense: str


class Sentence(NamedTuple):
    """A sentence with the senses of some of its words."""

    words: list[str]
    spans: tuple[Span, ...]


def crop(sentence: Sequence[str], begin: int, end: int, context: int) -> tuple[list[str], int]:
    """The words from begin to end with `context` words on each side, and the new begin."""
    first = max(0, begin - context)
    return list(sentence[first : end + context]), begin - first


def read_coarse_senses(path: Path) -> list[Sentence]:
    """CoarseWSD-20: lines of a sense, a tab, the position of the word, a tab, and lower-case words."""
    lemma = path.name.partition(".")[0]
    sentences = []
    for where, cells in _table(path, 3, "sense, position, words"):
        words = cells[2].split()
        begin = _position(where, cells[1], words)
        sentences.append(Sentence(words, (Span(begin, begin + 1, lemma, cells[0]),)))
    return sentences


_WORD = re.compile(r"<(wf|punc)([^>]*)>(.*)</\1>")
# Adjectives in clusters of similar ones (5) have their senses in common with the others (3).
_PART_OF_SPEECH = {"1": "n", "2": "v", "3": "a", "4": "r", "5": "a"}


def read_semcor(path: Path) -> list[Sentence]:
    """SemCor's sentences. A lemma is `say.v`, a sense the key `2:32:00::` of WordNet.

    Compounds are taken apart at underscores. Names (person, location, group), and words whose sense is gone from
    WordNet (wnsn=0), have no sense here; of words with several senses the first is taken.
    """
    sentences: list[Sentence] = []
    words: list[str] = []
    spans: list[Span] = []
    for _, line in text_lines(str(path)):
        if match := _WORD.match(line):
            attributes = dict(each.split("=", 1) for each in match[2].split())
            parts = match[3].split("_")
            parts = [part for part in parts if part] or [match[3]]
            sense = attributes.get("lexsn", "").partition(";")[0]
            number = attributes.get("wnsn", "0").partition(";")[0]
            if sense and number != "0" and "pn" not in attributes and sense[0] in _PART_OF_SPEECH:
                lemma = f"{attributes['lemma']}.{_PART_OF_SPEECH[sense[0]]}"
                spans.append(Span(len(words), len(words) + len(parts), lemma, sense))
            words += parts
        elif line.startswith("</s>") and words:
            sentences.append(Sentence(words, tuple(spans)))
            words, spans = [], []
    if not sentences:
        raise InputError(f"{path}: no sentence of SemCor (<s>, <wf>): give a file of its SGML")
    return sentences


class ContextPair(NamedTuple):
    """Two words in their sentences, and what people say of them: "T" for the same sense, or a number."""

    first: tuple[list[str], int]
    second: tuple[list[str], int]
    target: str
    gold: str


def read_wic(directory: Path, split: str) -> list[ContextPair]:
    """WiC: SPLIT/SPLIT.data.txt (target, part of speech, i-j, two sentences) and SPLIT/SPLIT.gold.txt (T or F)."""
    data, gold = (directory / split / f"{split}.{kind}.txt" for kind in ("data", "gold"))
    labels = [text.strip() for _, text in text_lines(str(gold)) if text.strip()]
    pairs = []
    for where, cells in _table(data, 5, "target, part of speech, positions, two sentences"):
        sentences = cells[3].split(), cells[4].split()
        positions = [*cells[2].split("-"), ""]
        first, second = (_position(where, *each) for each in zip(positions, sentences, strict=False))
        if len(pairs) == len(labels):
            raise InputError(f"{gold} has {len(labels)} lines, fewer than {data}: they must be of one version")
        pairs.append(ContextPair((sentences[0], first), (sentences[1], second), cells[0], labels[len(pairs)]))
    return pairs


def read_scws(path: Path) -> list[ContextPair]:
    """SCWS: id, word, part of speech, word, part of speech, two contexts with <b> word </b>, and the mean rating."""
    pairs = []
    for where, cells in _table(path, 8, "id, two words with parts of speech, two contexts, rating"):
        first, second = (_marked(where, text) for text in cells[5:7])
        pairs.append(ContextPair(first, second, f"{cells[1]} {cells[3]}", str(_number(where, cells[7]))))
    return pairs


def _marked(where: str, text: str) -> tuple[list[str], int]:
    before, marker, rest = text.partition("<b>")
    word, end, after = rest.partition("</b>")
    if not (marker and end and word.strip()):
        raise InputError(f"{where}: a context has no word between <b> and </b>")
    return [*before.split(), *word.split(), *after.split()], len(before.split())


# ---- Words -----------------------------------------------------------------------------------------------------------


class WordPair(NamedTuple):
    """Two words, and how similar people find them; any scale."""

    first: str
    second: str
    rating: float


def read_word_pairs(path: Path) -> list[WordPair]:
    """A TSV of word, word, rating; more columns are not read, and neither is a first line without a number."""
    pairs = []
    for number, (where, cells) in enumerate(_table(path, 3, "word, word, rating")):
        if number == 0 and not _is_number(cells[2]):
            continue
        pairs.append(WordPair(cells[0].strip(), cells[1].strip(), _number(where, cells[2])))
    if len(pairs) < 2:
        raise InputError(f"{path} has {len(pairs)} pairs of words: a correlation needs two")
    return pairs


def read_analogies(path: Path) -> list[tuple[str, tuple[str, str, str, str]]]:
    """(section, four words) of each question: lines `: SECTION`, and after each its questions of four words."""
    section, questions = "", []
    for where, line in text_lines(str(path)):
        words = line.split()
        if line.startswith(":"):
            section = line[1:].strip()
        elif len(words) == 4:
            questions.append((section, (words[0], words[1], words[2], words[3])))
        elif words:
            raise InputError(f"{where} has {len(words)} words: an analogy has four (a line `: NAME` begins a section)")
    return questions


def _table(path: Path, columns: int, names: str) -> Iterator[tuple[str, list[str]]]:
    """(FILE:LINE, cells) of the lines of a TSV that are not blank."""
    for where, line in text_lines(str(path)):
        cells = line.rstrip("\r\n").split("\t")
        if not line.strip():
            continue
        if len(cells) < columns:
            raise InputError(f"{where} has {len(cells)} columns, not {columns} with tabs between: {names}")
        yield where, cells


def _position(where: str, text: str, words: Sequence[str]) -> int:
    if not re.fullmatch(r"\d+", text, re.ASCII) or int(text) >= len(words):
        raise InputError(f"{where}: {text} is not the position of one of its {len(words)} words, from 0")
    return int(text)


def _is_number(text: str) -> bool:
    try:
        return np.isfinite(float(text))
    except ValueError:
        return False


def _number(where: str, text: str) -> float:
    if not _is_number(text):
        raise InputError(f"{where}: the rating {text} is not a number")
    return float(text)
