"""What every tokenizer offers."""

import os
from collections.abc import Iterable
from typing import Protocol

import numpy as np


class Tokenizer(Protocol):
    """Text to ids and back.

    The names of special tokens mean nothing in a text: "[MASK]" is encoded as a bracket, a word and a bracket. (Only
    those of `words` do where they stand between white space, see there.)
    """

    tokens: list[str]  # id -> string
    special_ids: dict[str, int]  # those of WordPiece ("[PAD]", "[UNK]", …), of BPE ("<unk>"), of words ("<S>", …)
    unknown_id: int | None  # the id that stands for what the vocabulary cannot spell
    pad_id: int | None
    cls_id: int | None
    sep_id: int | None
    mask_id: int | None
    lowercase: bool  # whether text is lower-cased
    fingerprint: str  # SHA-256 (hex) of the vocabulary and the settings

    @property
    def vocab_size(self) -> int: ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, without special tokens."""

    def encode_flat(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The same end to end, int32, and how many each text has, int64: for many texts, in less time."""

    def decode(self, ids: Iterable[int]) -> str: ...

    def save(self, directory: str | os.PathLike, model_max_length: int | None = None) -> None:
        """Writes the files that transformers' AutoTokenizer reads; `model_max_length`: where it is to truncate."""
