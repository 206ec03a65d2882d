"""Reads a tokenizer from its files."""

import os
from pathlib import Path

from prelm_jax.errors import InputError
from prelm_jax.storage import read_json
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.tokenizers.bpe import BPE, beside
from prelm_jax.tokenizers.sentencepiece import SentencePiece
from prelm_jax.tokenizers.wordpiece import WordPiece
from prelm_jax.tokenizers.words import WordVocabulary


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
        if not json_path.exists() and vocabulary.exists() and WordVocabulary.at(vocabulary):
            return WordVocabulary.from_directory(path)
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
    return WordVocabulary.from_vocab(path) if WordVocabulary.at(path) else WordPiece.from_vocab(path, lowercase)
