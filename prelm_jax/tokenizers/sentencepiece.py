"""SentencePiece (Kudo and Richardson 2018), for BERT and GPT: subwords of raw text, "▁" where a word begins.

The `sentencepiece` package trains the vocabulary, as a unigram language model (Kudo 2018) or by byte-pair encoding.
The `tokenizers` library applies it, so that transformers has the same ids: text in Unicode's NFKC, without control
characters but with the joiners that spell words (U+200C and U+200D), as the package keeps them, lower-cased if asked,
cut before each word. What the vocabulary cannot spell is unknown.

Divergence: the package's own segmentation differs in rare cases. It breaks ties between equal merges by position, and
its .model expects normalized text.
"""

import base64
import dataclasses
import io
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from prelm_jax.bounds import VocabularySize
from prelm_jax.cache import digest
from prelm_jax.corpus.documents import Corpus
from prelm_jax.errors import InputError
from prelm_jax.storage import opened, prefix_errors
from prelm_jax.tokenizers import bpe, wordpiece
from prelm_jax.tokenizers.added_tokens import AddedToken
from prelm_jax.tokenizers.cached_encoder import JOINERS, CachedEncoder, keeping_joiners, pipeline_of
from prelm_jax.tokenizers.saved import TOKENIZER, SavedTokenizer
from prelm_jax.tokenizers.training import ALPHABET_COVERAGE, train_once, training_texts
from prelm_jax.tokenizers.words import Splitter

ROLES = {"bert": wordpiece.ROLES, "gpt": bpe.ROLES}
BEGIN_OF_WORD = "▁"
MODEL_FILE = "spiece.model"
VERSION = 2  # Raise it when the same corpus would give another vocabulary.
# A larger corpus is sampled evenly, line by line: the package holds all of its training text in memory.
TRAINING_CHARACTERS = 10_000_000
LINE_CHARACTERS = 1000

Model = dict[str, object]  # the "model" of a tokenizer.json


class SentencePiece(CachedEncoder):
    """A SentencePiece tokenizer.

    `model` is the "model" of a tokenizer.json: subwords with scores ("Unigram") or with merges ("BPE"). `proto` is the
    package's own file of the same vocabulary, kept for `save`; None if it is lost, as transformers loses it. `joiners`:
    whether U+200C and U+200D are kept, which earlier versions dropped. `added`: tokens that are matched before a text
    is split into words. `frame`: see `CachedEncoder`. The attribute `continuation` is bool [vocab_size]: true for
    subwords that continue a word.

    Raises InputError for a vocabulary with repeated subwords, or without the special tokens of BERT or GPT.
    """

    def __init__(
        self,
        model: Model,
        lowercase: bool,
        proto: bytes | None = None,
        joiners: bool = True,
        added: Iterable[AddedToken] = (),
        frame: Mapping[str, str] = {},
    ):
        self.model, self.lowercase, self.proto, self.joiners = model, lowercase, proto, joiners
        tokens = _tokens(model)
        super().__init__(tokens, find_roles(tokens), added, frame)
        begins = [token.startswith(BEGIN_OF_WORD) or token in self.special_ids for token in self.tokens]
        self.continuation = ~np.array(begins)
        identity = ["sentencepiece", model, lowercase, *(["joiners"] if joiners else [])]
        self.fingerprint = digest([*identity, *self._added_identity])

    @classmethod
    def from_saved(cls, saved: SavedTokenizer) -> "SentencePiece":
        """Reads a directory written by `save`, or by transformers after loading one."""
        path, proto = saved.directory / TOKENIZER, None
        parts = saved.parts or {}
        if (saved.directory / MODEL_FILE).exists():
            with opened(saved.directory / MODEL_FILE) as file:
                proto = file.read()
        try:
            normalizer = json.dumps(parts["normalizer"])
            options = (
                '"lowercase": true' in normalizer,
                proto,
                any(json.dumps(joiner) in normalizer for joiner in JOINERS),
            )
            with prefix_errors(path):
                loaded = cls(dict(parts["model"]), *options, saved.added, saved.frame)
            saved.require_roles(loaded.roles)
            expected = json.loads(loaded._pipeline.to_str())
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is not a SentencePiece tokenizer of this package ({error!r})") from None
        if differing := [part for part in ("normalizer", "pre_tokenizer") if parts[part] != expected[part]]:
            raise InputError(f"{path}: its {' and '.join(differing)} are not those of this package")
        return loaded

    def _with_frame(self, added: list[AddedToken], frame: Mapping[str, str]) -> "SentencePiece":
        return SentencePiece(self.model, self.lowercase, self.proto, self.joiners, added, frame)

    def _make_pipeline(self) -> tokenizers.Tokenizer:
        pipeline = pipeline_of({"model": self.model})
        pipeline.normalizer = _normalizer(self.lowercase, self.joiners)
        # A unigram model does not know which entries are special: their names in a text are cut after one character.
        names = "|".join(f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in self.special_ids)
        pipeline.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Split(Regex(names), "isolated")]
        )
        pipeline.decoder = decoders.Metaspace(prepend_scheme="always")
        return pipeline

    def _settings(self) -> dict[str, object]:
        # From a BertTokenizer or OpenAIGPTTokenizer transformers would keep only the vocabulary.
        return {"tokenizer_class": "PreTrainedTokenizerFast"}

    def _vocabulary_files(self) -> dict[str, str | bytes]:
        return {} if self.proto is None else {MODEL_FILE: self.proto}


@dataclasses.dataclass(frozen=True)
class SentencePieceConfig:
    """A SentencePiece vocabulary, trained on the corpus or loaded."""

    # Entries of a trained vocabulary, special tokens included. Several thousand suit a small corpus.
    vocab_size: VocabularySize = 30522
    model_type: Literal["unigram", "bpe"] = "unigram"  # Training algorithm: unigram language model or merged pairs.
    lowercase: bool = True  # Lower-case text; turn off where case matters. A loaded tokenizer has its own setting.
    special_tokens: Literal["bert", "gpt"] = "bert"  # The model to train: BERT has five special tokens, GPT <unk> only.
    path: str | None = None  # Load this directory instead of training.

    @property
    def expected_vocab_size(self) -> int:
        return self.vocab_size

    def build(self, corpus: Corpus) -> SentencePiece:
        """A tokenizer trained on the training side of a corpus, or the cached result."""
        model, proto = train_once(self, VERSION, corpus, lambda: self._train(corpus))
        return SentencePiece(model, self.lowercase, base64.b64decode(proto))

    def _train(self, corpus: Corpus) -> tuple[Model, str]:
        """The model, and the package's file in base64; the same in every process."""
        import sentencepiece

        roles = ROLES[self.special_tokens]
        names = list(roles.values())
        normalize = _normalizer(self.lowercase).normalize_str
        written = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=filter(None, map(normalize, _lines(corpus))),
                model_writer=written,
                vocab_size=self.vocab_size,
                hard_vocab_limit=False,
                model_type=self.model_type,
                character_coverage=ALPHABET_COVERAGE,
                normalization_rule_name="identity",
                max_sentence_length=100 * LINE_CHARACTERS,
                num_threads=1,
                minloglevel=2,
                # The special tokens have the first ids, in the order of `roles`; -1 is for absent ones.
                unk_id=names.index(roles["unk"]),
                unk_piece=roles["unk"],
                pad_id=names.index(roles["pad"]) if "pad" in roles else -1,
                pad_piece=roles.get("pad", "[PAD]"),
                bos_id=-1,
                eos_id=-1,
                control_symbols=[name for role, name in roles.items() if role not in ("unk", "pad")],
            )
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise InputError(f"no vocabulary of vocab_size={self.vocab_size} from this corpus: {reason}") from None
        proto = written.getvalue()
        reader = sentencepiece.SentencePieceProcessor(model_proto=proto)
        # Scores are single precision; rounded, they survive any number of writes and reads unchanged.
        scored = [(reader.id_to_piece(i), round(reader.get_score(i), 6)) for i in range(reader.vocab_size())]
        if self.model_type == "unigram":
            model = models.Unigram(scored, reader.unk_id(), False)
        else:
            ids = {subword: index for index, (subword, _) in enumerate(scored)}
            model = models.BPE(ids, _merges(scored[len(roles) :]), unk_token=roles["unk"], fuse_unk=True)
        return json.loads(tokenizers.Tokenizer(model).to_str())["model"], base64.b64encode(proto).decode()


def find_roles(tokens: Iterable[str]) -> dict[str, str]:
    """The roles of the special tokens: GPT's if a vocabulary has these alone, else BERT's."""
    known = set(tokens)
    return next((roles for roles in ROLES.values() if known.issuperset(roles.values())), wordpiece.ROLES)


def _tokens(model: Model) -> list[str]:
    """The vocabulary by id. Raises KeyError or TypeError for a model without one."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        return sorted(vocabulary, key=vocabulary.__getitem__)
    if isinstance(vocabulary, list):
        return [subword for subword, _ in vocabulary]
    raise TypeError(f"vocab is {type(vocabulary).__name__}")


def _merges(scored: list[tuple[str, float]]) -> list[tuple[str, str]]:
    """The pairs of subwords that join to a subword, by falling score of the latter."""
    ranks = {subword: rank for rank, (subword, _) in enumerate(scored)}
    merges = []
    for subword, score in scored:
        pairs = [(subword[:i], subword[i:]) for i in range(1, len(subword))]
        pairs = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        merges += [(-score, *sorted(ranks[part] for part in pair), pair) for pair in pairs]
    return [pair for *_, pair in sorted(merges)]


def _lines(corpus: Corpus) -> Iterator[str]:
    """The lines of the training side, long ones cut; of a large corpus an even sample of TRAINING_CHARACTERS."""
    split = Splitter(tokenize=True)  # Words between white space and punctuation; ideographs are words.

    def texts(task: str) -> Iterator[str]:
        return training_texts(corpus, task, split, LINE_CHARACTERS)

    characters = sum(map(len, texts("counting characters")))
    lines = (line for text in texts("training the vocabulary") for line in text.split("\n") if not line.isspace())
    parts = (part for line in lines for part in _cut(line))
    return itertools.islice(parts, 0, None, max(1, math.ceil(characters / TRAINING_CHARACTERS)))


def _cut(line: str) -> Iterator[str]:
    """Parts of at most LINE_CHARACTERS, each but the last ending with a space if it contains one."""
    begin = 0
    while begin < len(line):
        end = begin + LINE_CHARACTERS
        if end < len(line):
            end = line.rfind(" ", begin, end) + 1 or end
        yield line[begin:end]
        begin = end


def _normalizer(lowercase: bool, joiners: bool = True) -> normalizers.Normalizer:
    clean = normalizers.BertNormalizer(handle_chinese_chars=False, strip_accents=False, lowercase=lowercase)
    spaces = normalizers.Replace(Regex(f"[ {BEGIN_OF_WORD}]+"), " ")
    steps = [normalizers.NFKC(), *(keeping_joiners(clean) if joiners else [clean]), spaces, normalizers.Strip()]
    return normalizers.Sequence(steps)
