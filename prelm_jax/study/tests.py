"""Tests by name."""

from collections.abc import Mapping

from prelm_jax.errors import InputError
from prelm_jax.study import geometry, neighbors, pairs, probes, replacement, senses, structural, words
from prelm_jax.study.base import Make, Settings, Test

# In the order of a page.
MODULES = (pairs, probes, structural, senses, words, geometry, neighbors, replacement)
TESTS: Mapping[str, Make] = {name: make for module in MODULES for name, make in module.TESTS.items()}
WITH_ARGUMENT = ("pairs", "similarity", "cka")


def make_test(name: str, settings: Settings) -> Test:
    """The test of a name. Raises InputError for an unknown one, and where its data is missing."""
    kind, colon, argument = name.partition(":")
    if kind not in TESTS:
        raise InputError(f"there is no test {name!r}: choose among {', '.join(TESTS)}")
    if colon and kind not in WITH_ARGUMENT:
        raise InputError(f"{name}: the test {kind} takes nothing after a colon")
    return TESTS[kind](settings, argument)
