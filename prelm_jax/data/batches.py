"""What all batches of a token store share."""

import abc
import functools
from collections.abc import Mapping
from typing import Literal

import numpy as np

from prelm_jax.corpus.store import Store
from prelm_jax.errors import InputError
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.training.contract import Layout

Role = Literal["pad", "cls", "sep", "mask", "bos", "eos", "unknown"]


class StoreBatches(abc.ABC):
    """`batches[step]` is the batch of a step, a pure function of (seed, step). Steps are endless: epochs reshuffle.

    A subclass defines `rows`. Fulfills `training.contract.Batches`.
    """

    def __init__(self, store: Store, vocab_size: int, batch_size: int):
        self.store = store
        self.vocab_size = vocab_size
        self.batch_size = batch_size

    @functools.cached_property
    def layout(self) -> Mapping[str, Layout]:
        """How each key is spread over hosts and devices: here every key holds rows."""
        return dict.fromkeys(self.rows(0, 0, 1), "rows")

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        return self.rows(step, 0, self.batch_size)

    @abc.abstractmethod
    def rows(self, step: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows start to stop of the batch of a step, built without the others."""


def special_id(tokenizer: Tokenizer, role: Role, user: str) -> int:
    """The id of the special token with a role; InputError, naming the `user` of the token, where there is none."""
    id = getattr(tokenizer, f"{role}_id")
    if id is None:
        raise InputError(f"the vocabulary has no {role} token, which {user} need: choose another tokenizer")
    return id
