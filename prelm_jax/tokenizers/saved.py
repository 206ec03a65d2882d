"""The files in which tokenizers are saved, read as transformers' AutoTokenizer reads them.

tokenizer.json            the `tokenizers` library's file: a vocabulary, its pipeline and its added tokens
tokenizer_config.json     transformers' class and its arguments, sometimes with added tokens
special_tokens_map.json   special tokens by role; read if tokenizer_config.json has no added tokens
added_tokens.json         token -> id of the tokens added to a vocab.txt or vocab.json; read in the same case
config.json               the model's; its model_type names the class where nothing else does
vocab.txt                 a token per line, the line number (from 0) its id
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from prelm_jax.errors import InputError
from prelm_jax.storage import read_json, read_text
from prelm_jax.tokenizers.added_tokens import AddedToken
from prelm_jax.tokenizers.base import FRAME_ROLES

TOKENIZER, SETTINGS, CONFIG = "tokenizer.json", "tokenizer_config.json", "config.json"
SPECIAL_TOKENS_MAP, ADDED_TOKENS = "special_tokens_map.json", "added_tokens.json"

# transformers' classes, without the suffix Fast. Those of BERT are BertTokenizer under other names. The generic ones
# apply tokenizer.json as it is, where the others take its vocabulary alone.
BERT_CLASSES = frozenset({"BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MobileBertTokenizer"})
GPT_CLASSES = frozenset({"OpenAIGPTTokenizer"})
GENERIC_CLASSES = frozenset({"PreTrainedTokenizer", "TokenizersBackend"})
CLASS_OF_MODEL = {"bert": "BertTokenizer", "openai-gpt": "OpenAIGPTTokenizer"}

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # In transformers' order, in which it adds their tokens.

Part = dict[str, object]  # A part of a tokenizer.json: its model, its normalizer, …


@dataclasses.dataclass(frozen=True)
class SavedTokenizer:
    """What the files of a directory say. `class_name` is None where they do not; `added` is in the order of ids."""

    directory: Path
    class_name: str | None
    settings: Mapping[str, object]  # tokenizer_config.json and special_tokens_map.json
    parts: Mapping[str, Part] | None  # of tokenizer.json, None without one
    added: tuple[AddedToken, ...]

    @classmethod
    def read(cls, directory: str | os.PathLike) -> "SavedTokenizer":
        """Reads a directory. Raises InputError for a class that is not supported, naming it."""
        directory = Path(directory)
        settings = _read(directory / SETTINGS) or {}
        if extra := settings.pop("additional_special_tokens", None):  # Their old name.
            settings.setdefault("extra_special_tokens", extra)
        class_name = _class_name(directory, settings)
        data = _read(directory / TOKENIZER)
        in_pipeline = [] if data is None else _tokens_of_pipeline(directory / TOKENIZER, data)
        if "added_tokens_decoder" in settings:
            found = _tokens_of_decoder(directory / SETTINGS, settings["added_tokens_decoder"])
            declared = [*in_pipeline, *found] if class_name in GENERIC_CLASSES else found
        else:
            source = directory / ADDED_TOKENS
            settings = settings | (_read(directory / SPECIAL_TOKENS_MAP) or {})
            special = {
                token.content for token in _named_tokens(directory / SETTINGS, settings, ("extra_special_tokens",))
            }
            found = [_token(source, token, id, token in special) for token, id in (_read(source) or {}).items()]
            declared = [*found, *in_pipeline]
        by_content = {token.content: token for token in declared}
        added = sorted(by_content.values(), key=lambda token: token.id)
        added += [token for token in _named_tokens(directory / SETTINGS, settings) if token.content not in by_content]
        parts = None if data is None else _parts(directory / TOKENIZER, data)
        return cls(directory, class_name, settings, parts, tuple(added))

    @property
    def is_generic(self) -> bool:
        """Whether tokenizer.json is applied as it is; if not, tokenizer_config.json has the settings."""
        return self.parts is not None and (self.class_name is None or self.class_name in GENERIC_CLASSES)

    @property
    def frame(self) -> dict[str, str]:
        """The tokens of FRAME_ROLES, where tokenizer.json puts them around a text; empty where it does not."""
        named = {role: self.settings.get(f"{role}_token") for role in FRAME_ROLES}
        tokens = {role: _token(self.directory / SETTINGS, token).content for role, token in named.items() if token}
        single = ((self.parts or {}).get("post_processor") or {}).get("single")
        steps = [step for step in single if isinstance(step, dict)] if isinstance(single, list) else []
        ids = [piece.get("id") for step in steps for piece in step.values() if isinstance(piece, dict)]
        return tokens if {"bos", "sep", "cls"} <= set(tokens) and ids == [tokens["bos"], "A", tokens["cls"]] else {}

    def difference(self, expected: Mapping[str, Mapping[str, object]]) -> str | None:
        """The first setting of tokenizer.json that is not the expected one; None if there is none."""
        for part, settings in expected.items():
            found = (self.parts or {}).get(part, {})
            for name, value in settings.items():
                # Old versions of the library do not write the model's type; the other settings tell the models apart.
                if found.get(name, value if (part, name) == ("model", "type") else None) != value:
                    return f"the {part} has {name} {found.get(name)!r}: only {value!r} is supported"
        return None

    def vocabulary(self, expected: Mapping[str, Mapping[str, object]]) -> tuple[list[str], Mapping[str, Part]]:
        """The tokens of tokenizer.json by id, without added ones, and its parts.

        Raises InputError if a setting is not the expected one.
        """
        path = self.directory / TOKENIZER
        if difference := self.difference(expected):
            raise InputError(f"{path}: {difference}")
        parts = self.parts or {}
        return tokens_by_id(path, parts["model"].get("vocab")), parts

    def require_roles(self, roles: Mapping[str, str]) -> None:
        """Raises InputError if the settings give a role to another token, or change how special tokens are read."""
        path, roles = self.directory / SETTINGS, {**roles, **self.frame}
        for role, token in roles.items():
            if (found := self.settings.get(f"{role}_token")) is not None and _token(path, found).content != token:
                content = _token(path, found).content
                raise InputError(f"{path}: {role}_token is {content!r}: only {token!r} is supported")
        known = {roles.get(role) for role in ("bos", "cls", "sep")}
        others = _tokens_of_processor((self.parts or {}).get("post_processor")) - known
        if others:
            found = f"the post_processor puts {min(map(str, others))!r} around a text"
            raise InputError(f"{self.directory / TOKENIZER}: {found}: only [CLS] and [SEP] are supported")
        if self.settings.get("split_special_tokens") and any(
            token.content not in roles.values() for token in self.added
        ):
            raise InputError(f"{path}: split_special_tokens is true, but there are added tokens: set it to false")

    def flag(self, name: str, default: bool | None, nullable: bool = False) -> bool | None:
        """A setting that is true, false or, if it is `nullable`, null."""
        value = self.settings.get(name, default)
        if isinstance(value, bool) or (value is None and nullable):
            return value
        raise InputError(f"{self.directory / SETTINGS}: {name} is {value!r}: give true or false")


def tokens_by_id(path: object, ids: object) -> list[str]:
    """The tokens of a vocabulary in the order of their ids. Raises InputError, naming `path`, if ids are missing."""
    if not isinstance(ids, dict):
        raise InputError(f"{path}: the vocabulary is not a JSON object, token -> id")
    if not all(type(index) is int for index in ids.values()) or set(ids.values()) != set(range(len(ids))):
        raise InputError(f"{path}: the ids of the vocabulary are not 0 to {len(ids) - 1}")
    return sorted(ids, key=ids.__getitem__)


def read_max_length(directory: str | os.PathLike) -> int | None:
    """The length in tokens at which readers of a directory truncate a text; None if it does not say."""
    source = Path(directory) / SETTINGS
    length = (_read(source) or {}).get("model_max_length")
    if length is None:
        return None
    if isinstance(length, bool) or not isinstance(length, int | float) or not 1 <= length < math.inf:
        raise InputError(f"{source}: model_max_length is {length!r}: give a number of tokens")
    return int(length)


def read_vocab(path: str | os.PathLike) -> list[str]:
    """The tokens of a vocab.txt by id, without white space after them, as other readers take them.

    Raises InputError, with a remedy that leaves all ids as they are, for blank and repeated lines.
    """
    text = read_text(path).removeprefix("\ufeff")
    if str(path).endswith(".json") or _is_json(text):
        raise InputError(
            f"{path} is JSON, and a vocab.txt has a token on every line: give the directory, with tokenizer.json or "
            "with vocab.json and merges.txt"
        )
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    tokens = [line.rstrip() or line for line in (lines if lines[-1] else lines[:-1])]
    unused = next(name for name in map("[unused{}]".format, range(len(tokens) + 1)) if name not in set(tokens))
    rule = f"line numbers are ids, so delete no line: write a token there that no text has, such as {unused}"
    first: dict[str, int] = {}
    for number, token in enumerate(tokens, start=1):
        if not token.strip(" \t"):
            at_end = not any(token.strip(" \t") for token in tokens[number:])
            raise InputError(f"{path}:{number} is blank: {'delete it, it is the end of the file' if at_end else rule}")
        if (earlier := first.setdefault(token, number)) != number:
            last = len(tokens) - tokens[::-1].index(token)
            raise InputError(f"{path}:{earlier} holds {token!r}, as line {last} does, which other readers take: {rule}")
    return tokens


def _is_json(text: str) -> bool:
    if not text.lstrip().startswith(("{", "[")):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _read(path: Path) -> dict | None:
    return read_json(path) if path.exists() else None


def _class_name(directory: Path, settings: Mapping[str, object]) -> str | None:
    """The name of transformers' class. Raises InputError for one that is not supported."""
    source, name = directory / SETTINGS, settings.get("tokenizer_class")
    if settings.get("auto_map"):
        raise InputError(f"{source}: auto_map names code of its own, which is never run: only {_supported()}")
    if name is None:
        source, config = directory / CONFIG, _read(directory / CONFIG) or {}
        name = config.get("tokenizer_class") or CLASS_OF_MODEL.get(str(config.get("model_type")))
    if name is None:
        return None
    class_name = str(name).removesuffix("Fast")
    if class_name not in BERT_CLASSES | GPT_CLASSES | GENERIC_CLASSES:
        raise InputError(f"{source}: tokenizer_class is {name!r}, which finds other tokens: only {_supported()}")
    return class_name


def _supported() -> str:
    return "BertTokenizer, OpenAIGPTTokenizer and PreTrainedTokenizerFast are supported"


def _parts(path: Path, data: Mapping[str, object]) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    for part in ("model", "normalizer", "pre_tokenizer", "post_processor", "decoder"):
        value = data.get(part) or {}
        if not isinstance(value, dict):
            raise InputError(f"{path}: {part} is not a JSON object")
        parts[part] = value
    return parts


def _tokens_of_pipeline(path: Path, data: Mapping[str, object]) -> list[AddedToken]:
    tokens = data.get("added_tokens") or []
    if not isinstance(tokens, list):
        raise InputError(f"{path}: added_tokens is not a JSON array")
    return [_token(path, token, token.get("id", -1) if isinstance(token, dict) else -1) for token in tokens]


def _tokens_of_decoder(path: Path, tokens: object) -> list[AddedToken]:
    if not isinstance(tokens, dict) or not all(str(id).isdecimal() for id in tokens):
        raise InputError(f"{path}: added_tokens_decoder is not a JSON object, id -> token")
    return [_token(path, token, int(id)) for id, token in tokens.items()]


def _tokens_of_processor(processor: object) -> set[object]:
    """The special tokens that a post_processor of tokenizer.json names."""
    if not isinstance(processor, dict):
        return set()
    templates, steps = processor.get("special_tokens"), processor.get("processors")
    found: set[object] = set(templates if isinstance(templates, dict) else ())
    found |= {part[0] for part in (processor.get("cls"), processor.get("sep")) if isinstance(part, list) and part}
    return found.union(*map(_tokens_of_processor, steps if isinstance(steps, list) else ()))


def _named_tokens(
    path: Path,
    settings: Mapping[str, object],
    lists: tuple[str, ...] = ("extra_special_tokens", "additional_special_tokens"),
) -> list[AddedToken]:
    """The special tokens that settings name: by role, under names of their own ("entity_token"), and in a list."""
    names = [f"{role}_token" for role in ROLES]
    names += [name for name in settings if name.endswith("_token") and name not in names]
    found = [settings[name] for name in names if isinstance(settings.get(name), str | dict)]
    extra = next((settings[name] for name in lists if settings.get(name)), [])
    if not isinstance(extra, list | dict):
        raise InputError(f"{path}: the special tokens {extra!r} are not a JSON array")
    found += extra.values() if isinstance(extra, dict) else extra
    tokens = [_token(path, token, special=True) for token in found]
    return list({token.content: token for token in tokens}.values())


def _token(path: Path, token: object, id: object = -1, special: bool = False) -> AddedToken:
    """A token in any of its forms: its text alone, or an object with its options.

    `special`: whether the token is special, where its form does not say.
    """
    options = {"content": token} if isinstance(token, str) else token
    if not isinstance(options, dict) or not isinstance(options.get("content"), str) or not options["content"]:
        raise InputError(f"{path}: the added token {token!r} has no content")
    if not isinstance(id, int) or isinstance(id, bool):
        raise InputError(f"{path}: the added token {options['content']!r} has the id {id!r}: give a number")
    is_special = options.get("special", special)
    values: dict[str, object] = {"special": is_special, "normalized": options.get("normalized", not is_special)}
    values |= {name: options.get(name, False) for name in ("single_word", "lstrip", "rstrip")}
    if wrong := [name for name, value in values.items() if not isinstance(value, bool)]:
        raise InputError(f"{path}: {wrong[0]} of the added token {options['content']!r} is not true or false")
    return AddedToken(options["content"], id, **{name: value is True for name, value in values.items()})
