"""Parameter paths, and tables of rules that decide something for each of them."""

import re
from collections.abc import Iterable
from typing import TypeVar

import jax

Answer = TypeVar("Answer")

# A regular expression of the last names of parameters that are small: biases, norms, and the scalars of heads.
SMALL = r"\w*bias|scale|weights|gamma|\w*transitions"


def path_name(path: tuple[object, ...]) -> str:
    """A path of jax.tree_util as a string: `encoder/layer_0/attention/query/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def matches(rules: Iterable[str], name: str) -> bool:
    """Whether any of the regular expressions is found in the name."""
    return any(re.search(rule, name) for rule in rules)


def first_match(table: tuple[tuple[str, Answer], ...], name: str) -> Answer:
    """The answer of the first rule (regular expression, answer) found in the name.

    A table is exhaustive: a name without a rule is a ValueError, so that nothing is decided by oversight.
    """
    for rule, answer in table:
        if re.search(rule, name):
            return answer
    raise ValueError(f"no rule covers {name}: {', '.join(rule for rule, _ in table)}")
