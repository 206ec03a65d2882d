"""Loads a tokenizer from its files, whatever its kind."""

import json
import os
from pathlib import Path

from prelm_jax.errors import InputError
from prelm_jax.storage import read_json
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.tokenizers.bpe import BPE, candidate_files
from prelm_jax.tokenizers.sentencepiece import SentencePiece
from prelm_jax.tokenizers.wordpiece import WordPiece
from prelm_jax.tokenizers.words import WordVocabulary


def load(path: str | os.PathLike, lowercase: bool = True) -> Tokenizer:
    """The tokenizer in a directory (with Hugging Face's files or OpenAI's), or of a `vocab.txt` or `vocab.json`.

    A `vocab.json` needs its merges in the same directory. `lowercase` is for WordPiece without settings: a directory
    has its own, and the other kinds ignore it.

    Raises InputError if there is no tokenizer, or an unsupported one.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _load_directory(path, lowercase)
    if not path.exists():
        raise InputError(f"there is no tokenizer at {path}: give a directory, a vocab.txt or a vocab.json")
    for vocabulary, merges in candidate_files(path.parent):
        if path in (vocabulary, merges):
            return BPE.from_files(vocabulary, merges)
    if WordVocabulary.at(path):
        return WordVocabulary.from_vocab(path)
    return WordPiece.from_vocab(path, lowercase)


def _load_directory(directory: Path, lowercase: bool) -> Tokenizer:
    """Recognizes the kind by tokenizer.json if there is one, else by vocab.txt, else by the files of BPE."""
    if (path := directory / "tokenizer.json").exists():
        data = read_json(path)
        if "Metaspace" in json.dumps(data.get("pre_tokenizer")):
            return SentencePiece.from_directory(directory)
        if "merges" in (data.get("model") or {}):
            return BPE.from_directory(directory)
        return WordPiece.from_directory(directory, lowercase)
    if (path := directory / "vocab.txt").exists():
        if WordVocabulary.at(path):
            return WordVocabulary.from_directory(directory)
        return WordPiece.from_directory(directory, lowercase)
    if any(vocabulary.exists() for vocabulary, _ in candidate_files(directory)):
        return BPE.from_directory(directory)
    names = "tokenizer.json, vocab.txt, or vocab.json and merges.txt"
    raise InputError(f"{directory} holds no tokenizer: give a directory with {names}")
