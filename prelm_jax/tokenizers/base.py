"""The base of all tokenizers and of their configurations."""

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from prelm_jax.corpus.documents import Corpus
from prelm_jax.errors import InputError

TEXTS_AT_ONCE = 1000


class Tokenizer:
    """Text to ids and back. `tokens` lists the vocabulary by id; `roles` maps roles to the special tokens.

    Roles have transformers' names: {"unk": "<UNK>", "bos": "<S>", "eos": "</S>"}. "unk" is required.

    Special tokens are looked up by role: `mask_id` is the id of "[MASK]", or None in a vocabulary without such a token.
    Their names have no meaning in a text: "[MASK]" is encoded as a bracket, a word and a bracket. (`WordVocabulary` is
    the exception.)

    Raises InputError if a token is repeated, or if the token of a role is missing.
    """

    open_vocabulary: bool = False  # whether the token store gives ids of their own to words outside of the vocabulary
    lowercase: bool  # whether text is lower-cased
    fingerprint: str  # SHA-256 (hex) of the vocabulary and the settings

    def __init__(self, tokens: list[str], roles: Mapping[str, str]):
        self.tokens = tokens
        self.roles = roles
        check_distinct(tokens)
        self.ids = {token: index for index, token in enumerate(tokens)}
        if missing := [token for token in roles.values() if token not in self.ids]:
            raise InputError(
                f"the vocabulary lacks {' '.join(missing)}, which {type(self).__name__} needs: line numbers are "
                "ids, so write them over unused entries or add them at the end"
            )
        self.special_ids = {token: self.ids[token] for token in roles.values()}
        role_ids = {role: self.ids[token] for role, token in roles.items()}
        self.pad_id, self.cls_id, self.sep_id = role_ids.get("pad"), role_ids.get("cls"), role_ids.get("sep")
        self.mask_id, self.bos_id, self.eos_id = role_ids.get("mask"), role_ids.get("bos"), role_ids.get("eos")
        self.unknown_id = role_ids.get("unk")  # for words that the vocabulary cannot spell

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, without special tokens."""
        raise NotImplementedError

    def encode_each(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """The ids of each text, as from `encode_batch`; a part of the texts at a time is in memory."""
        texts = iter(texts)
        while some := list(itertools.islice(texts, TEXTS_AT_ONCE)):
            yield from self.encode_batch(some)

    def encode_flat(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts end to end (int32), and the number of ids of each text (int64).

        Faster than `encode_batch` for many texts.
        """
        raise NotImplementedError

    def number_flat(self, texts: list[str], numbers: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
        """Like `encode_flat`, with ids from `numbers`, to which new words are added; for an open vocabulary only."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, including the names of special tokens."""
        raise NotImplementedError

    def save(self, directory: str | os.PathLike, model_max_length: int | None = None) -> None:
        """Writes the files that transformers' AutoTokenizer and `tokenizers.load` read.

        `model_max_length` is the model's number of positions, at which readers truncate.
        """
        raise NotImplementedError


class TokenizerConfig(Protocol):
    """A configuration of a tokenizer, resolved by `tokenizers.build`."""

    @property
    def path(self) -> str | None:
        """An existing tokenizer to load, or None to train one."""

    @property
    def expected_vocab_size(self) -> int:
        """The vocabulary size to plan with before training. A small corpus may give fewer entries."""

    def build(self, corpus: Corpus) -> Tokenizer:
        """A tokenizer trained on the training side of a corpus, or the cached result; `path` is ignored."""


def check_distinct(tokens: list[str]) -> None:
    """Raises InputError if a vocabulary, by id, holds a token twice."""
    first: dict[str, int] = {}
    for id, token in enumerate(tokens):
        if first.setdefault(token, id) != id:
            raise InputError(f"the vocabulary holds {token!r} more than once, as {first[token]} and as {id}")


def write_files(directory: str | os.PathLike, files: Mapping[str, str | bytes]) -> None:
    """Writes files, given by name, into a directory, which is created if need be."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (Path(directory) / name).write_bytes(content.encode() if isinstance(content, str) else content)
