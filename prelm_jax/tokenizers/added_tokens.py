"""Tokens added to a finished vocabulary: matched in a text as they are written, before it is split into words."""

import copy
import dataclasses
from collections.abc import Iterable

import tokenizers

from prelm_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token with the options of the `tokenizers` library.

    content: the text to match. id: -1 for the next free one. special: not part of the text proper ("[ENTITY]").
    normalized: match in the normalized text. single_word: match only between characters that are not letters or digits.
    lstrip, rstrip: take the white space on that side along.
    """

    content: str
    id: int = -1
    special: bool = False
    normalized: bool = True
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False

    def to_library(self) -> tokenizers.AddedToken:
        """The library's form of the token."""
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del options["id"], options["content"]
        return tokenizers.AddedToken(self.content, **options)


def with_ids(added: Iterable[AddedToken], tokens: list[str]) -> list[AddedToken]:
    """The added tokens with their ids: those in the vocabulary (`tokens`, by id) keep theirs, the others follow it.

    Raises InputError for a token that has another id already: transformers would give it the one from here.
    """
    ids = {token: id for id, token in enumerate(tokens)}
    placed: dict[str, AddedToken] = {}
    for token in added:
        id = ids.setdefault(token.content, len(ids))
        if token.id not in (-1, id):
            raise InputError(
                f"the added token {token.content!r} has the id {token.id}, but its place is {id}: ids of added tokens "
                "follow the ids of the vocabulary without gaps"
            )
        placed[token.content] = dataclasses.replace(token, id=id)
    return sorted(placed.values(), key=lambda token: token.id)


def with_added_tokens(pipeline: tokenizers.Tokenizer, added: Iterable[AddedToken]) -> tokenizers.Tokenizer:
    """A copy of a pipeline that matches added tokens; those that its vocabulary lacks get the next ids, in order."""
    pipeline = copy.deepcopy(pipeline)
    for token in added:
        add = pipeline.add_special_tokens if token.special else pipeline.add_tokens
        add([token.to_library()])
    return pipeline
