"""Words, ELMo's vocabulary (Peters et al. 2018; bilm-tf): whole words by falling count, after <S>, </S> and <UNK>.

The vocabulary is what the model predicts: a word outside of it is <UNK> as a target. As an input it is not, for the
model reads its characters (`prelm_jax.tokenizers.characters`), so the token store keeps the spelling of every word.

Divergence: the original was trained on text that others had split ("do n't"). Such text is read as it is with
`tokenize=False`, words being what stands between white space. With `tokenize=True` words are found as BERT and GPT-1
find them here, but keep case and accents: punctuation marks and CJK ideographs are words of their own ("don't" is
three), control characters are dropped. The `tokenizers` library does the work.
"""

import dataclasses
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import normalizers, pre_tokenizers

from prelm_jax.cache import cached, digest
from prelm_jax.corpus.documents import Corpus
from prelm_jax.errors import InputError
from prelm_jax.storage import opened, prefix_errors, read_json, read_lines
from prelm_jax.tokenizers.alphabet import training_texts
from prelm_jax.tokenizers.cached_encoder import numbered
from prelm_jax.tokenizers.characters import BEGIN_SENTENCE, END_SENTENCE

UNKNOWN = "<UNK>"
SPECIAL_TOKENS = (BEGIN_SENTENCE, END_SENTENCE, UNKNOWN)
TRAINING_VERSION = 1  # raise it when the same corpus would give another vocabulary
REMEMBERED_CHUNKS = 1 << 20
SETTINGS = "tokenizer_config.json"


class WordVocabulary:
    """A vocabulary of words. `tokens` lists it by id and begins with <S>, </S> and <UNK>, in any order.

    `tokenize`: split words at punctuation, not only at white space.

    Unlike the names of other tokenizers' special tokens, <S> and </S> that stand in a text between white space are read
    as the beginning and end of a sentence, as the original does; `tokenize` takes them apart.

    Raises InputError for a vocabulary with repeated words, or without the three at its beginning.
    """

    lowercase = False

    def __init__(self, tokens: Iterable[str], tokenize: bool = False):
        self.tokens = list(tokens)
        self.tokenize = tokenize
        self._ids = numbered(self.tokens)
        if set(self.tokens[:3]) != set(SPECIAL_TOKENS):
            raise InputError(f"the vocabulary begins with {' '.join(self.tokens[:3])}, not with <S>, </S> and <UNK>")
        self.special_ids = {token: self._ids[token] for token in SPECIAL_TOKENS}
        self.unknown_id = self._ids[UNKNOWN]
        self.fingerprint = digest(["words", self.tokens, tokenize])
        self._split = Splitter(tokenize)

    @staticmethod
    def at(path: Path) -> bool:
        """Whether a `vocab.txt` is one of words: the special tokens are its first three lines."""
        with opened(path) as file:
            return {file.readline().strip() for _ in SPECIAL_TOKENS} == {token.encode() for token in SPECIAL_TOKENS}

    @classmethod
    def from_vocab(cls, path: str | os.PathLike, tokenize: bool = False) -> "WordVocabulary":
        """Reads a `vocab.txt`: UTF-8, a word per line, the line number (from 0) its id."""
        words = [line.strip() for line in read_lines(path)]
        if "" in words:
            raise InputError(f"{path}:{words.index('') + 1} is blank: a vocabulary has a word on every line")
        with prefix_errors(path):
            return cls(words, tokenize)

    @classmethod
    def from_directory(cls, directory: str | os.PathLike, tokenize: bool = False) -> "WordVocabulary":
        """Reads a directory with vocab.txt; the settings that were saved with it come first."""
        settings = Path(directory) / SETTINGS
        if settings.exists():
            tokenize = bool(read_json(settings).get("tokenize", tokenize))
        return cls.from_vocab(Path(directory) / "vocab.txt", tokenize)

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    def split_batch(self, texts: list[str]) -> list[list[str]]:
        """The words of each text."""
        return [self._split(text) for text in texts]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, that of <UNK> for words outside of the vocabulary."""
        return [[self._ids.get(word, self.unknown_id) for word in self._split(text)] for text in texts]

    def encode_flat(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The same end to end, int32, and how many each text has, int64."""
        return _flat(self.encode_batch(texts))

    def number_flat(self, texts: list[str], numbers: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
        """The number of each word in `numbers`, to which words that are new are added at its end; as `encode_flat`."""
        return _flat([[numbers.setdefault(word, len(numbers)) for word in self._split(text)] for text in texts])

    def decode(self, ids: Iterable[int]) -> str:
        """Words with spaces between them."""
        return " ".join(self.tokens[index] for index in ids)

    def save(self, directory: str | os.PathLike, model_max_length: int | None = None) -> None:
        """Writes vocab.txt, as published models have it, and tokenizer_config.json.

        `model_max_length` is for other tokenizers: ELMo reads texts of any length.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "vocab.txt").write_bytes("".join(f"{token}\n" for token in self.tokens).encode())
        (directory / SETTINGS).write_text(json.dumps({"tokenize": self.tokenize}, indent=2) + "\n")


def _flat(encoded: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
    return np.fromiter(itertools.chain.from_iterable(encoded), np.int32, lengths.sum()), lengths


class Splitter:
    """Texts to words: at white space, and if `tokenize`, as BERT's texts are split, case and accents kept."""

    def __init__(self, tokenize: bool):
        self._tokenize = tokenize
        self._normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
        self._pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self._known: dict[str, list[str]] = {}

    def __call__(self, text: str) -> list[str]:
        chunks = text.split()
        if not self._tokenize:
            return chunks
        if len(self._known) > REMEMBERED_CHUNKS:
            self._known = {}
        for chunk in set(chunks).difference(self._known):
            self._known[chunk] = self._words(chunk)
        return list(itertools.chain.from_iterable(map(self._known.__getitem__, chunks)))

    def _words(self, chunk: str) -> list[str]:
        return [word for word, _ in self._pre_tokenizer.pre_tokenize_str(self._normalizer.normalize_str(chunk))]


@dataclasses.dataclass(frozen=True)
class WordVocabularyConfig:
    """The `vocab_size` most frequent words of the corpus, or with `path` the vocabulary found there (and its size).

    Words seen less than `min_count` times are left out: they are the <UNK> that a model learns to expect. `tokenize` is
    for such a vocabulary and for a `vocab.txt`; a directory with settings says itself.
    """

    vocab_size: int = 793_471
    min_count: int = 3
    tokenize: bool = True
    path: str | None = None

    def __post_init__(self):
        if self.vocab_size <= len(SPECIAL_TOKENS):
            raise InputError(f"tokenizer.vocab_size is {self.vocab_size}: give more than {len(SPECIAL_TOKENS)}")

    @property
    def expected_vocab_size(self) -> int:
        """The size of an untrained vocabulary, for planning."""
        return self.vocab_size

    def build(self, corpus: Corpus) -> WordVocabulary:
        """The tokenizer. A trained vocabulary depends on the corpus' training side alone, and is kept in the cache.

        Raises InputError for a vocabulary in another order than by falling count: the ids say nothing then of how
        frequent words are, and sampled softmax believes them.
        """
        if self.path is not None:
            path = Path(self.path).expanduser()
            words = (WordVocabulary.from_directory if path.is_dir() else WordVocabulary.from_vocab)(path, self.tokenize)
            check_order(words.tokens, count(corpus, words.tokenize), path)
            return words
        key = ["words", TRAINING_VERSION, tokenizers.__version__, corpus.fingerprint]
        key += [self.vocab_size, self.min_count, self.tokenize]
        vocabulary = cached("vocabularies", digest(key), lambda: "\n".join(self._train(corpus)))
        return WordVocabulary(vocabulary.split("\n"), self.tokenize)

    def _train(self, corpus: Corpus) -> list[str]:
        counts = count(corpus, self.tokenize)
        words = [word for word, n in counts.items() if n >= self.min_count and word not in SPECIAL_TOKENS]
        if not words:
            raise InputError(
                f"no word is {self.min_count} times in the training side of the corpus: "
                "give a larger corpus or a smaller --tokenizer.min-count"
            )
        words.sort(key=lambda word: (-counts[word], word))
        return [*SPECIAL_TOKENS, *words[: self.vocab_size - len(SPECIAL_TOKENS)]]


def count(corpus: Corpus, tokenize: bool) -> Counter[str]:
    """How often each word occurs in the training side of a corpus. All its different words are held in memory."""
    chunks: Counter[str] = Counter()
    for text in training_texts(corpus, "counting words"):
        chunks.update(text.split())
    if not tokenize:
        return chunks
    split = Splitter(tokenize)
    counts: Counter[str] = Counter()
    for chunk, n in chunks.items():
        for word in split(chunk):
            counts[word] += n
    return counts


def check_order(tokens: list[str], counts: Counter[str], source: object) -> None:
    """InputError if the vocabulary is far from being sorted by falling count.

    It need not be sorted by the counts of just this corpus. The measure is the mean logarithm of the ids of the corpus:
    it must be nearer to what sorting by count would make of it than to that of any order.
    """
    counts_V = np.array([counts[token] for token in tokens[len(SPECIAL_TOKENS) :]])
    log_V = np.log(np.arange(len(counts_V)) + len(SPECIAL_TOKENS) + 1)
    found, sorted_ = counts_V @ log_V, np.sort(counts_V)[::-1] @ log_V
    if found - sorted_ > (counts_V.sum() * log_V.sum() / max(len(log_V), 1) - sorted_) / 2:
        raise InputError(
            f"{source} is not sorted by falling count, from which sampled softmax takes how frequent its words are: "
            "sort it, or leave out --tokenizer.path and let the corpus decide"
        )
