"""What every tokenizer offers, and how one is read from its files."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from prelm_jax.errors import InputError
from prelm_jax.text.bpe import BPE, beside
from prelm_jax.text.files import read_json
from prelm_jax.text.sentencepiece import SentencePiece
from prelm_jax.text.wordpiece import WordPiece
from prelm_jax.text.words import Words


class Tokenizer(Protocol):
    """Text to ids and back.

    The names of special tokens mean nothing in a text: "[MASK]" is encoded as a bracket, a word and a bracket. (Only
    those of `words` do where they stand between white space, see there.)
    """

    tokens: list[str]  # id -> string
    special_ids: dict[str, int]  # those of WordPiece ("[PAD]", "[UNK]", …), of BPE ("<unk>"), of words ("<S>", …)
    unknown_id: int | None  # the id that stands for what the vocabulary cannot spell
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


def load(path: str | os.PathLike, lowercase: bool = True) -> Tokenizer:
    """The tokenizer in a directory (with Hugging Face's files or OpenAI's), a `vocab.txt`, or a `vocab.json`.

    The merges lie beside a `vocab.json`. `lowercase` is for a WordPiece vocabulary that comes without settings: a
    directory that has them says itself, and GPT-1's BPE is always lower-cased. A vocabulary that begins with <S>, </S>
    and <UNK> is one of words (ELMo).
    Raises InputError where there is no tokenizer, or one that this package does not have.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        if SentencePiece.at(path):
            return SentencePiece.from_directory(path)
        json_path = path / "tokenizer.json"
        if json_path.exists() and "merges" in (read_json(json_path).get("model") or {}):
            return BPE.from_directory(path)
        vocabulary = path / "vocab.txt"
        if not json_path.exists() and vocabulary.exists() and Words.at(vocabulary):
            return Words.from_directory(path)
        if json_path.exists() or vocabulary.exists():
            return WordPiece.from_directory(path, lowercase)
        if any(vocabulary.exists() for vocabulary, _ in beside(path)):
            return BPE.from_directory(path)
        names = "tokenizer.json, vocab.txt, or vocab.json and merges.txt"
        raise InputError(f"{path} holds no tokenizer: give a directory with {names}")
    if not path.exists():
        raise InputError(f"there is no tokenizer at {path}: give a directory, a vocab.txt or a vocab.json")
    for files in beside(path.parent):
        if path in files:
            return BPE.from_files(*files)
    return Words.from_vocab(path) if Words.at(path) else WordPiece.from_vocab(path, lowercase)
