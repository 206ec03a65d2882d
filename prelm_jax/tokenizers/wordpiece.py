"""WordPiece, BERT's tokenizer (Devlin et al. 2018; google-research/bert, tokenization.py), with transformers' ids.

Text is cleaned (control characters dropped, CJK ideographs set apart) and, if the vocabulary is lower-cased,
lower-cased and stripped of accents; it is split at white space and punctuation; each word is spelled by the longest
pieces of the vocabulary, greedily from its left, pieces after the first written with "##"; a word that cannot be
spelled, or is longer than 100 characters, is [UNK]. The `tokenizers` library does the work.
"""

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from prelm_jax.cache import cached, digest
from prelm_jax.corpus.documents import Corpus
from prelm_jax.errors import InputError
from prelm_jax.storage import prefix_errors, read_json, read_lines
from prelm_jax.tokenizers.alphabet import alphabet, training_texts
from prelm_jax.tokenizers.cached_encoder import WordEncoder, numbered

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_WORD_CHARACTERS = 100
TRAINING_VERSION = 1  # raise it when the same corpus would give another vocabulary


class WordPiece(WordEncoder):
    """A WordPiece tokenizer. `tokens` lists the vocabulary by id and must hold [PAD], [UNK], [CLS], [SEP] and [MASK].

    `strip_accents=None` means: if lower-casing, as in BERT. `continuation` is bool [vocab_size]: true for the pieces
    that continue a word ("##ing").

    Raises InputError for a vocabulary with blank or repeated entries or without one of the special tokens.
    """

    def __init__(self, tokens: Iterable[str], lowercase: bool = True, strip_accents: bool | None = None):
        tokens = list(tokens)
        self.lowercase = lowercase
        self.strip_accents = strip_accents
        ids = numbered(tokens)
        if missing := [token for token in SPECIAL_TOKENS if token not in ids]:
            raise InputError(f"the vocabulary has no {' and no '.join(missing)}: it needs {' '.join(SPECIAL_TOKENS)}")
        self.special_ids = {token: ids[token] for token in SPECIAL_TOKENS}
        self.unknown_id = ids["[UNK]"]
        settings = [tokens, lowercase, lowercase if strip_accents is None else strip_accents]
        self.fingerprint = digest(settings)
        self.continuation = np.array([token.startswith("##") for token in tokens])
        super().__init__(tokens, _pipeline(tokens, lowercase, strip_accents))

    @classmethod
    def from_vocab(cls, path: str | os.PathLike, lowercase: bool = True, strip_accents: bool | None = None):
        """Reads a `vocab.txt`: UTF-8, a token per line, the line number (from 0) its id."""
        lines = [line.removesuffix("\r") for line in read_lines(path)]
        for number, line in enumerate(lines, start=1):
            if not line.strip(" \t"):
                raise InputError(f"{path}:{number} is blank: a vocabulary has a token on every line")
        with prefix_errors(path):
            return cls(lines, lowercase, strip_accents)

    @classmethod
    def from_directory(cls, directory: str | os.PathLike, lowercase: bool = True):
        """Reads a Hugging Face directory: tokenizer.json or vocab.txt, with the settings of tokenizer_config.json."""
        directory = Path(directory)
        settings = {"do_lower_case": lowercase}
        tokens = None
        if (path := directory / "tokenizer.json").exists():
            tokens, normalizer = _read_tokenizer_json(path)
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

    def save(self, directory: str | os.PathLike, model_max_length: int | None = None) -> None:
        """Writes vocab.txt, tokenizer.json, tokenizer_config.json and special_tokens_map.json.

        `model_max_length` is the model's number of positions: without it, a reader does not know where to truncate.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tokenizer = _pipeline(self.tokens, self.lowercase, self.strip_accents)
        tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS]:0 $A:0 [SEP]:0",
            pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
            special_tokens=[(token, self.special_ids[token]) for token in ("[CLS]", "[SEP]")],
        )
        names = {f"{token.strip('[]').lower()}_token": token for token in SPECIAL_TOKENS}
        config = {
            "do_lower_case": self.lowercase,
            "strip_accents": self.strip_accents,
            "tokenize_chinese_chars": True,
            "tokenizer_class": "BertTokenizer",
            **names,
        }
        if model_max_length is not None:
            config["model_max_length"] = model_max_length
        files = {
            "vocab.txt": "".join(f"{token}\n" for token in self.tokens),
            "tokenizer.json": tokenizer.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(config, indent=2, sort_keys=True) + "\n",
            "special_tokens_map.json": json.dumps(names, indent=2, sort_keys=True) + "\n",
        }
        for name, text in files.items():
            (directory / name).write_bytes(text.encode())


@dataclasses.dataclass(frozen=True)
class WordPieceConfig:
    """A vocabulary of `vocab_size` trained on the corpus, or with `path` the one found there (and its size).

    `lowercase` is for a trained vocabulary and for a `vocab.txt`; a directory with settings says itself.
    """

    vocab_size: int = 30522
    lowercase: bool = True
    path: str | None = None

    @property
    def expected_vocab_size(self) -> int:
        """The size of an untrained vocabulary, for planning."""
        return self.vocab_size

    def build(self, corpus: Corpus) -> WordPiece:
        """The tokenizer. A trained vocabulary depends on the corpus' training side alone, and is kept in the cache."""
        if self.path is not None:
            from prelm_jax.tokenizers.load import load

            return load(self.path, self.lowercase)
        key = [TRAINING_VERSION, tokenizers.__version__, corpus.fingerprint, self.vocab_size, self.lowercase]
        vocabulary = cached(
            "vocabularies", digest(key), lambda: "\n".join(train(corpus, self.vocab_size, self.lowercase))
        )
        return WordPiece(vocabulary.split("\n"), self.lowercase)


def train(corpus: Corpus, vocab_size: int, lowercase: bool = True) -> list[str]:
    """A vocabulary from the training side of a corpus, the same in every process.

    It holds the special tokens, the characters by falling count (then code point), "##" and each character that can
    continue a word, then the merged pieces in the order they were found; `vocab_size` entries, or fewer if the corpus
    does not have that many pieces seen at least twice.

    Raises InputError if `vocab_size` is too small for the characters.
    """
    tokenizer = _pipeline(SPECIAL_TOKENS, lowercase)
    letters = alphabet(corpus, tokenizer.normalizer)
    continuing = [character for character in letters if _continues(character, tokenizer)]
    base = [*SPECIAL_TOKENS, *letters, *(f"##{character}" for character in continuing)]
    if len(base) > vocab_size:
        raise InputError(
            f"vocab_size={vocab_size} is too small for the {len(letters)} characters of the corpus:"
            f" give at least {len(base)}, better several times as many"
        )
    # The library numbers characters in the order of a hash table that differs between processes, and breaks ties
    # between merges by number. Characters given as special tokens are numbered as given.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=base,
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(corpus, "learning the vocabulary"), trainer)
    # Of the trained tokenizer only the vocabulary is of use: it would match its special tokens, here every letter.
    ids = tokenizer.get_vocab(with_added_tokens=False)
    return sorted(ids, key=ids.__getitem__)


def _pipeline(tokens: Iterable[str], lowercase: bool, strip_accents: bool | None = None) -> tokenizers.Tokenizer:
    ids = {token: index for index, token in enumerate(tokens)}
    model = models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=MAX_WORD_CHARACTERS)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def _continues(character: str, tokenizer: tokenizers.Tokenizer) -> bool:
    """False for what is always a word of its own: punctuation and ideographs."""
    return len(tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str("a" + character))) == 1


def _read_tokenizer_json(path: Path) -> tuple[list[str], dict]:
    """The vocabulary and the normalizer's settings, if these are BERT's."""
    data = read_json(path)
    model, normalizer = data.get("model") or {}, data.get("normalizer") or {}
    found = {
        "model": (model.get("type"), model.get("continuing_subword_prefix"), model.get("max_input_chars_per_word")),
        "normalizer": (normalizer.get("type"), normalizer.get("clean_text"), normalizer.get("handle_chinese_chars")),
        "pre_tokenizer": (data.get("pre_tokenizer") or {}).get("type"),
    }
    expected = {
        "model": ("WordPiece", "##", MAX_WORD_CHARACTERS),
        "normalizer": ("BertNormalizer", True, True),
        "pre_tokenizer": "BertPreTokenizer",
    }
    for part, value in expected.items():
        if found[part] != value:
            raise InputError(f"{path} is no tokenizer of BERT's kind: its {part} is {found[part]}, not {value}")
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    if [model["vocab"][token] for token in tokens] != list(range(len(tokens))):
        raise InputError(f"{path}: the ids of the vocabulary are not 0 to {len(tokens) - 1}")
    if added := [token["content"] for token in data.get("added_tokens", []) if token["content"] not in model["vocab"]]:
        raise InputError(f"{path}: the added tokens {', '.join(added)} are not in the vocabulary: put them there")
    return tokens, normalizer
