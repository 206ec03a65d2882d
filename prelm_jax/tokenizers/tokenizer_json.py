"""tokenizer.json, the file in which the `tokenizers` library keeps a vocabulary with its pipeline."""

import copy
from collections.abc import Mapping
from pathlib import Path

import tokenizers
from tokenizers import processors

from prelm_jax.errors import InputError
from prelm_jax.storage import read_json


def tokenizer_json(pipeline: tokenizers.Tokenizer, roles: Mapping[str, str]) -> str:
    """The content of tokenizer.json: `pipeline`, and what readers expect in addition to it.

    In a reader's hands special tokens are recognized in a text, and `[CLS] A [SEP] B [SEP]` is put around a pair of
    texts if the vocabulary has these roles.
    """
    pipeline = copy.deepcopy(pipeline)
    pipeline.add_special_tokens(list(roles.values()))
    if "cls" in roles:
        cls, sep = roles["cls"], roles["sep"]
        pipeline.post_processor = processors.TemplateProcessing(
            single=f"{cls}:0 $A:0 {sep}:0",
            pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
            special_tokens=[(token, pipeline.token_to_id(token)) for token in (cls, sep)],
        )
    return pipeline.to_str(pretty=True)


def read_tokenizer_json(path: Path, expected: Mapping[str, Mapping[str, object]]) -> tuple[list[str], dict[str, dict]]:
    """The tokens by id, and the parts named in `expected`: {"model": {"type": "BPE", …}, "normalizer": {…}, …}.

    Raises InputError if a setting is not the expected one, or if a token that was added later has no place in the
    vocabulary.
    """
    data = read_json(path)
    parts: dict[str, dict] = {part: data.get(part) or {} for part in expected}
    # Old versions of the library do not write the model's type; the other settings tell the models apart.
    parts["model"].setdefault("type", expected["model"]["type"])
    for part, settings in expected.items():
        for name, value in settings.items():
            if (found := parts[part].get(name)) != value:
                raise InputError(f"{path}: the {part} has {name} {found!r}: only {value!r} is supported")
    vocabulary = parts["model"]["vocab"]
    if added := [token["content"] for token in data.get("added_tokens", []) if token["content"] not in vocabulary]:
        raise InputError(f"{path}: the added tokens {', '.join(added)} are not in the vocabulary: put them there")
    return tokens_by_id(path, vocabulary), parts


def tokens_by_id(path: object, ids: dict[str, int]) -> list[str]:
    """The tokens of a vocabulary in the order of their ids. Raises InputError, naming `path`, if ids are missing."""
    if not all(isinstance(index, int) for index in ids.values()) or set(ids.values()) != set(range(len(ids))):
        raise InputError(f"{path}: the ids of the vocabulary are not 0 to {len(ids) - 1}")
    return sorted(ids, key=ids.__getitem__)
