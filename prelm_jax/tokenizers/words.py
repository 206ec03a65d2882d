"""Words, ELMo's vocabulary (Peters et al. 2018; bilm-tf): whole words by falling count, after <S>, </S> and <UNK>.

The vocabulary lists the words that the model predicts: as a target, a word outside of it is <UNK>. As an input it is
not, because the model reads characters (`prelm_jax.tokenizers.characters`), so the token store keeps the spelling of
every word.

Divergence: the original was trained on tokenized text ("do n't"). Such text is read unchanged with `tokenize=False`,
which splits at white space only. With `tokenize=True` words are found as for BERT and GPT-1 here, but keep accents and,
without `lowercase`, case: punctuation marks and CJK ideographs are words of their own ("don't" is three), and control
characters are dropped, but for the joiners that spell words (U+200C and U+200D). The `tokenizers` library does it.
"""

import codecs
import dataclasses
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import numpy as np
from tokenizers import normalizers, pre_tokenizers

from prelm_jax.bounds import Bounds, Positive, VocabularySize
from prelm_jax.cache import digest
from prelm_jax.corpus.documents import Corpus
from prelm_jax.errors import InputError
from prelm_jax.storage import opened, prefix_errors, read_json
from prelm_jax.tokenizers.base import Tokenizer, write_files
from prelm_jax.tokenizers.cached_encoder import keeping_joiners
from prelm_jax.tokenizers.characters import BEGIN_SENTENCE, END_SENTENCE
from prelm_jax.tokenizers.saved import read_vocab
from prelm_jax.tokenizers.training import train_once, training_texts

UNKNOWN = "<UNK>"
ROLES = {"bos": BEGIN_SENTENCE, "eos": END_SENTENCE, "unk": UNKNOWN}
SPECIAL_TOKENS = tuple(ROLES.values())
SETTINGS = "tokenizer_config.json"
VERSION = 2  # Raise it when the same corpus would give another vocabulary.
CACHED_CHUNKS = 1 << 20


class WordVocabulary(Tokenizer):
    """A vocabulary of words. `tokens` lists it by id and begins with <S>, </S> and <UNK>, in any order.

    With `tokenize`, text is split at punctuation and not only at white space; with `lowercase` it is lower-cased first.

    Unlike the special tokens of other tokenizers, <S> and </S> are read as such where a text has them between white
    space, as in the original; `tokenize` takes them apart.

    Raises InputError for a vocabulary with repeated words, or that begins with other words.
    """

    open_vocabulary: bool = True

    def __init__(self, tokens: Iterable[str], tokenize: bool = False, lowercase: bool = False):
        tokens = list(tokens)
        if set(tokens[:3]) != set(SPECIAL_TOKENS):
            raise InputError(f"the vocabulary begins with {' '.join(tokens[:3])}, not with {' '.join(SPECIAL_TOKENS)}")
        super().__init__(tokens, ROLES)
        self.tokenize, self.lowercase = tokenize, lowercase
        # Earlier versions dropped the joiners inside of words when they tokenized.
        reading = ["with joiners" if tokenize else False, *(["lowercase"] if lowercase else [])]
        self.fingerprint = digest(["words", tokens, *reading])
        self._split = Splitter(tokenize, lowercase)

    @staticmethod
    def at(path: Path) -> bool:
        """Whether a `vocab.txt` is a vocabulary of words: its first three lines are the special tokens."""
        with opened(path) as file:
            lines = [file.readline() for _ in SPECIAL_TOKENS]
        lines[0] = lines[0].removeprefix(codecs.BOM_UTF8)
        return {line.strip() for line in lines} == {token.encode() for token in SPECIAL_TOKENS}

    @classmethod
    def from_vocab(cls, path: str | os.PathLike, tokenize: bool = False, lowercase: bool = False) -> "WordVocabulary":
        """Reads a `vocab.txt`: UTF-8, a word per line, the line number (from 0) its id."""
        words = [word.strip() for word in read_vocab(path)]
        with prefix_errors(path):
            return cls(words, tokenize, lowercase)

    @classmethod
    def from_directory(
        cls, directory: str | os.PathLike, tokenize: bool = False, lowercase: bool = False
    ) -> "WordVocabulary":
        """Reads a directory with vocab.txt. `tokenize` and `lowercase` apply to a directory without settings."""
        path = Path(directory) / SETTINGS
        if path.exists():
            settings = read_json(path)
            tokenize, lowercase = bool(settings.get("tokenize", tokenize)), bool(settings.get("lowercase", False))
        return cls.from_vocab(Path(directory) / "vocab.txt", tokenize, lowercase)

    def split_batch(self, texts: list[str]) -> list[list[str]]:
        """The words of each text."""
        return [self._split(text) for text in texts]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, that of <UNK> for words outside of the vocabulary."""
        unknown = self.ids[UNKNOWN]
        return [[self.ids.get(word, unknown) for word in self._split(text)] for text in texts]

    def encode_flat(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts end to end (int32), and the number of ids of each text (int64)."""
        return _flat(self.encode_batch(texts))

    def number_flat(self, texts: list[str], numbers: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
        """Like `encode_flat`, with ids from `numbers`, to which new words are added with the next ids."""
        return _flat([[numbers.setdefault(word, len(numbers)) for word in self._split(text)] for text in texts])

    def decode(self, ids: Iterable[int]) -> str:
        """Words with spaces between them."""
        return " ".join(self.tokens[index] for index in ids)

    def save(self, directory: str | os.PathLike, model_max_length: int | None = None) -> None:
        """Writes vocab.txt, in the format of published models, and tokenizer_config.json.

        `model_max_length` is ignored: ELMo reads texts of any length.
        """
        reading = {"tokenize": self.tokenize, **({"lowercase": True} if self.lowercase else {})}
        settings = json.dumps(reading, indent=2) + "\n"
        write_files(directory, {"vocab.txt": "".join(f"{token}\n" for token in self.tokens), SETTINGS: settings})


def _flat(encoded: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
    return np.fromiter(itertools.chain.from_iterable(encoded), np.int32, lengths.sum()), lengths


class Splitter:
    """Texts to words: split at white space, with `tokenize` as for BERT; accents are kept, case unless `lowercase`."""

    def __init__(self, tokenize: bool, lowercase: bool = False):
        self._tokenize, self._lowercase = tokenize, lowercase
        clean = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
        self._normalizer = normalizers.Sequence(keeping_joiners(clean))
        self._pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self._known: dict[str, list[str]] = {}

    def __call__(self, text: str) -> list[str]:
        chunks = text.split()
        if self._lowercase:
            chunks = [chunk if chunk in SPECIAL_TOKENS else chunk.lower() for chunk in chunks]
        if not self._tokenize:
            return chunks
        if len(self._known) > CACHED_CHUNKS:
            self._known = {}
        for chunk in set(chunks).difference(self._known):
            self._known[chunk] = self._words(chunk)
        return list(itertools.chain.from_iterable(map(self._known.__getitem__, chunks)))

    def _words(self, chunk: str) -> list[str]:
        return [word for word, _ in self._pre_tokenizer.pre_tokenize_str(self._normalizer.normalize_str(chunk))]


@dataclasses.dataclass(frozen=True)
class WordVocabularyConfig:
    """A vocabulary of whole words (ELMo), the most frequent ones of the corpus or loaded."""

    # Entries of a trained vocabulary at most, special tokens included. It sets the cost of the softmax.
    vocab_size: Annotated[VocabularySize, Bounds(len(SPECIAL_TOKENS) + 1)] = 793_471
    # Leave out words that occur less often: the model learns <UNK> from them. 1 or 2 suit a tiny corpus.
    min_count: Positive = 3
    # Split at punctuation, not only at white space; turn off for a corpus that is tokenized already. For a trained
    # vocabulary or a lone vocab.txt: a directory has its own setting.
    tokenize: bool = True
    path: str | None = None  # Load this directory or vocab.txt instead of training.
    lowercase: bool = False  # Lower-case text, as BERT and GPT-1 do here; the original ELMo keeps case.

    @property
    def expected_vocab_size(self) -> int:
        return self.vocab_size

    def build(self, corpus: Corpus) -> WordVocabulary:
        """A tokenizer trained on the training side of a corpus, or the cached result."""
        words = train_once(self, VERSION, corpus, lambda: self._train(corpus))
        return WordVocabulary(words, self.tokenize, self.lowercase)

    def _train(self, corpus: Corpus) -> list[str]:
        counts = count(corpus, self.tokenize, self.lowercase)
        words = [word for word, n in counts.items() if n >= self.min_count and word not in SPECIAL_TOKENS]
        if not words:
            raise InputError(
                f"no word occurs {self.min_count} times in the training side of the corpus: "
                "give a larger corpus or a smaller --tokenizer.min-count"
            )
        words.sort(key=lambda word: (-counts[word], word))
        return [*SPECIAL_TOKENS, *words[: self.vocab_size - len(SPECIAL_TOKENS)]]


def count(corpus: Corpus, tokenize: bool, lowercase: bool = False) -> Counter[str]:
    """The number of occurrences of each word in the training side of a corpus. Memory holds every distinct word.

    Words of more than 100 characters, of which the model reads half, are left out.
    """
    chunks: Counter[str] = Counter()
    split = Splitter(tokenize, lowercase)
    for text in training_texts(corpus, "counting words", split):
        chunks.update(text.split())
    if not (tokenize or lowercase):
        return chunks
    counts: Counter[str] = Counter()
    for chunk, n in chunks.items():
        for word in split(chunk):
            counts[word] += n
    return counts


def check_order(tokens: list[str], counts: Counter[str], source: object) -> None:
    """Raises InputError, naming `source`, if the vocabulary is far from being sorted by falling count.

    Sampled softmax takes the frequency of words from their ids. The counts of another corpus give a slightly different
    order, which is fine. The measure is the mean logarithm of the corpus' ids: it must be nearer to its value for the
    sorted vocabulary, the least possible, than to its expected value for a random order.
    """
    counts_V = np.array([counts[token] for token in tokens[len(SPECIAL_TOKENS) :]])
    log_V = np.log(np.arange(len(counts_V)) + len(SPECIAL_TOKENS) + 1)
    found, sorted_ = counts_V @ log_V, np.sort(counts_V)[::-1] @ log_V
    random = counts_V.sum() * log_V.sum() / max(len(log_V), 1)
    if found - sorted_ > (random - sorted_) / 2:
        raise InputError(
            f"{source} is not sorted by falling count, which sampled softmax relies on: "
            "sort it, or train a vocabulary by leaving out --tokenizer.path"
        )
