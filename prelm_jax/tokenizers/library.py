"""Tokenizers of the `tokenizers` library that are none of the other kinds, such as the one of its quick tour.

Their tokenizer.json is applied as it is: byte-pair encoding, WordPiece, unigrams or whole words, after any of the
normalizers and splits that do not look across white space. They need the special tokens of BERT, or GPT's <unk>.
"""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import tokenizers

from prelm_jax.cache import digest
from prelm_jax.errors import InputError
from prelm_jax.storage import prefix_errors
from prelm_jax.tokenizers.added_tokens import AddedToken
from prelm_jax.tokenizers.cached_encoder import CachedEncoder, pipeline_of
from prelm_jax.tokenizers.saved import TOKENIZER, Part, SavedTokenizer, tokens_by_id
from prelm_jax.tokenizers.sentencepiece import find_roles

# The supported types of each part. One pre-tokenizer splits at white space, and none joins words or marks them.
SPLITS_AT_SPACE = ("BertPreTokenizer", "Whitespace", "WhitespaceSplit")
TYPES = {
    "model": ("BPE", "Unigram", "WordLevel", "WordPiece"),
    "normalizer": ("BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "StripAccents"),
    "pre_tokenizer": (*SPLITS_AT_SPACE, "Digits", "Punctuation"),
}


class LibraryTokenizer(CachedEncoder):
    """A tokenizer of the `tokenizers` library. `parts`: those of its tokenizer.json.

    A WordPiece has the attribute `continuation`, bool [vocab_size]: true for subwords that continue a word.

    Raises InputError for parts that are not supported, naming them.
    """

    isolates_characters: bool = False

    def __init__(self, parts: Mapping[str, Part], added: Iterable[AddedToken] = (), frame: Mapping[str, str] = {}):
        self.parts = {name: parts.get(name) or None for name in (*TYPES, "decoder")}
        self.parts["normalizer"] = self.parts["normalizer"] or {"type": "Sequence", "normalizers": []}
        for part, supported in TYPES.items():
            if wrong := [kind for kind in map(_type, _steps(parts, part)) if kind not in supported]:
                raise InputError(f"the {part} has type {wrong[0]}: only {', '.join(supported)} are supported")
        if not any(_type(step) in SPLITS_AT_SPACE for step in _steps(parts, "pre_tokenizer")):
            raise InputError(f"no pre_tokenizer splits at white space: give one of {', '.join(SPLITS_AT_SPACE)}")
        self.lowercase = any(
            step.get("lowercase") is True or _type(step) == "Lowercase" for step in _steps(parts, "normalizer")
        )
        tokens = tokens_by_id("model", self._make_pipeline().get_vocab())
        added = list(added)
        super().__init__(tokens, find_roles([*tokens, *(token.content for token in added)]), added, frame)
        model = parts["model"]
        if model.get("dropout"):
            raise InputError(f"the model has dropout {model['dropout']}, which makes ids random: set it to null")
        unknown, unknown_id = model.get("unk_token"), model.get("unk_id")
        if _type(model) == "Unigram" and unknown_id is None:
            raise InputError("the model has no unk_id, which stands for what it cannot spell")
        if isinstance(unknown_id, int):
            unknown = tokens[unknown_id]
        if unknown not in (None, self.roles["unk"]):
            raise InputError(f"the model has unk_token {unknown!r}: only {self.roles['unk']!r} is supported")
        if _type(model) == "WordPiece":
            prefix = str(model["continuing_subword_prefix"])
            self.continuation = np.array([token.startswith(prefix) for token in self.tokens])
        self.fingerprint = digest(["library", self.parts, *self._added_identity])

    @classmethod
    def from_saved(cls, saved: SavedTokenizer) -> "LibraryTokenizer":
        """Reads a directory with tokenizer.json."""
        with prefix_errors(saved.directory / TOKENIZER):
            loaded = cls(saved.parts or {}, saved.added, saved.frame)
        saved.require_roles(loaded.roles)
        return loaded

    def _with_frame(self, added: list[AddedToken], frame: Mapping[str, str]) -> "LibraryTokenizer":
        return LibraryTokenizer({name: part or {} for name, part in self.parts.items()}, added, frame)

    def _make_pipeline(self) -> tokenizers.Tokenizer:
        return pipeline_of(self.parts)

    def _settings(self) -> dict[str, object]:
        return {"tokenizer_class": "PreTrainedTokenizerFast"}

    def _vocabulary_files(self) -> dict[str, str | bytes]:
        return {}


def _steps(parts: Mapping[str, Part], name: str) -> Iterator[Part]:
    """The steps of a part, those of a Sequence one by one."""
    pending: list[object] = [parts.get(name) or {"type": "Sequence"}]
    while pending:
        step = pending.pop(0)
        if not isinstance(step, dict):
            raise InputError(f"the {name} is not a JSON object")
        if _type(step) == "Sequence":
            nested = step.get("normalizers", step.get("pretokenizers", []))
            pending = [*(nested if isinstance(nested, list) else [nested]), *pending]
        else:
            yield step


def _type(step: Part) -> str:
    return str(step.get("type"))
