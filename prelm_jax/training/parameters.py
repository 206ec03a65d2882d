"""The names of parameters, and tables that decide something for each of them."""

import re
from typing import Any, TypeVar

import jax

Answer = TypeVar("Answer")


def path_name(path: tuple[Any, ...]) -> str:
    """`encoder/layer_0/attention/query/kernel` for a path of jax.tree_util."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def first_match(table: tuple[tuple[str, Answer], ...], name: str) -> Answer:
    """The answer of the first rule (regular expression, answer) that is found in the name.

    A table is exhaustive: a name that no rule knows is a ValueError, so that nothing is decided by oversight.
    """
    for rule, answer in table:
        if re.search(rule, name):
            return answer
    raise ValueError(f"no rule covers {name}: {', '.join(rule for rule, _ in table)}")
