"""Bounds of the values that users and files give, declared at the field; `prelm_jax.validation` holds values to them.

num_layers: Annotated[int, Bounds(1, 512)] = 12
"""

import dataclasses
import json
import math
from typing import Annotated

from prelm_jax.errors import InputError

Path = tuple[str | int, ...]  # Fields, keys and indices that lead to a value: ("model", "filters", 0).


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Metadata of a number: low <= x <= high and above < x < below."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def rule(self, x: float) -> str | None:
        """The first bound that x violates, as "at least 1"; None within the bounds."""
        rules = {f"at least {self.low}": x >= self.low, f"at most {self.high}": x <= self.high}
        rules |= {f"above {self.above}": x > self.above, f"below {self.below}": x < self.below}
        return next((rule for rule, kept in rules.items() if not kept), None)


Positive = Annotated[int, Bounds(1, 2**31 - 1)]
NotNegative = Annotated[int, Bounds(0, 2**31 - 1)]
Size = Annotated[int, Bounds(1, 2**20)]  # Of an axis, unless it is the vocabulary.
VocabularySize = Annotated[int, Bounds(1, 2**24)]
Layers = Annotated[int, Bounds(1, 512)]  # Each of them is compiled.
Length = Annotated[int, Bounds(1, 2**16 - 1)]  # Of a row of a batch.
Seed = Annotated[int, Bounds(0, 2**32 - 1)]  # JAX takes seeds modulo 2**32.
PositiveFloat = Annotated[float, Bounds(above=0)]
NotNegativeFloat = Annotated[float, Bounds(0)]
Epsilon = Annotated[float, Bounds(1e-37, 1)]  # Smaller values may be 0 in float32.
Fraction = Annotated[float, Bounds(0, 1)]
FractionBelow1 = Annotated[float, Bounds(0, below=1)]  # Dropout, decay rates of moments.


class OutOfBounds(InputError):
    """A value is outside the bounds or types of its field. `path` leads to the field; `rule` says what is allowed."""

    def __init__(self, path: Path, value: object, rule: str):
        self.path, self.value, self.rule, shown = path, value, rule, json.dumps(value, default=repr)
        self.shown = shown if len(shown) <= 60 else f"{shown[:60]}…"
        super().__init__(f"{'.'.join(map(str, path))[:200] or 'the value'} is {self.shown}: {rule}")
