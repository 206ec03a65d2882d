"""Which tokens continue a word where words are written without spaces: Chinese, whose every character is a token.

BERT-wwm (Cui et al. 2019, arXiv:1906.08101) masks the characters of a word together. Here the words are those that
jieba finds (extra `chinese`: rjieba, which finds the same some forty times as fast).

Divergences: the paper has LTP find the words; they are looked for in the ids, not in the text, so a character outside
the vocabulary is a word of its own.
"""

import importlib.metadata
import unicodedata
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from prelm_jax.cache import cached_file, digest
from prelm_jax.corpus.store import Store
from prelm_jax.errors import InputError

VERSION = 1  # raise it when the same store would give other words
TOKENS_AT_ONCE = 1 << 20
BREAK = "\n"  # stands for whatever is no ideograph


def continuations(store: Store, tokens: list[str]) -> np.ndarray:
    """For each token of a store whether it continues a word of ideographs: bool [tokens], memory-mapped.

    `tokens` is the vocabulary. What was found is kept in the cache directory. Raises InputError where rjieba is not
    installed.
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


def _parts(store: Store, tokens: list[str], cut) -> Iterator[np.ndarray]:
    """The continuations, some million tokens at a time; `cut` gives the words of a text, end to end."""
    character_V = np.array([token if _is_ideograph(token) else BREAK for token in tokens], "<U1")
    offsets = store.sentence_offsets
    borders = np.searchsorted(offsets, range(0, store.num_tokens, TOKENS_AT_ONCE))
    for first, last in pairwise([*np.unique(borders), store.num_sentences]):
        begins = offsets[first:last] - offsets[first]
        characters = character_V[store.ids[offsets[first] : offsets[last]]]
        # A break before each sentence: no word goes over its border.
        text = np.insert(characters, begins, BREAK).tobytes().decode("utf-32-le")
        continues = np.ones(len(text), bool)
        continues[np.cumsum([0, *map(len, cut(text))])[:-1]] = False
        yield np.delete(continues, begins + np.arange(len(begins)))


def _is_ideograph(token: str) -> bool:
    return len(token) == 1 and unicodedata.name(token, "").startswith(("CJK UNIFIED", "CJK COMPATIBILITY IDEOGRAPH"))
