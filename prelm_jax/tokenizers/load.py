"""Loads a tokenizer from its files, whatever its kind."""

import json
import os
from pathlib import Path

from prelm_jax.errors import InputError
from prelm_jax.tokenizers import bpe, wordpiece
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.tokenizers.bpe import BPE, candidate_files
from prelm_jax.tokenizers.library import LibraryTokenizer
from prelm_jax.tokenizers.saved import BERT_CLASSES, GPT_CLASSES, TOKENIZER, SavedTokenizer
from prelm_jax.tokenizers.sentencepiece import SentencePiece
from prelm_jax.tokenizers.wordpiece import WordPiece
from prelm_jax.tokenizers.words import WordVocabulary


def load(path: str | os.PathLike, lowercase: bool = True, strip_accents: bool | None = None) -> Tokenizer:
    """The tokenizer in a directory (with Hugging Face's files or OpenAI's), or of a `vocab.txt` or `vocab.json`.

    A `vocab.json` needs its merges in the same directory. `lowercase` and `strip_accents` are for WordPiece
    without settings: a directory that has its own keeps them, and the other kinds ignore them.

    Raises InputError if there is no tokenizer, or an unsupported one: what is loaded gives transformers' ids.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _load_directory(path, lowercase, strip_accents)
    if not path.exists():
        raise InputError(f"there is no tokenizer at {path}: give a directory, a vocab.txt or a vocab.json")
    for vocabulary, merges in candidate_files(path.parent):
        if path in (vocabulary, merges):
            return BPE.from_files(vocabulary, merges)
    if WordVocabulary.at(path):
        return WordVocabulary.from_vocab(path)
    return WordPiece.from_vocab(path, lowercase, strip_accents)


def _load_directory(directory: Path, lowercase: bool, strip_accents: bool | None) -> Tokenizer:
    """Recognizes the kind by tokenizer.json if there is one, else by vocab.txt, else by the files of BPE.

    A class of transformers that has a pipeline of its own decides before tokenizer.json does.
    """
    has_vocab = (directory / "vocab.txt").exists()
    if has_vocab and not (directory / TOKENIZER).exists() and WordVocabulary.at(directory / "vocab.txt"):
        return WordVocabulary.from_directory(directory)
    saved = SavedTokenizer.read(directory)
    if saved.is_generic:
        return _load_pipeline(saved)
    if saved.class_name in BERT_CLASSES and (saved.parts or has_vocab):
        return WordPiece.from_saved(saved, lowercase, strip_accents)
    has_merges = any(vocabulary.exists() for vocabulary, _ in candidate_files(directory))
    if saved.class_name in GPT_CLASSES and (saved.parts or has_merges):
        return BPE.from_saved(saved)
    if saved.class_name is None and has_vocab:
        return WordPiece.from_saved(saved, lowercase, strip_accents)
    if saved.class_name is None and has_merges:
        return BPE.from_saved(saved)
    names = "tokenizer.json, vocab.txt, or vocab.json and merges.txt"
    kind = "tokenizer" if saved.class_name is None else f"{saved.class_name}"
    raise InputError(f"{directory} holds no {kind}: give a directory with {names}")


def _load_pipeline(saved: SavedTokenizer) -> Tokenizer:
    """The tokenizer of a tokenizer.json that is applied as it is."""
    parts = saved.parts or {}
    if "Metaspace" in json.dumps(parts["pre_tokenizer"]):
        return SentencePiece.from_saved(saved)
    if saved.difference(bpe.TOKENIZER_JSON) is None:
        return BPE.from_saved(saved)
    if saved.difference(wordpiece.TOKENIZER_JSON) is None:
        return WordPiece.from_saved(saved)
    return LibraryTokenizer.from_saved(saved)
