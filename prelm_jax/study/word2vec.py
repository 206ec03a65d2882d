"""Vectors of words without context: word2vec's (Mikolov et al. 2013), trained by gensim or read from a text file.

vectors = train("corpus/*.txt")
vectors.lookup(["cat", "unicorn"]).shape  # (2, 100)
"""

import dataclasses
import functools
import hashlib
import json
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from prelm_jax.cache import cached_file, digest
from prelm_jax.corpus.documents import Corpus
from prelm_jax.errors import InputError
from prelm_jax.finetuning.records import text_lines
from prelm_jax.study.subjects import Origin
from prelm_jax.tokenizers.words import Splitter

VERSION = 1  # Raise it when the same corpus would give other vectors.
# gensim's names. Skip-gram with negative sampling; one worker, so that the same corpus gives the same bits.
SETTINGS = {
    "sg": 1,
    "vector_size": 100,
    "window": 5,
    "negative": 5,
    "min_count": 5,
    "sample": 1e-4,  # Frequent words are left out more often than by gensim's 1e-3: faster, and better on analogies.
    "epochs": 3,
    "workers": 1,
    "seed": 1,
}
# gensim cuts longer sentences of a file.
MAX_SENTENCE = 10_000


@dataclasses.dataclass(frozen=True)
class WordVectors:
    """Words, the most frequent first, and their vectors, f32 [V, D]."""

    words: Sequence[str]
    vectors_VD: np.ndarray

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of words and vectors."""
        found = hashlib.sha256(json.dumps(list(self.words)).encode())
        found.update(np.ascontiguousarray(self.vectors_VD).data)
        return found.hexdigest()

    @functools.cached_property
    def _rows(self) -> dict[str, int]:
        # Of words that are spelled twice the first, which is more frequent, counts.
        return {word: row for row, word in reversed(list(enumerate(self.words)))}

    def lookup(self, words: Sequence[str]) -> np.ndarray:
        """f32 [words, D]: the vector of each word as it is written, else of the lower-cased word, else zeros."""
        rows = [self._rows.get(word, self._rows.get(word.lower(), -1)) for word in words]
        found_ND = self.vectors_VD[rows]
        found_ND[np.array(rows, int) < 0] = 0
        return found_ND


class WordVectorsSubject:
    """Vectors of words as a subject of one layer. A word that it does not know has the zero vector."""

    family = "word2vec"
    num_layers = 1
    scoring = ""

    def __init__(self, name: str, vectors: WordVectors):
        self.name, self._vectors = name, vectors
        self.origin = Origin(vectors.fingerprint)

    def score(self, texts: Collection[str]) -> NoReturn:
        """Raises InputError."""
        raise InputError(f"{self.name} has vectors of words only, no probabilities")

    def embed(self, sentences: Iterable[Sequence[str]]) -> Iterator[np.ndarray]:
        """See `Subject`."""
        return (self._vectors.lookup(words)[None] for words in sentences)


def train(spec: str) -> WordVectors:
    """The vectors of the lower-cased words of a corpus (a SPEC), split at punctuation, without it and numbers.

    They are kept in the cache.
    """
    corpus = Corpus((spec,))
    key = digest([VERSION, SETTINGS, corpus.fingerprint])
    path = cached_file("word2vec", f"{key}.npz", lambda unfinished: _train(corpus, unfinished))
    with np.load(path) as arrays:
        return WordVectors(json.loads(arrays["words"].tobytes()), arrays["vectors"])


def _train(corpus: Corpus, target: Path) -> None:
    try:
        from gensim.models import Word2Vec
    except ImportError:
        raise InputError('word2vec needs a package: pip install "prelm_jax[study]"') from None
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        text = Path(directory) / "words.txt"
        _write_words(corpus, text)
        try:
            model = Word2Vec(corpus_file=str(text), **SETTINGS)
        except RuntimeError:  # gensim's way to say that there is no word.
            raise InputError(
                f"{' '.join(corpus.sources)}: no word occurs {SETTINGS['min_count']} times: give a larger corpus"
            ) from None
    words = np.frombuffer(json.dumps(model.wv.index_to_key).encode(), np.uint8)
    with open(target, "wb") as file:
        np.savez(file, words=words, vectors=model.wv.vectors)


def _write_words(corpus: Corpus, path: Path) -> None:
    """Writes a line for each line of the corpus: its words, without numbers and punctuation."""
    split = Splitter(tokenize=True)
    with open(path, "w", encoding="utf-8") as file:
        for document in corpus.documents(description="word2vec"):
            for line in document.text.splitlines():
                words = [word for word in split(line.lower()) if word[0].isalpha()]
                for start in range(0, len(words), MAX_SENTENCE):
                    file.write(" ".join(words[start : start + MAX_SENTENCE]) + "\n")


def read(path: Path) -> WordVectors:
    """Vectors in word2vec's text format: a line of their number and size, then a line of each word and its numbers.

    GloVe's files, which lack the first line, are read too. Raises InputError, naming the line, for a wrong one.
    """
    words, vectors, promised = [], [], None
    for number, (where, line) in enumerate(text_lines(str(path))):
        cells = line.rstrip().split(" ")
        if number == 0 and len(cells) == 2 and cells[0].isdecimal():
            promised = int(cells[0])
            continue
        try:
            vector = np.array(cells[1:], np.float32)
        except ValueError:
            raise InputError(f"{where} is no word with numbers after it: give a text file of word vectors") from None
        if not len(vector) or not np.isfinite(vector).all():
            raise InputError(f"{where} is no word with numbers after it: give a text file of word vectors")
        if vectors and len(vector) != len(vectors[0]):
            raise InputError(f"{where} has {len(vector)} numbers, the lines before it {len(vectors[0])}")
        words.append(cells[0])
        vectors.append(vector)
    if not words:
        raise InputError(f"{path} has no vectors: give a text file of word vectors")
    if promised is not None and promised != len(words):
        raise InputError(f"{path} has {len(words)} vectors, but its first line says {promised}: copy the file again")
    return WordVectors(words, np.stack(vectors))
