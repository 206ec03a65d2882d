"""What all trained vocabularies share: their text, their alphabet and their cache."""

import copy
import functools
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import tokenizers
from tokenizers.trainers import Trainer

from prelm_jax.cache import cached, digest
from prelm_jax.corpus.documents import Corpus

# A trained vocabulary can spell the most frequent characters, up to this fraction of the text. The others, thousands in
# a web corpus and each of them rare, would take the place of words; a word that contains one of them is unknown.
ALPHABET_COVERAGE = 0.9999

# Longer words are not trained on. WordPiece finds them unknown; nothing in them is worth an entry; and the trainers
# need time that is quadratic in the length of a word.
MAX_WORD_CHARACTERS = 100

Trained = TypeVar("Trained")
Split = Callable[[str], list[str]]  # A text to its words.


def train_once(config: object, version: int, corpus: Corpus, train: Callable[[], Trained]) -> Trained:
    """`train()`, or its result from the cache, which must be JSON (tuples return as lists).

    The key in the cache is the configuration, the version of the training code, the `tokenizers` library's version and
    the corpus.
    """
    key = [type(config).__name__, vars(config), version, tokenizers.__version__, corpus.fingerprint]
    return json.loads(cached("vocabularies", digest(key), lambda: json.dumps(train())))


def training_texts(corpus: Corpus, task: str, split: Split, limit: int = MAX_WORD_CHARACTERS) -> Iterator[str]:
    """The documents of the training side, the only text that a vocabulary is trained on, without long words.

    `task` titles the progress. `split` finds words; those of more than `limit` characters are left out.
    """
    without_long_words = _LongWords(split, limit)
    return (without_long_words(document.text) for document in corpus.documents("training", task))


class _LongWords:
    """Leaves out the words of more than `limit` characters, in time linear in the length of a text."""

    def __init__(self, split: Split, limit: int):
        self._limit = limit
        # White space, but not the controls that only Python takes for it: tokenizers drop them.
        self._long_chunk = re.compile(rf"[\S\x1c-\x1f\x85]{{{limit + 1},}}")
        self._is_inside = functools.cache(lambda character: len(split(f"a{character}a")) == 1)

    def __call__(self, text: str) -> str:
        return self._long_chunk.sub(self._shorten, text)

    def _shorten(self, match: re.Match[str]) -> str:
        chunk = match[0]
        if between := [character for character in set(chunk) if not self._is_inside(character)]:
            return re.sub(rf"[^{re.escape(''.join(between))}]{{{self._limit + 1},}}", " ", chunk)
        return " "


def words_of(pipeline: tokenizers.Tokenizer) -> Split:
    """The function that finds the words of a pipeline in a text."""
    pipeline = copy.deepcopy(pipeline)  # The library locks a pipeline while it trains it.

    def split(text: str) -> list[str]:
        normal = pipeline.normalizer.normalize_str(text)
        return [word for word, _ in pipeline.pre_tokenizer.pre_tokenize_str(normal)]

    return split


def train_subwords(
    pipeline: tokenizers.Tokenizer, corpus: Corpus, make: Callable[..., Trainer], base: list[str], letters: list[str]
) -> dict:
    """Trains a pipeline with the trainer that `make` builds; returns the "model" of its tokenizer.json.

    Its tokens are `base`, which spell the `letters`, then the merged ones.

    The same in every process: the library numbers characters in the order of a hash table that differs between
    processes, and breaks ties between merges by number, but characters given as special tokens keep their order.
    """
    characters = {"special_tokens": base, "initial_alphabet": letters, "limit_alphabet": len(letters)}
    trainer = make(**characters, min_frequency=2, show_progress=False)
    texts = training_texts(corpus, "training the vocabulary", words_of(pipeline))
    pipeline.train_from_iterator(texts, trainer)
    # The model alone: the trained pipeline would match its special tokens, here every letter.
    return json.loads(pipeline.to_str())["model"]


def alphabet(corpus: Corpus, pipeline: tokenizers.Tokenizer) -> list[str]:
    """The characters that cover ALPHABET_COVERAGE of the training side, by falling count, then code point."""
    code_points = np.zeros(sys.maxunicode + 1, np.int64)
    texts = training_texts(corpus, "counting characters", words_of(pipeline))
    while batch := list(itertools.islice(texts, 1000)):
        batched = np.frombuffer("".join(batch).encode("utf-32-le"), np.uint32)
        code_points += np.bincount(batched, minlength=len(code_points))
    characters: Counter[str] = Counter()
    for code_point in np.flatnonzero(code_points):
        for character in "".join(pipeline.normalizer.normalize_str(chr(code_point)).split()):
            characters[character] += int(code_points[code_point])
    ranked = sorted(characters, key=lambda character: (-characters[character], character))
    cumulative = np.cumsum([characters[character] for character in ranked])
    return ranked[: np.searchsorted(cumulative, ALPHABET_COVERAGE * cumulative[-1]) + 1] if ranked else []
