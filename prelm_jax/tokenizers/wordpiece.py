"""WordPiece, BERT's tokenizer (Devlin et al. 2018; google-research/bert, tokenization.py), with transformers' ids.

Text is cleaned (control characters dropped, CJK ideographs set apart) and, for a lower-cased vocabulary, lower-cased
and stripped of accents. It is split at white space and punctuation. Each word is spelled greedily from its left by the
longest subwords of the vocabulary, where subwords after the first are written with "##". A word that cannot be spelled,
or has more than 100 characters, is [UNK]. The `tokenizers` library does the work.
"""

import dataclasses
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from prelm_jax.bounds import VocabularySize
from prelm_jax.cache import digest
from prelm_jax.corpus.documents import Corpus
from prelm_jax.errors import InputError
from prelm_jax.storage import prefix_errors, read_json, read_lines
from prelm_jax.tokenizers.cached_encoder import CachedEncoder
from prelm_jax.tokenizers.tokenizer_json import read_tokenizer_json
from prelm_jax.tokenizers.training import alphabet, train_once, train_subwords

ROLES = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
SPECIAL_TOKENS = tuple(ROLES.values())
MAX_WORD_CHARACTERS = 100
VERSION = 1  # Raise it when the same corpus would give another vocabulary.

# The settings of a tokenizer.json that this package can apply; lower-casing and accents may vary.
_TOKENIZER_JSON = {
    "model": {"type": "WordPiece", "continuing_subword_prefix": "##", "max_input_chars_per_word": MAX_WORD_CHARACTERS},
    "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True},
    "pre_tokenizer": {"type": "BertPreTokenizer"},
}


class WordPiece(CachedEncoder):
    """A WordPiece tokenizer. `tokens` lists the vocabulary by id and must hold [PAD], [UNK], [CLS], [SEP] and [MASK].

    `strip_accents=None` means the value of `lowercase`, as in BERT. The attribute `continuation` is bool [vocab_size]:
    true for subwords that continue a word ("##ing").

    Raises InputError for a vocabulary with repeated entries or without one of the special tokens.
    """

    def __init__(self, tokens: Iterable[str], lowercase: bool = True, strip_accents: bool | None = None):
        self.lowercase, self.strip_accents = lowercase, strip_accents
        super().__init__(list(tokens), ROLES)
        self.continuation = np.array([token.startswith("##") for token in self.tokens])
        self.fingerprint = digest([self.tokens, lowercase, lowercase if strip_accents is None else strip_accents])

    @classmethod
    def from_vocab(cls, path: str | os.PathLike, lowercase: bool = True, strip_accents: bool | None = None) -> Self:
        """Reads a `vocab.txt`: UTF-8, a token per line, the line number (from 0) its id."""
        lines = [line.removesuffix("\r") for line in read_lines(path)]
        for number, line in enumerate(lines, start=1):
            if not line.strip(" \t"):
                raise InputError(f"{path}:{number} is blank: a vocabulary has a token on every line")
        with prefix_errors(path):
            return cls(lines, lowercase, strip_accents)

    @classmethod
    def from_directory(cls, directory: str | os.PathLike, lowercase: bool = True) -> Self:
        """Reads a Hugging Face directory: tokenizer.json or vocab.txt, with the settings of tokenizer_config.json.

        `lowercase` applies to a directory without the setting.
        """
        directory = Path(directory)
        settings = {"do_lower_case": lowercase}
        tokens = None
        if (path := directory / "tokenizer.json").exists():
            tokens, parts = read_tokenizer_json(path, _TOKENIZER_JSON)
            normalizer = parts["normalizer"]
            settings |= {"do_lower_case": normalizer["lowercase"], "strip_accents": normalizer["strip_accents"]}
        if (config := directory / "tokenizer_config.json").exists():
            settings |= read_json(config)
        if not settings.get("tokenize_chinese_chars", True):
            raise InputError(f"{config}: tokenize_chinese_chars=false is not supported")
        options = (settings["do_lower_case"], settings.get("strip_accents"))
        if tokens is None:
            return cls.from_vocab(directory / "vocab.txt", *options)
        with prefix_errors(path):
            return cls(tokens, *options)

    def _make_pipeline(self) -> tokenizers.Tokenizer:
        model = models.WordPiece(self.ids, unk_token="[UNK]", max_input_chars_per_word=MAX_WORD_CHARACTERS)
        pipeline = tokenizers.Tokenizer(model)
        pipeline.normalizer = normalizers.BertNormalizer(lowercase=self.lowercase, strip_accents=self.strip_accents)
        pipeline.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        pipeline.decoder = decoders.WordPiece(prefix="##")
        return pipeline

    def _settings(self) -> dict[str, object]:
        return {
            "do_lower_case": self.lowercase,
            "strip_accents": self.strip_accents,
            "tokenize_chinese_chars": True,
            "tokenizer_class": "BertTokenizer",
        }

    def _vocabulary_files(self) -> dict[str, str | bytes]:
        return {"vocab.txt": "".join(f"{token}\n" for token in self.tokens)}


@dataclasses.dataclass(frozen=True)
class WordPieceConfig:
    """A WordPiece vocabulary, trained on the corpus or loaded."""

    # Entries of a trained vocabulary, special tokens included. Several thousand suit a small corpus.
    vocab_size: VocabularySize = 30522
    # Lower-case text and strip accents; turn off where case matters, for names or German. For a trained vocabulary or
    # a lone vocab.txt: a directory has its own setting.
    lowercase: bool = True
    path: str | None = None  # Load this directory or vocab.txt instead of training.

    @property
    def expected_vocab_size(self) -> int:
        return self.vocab_size

    def build(self, corpus: Corpus) -> WordPiece:
        """A tokenizer trained on the training side of a corpus, or the cached result."""
        tokens = train_once(self, VERSION, corpus, lambda: train(corpus, self.vocab_size, self.lowercase))
        return WordPiece(tokens, self.lowercase)


def train(corpus: Corpus, vocab_size: int, lowercase: bool = True) -> list[str]:
    """A vocabulary from the training side of a corpus, the same in every process.

    In the order of ids: the special tokens; the characters by falling count, then code point; "##" with each character
    that can continue a word; the merged subwords in the order of merging. There are `vocab_size` entries, or fewer if
    the corpus has fewer subwords that occur at least twice.

    Raises InputError if `vocab_size` is too small for the characters.
    """
    tokenizer = WordPiece(SPECIAL_TOKENS, lowercase)._make_pipeline()
    letters = alphabet(corpus, tokenizer.normalizer)
    continuing = [character for character in letters if _can_continue(character, tokenizer)]
    base = [*SPECIAL_TOKENS, *letters, *(f"##{character}" for character in continuing)]
    if len(base) > vocab_size:
        raise InputError(
            f"vocab_size={vocab_size} is too small for the {len(letters)} characters of the corpus:"
            f" give at least {len(base)}, better several times as many"
        )
    make = partial(trainers.WordPieceTrainer, vocab_size=vocab_size)
    ids = train_subwords(tokenizer, corpus, make, base, letters)["vocab"]
    return sorted(ids, key=ids.__getitem__)


def _can_continue(character: str, tokenizer: tokenizers.Tokenizer) -> bool:
    """False for characters that are always words of their own: punctuation and ideographs."""
    return len(tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str("a" + character))) == 1
