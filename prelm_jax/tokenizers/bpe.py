"""Byte-pair encoding, GPT-1's tokenizer (Radford et al. 2018; openai/finetune-transformer-lm, text_utils.py).

A word starts as its characters, the last one written with "</w>". Of its adjacent pairs, the one merged first in
training is joined, until no merge applies; a subword outside of the vocabulary is <unk>. The `tokenizers` library does
the work, with transformers' ids.

Divergence: words are found as by transformers' OpenAIGPTTokenizer, where the original uses spaCy, so that an exported
model reads text as it was trained to. Text is lower-cased and stripped of accents and control characters, CJK
ideographs are set apart, and words end at white space and punctuation: "don't" is three words (two in the original),
"..." is three (one), newlines are lost. The original's cleaning is an option of the corpus: `cleaning=gpt`.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from prelm_jax.bounds import NotNegative
from prelm_jax.cache import digest
from prelm_jax.corpus.documents import Corpus
from prelm_jax.errors import InputError
from prelm_jax.storage import prefix_errors, read_json, read_lines
from prelm_jax.tokenizers.added_tokens import AddedToken
from prelm_jax.tokenizers.cached_encoder import CachedEncoder
from prelm_jax.tokenizers.saved import TOKENIZER, SavedTokenizer, tokens_by_id
from prelm_jax.tokenizers.training import alphabet, train_once, train_subwords

UNKNOWN = "<unk>"
ROLES = {"unk": UNKNOWN}
END_OF_WORD = "</w>"
# Vocabulary and merges under Hugging Face's names, and under OpenAI's.
FILES = (("vocab.json", "merges.txt"), ("encoder_bpe_40000.json", "vocab_40000.bpe"))
GPT1_BASE = 478  # Entries of GPT-1's vocabulary besides its 40,000 merges: <unk>, 238 characters twice, a newline.
VERSION = 2  # Raise it when the same corpus would give another vocabulary.

# The settings of a tokenizer.json that this package can apply.
_CLEANING = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True}
TOKENIZER_JSON = {
    "model": {"type": "BPE", "unk_token": UNKNOWN, "end_of_word_suffix": END_OF_WORD, "fuse_unk": False},
    "normalizer": {"type": "BertNormalizer", **_CLEANING},
    "pre_tokenizer": {"type": "BertPreTokenizer"},
}

Merge = tuple[str, str]


class BPE(CachedEncoder):
    """GPT-1's tokenizer. `tokens` lists the vocabulary by id and must hold <unk>; `merges` are pairs of its entries.

    `added`: tokens that are matched before a text is split into words. `frame`: see `CachedEncoder`.

    Raises InputError for a vocabulary with repeated entries, without <unk> or without an entry that ends a word, and
    for a merge whose parts or product it lacks.
    """

    lowercase: bool = True

    def __init__(
        self,
        tokens: Iterable[str],
        merges: Iterable[Merge],
        added: Iterable[AddedToken] = (),
        frame: Mapping[str, str] = {},
    ):
        self.merges = [(first, second) for first, second in merges]
        super().__init__(list(tokens), ROLES, added, frame)
        self.fingerprint = digest([self.tokens, self.merges, *self._added_identity])

    @classmethod
    def from_files(
        cls, vocabulary: str | os.PathLike, merges: str | os.PathLike, added: Iterable[AddedToken] = ()
    ) -> "BPE":
        """Reads a vocabulary (a JSON object, token → id) and its merges ("a b" per line, after a line "#version…")."""
        tokens = tokens_by_id(vocabulary, read_json(vocabulary))
        lines = [line.removesuffix("\r") for line in read_lines(merges)]
        header = bool(lines) and lines[0].startswith("#version")
        pairs = []
        for number, line in enumerate(lines[header:], start=1 + header):
            first, _, second = line.partition(" ")
            if not first or not second or " " in second:
                raise InputError(f"{merges}:{number} is {line!r}: a merge is two subwords with a space between them")
            pairs.append((first, second))
        with prefix_errors(vocabulary):
            return cls(tokens, pairs, added)

    @classmethod
    def from_saved(cls, saved: SavedTokenizer) -> "BPE":
        """Reads a directory with tokenizer.json, or vocab.json and merges.txt, or OpenAI's two files."""
        saved.require_roles(ROLES)
        if saved.parts is None:
            candidates = candidate_files(saved.directory)
            return cls.from_files(
                *next((files for files in candidates if files[0].exists()), candidates[0]), saved.added
            )
        path = saved.directory / TOKENIZER
        tokens, parts = saved.vocabulary(TOKENIZER_JSON)
        merges = parts["model"].get("merges")
        if not isinstance(merges, list):
            raise InputError(f"{path}: the model has no merges")
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]  # Strings before 0.20.
        for pair in pairs:
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
                raise InputError(f"{path}: the merge {pair} is not one of two subwords")
        with prefix_errors(path):
            return cls(tokens, [(first, second) for first, second in pairs], saved.added, saved.frame)

    def _with_frame(self, added: list[AddedToken], frame: Mapping[str, str]) -> "BPE":
        return BPE(self.tokens[: self.known_size], self.merges, added, frame)

    def _make_pipeline(self) -> tokenizers.Tokenizer:
        tokens = self.tokens[: self.known_size]
        if not any(token.endswith(END_OF_WORD) for token in tokens):
            raise InputError(f"no entry of the vocabulary ends with {END_OF_WORD}: is it a byte-level one (GPT-2)?")
        for first, second in self.merges:
            if missing := [token for token in (first, second, first + second) if token not in self.ids]:
                raise InputError(f"the merge {f'{first} {second}'!r} needs {missing[0]!r}: it is not in the vocabulary")
        return _pipeline(tokens, self.merges)

    def _settings(self) -> dict[str, object]:
        # Readers that pad, such as BabyLM's pipeline, fail without a token to do it with; a frame has one of its own.
        return {"tokenizer_class": "OpenAIGPTTokenizer", "pad_token": UNKNOWN}

    def _vocabulary_files(self) -> dict[str, str | bytes]:
        return {
            "vocab.json": json.dumps(dict(list(self.ids.items())[: self.known_size]), ensure_ascii=False) + "\n",
            "merges.txt": "".join(["#version: 0.2\n", *(f"{first} {second}\n" for first, second in self.merges)]),
        }


@dataclasses.dataclass(frozen=True)
class BPEConfig:
    """GPT-1's BPE vocabulary, trained on the corpus or loaded."""

    # Merges to train; the vocabulary has the characters in addition. A few thousand suit a small corpus.
    num_merges: NotNegative = 40000
    path: str | None = None  # Load this directory, vocab.json or merges.txt instead of training.

    @property
    def expected_vocab_size(self) -> int:
        return self.num_merges + GPT1_BASE

    def build(self, corpus: Corpus) -> BPE:
        """A tokenizer trained on the training side of a corpus, or the cached result."""
        return BPE(*train_once(self, VERSION, corpus, lambda: train(corpus, self.num_merges)))


def train(corpus: Corpus, num_merges: int) -> tuple[list[str], list[Merge]]:
    """(tokens, merges) from the training side of a corpus, the same in every process.

    The ids follow OpenAI's layout: <unk>; the characters by falling count, then code point; the same with "</w>"; the
    merged subwords in the order of merging. There are `num_merges` of them, or fewer if the corpus has fewer pairs that
    occur at least twice. Words of more than 100 characters are left out.
    """
    tokenizer = _pipeline([UNKNOWN], [])
    letters = alphabet(corpus, tokenizer)
    base = [UNKNOWN, *letters, *(letter + END_OF_WORD for letter in letters)]
    make = partial(trainers.BpeTrainer, vocab_size=len(base) + num_merges, end_of_word_suffix=END_OF_WORD)
    model = train_subwords(tokenizer, corpus, make, base, letters)
    return sorted(model["vocab"], key=model["vocab"].__getitem__), [tuple(merge) for merge in model["merges"]]


def candidate_files(directory: Path) -> list[tuple[Path, Path]]:
    """The possible paths of (vocabulary, merges) in a directory."""
    return [(directory / vocabulary, directory / merges) for vocabulary, merges in FILES]


def _pipeline(tokens: Iterable[str], merges: list[Merge]) -> tokenizers.Tokenizer:
    """The same pipeline as transformers' OpenAIGPTTokenizer."""
    model = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        unk_token=UNKNOWN,
        fuse_unk=False,
        continuing_subword_prefix="",
        end_of_word_suffix=END_OF_WORD,
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder(suffix=END_OF_WORD)
    return tokenizer
