"""WordPiece, BERT's tokenizer (Devlin et al. 2018; google-research/bert, tokenization.py), with transformers' ids.

Text is cleaned (control characters dropped, joiners among them; CJK ideographs set apart) and, for a lower-cased
vocabulary, lower-cased and, unless asked otherwise, stripped of accents. It is split at white space and punctuation.
Each word is spelled greedily from its left by the longest subwords of the vocabulary, where subwords after the first
are written with "##". A word that cannot be spelled, or has more than 100 characters, is [UNK]. The `tokenizers`
library does the work.
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Self

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from prelm_jax.bounds import VocabularySize
from prelm_jax.cache import digest
from prelm_jax.corpus.documents import Corpus
from prelm_jax.errors import InputError
from prelm_jax.storage import prefix_errors
from prelm_jax.tokenizers.added_tokens import AddedToken
from prelm_jax.tokenizers.cached_encoder import CachedEncoder
from prelm_jax.tokenizers.saved import SETTINGS, TOKENIZER, SavedTokenizer, read_vocab
from prelm_jax.tokenizers.training import MAX_WORD_CHARACTERS, alphabet, train_once, train_subwords

ROLES = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
SPECIAL_TOKENS = tuple(ROLES.values())
VERSION = 2  # Raise it when the same corpus would give another vocabulary.

# The settings of a tokenizer.json that this class can apply; lower-casing, accents and ideographs may vary.
TOKENIZER_JSON = {
    "model": {
        "type": "WordPiece",
        "unk_token": ROLES["unk"],
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": MAX_WORD_CHARACTERS,
    },
    "normalizer": {"type": "BertNormalizer", "clean_text": True},
    "pre_tokenizer": {"type": "BertPreTokenizer"},
}

# The settings that may vary: in tokenizer_config.json, and in the normalizer of a tokenizer.json.
SETTING_NAMES = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}


class WordPiece(CachedEncoder):
    """A WordPiece tokenizer. `tokens` lists the vocabulary by id and must hold [PAD], [UNK], [CLS], [SEP] and [MASK].

    `strip_accents=None` means the value of `lowercase`, as in BERT. `split_ideographs`: CJK ideographs are words of
    their own. `added`: tokens that are matched before a text is split into words. `frame`: see `CachedEncoder`. The
    attribute `continuation` is bool [vocab_size]: true for subwords that continue a word ("##ing").

    Raises InputError for a vocabulary with repeated entries or without one of the special tokens.
    """

    def __init__(
        self,
        tokens: Iterable[str],
        lowercase: bool = True,
        strip_accents: bool | None = None,
        split_ideographs: bool = True,
        added: Iterable[AddedToken] = (),
        frame: Mapping[str, str] = {},
    ):
        self.lowercase, self.strip_accents, self.split_ideographs = lowercase, strip_accents, split_ideographs
        super().__init__(list(tokens), ROLES, added, frame)
        self.continuation = np.array([token.startswith("##") for token in self.tokens])
        identity: list[object] = [self.tokens, lowercase, lowercase if strip_accents is None else strip_accents]
        identity += [] if split_ideographs else ["whole ideographs"]
        self.fingerprint = digest([*identity, *self._added_identity])

    @classmethod
    def from_vocab(
        cls,
        path: str | os.PathLike,
        lowercase: bool = True,
        strip_accents: bool | None = None,
        split_ideographs: bool = True,
        added: Iterable[AddedToken] = (),
    ) -> Self:
        """Reads a `vocab.txt`: UTF-8, a token per line, the line number (from 0) its id."""
        tokens = read_vocab(path)
        with prefix_errors(path):
            return cls(tokens, lowercase, strip_accents, split_ideographs, added)

    @classmethod
    def from_saved(cls, saved: SavedTokenizer, lowercase: bool = True, strip_accents: bool | None = None) -> Self:
        """Reads a directory with tokenizer.json or vocab.txt.

        `lowercase` and `strip_accents` apply where it has no such setting.

        Raises InputError where transformers' default is used against tokenizer.json, which says something else.
        """
        saved.require_roles(ROLES)
        options = (
            bool(saved.flag("do_lower_case", lowercase)),
            saved.flag("strip_accents", strip_accents, nullable=True),
            bool(saved.flag("tokenize_chinese_chars", True)),
        )
        if saved.parts is None:
            return cls.from_vocab(saved.directory / "vocab.txt", *options, saved.added)
        path = saved.directory / TOKENIZER
        tokens, parts = saved.vocabulary(TOKENIZER_JSON)
        stored = tuple(parts["normalizer"].get(name) for name in SETTING_NAMES.values())
        for name, value in zip(SETTING_NAMES.values(), stored, strict=True):
            if not isinstance(value, bool) and (name, value) != ("strip_accents", None):
                raise InputError(f"{path}: the normalizer has {name} {value!r}: give true or false")
        if saved.is_generic:
            options = (bool(stored[0]), None if stored[1] is None else bool(stored[1]), bool(stored[2]))
        stored = (stored[0], None if stored[1] == options[0] else stored[1], stored[2])  # None: as `lowercase`.
        for (key, name), value, used in zip(SETTING_NAMES.items(), stored, options, strict=True):
            if not saved.is_generic and key not in saved.settings and value != used:
                raise InputError(
                    f"{path} has {name} {value}, but {saved.directory / SETTINGS}, which decides, has no {key}: "
                    f'add "{key}": {json.dumps(value)} there{" or give --cased" if key == "do_lower_case" else ""}'
                )
        with prefix_errors(path):
            return cls(tokens, *options, saved.added, saved.frame)

    def _with_frame(self, added: list[AddedToken], frame: Mapping[str, str]) -> "WordPiece":
        options = (self.lowercase, self.strip_accents, self.split_ideographs)
        return WordPiece(self.tokens[: self.known_size], *options, added, frame)

    def _make_pipeline(self) -> tokenizers.Tokenizer:
        ids = {token: id for id, token in enumerate(self.tokens[: self.known_size])}
        model = models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=MAX_WORD_CHARACTERS)
        pipeline = tokenizers.Tokenizer(model)
        pipeline.normalizer = normalizers.BertNormalizer(
            handle_chinese_chars=self.split_ideographs, strip_accents=self.strip_accents, lowercase=self.lowercase
        )
        pipeline.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        pipeline.decoder = decoders.WordPiece(prefix="##")
        return pipeline

    def _settings(self) -> dict[str, object]:
        return {
            "do_lower_case": self.lowercase,
            "strip_accents": self.strip_accents,
            "tokenize_chinese_chars": self.split_ideographs,
            # The class of BERT puts BERT's own special tokens around a text.
            "tokenizer_class": "PreTrainedTokenizerFast" if self.frame else "BertTokenizer",
        }

    def _vocabulary_files(self) -> dict[str, str | bytes]:
        return {"vocab.txt": "".join(f"{token}\n" for token in self.tokens[: self.known_size])}


def has_capitals(tokens: Iterable[str]) -> bool:
    """Whether a vocabulary has capital letters (A-Z) outside of [CLS], <S> and the like; a lower-cased one has none."""
    return any(re.search("[A-Z]", token) and not re.fullmatch(r"\[.*\]|<.*>", token) for token in tokens)


@dataclasses.dataclass(frozen=True)
class WordPieceConfig:
    """A WordPiece vocabulary, trained on the corpus or loaded."""

    # Entries of a trained vocabulary, special tokens included. Several thousand suit a small corpus.
    vocab_size: VocabularySize = 30522
    # Lower-case text; turn off where case matters, for names or German. For a trained vocabulary or a lone vocab.txt: a
    # directory has its own setting.
    lowercase: bool = True
    # Strip accents; None: if text is lower-cased, as BERT does. False suits Hindi or Thai, whose vowels are accents.
    strip_accents: bool | None = None
    path: str | None = None  # Load this directory or vocab.txt instead of training.

    @property
    def expected_vocab_size(self) -> int:
        return self.vocab_size

    def build(self, corpus: Corpus) -> WordPiece:
        """A tokenizer trained on the training side of a corpus, or the cached result."""
        options = (self.lowercase, self.strip_accents)
        return WordPiece(train_once(self, VERSION, corpus, lambda: train(corpus, self.vocab_size, *options)), *options)


def train(corpus: Corpus, vocab_size: int, lowercase: bool = True, strip_accents: bool | None = None) -> list[str]:
    """A vocabulary from the training side of a corpus, the same in every process.

    In the order of ids: the special tokens; the characters by falling count, then code point; "##" with each character
    that can continue a word; the merged subwords in the order of merging. There are `vocab_size` entries, or fewer if
    the corpus has fewer subwords that occur at least twice. Words of more than 100 characters are left out.

    Raises InputError if `vocab_size` is too small for the characters.
    """
    tokenizer = WordPiece(SPECIAL_TOKENS, lowercase, strip_accents)._make_pipeline()
    letters = alphabet(corpus, tokenizer)
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
