"""Continued pretraining: the initial parameters of a run that starts from a loaded model."""

import jax
import numpy as np

from prelm_jax.errors import InputError
from prelm_jax.formats.base import Config, Format, LoadedModel, ModelConfig, Vocabulary
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.training.contract import Params
from prelm_jax.training.parameters import path_name


def initial_params(
    model: LoadedModel[Config, Vocabulary],
    format: Format[Config, Vocabulary],
    config: ModelConfig,
    fresh: Params,
    tokenizer: Tokenizer,
) -> Params:
    """The initial parameters of a run with `config` and `tokenizer` that continues a loaded model.

    Values come from the model. Parameters that its directory lacks or that are not its own (the head of a task), and
    the rows of tokens and positions that are new to it, keep their fresh initialization; positions that the run does
    not have are left out. Arrays taken from the model stay on its device.

    Raises InputError if the sizes differ, or if the vocabulary is not one that can continue the model's.
    """
    if config.model_type != model.config.model_type:
        raise InputError(f"--init-from: the model is {model.config.model_type}, the run trains {config.model_type}")
    for field, ours in vars(config).items():
        theirs = getattr(model.config, field)
        if field not in format.may_differ and ours != theirs:
            raise InputError(f"--init-from: {field} is {theirs} in the model, but {ours} in the run")
    rows_V = format.rows_to_copy(model.tokenizer, tokenizer)
    copied = np.flatnonzero(rows_V >= 0)
    values = {path_name(path): value for path, value in jax.tree_util.tree_leaves_with_path(model.params)}

    def choose(path: tuple[object, ...], new: jax.Array) -> jax.Array:
        name = path_name(path)
        if name not in values or name in model.missing:
            return new
        loaded = values[name]
        if name in format.vocabulary_tables:
            return new.at[copied].set(loaded[rows_V[copied]])
        if name in format.position_tables and len(new) != len(loaded):
            number = min(len(new), len(loaded))
            return new.at[:number].set(loaded[:number])
        return loaded

    return jax.tree_util.tree_map_with_path(choose, fresh)


def positions_note(model_config: ModelConfig, config: ModelConfig) -> str | None:
    """A line for the user about the positions of a run that continues a model; None if they are the same."""
    theirs, ours = (getattr(each, "max_position_embeddings", None) for each in (model_config, config))
    if theirs == ours or theirs is None or ours is None:
        return None
    if ours < theirs:
        return f"--init-from: of the model's {theirs} positions, the first {ours} are taken"
    return f"--init-from: the model has {theirs} positions; positions {theirs} to {ours - 1} start fresh"


def rows_of_prefix(old: Tokenizer, new: Tokenizer) -> np.ndarray:
    """For each token of the new vocabulary the embedding row to copy, or -1 to keep its fresh initialization.

    Raises InputError unless the new vocabulary begins with the old one: subwords depend on all others.
    """
    for i, token in enumerate(old.tokens):
        if i >= new.vocab_size or new.tokens[i] != token:
            found = repr(new.tokens[i]) if i < new.vocab_size else "nothing"
            raise InputError(
                f"--init-from: token {i} of the vocabulary is {token!r} in the model, but {found} in the run; "
                "the run's vocabulary must begin with the model's"
            )
    rows_V = np.arange(new.vocab_size)
    return np.where(rows_V < old.vocab_size, rows_V, -1)


def rows_of_tokens(old: Tokenizer | None, new: Tokenizer) -> np.ndarray:
    """Like `rows_of_prefix`, for vocabularies of words: a word of both keeps its row, at whatever position."""
    rows = {} if old is None else {token: row for row, token in enumerate(old.tokens)}
    return np.array([rows.get(token, -1) for token in new.tokens])
