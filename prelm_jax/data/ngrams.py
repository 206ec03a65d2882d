"""The cross-entropy of a trigram model: the baseline of a language model's loss.

Interpolated after Jelinek and Mercer (1980): the probability of a token is a weighted mean of its frequency after the
two tokens before it and of the bigram model's probability, which in turn is a weighted mean of its frequency after the
one token before it and of the unigram model's probability. The weights depend on how often the tokens before were seen,
in powers of two. Expectation-maximization fits them to training tokens, each of which is taken out of the counts while
it is predicted (deleted interpolation), so no text has to be set aside.

Only the n-grams that are asked for are counted, so memory does not grow with the corpus; of a large corpus at most
COUNTED_CHUNKS chunks, evenly spread, are read.
"""

from typing import Protocol

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

CHUNK = 1 << 20  # tokens
COUNTED_CHUNKS = 64
FITTED_ON = 1 << 17  # tokens, about, to which the weights are fitted
_ITERATIONS = 30
_LEVELS = 64  # of how often a history was seen: powers of two
_BACK = np.array([[2], [1], [0]])  # how far before the last token each of the three is


class TokenSource(Protocol):
    """Token ids of documents: a `Store`, or anything that can be read like one."""

    sentence_offsets: np.ndarray  # index of the first token of each sentence, and the number of tokens
    document_offsets: np.ndarray  # index of the first sentence of each document, and the number of sentences

    @property
    def num_tokens(self) -> int: ...

    def gather(self, positions: np.ndarray) -> np.ndarray:
        """The ids (int32) at token indices of any shape."""

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """int64 [vocab_size]: how often each id occurs."""


def trigram_nll(source: TokenSource, vocab_size: int, queries: np.ndarray) -> np.ndarray:
    """Negative log-likelihoods (nats, [n]) of the last token of each trigram, given the two before it.

    Args:
        source: the training text; no n-gram crosses the boundary of a document.
        vocab_size: V, above all ids; at most two million.
        queries: int [3, n], the trigrams. V stands for a missing token: [V, V, c] is the first token of a document,
            [V, b, c] its second.
    """
    chunks = _chunks(source.num_tokens)
    stride = -(-sum(map(len, chunks)) // FITTED_ON)
    index = np.concatenate([chunk[::stride] for chunk in chunks])
    fitted_to = _ngrams(source, index, source.gather(np.maximum(index - _BACK, 0)), vocab_size)
    counts, total = _count(source, chunks, vocab_size, np.concatenate([fitted_to, queries], axis=1))
    n = fitted_to.shape[1]
    left_out, asked = np.maximum(counts[:, :n] - 1, 0), counts[:, n:]

    # `fitted`: probabilities of the tokens that are left out in turn; `result`: probabilities of the queries: first the
    # unigram model's (count 4), then mixed with the bigram frequencies (counts 2 and 3), then with the trigram
    # frequencies (counts 0 and 1).
    fitted = (left_out[4] + 1) / (total - 1 + vocab_size)
    result = (asked[4] + 1) / (total + vocab_size)
    for order in (2, 0):
        frequency, level = _frequency(left_out, order)
        asked_frequency, asked_level = _frequency(asked, order)
        weight = _fit(frequency, fitted, level)
        fitted = weight[level] * frequency + (1 - weight[level]) * fitted
        result = weight[asked_level] * asked_frequency + (1 - weight[asked_level]) * result
    return -np.log(result)


def _frequency(counts: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    """The frequency of n-grams after their histories, and the level of the histories: the bits of their counts."""
    ngram, history = counts[order], counts[order + 1]
    return ngram / np.maximum(history, 1), np.frexp(history)[1]


def _fit(frequency: np.ndarray, lower: np.ndarray, level: np.ndarray) -> np.ndarray:
    """The weight of the frequencies in their mean with the lower order's probabilities, for each level."""
    members = np.bincount(level, minlength=_LEVELS)
    weight = np.full(_LEVELS, 0.5)
    for _ in range(_ITERATIONS):
        posterior = weight[level] * frequency
        posterior /= posterior + (1 - weight[level]) * lower
        weight = (np.bincount(level, posterior, minlength=_LEVELS) + 0.5) / (members + 1)
    weight[0] = 0  # of a history that was never seen
    return weight


def _chunks(num_tokens: int) -> list[range]:
    """The token indices that are counted."""
    chunks = [range(begin, min(begin + CHUNK, num_tokens)) for begin in range(0, num_tokens, CHUNK)]
    if len(chunks) <= COUNTED_CHUNKS:
        return chunks
    return [chunks[i * len(chunks) // COUNTED_CHUNKS] for i in range(COUNTED_CHUNKS)]


def _ngrams(source: TokenSource, indices: np.ndarray, tokens: np.ndarray, missing: int) -> np.ndarray:
    """int64 [3, n]: the tokens [3, n] two before, one before and at some indices; `missing` before a document.

    A document a b c gives the columns (missing, missing, a), (missing, a, b), (a, b, c).
    """
    begins = source.sentence_offsets[source.document_offsets]
    depth = indices - begins[np.searchsorted(begins, indices, side="right") - 1]  # tokens before it in its document
    return np.where(depth >= _BACK, tokens, missing).astype(np.int64)


def _count(source: TokenSource, chunks: list[range], vocab_size: int, queries: np.ndarray) -> tuple[np.ndarray, int]:
    """How often the n-grams of the queries occur in the chunks, and the number of tokens in these.

    int64 [5, n], for a query (a, b, c): the counts of abc, of ab before any third token, of bc, of b before any second
    token, and of c; 0 for an n-gram with a missing token.
    """
    distinct, inverse = zip(*(np.unique(keys, return_inverse=True) for keys in _keys(queries, vocab_size)), strict=True)
    counts = [np.zeros(len(keys), np.int64) for keys in distinct]
    for chunk in chunks:
        # Each token is read once, and is the last, the middle and the first of three n-grams.
        tokens = source.gather(np.maximum(np.arange(chunk.start - 2, chunk.stop), 0))
        ngrams = _ngrams(source, np.arange(chunk.start, chunk.stop), sliding_window_view(tokens, 3).T, vocab_size)
        for count, known, keys in zip(counts, distinct, _keys(ngrams, vocab_size), strict=True):
            keys = np.sort(keys)
            count += np.searchsorted(keys, known, "right") - np.searchsorted(keys, known)
    result = np.stack([count[i] for count, i in zip(counts, inverse, strict=True)])
    result[:2, queries[0] == vocab_size] = 0
    result[2:4, queries[1] == vocab_size] = 0
    return result, sum(map(len, chunks))


def _keys(ngrams: np.ndarray, vocab_size: int) -> list[np.ndarray]:
    """One number for each of the five n-grams of a trigram that `_count` counts."""
    base = vocab_size + 1
    first, second, third = ngrams
    return [(first * base + second) * base + third, first * base + second, second * base + third, second, +third]
