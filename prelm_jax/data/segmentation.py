"""Word boundaries in Chinese, which is written without spaces: which tokens continue a word.

Every ideograph is a token, and BERT-wwm (Cui et al. 2019, arXiv:1906.08101) masks the ideographs of a word together.
Here jieba finds the words (extra `chinese`: rjieba, which gives the same words about forty times as fast).

Divergences: the paper segments with LTP. Words are found in the ids, not in the original text, so a character outside
of the vocabulary is a word of its own.
"""

import importlib.metadata
import unicodedata
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from prelm_jax.cache import cached_file, digest
from prelm_jax.corpus.store import Store
from prelm_jax.errors import InputError

VERSION = 1  # increase it when the same store would give other words
TOKENS_AT_ONCE = 1 << 20
BREAK = "\n"  # replaces every token that is not an ideograph


def continuations(store: Store, tokens: list[str]) -> np.ndarray:
    """Whether each token of a store continues a word of ideographs: bool [tokens of the store], memory-mapped.

    `tokens` is the vocabulary. The result is kept in the cache directory. Raises InputError if rjieba is not installed.
    """
    try:
        import rjieba
    except ImportError:
        raise InputError('masking.segmenter=jieba needs rjieba: pip install "prelm_jax[chinese]"') from None
    key = digest([VERSION, importlib.metadata.version("rjieba"), store.fingerprint, tokens])

    def write(path: Path):
        with open(path, "wb") as file:
            for part in _parts(store, tokens, rjieba.cut):
                file.write(part.tobytes())

    path = cached_file("continuations", key, write)
    return np.asarray(np.memmap(path, bool, "r"))


def _parts(store: Store, tokens: list[str], cut: Callable[[str], list[str]]) -> Iterator[np.ndarray]:
    """The continuations, about a million tokens at a time. `cut` splits a text into words.

    For sentences 我们来 and 到北京, which are cut into 我们 来 and 到 北京:

        text with breaks     \\n 我 们 来 \\n 到 北 京      a break before each sentence: no word crosses its boundary
        continues            0  0  1  0  0  0  0  1
        without breaks          0  1  0     0  0  1
    """
    character_V = np.array([token if _is_ideograph(token) else BREAK for token in tokens], "<U1")
    offsets = store.sentence_offsets
    bounds = np.searchsorted(offsets, range(0, store.num_tokens, TOKENS_AT_ONCE))
    for first, last in pairwise([*np.unique(bounds), store.num_sentences]):
        begins = offsets[first:last] - offsets[first]
        characters = character_V[store.ids[offsets[first] : offsets[last]]]
        text = np.insert(characters, begins, BREAK).tobytes().decode("utf-32-le")
        continues = np.ones(len(text), bool)
        continues[np.cumsum([0, *map(len, cut(text))])[:-1]] = False
        yield np.delete(continues, begins + np.arange(len(begins)))


def _is_ideograph(token: str) -> bool:
    return len(token) == 1 and unicodedata.name(token, "").startswith(("CJK UNIFIED", "CJK COMPATIBILITY IDEOGRAPH"))
