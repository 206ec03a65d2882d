"""SentencePiece (Kudo and Richardson 2018), for BERT and GPT: pieces of raw text, "▁" where a word begins.

The vocabulary is learnt by the package `sentencepiece` (extra of that name), as a unigram language model (Kudo 2018) or
by byte-pair encoding; what does not occur in it is unknown. The `tokenizers` library applies it, so that transformers
has the same ids: text in Unicode's NFKC, without control characters, lower-cased if asked, cut before each word.

Divergence: the package's own segmentation differs in rare cases. It picks among equal merges by place, and its .model
expects text that is normalised already.
"""

import base64
import dataclasses
import io
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from prelm_jax.cache import cached, digest
from prelm_jax.corpus.documents import Corpus
from prelm_jax.errors import InputError
from prelm_jax.storage import opened, prefix_errors, read_json
from prelm_jax.tokenizers import bpe, wordpiece
from prelm_jax.tokenizers.alphabet import ALPHABET_COVERAGE, training_texts
from prelm_jax.tokenizers.cached_encoder import WordEncoder, numbered

SPECIAL_TOKENS = {"bert": wordpiece.SPECIAL_TOKENS, "gpt": (bpe.UNKNOWN,)}
BEGIN_OF_WORD = "▁"
MODEL_FILE = "spiece.model"
TRAINING_VERSION = 1  # raise it when the same corpus would give another vocabulary
# Of a larger corpus lines are taken evenly, so many characters in all, for the package holds what it learns from.
TRAINING_CHARACTERS = 10_000_000
LINE_CHARACTERS = 1000


class SentencePiece(WordEncoder):
    """A SentencePiece tokenizer.

    `model` is what tokenizer.json calls so: pieces with their scores ("Unigram"), or with merges ("BPE"). `proto` is
    the file of the package from which it was made; it is only passed on. `continuation` is bool [vocab_size]: true for
    the pieces that continue a word.

    Raises InputError for a vocabulary with repeated pieces, or without the special tokens of BERT or GPT.
    """

    def __init__(self, model: dict, lowercase: bool, proto: bytes):
        self.model, self.lowercase, self.proto = model, lowercase, proto
        vocabulary = model["vocab"]
        unigram = model["type"] == "Unigram"
        tokens = [piece for piece, _ in vocabulary] if unigram else sorted(vocabulary, key=vocabulary.__getitem__)
        ids = numbered(tokens)
        self.special_tokens = next((names for names in SPECIAL_TOKENS.values() if ids.keys() >= set(names)), None)
        if self.special_tokens is None:
            expected = " or ".join(" ".join(names) for names in SPECIAL_TOKENS.values())
            raise InputError(f"the vocabulary lacks special tokens: it needs {expected}")
        self.special_ids = {token: ids[token] for token in self.special_tokens}
        self.unknown_id = self.special_ids.get("[UNK]", self.special_ids.get(bpe.UNKNOWN))
        self.continuation = np.array(
            [not token.startswith(BEGIN_OF_WORD) and token not in self.special_ids for token in tokens]
        )
        self.fingerprint = digest(["sentencepiece", model, lowercase])
        super().__init__(tokens, _pipeline(model, lowercase, self.special_tokens))

    @staticmethod
    def at(directory: Path) -> bool:
        """Whether the tokenizer of a directory is one of SentencePiece's kind."""
        path = directory / "tokenizer.json"
        return path.exists() and "Metaspace" in json.dumps(read_json(path).get("pre_tokenizer"))

    @classmethod
    def from_directory(cls, directory: str | os.PathLike) -> "SentencePiece":
        """Reads what `save` wrote."""
        path = Path(directory) / "tokenizer.json"
        data = read_json(path)
        with opened(Path(directory) / MODEL_FILE) as file:
            proto = file.read()
        try:
            lowercase = any(step.get("lowercase") for step in data["normalizer"]["normalizers"])
            with prefix_errors(path):
                loaded = cls(data["model"], lowercase, proto)
            expected = json.loads(loaded._pipeline.to_str())
            if differing := [part for part in ("normalizer", "pre_tokenizer") if data[part] != expected[part]]:
                raise InputError(f"{path}: its {' and '.join(differing)} are not those of this package")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path} is no tokenizer of SentencePiece's kind ({error!r})") from None
        return loaded

    def save(self, directory: str | os.PathLike, model_max_length: int | None = None) -> None:
        """Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json and the package's spiece.model.

        `model_max_length` is the model's number of positions: without it, a reader does not know where to truncate.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tokenizer = _pipeline(self.model, self.lowercase, self.special_tokens)
        tokenizer.add_special_tokens(list(self.special_tokens))
        if "[CLS]" in self.special_ids:
            tokenizer.post_processor = processors.TemplateProcessing(
                single="[CLS]:0 $A:0 [SEP]:0",
                pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
                special_tokens=[(token, self.special_ids[token]) for token in ("[CLS]", "[SEP]")],
            )
        names = {f"{token.strip('[]<>').lower()}_token": token for token in self.special_tokens}
        # Of a BertTokenizer or OpenAIGPTTokenizer transformers would keep the vocabulary alone.
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
        if model_max_length is not None:
            config["model_max_length"] = model_max_length
        files = {
            "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
            "tokenizer_config.json": (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
            "special_tokens_map.json": (json.dumps(names, indent=2, sort_keys=True) + "\n").encode(),
            MODEL_FILE: self.proto,
        }
        for name, content in files.items():
            (directory / name).write_bytes(content)


@dataclasses.dataclass(frozen=True)
class SentencePieceConfig:
    """A vocabulary of `vocab_size` pieces learnt from the corpus, or with `path` the one found there.

    `special_tokens`: those of "bert", or for "gpt" <unk> alone.
    """

    vocab_size: int = 30522
    model_type: Literal["unigram", "bpe"] = "unigram"
    lowercase: bool = True
    special_tokens: Literal["bert", "gpt"] = "bert"
    path: str | None = None

    @property
    def expected_vocab_size(self) -> int:
        """The size of an untrained vocabulary, for planning."""
        return self.vocab_size

    def build(self, corpus: Corpus) -> SentencePiece:
        """The tokenizer. A trained vocabulary depends on the corpus' training side alone, and is kept in the cache."""
        if self.path is not None:
            from prelm_jax.tokenizers.load import load

            return load(self.path)
        settings = [self.vocab_size, self.model_type, self.lowercase, self.special_tokens]
        key = digest(["sentencepiece", TRAINING_VERSION, corpus.fingerprint, *settings])
        model, proto = json.loads(cached("vocabularies", key, lambda: json.dumps(self._train(corpus))))
        return SentencePiece(model, self.lowercase, base64.b64decode(proto))

    def _train(self, corpus: Corpus) -> tuple[dict, str]:
        """The model, and the package's file in base64; the same in every process."""
        try:
            import sentencepiece
        except ImportError:
            raise InputError('this vocabulary needs sentencepiece: pip install "prelm_jax[sentencepiece]"') from None
        names = SPECIAL_TOKENS[self.special_tokens]
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
                **_numbers(names),
            )
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise InputError(f"no vocabulary of vocab_size={self.vocab_size} from this corpus: {reason}") from None
        proto = written.getvalue()
        reader = sentencepiece.SentencePieceProcessor(model_proto=proto)
        # Scores are single precision; with fewer digits they are the same however often they are written and read.
        pieces = [(reader.id_to_piece(i), round(reader.get_score(i), 6)) for i in range(reader.vocab_size())]
        unknown = reader.unk_id()
        if self.model_type == "unigram":
            model = models.Unigram(pieces, unknown, False)
        else:
            ids = {piece: index for index, (piece, _) in enumerate(pieces)}
            model = models.BPE(ids, _merges(pieces[len(names) :]), unk_token=names[unknown], fuse_unk=True)
        return json.loads(tokenizers.Tokenizer(model).to_str())["model"], base64.b64encode(proto).decode()


def _numbers(names: tuple[str, ...]) -> dict:
    """The package's settings for special tokens that are numbered from 0 in this order."""
    unknown = next(name for name in names if name in ("[UNK]", bpe.UNKNOWN))
    pad = "[PAD]" in names
    others = [name for name in names if name not in (unknown, "[PAD]")]
    settings = {"unk_id": names.index(unknown), "unk_piece": unknown, "bos_id": -1, "eos_id": -1}
    return settings | {"pad_id": 0 if pad else -1, "pad_piece": "[PAD]", "control_symbols": others}


def _merges(pieces: list[tuple[str, float]]) -> list[tuple[str, str]]:
    """The pairs of pieces that make a piece, the best one (by score) first."""
    known = {piece: rank for rank, (piece, _) in enumerate(pieces)}
    merges = []
    for piece, score in pieces:
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        pairs = [pair for pair in pairs if pair[0] in known and pair[1] in known]
        merges += [(-score, *sorted(known[part] for part in pair), pair) for pair in pairs]
    return [pair for *_, pair in sorted(merges)]


def _lines(corpus: Corpus) -> Iterator[str]:
    """Lines of the training side, long ones cut, all of them or evenly some of TRAINING_CHARACTERS in all."""
    characters = sum(map(len, training_texts(corpus, "counting characters")))
    texts = training_texts(corpus, "learning the vocabulary")
    lines = (part for text in texts for line in text.split("\n") for part in _cut(line))
    return itertools.islice(lines, 0, None, max(1, math.ceil(characters / TRAINING_CHARACTERS)))


def _cut(line: str) -> Iterable[str]:
    """A line in parts that end with a space, if there is one in so many characters."""
    begin = 0
    while begin < len(line):
        end = begin + LINE_CHARACTERS
        if end < len(line):
            end = line.rfind(" ", begin, end) + 1 or end
        yield line[begin:end]
        begin = end


def _normalizer(lowercase: bool) -> normalizers.Normalizer:
    steps = [
        normalizers.NFKC(),
        normalizers.BertNormalizer(
            clean_text=True, handle_chinese_chars=False, strip_accents=False, lowercase=lowercase
        ),
        normalizers.Replace(Regex(f"[ {BEGIN_OF_WORD}]+"), " "),
        normalizers.Strip(),
    ]
    return normalizers.Sequence(steps)


def _pipeline(model: dict, lowercase: bool, special_tokens: tuple[str, ...]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps({"version": "1.0", "model": model, "added_tokens": []}))
    tokenizer.normalizer = _normalizer(lowercase)
    # A unigram model knows no special pieces: their names in a text are cut after the first character.
    names = "|".join(f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in special_tokens)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Split(Regex(names), "isolated")]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return tokenizer
