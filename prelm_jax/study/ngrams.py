"""Subjects that have counted words: unigram and trigram, in the vocabulary of a run. What a model must do better than.

Both have counted the training side of the run's corpus; words outside of its vocabulary count as unknown. Sentences are
scored after the end of a sentence.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Literal, NoReturn

import numpy as np

from prelm_jax.cache import digest
from prelm_jax.corpus.store import Store
from prelm_jax.data.batches import special_id
from prelm_jax.data.ngrams import trigram_nll
from prelm_jax.errors import InputError
from prelm_jax.inference.base import SENTENCE_END, SentenceScore
from prelm_jax.study.subjects import Origin
from prelm_jax.tokenizers.base import Tokenizer


class NgramSubject:
    """A unigram or trigram model of a text."""

    num_layers = 0

    def __init__(self, name: str, order: Literal["unigram", "trigram"], text: Store, tokenizer: Tokenizer):
        self.name, self.family = name, order
        self.scoring = "log-probability" if order == "unigram" else f"log-probability after {SENTENCE_END!r}"
        self.origin = Origin(digest([order, text.fingerprint, tokenizer.fingerprint]), words_seen=text.num_words)
        self._text, self._tokenizer = _InVocabulary(text, tokenizer), tokenizer

    def score(self, texts: Collection[str]) -> Iterator[SentenceScore]:
        """See `Subject`. All texts are in memory at once."""
        encoded = [np.array(ids, np.int64) for ids in self._tokenizer.encode_each(texts)]
        tokens = np.concatenate([np.zeros(0, np.int64), *encoded])
        nll = self._unigram_nll(tokens) if self.family == "unigram" else self._trigram_nll(encoded)
        for ids, part in zip(encoded, np.split(nll, np.cumsum([len(ids) for ids in encoded])[:-1]), strict=True):
            unknown = int((ids == self._tokenizer.unknown_id).sum())
            # A sum over sorted terms: sentences of the same words, in any order, are a tie to the unigram.
            yield SentenceScore(0.0 - float(np.sort(part).sum()), len(ids), unknown)

    def embed(self, sentences: Iterable[Sequence[str]]) -> NoReturn:
        """Raises InputError."""
        raise InputError(f"{self.name} has no vectors of words")

    def _unigram_nll(self, tokens: np.ndarray) -> np.ndarray:
        counts_V = self._text.token_counts(self._tokenizer.vocab_size) + 1
        return -np.log(counts_V / counts_V.sum())[tokens]

    def _trigram_nll(self, encoded: Sequence[np.ndarray]) -> np.ndarray:
        missing = self._tokenizer.vocab_size
        (end,) = self._tokenizer.encode_batch([SENTENCE_END])
        before = np.array([missing, missing, *end])[-2:]
        queries = [np.lib.stride_tricks.sliding_window_view(np.append(before, ids), 3) for ids in encoded if len(ids)]
        if not queries:
            return np.zeros(0)
        return trigram_nll(self._text, self._tokenizer.vocab_size, np.concatenate(queries).T)


class _InVocabulary:
    """The ids of a store, those outside of the vocabulary as unknown. Fulfills `TokenSource`."""

    def __init__(self, store: Store, tokenizer: Tokenizer):
        self._store, self._vocab_size = store, tokenizer.vocab_size
        self._unknown_id = special_id(tokenizer, "unknown", "counting words")
        self.sentence_offsets, self.document_offsets = store.sentence_offsets, store.document_offsets

    @property
    def num_tokens(self) -> int:
        return self._store.num_tokens

    def gather(self, positions: np.ndarray) -> np.ndarray:
        ids = self._store.gather(positions)
        return np.where(ids < self._vocab_size, ids, self._unknown_id)

    def token_counts(self, vocab_size: int) -> np.ndarray:
        spellings = self._store.spellings
        counts = self._store.token_counts(max(vocab_size, 0 if spellings is None else len(spellings)))
        counts[self._unknown_id] += counts[vocab_size:].sum()
        return counts[:vocab_size]
