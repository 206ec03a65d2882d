"""Byte-pair encoding, GPT-1's tokenizer (Radford et al. 2018; openai/finetune-transformer-lm, text_utils.py).

A word is spelled by its characters, the last one written with "</w>"; of the pairs that stand side by side the one
merged first in training is joined, until no merge is left; what is not in the vocabulary is <unk>. The `tokenizers`
library does the work, with transformers' ids.

Divergence: words are found as transformers' OpenAIGPTTokenizer finds them, where the original has spaCy, so that an
exported model reads text as it was trained to. Text is lower-cased and stripped of accents and control characters, CJK
ideographs are set apart, and it is split at white space and punctuation: "don't" is three words and the original's two,
"..." is three and its one, newlines are lost. The original's cleaning is for the corpus: `cleaning=gpt`.
"""

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from prelm_jax.cache import cached, digest
from prelm_jax.corpus.documents import Corpus
from prelm_jax.errors import InputError
from prelm_jax.storage import prefix_errors, read_json, read_lines
from prelm_jax.tokenizers.alphabet import alphabet, training_texts
from prelm_jax.tokenizers.cached_encoder import WordEncoder, numbered

UNKNOWN = "<unk>"
END_OF_WORD = "</w>"
# Vocabulary and merges under the names of Hugging Face, and of OpenAI.
FILES = (("vocab.json", "merges.txt"), ("encoder_bpe_40000.json", "vocab_40000.bpe"))
TRAINING_VERSION = 1  # raise it when the same corpus would give another vocabulary

Merge = tuple[str, str]


class BPE(WordEncoder):
    """GPT-1's tokenizer. `tokens` lists the vocabulary by id and must hold <unk>; `merges` are pairs of its entries.

    Raises InputError for a vocabulary with repeated entries, without <unk> or without an entry that ends a word, and
    for a merge whose parts or product it lacks.
    """

    lowercase = True

    def __init__(self, tokens: Iterable[str], merges: Iterable[Merge]):
        tokens = list(tokens)
        self.merges = list(merges)
        ids = numbered(tokens)
        if UNKNOWN not in ids:
            raise InputError(f"the vocabulary has no {UNKNOWN}: GPT-1's has")
        if not any(token.endswith(END_OF_WORD) for token in tokens):
            raise InputError(f"no entry of the vocabulary ends with {END_OF_WORD}: is it a byte-level one (GPT-2)?")
        for merge in self.merges:
            if len(merge) != 2:
                raise InputError(f"the merge {list(merge)} is not two pieces")
            first, second = merge
            if missing := [token for token in (first, second, first + second) if token not in ids]:
                raise InputError(f"the merge {f'{first} {second}'!r} needs {missing[0]!r}: it is not in the vocabulary")
        self.special_ids = {UNKNOWN: ids[UNKNOWN]}
        self.unknown_id = ids[UNKNOWN]
        self.fingerprint = digest([tokens, self.merges])
        super().__init__(tokens, _pipeline(tokens, self.merges))

    @classmethod
    def from_files(cls, vocabulary: str | os.PathLike, merges: str | os.PathLike) -> "BPE":
        """Reads a vocabulary (a JSON object, token → id) and its merges ("a b" a line, after a line "#version…")."""
        tokens = _by_id(vocabulary, read_json(vocabulary))
        lines = [line.removesuffix("\r") for line in read_lines(merges)]
        header = bool(lines) and lines[0].startswith("#version")
        pairs = []
        for number, line in enumerate(lines[header:], start=1 + header):
            first, _, second = line.partition(" ")
            if not first or not second or " " in second:
                raise InputError(f"{merges}:{number} is {line!r}, not two pieces with a space between them")
            pairs.append((first, second))
        with prefix_errors(vocabulary):
            return cls(tokens, pairs)

    @classmethod
    def from_directory(cls, directory: str | os.PathLike) -> "BPE":
        """Reads a directory with tokenizer.json, or vocab.json and merges.txt, or OpenAI's two files."""
        directory = Path(directory)
        if (path := directory / "tokenizer.json").exists():
            tokens, merges = _read_tokenizer_json(path)
            with prefix_errors(path):
                return cls(tokens, merges)
        present = [files for files in beside(directory) if files[0].exists()]
        return cls.from_files(*(present or beside(directory))[0])

    def save(self, directory: str | os.PathLike, model_max_length: int | None = None) -> None:
        """Writes vocab.json, merges.txt, tokenizer.json, tokenizer_config.json and special_tokens_map.json.

        `model_max_length` is the model's number of positions: without it, a reader does not know where to truncate.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tokenizer = _pipeline(self.tokens, self.merges)
        tokenizer.add_special_tokens([UNKNOWN])
        config = {"tokenizer_class": "OpenAIGPTTokenizer", "unk_token": UNKNOWN}
        if model_max_length is not None:
            config["model_max_length"] = model_max_length
        vocabulary = {token: index for index, token in enumerate(self.tokens)}
        files = {
            "vocab.json": json.dumps(vocabulary, ensure_ascii=False) + "\n",
            "merges.txt": "".join(["#version: 0.2\n", *(f"{first} {second}\n" for first, second in self.merges)]),
            "tokenizer.json": tokenizer.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(config, indent=2, sort_keys=True) + "\n",
            "special_tokens_map.json": json.dumps({"unk_token": UNKNOWN}, indent=2) + "\n",
        }
        for name, text in files.items():
            (directory / name).write_bytes(text.encode())


@dataclasses.dataclass(frozen=True)
class BPEConfig:
    """A vocabulary of `num_merges` merged pieces trained on the corpus, or with `path` the one found there."""

    num_merges: int = 40000
    path: str | None = None

    def __post_init__(self):
        if self.num_merges < 0:
            raise InputError(f"tokenizer.num_merges is {self.num_merges}: give 0 or more")

    @property
    def expected_vocab_size(self) -> int:
        """The size of an untrained vocabulary, for planning: the merges and GPT-1's alphabet and special tokens."""
        return self.num_merges + 478

    def build(self, corpus: Corpus) -> BPE:
        """The tokenizer. A trained vocabulary depends on the corpus' training side alone, and is kept in the cache."""
        if self.path is not None:
            from prelm_jax.tokenizers.load import load

            return load(self.path)
        key = digest(["bpe", TRAINING_VERSION, tokenizers.__version__, corpus.fingerprint, self.num_merges])
        tokens, merges = json.loads(cached("vocabularies", key, lambda: json.dumps(train(corpus, self.num_merges))))
        return BPE(tokens, map(tuple, merges))


def train(corpus: Corpus, num_merges: int) -> tuple[list[str], list[Merge]]:
    """(tokens, merges) from the training side of a corpus, the same in every process.

    The ids are laid out as OpenAI's: <unk>, the characters by falling count (then code point), the same with "</w>",
    and the merged pieces in the order they were found; `num_merges` of them, or fewer if the corpus does not have that
    many pairs seen at least twice.
    """
    tokenizer = _pipeline([UNKNOWN], [])
    letters = alphabet(corpus, tokenizer.normalizer)
    base = [UNKNOWN, *letters, *(letter + END_OF_WORD for letter in letters)]
    # The library numbers characters in the order of a hash table that differs between processes, and breaks ties
    # between merges by number. Characters given as special tokens are numbered as given.
    trainer = trainers.BpeTrainer(
        vocab_size=len(base) + num_merges,
        min_frequency=2,
        special_tokens=base,
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(corpus, "learning the vocabulary"), trainer)
    # Of the trained tokenizer only these are of use: it would match its special tokens, here every letter.
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].__getitem__), [tuple(merge) for merge in model["merges"]]


def beside(directory: Path) -> list[tuple[Path, Path]]:
    """Where vocabulary and merges may lie in a directory."""
    return [(directory / vocabulary, directory / merges) for vocabulary, merges in FILES]


def _pipeline(tokens: Iterable[str], merges: list[Merge]) -> tokenizers.Tokenizer:
    """What transformers makes of a vocabulary and merges."""
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


def _by_id(path: str | os.PathLike, ids: dict[str, int]) -> list[str]:
    if not all(isinstance(index, int) for index in ids.values()) or set(ids.values()) != set(range(len(ids))):
        raise InputError(f"{path}: the ids of the vocabulary are not 0 to {len(ids) - 1}")
    return sorted(ids, key=ids.__getitem__)


def _read_tokenizer_json(path: Path) -> tuple[list[str], list[Merge]]:
    """The vocabulary and merges, if the rest is GPT-1's."""
    data = read_json(path)
    data["model"] = {"type": "BPE"} | (data.get("model") or {})  # older ones do not say the type
    lowercase = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True}
    expected = {
        "model": {"type": "BPE", "unk_token": UNKNOWN, "end_of_word_suffix": END_OF_WORD, "fuse_unk": False},
        "normalizer": {"type": "BertNormalizer", **lowercase},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
    }
    for part, settings in expected.items():
        found = {name: (data.get(part) or {}).get(name) for name in settings}
        for name, value in settings.items():
            if found[name] != value:
                kind = f"its {part} has {name} {found[name]!r}, not {value!r}"
                raise InputError(f"{path} is no tokenizer of GPT-1's kind: {kind}")
    model = data["model"]
    if added := [token["content"] for token in data.get("added_tokens", []) if token["content"] not in model["vocab"]]:
        raise InputError(f"{path}: the added tokens {', '.join(added)} are not in the vocabulary: put them there")
    # Before tokenizers 0.20 a merge was one string.
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    return _by_id(path, model["vocab"]), merges
