"""Counter-based random numbers: the only source of randomness of the data.

Every number is a pure function of a key and a counter, and its bits can serve as a key again (seed → stream → example
→ position). So a batch can be built anywhere and in any order, and a host that builds only its rows draws the same
numbers for them. There is no state:

    shuffle = key(seed, "shuffle")
    uniform(shuffle, np.arange(3))               # three numbers in [0, 1), the same in every process
    random_uint32(bits(shuffle, example_B), T)   # T numbers for each example
"""

import hashlib
import math

import numpy as np
from numpy.typing import ArrayLike

# Chosen by chi-square tests of where two elements go: with four rounds, permutations of fewer than 1000 elements are
# biased, with six they are not; shorter sides bias permutations of five elements or fewer.
_ROUNDS = 6
_SHORTEST_SIDE = 8

# SplitMix64 (Steele, Lea and Flood, 2014). As arrays, because NumPy converts a scalar for every operation again.
_GOLDEN, _FIRST, _SECOND = (
    np.array(n, np.uint64) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
_1, _11, _27, _30, _31, _32 = (np.array(n, np.uint64) for n in (1, 11, 27, 30, 31, 32))


def key(seed: int, name: str) -> np.ndarray:
    """The key (uint64) of a stream of random numbers; streams of different names or seeds are independent."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return np.array(int.from_bytes(digest, "little"), np.uint64)


def bits(key: np.ndarray, counter: ArrayLike) -> np.ndarray:
    """64 random bits (uint64) for each key and counter (integers), broadcast against each other."""
    x = key + (np.asarray(counter, np.uint64) + _1) * _GOLDEN
    x ^= x >> _30
    x *= _FIRST
    x ^= x >> _27
    x *= _SECOND
    x ^= x >> _31
    return x


def random_uint32(key_B: np.ndarray, n: int) -> np.ndarray:
    """n random uint32 for each key: [B, n]."""
    return bits(key_B[:, None], np.arange((n + 1) // 2)).view("<u4")[:, :n]


def uniform(key: np.ndarray, counter: ArrayLike) -> np.ndarray:
    """Random float64 in [0, 1) for each key and counter: multiples of 2^-53."""
    return (bits(key, counter) >> _11) * 2.0**-53


def log_uniform(key: np.ndarray, n: int, vocab_size: int, at_once: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws n distinct ids of a vocabulary that is sorted by falling count, and counts the draws.

    As TensorFlow's LogUniformCandidateSampler: id k is drawn with probability log((k + 2) / (k + 1)) /
    log(vocab_size + 1), until there are n distinct ids. `at_once`, the number of draws that are made before they are
    counted, affects only the speed.

    Returns the ids in the order they were drawn, int32 [n], and the number of draws, int32 [].
    """
    while True:
        draws = np.exp(uniform(key, np.arange(at_once)) * np.log(vocab_size + 1)).astype(np.int64) - 1
        # Written in reverse order, so that the first of several draws of an id stays.
        number = np.arange(at_once, dtype=np.min_scalar_type(at_once))
        first_V = np.empty(vocab_size, number.dtype)
        first_V[draws[::-1]] = number[::-1]
        first = np.flatnonzero(first_V[draws] == number)
        if len(first) >= n:
            return draws[first[:n]].astype(np.int32), np.array(first[n - 1] + 1, np.int32)
        at_once *= 2


def permute(index: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """Maps each index by a random permutation of [0, n), which `key` (broadcast to `index`) chooses: int64.

    A Feistel network on the pairs of [0, a) × [0, b), a near-square that holds n, with cycle walking (Black and
    Rogaway, 2002): no table, so a permutation of any size (up to 2^60) costs nothing to set up.
    """
    a = max(math.isqrt(n - 1) + 1, _SHORTEST_SIDE)
    b = max(-(-n // a), _SHORTEST_SIDE)
    keys = bits(np.broadcast_to(key, index.shape), np.arange(_ROUNDS)[:, None])
    x = _feistel(index.astype(np.uint64), a, b, keys)
    # a · b is below n + a (but for the smallest n): few results are outside of [0, n), and permuting them again brings
    # them back soon.
    while (outside := np.flatnonzero(x >= n)).size:
        x[outside] = _feistel(x[outside], a, b, keys[:, outside])
    return x.astype(np.int64)


def _feistel(x: np.ndarray, a: int, b: int, keys: np.ndarray) -> np.ndarray:
    left, right = np.divmod(x, np.uint64(b))
    for i in range(0, _ROUNDS, 2):
        left = (left + _round(right, keys[i])) % np.uint64(a)
        right = (right + _round(left, keys[i + 1])) % np.uint64(b)
    return left * np.uint64(b) + right


def _round(x: np.ndarray, key: np.ndarray) -> np.ndarray:
    """32 random bits."""
    x = (x + key) * _FIRST
    x ^= x >> _32
    x *= _SECOND
    return x >> _32
