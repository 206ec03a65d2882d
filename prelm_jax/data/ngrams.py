"""What a trigram model reaches: the baseline beside which the loss of a language model says something.

Interpolated as by Jelinek and Mercer (1980): the probability of a token is a mean of its frequency after the two tokens
before it and of what a bigram says, which is a mean of the frequency after the one before it and of the unigram's; the
weights of these means depend on how often the tokens before were seen, in powers of two. They are fitted by
expectation-maximisation to training tokens, each of which is taken out of the counts while it is predicted (deleted
interpolation), so that no text has to be set aside.

Only the n-grams that are asked for are counted, so memory does not grow with the corpus; and of a large one no more
than COUNTED pieces, evenly spread, are read.
"""

import numpy as np

from prelm_jax.corpus.store import Store

PIECE = 1 << 20  # tokens
COUNTED = 64  # pieces
FITTED_ON = 1 << 17  # tokens, about, that the weights are fitted to
_ITERATIONS = 30
_LEVELS = 64


def trigram_loss(store: Store, vocab_size: int, asked: np.ndarray) -> float:
    """The mean cross-entropy (nats) of the last tokens of trigrams after the two before.

    Args:
        store: what the model is fitted on; none of its n-grams crosses the border of a document.
        vocab_size: V, above all ids; up to two million.
        asked: int [3, n], the trigrams, with V where there is no first token, or no first and no second.
    """
    pieces = _pieces(store.num_tokens)
    stride = -(-sum(map(len, pieces)) // FITTED_ON)
    fitted_to = _ngrams(store, np.concatenate([piece[::stride] for piece in pieces]), vocab_size)
    counts, seen = _count(store, pieces, vocab_size, np.concatenate([fitted_to, asked], axis=1))
    n = fitted_to.shape[1]
    left_out, rest = np.maximum(counts[:, :n] - 1, 0), counts[:, n:]

    # Probabilities of the tokens left out in turn and of those asked for: the unigram's, then with the bigram's
    # frequencies (counts 2 and 3), and with the trigram's (0 and 1).
    mean, result = ((x[4] + 1) / (total + vocab_size) for x, total in ((left_out, seen - 1), (rest, seen)))
    for order in (2, 0):
        (frequency, level), (asked_frequency, asked_level) = (
            (x[order] / np.maximum(x[order + 1], 1), np.frexp(x[order + 1])[1]) for x in (left_out, rest)
        )
        weight = _fit(frequency, mean, level)
        mean = weight[level] * frequency + (1 - weight[level]) * mean
        result = weight[asked_level] * asked_frequency + (1 - weight[asked_level]) * result
    return float(-np.log(result).mean())


def _fit(frequency: np.ndarray, lower: np.ndarray, level: np.ndarray) -> np.ndarray:
    """The weight of the frequencies in their mean with the lower order's probabilities, for each level."""
    members = np.bincount(level, minlength=_LEVELS)
    weight = np.full(_LEVELS, 0.5)
    for _ in range(_ITERATIONS):
        share = weight[level] * frequency
        share /= share + (1 - weight[level]) * lower
        weight = (np.bincount(level, share, minlength=_LEVELS) + 0.5) / (members + 1)
    weight[0] = 0  # what stands before was never seen
    return weight


def _pieces(num_tokens: int) -> list[range]:
    """The places that are counted."""
    pieces = [range(begin, min(begin + PIECE, num_tokens)) for begin in range(0, num_tokens, PIECE)]
    return [pieces[i * len(pieces) // COUNTED] for i in range(COUNTED)] if len(pieces) > COUNTED else pieces


def _ngrams(store: Store, places: np.ndarray, none: int) -> np.ndarray:
    """int64 [3, n]: the tokens at some places after the two before them, `none` where the document begins later."""
    begins = store.sentence_offsets[store.document_offsets]
    depth = places - begins[np.searchsorted(begins, places, side="right") - 1]
    back = np.array([[2], [1], [0]])
    return np.where(depth >= back, store.gather(np.maximum(places - back, 0)), none).astype(np.int64)


def _count(store: Store, pieces: list[range], vocab_size: int, asked: np.ndarray) -> tuple[np.ndarray, int]:
    """How often the n-grams asked for occur at the places of the pieces, and the number of these.

    int64 [5, n]: the trigram, the two tokens before a third, the bigram, the token before a second, the token; 0 for
    those of which a part is missing.
    """
    distinct, inverse = zip(*(np.unique(keys, return_inverse=True) for keys in _keys(asked, vocab_size)), strict=True)
    counts = [np.zeros(len(keys), np.int64) for keys in distinct]
    for piece in pieces:
        ngrams = _ngrams(store, np.arange(piece.start, piece.stop), vocab_size)
        for count, known, keys in zip(counts, distinct, _keys(ngrams, vocab_size), strict=True):
            keys = np.sort(keys)  # in order they are looked up several times as fast
            place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
            count += np.bincount(place[known[place] == keys], minlength=len(known))
    result = np.stack([count[i] for count, i in zip(counts, inverse, strict=True)])
    result[:2, asked[0] == vocab_size] = 0
    result[2:4, asked[1] == vocab_size] = 0
    return result, sum(map(len, pieces))


def _keys(ngrams: np.ndarray, vocab_size: int) -> list[np.ndarray]:
    """A number for each of the five parts of the trigrams that `_count` counts."""
    base = vocab_size + 1
    first, second, third = ngrams
    return [(first * base + second) * base + third, first * base + second, second * base + third, second, +third]
