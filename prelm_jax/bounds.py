"""Types and bounds of the values that users and files give: declared at the field, held by one validator.

    num_layers: Annotated[int, Bounds(1, 1024)] = 12

A condition on several fields is a method `check_together` of the dataclass, which raises OutOfBounds.
"""

import contextlib
import dataclasses
import functools
import json
import math
import types
import typing
from typing import Annotated, Any, Literal, TypeVar

from prelm_jax.errors import InputError

FLOAT32_MAX = 3.4e38
NAMES = {int: "an integer", float: "a finite number", bool: "true or false", str: "UTF-8 text", types.NoneType: "null"}
NAMES |= {dict: "an object", list: "a list", tuple: "a tuple"}

Kind = TypeVar("Kind")
Origin = Literal["python", "json", "foreign json"]  # Of a value. In foreign JSON unknown keys are ignored.
Path = tuple[str | int, ...]  # Fields, keys and indices that lead to a value: ("model", "filters", 0).


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Metadata of a number: low <= x <= high and above < x < below."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def rule(self, x: float) -> str | None:
        """What x must be and is not; None within the bounds."""
        rules = {f"at least {self.low}": x >= self.low, f"at most {self.high}": x <= self.high}
        rules |= {f"above {self.above}": x > self.above, f"below {self.below}": x < self.below}
        return next((rule for rule, kept in rules.items() if not kept), None)


Positive = Annotated[int, Bounds(1, 2**31 - 1)]
NotNegative = Annotated[int, Bounds(0, 2**31 - 1)]
Size = Annotated[int, Bounds(1, 2**20)]  # Of an axis, unless it is the vocabulary.
VocabularySize = Annotated[int, Bounds(1, 2**24)]
Layers = Annotated[int, Bounds(1, 1024)]  # Each of them is compiled.
Length = Annotated[int, Bounds(1, 2**16 - 1)]  # Of a row of a batch.
Seed = Annotated[int, Bounds(0, 2**32 - 1)]  # JAX takes seeds modulo 2**32.
PositiveFloat = Annotated[float, Bounds(above=0)]
NotNegativeFloat = Annotated[float, Bounds(0)]
Epsilon = Annotated[float, Bounds(1e-37, 1)]  # What is smaller may be 0 in float32.
Fraction = Annotated[float, Bounds(0, 1)]
FractionBelow1 = Annotated[float, Bounds(0, below=1)]  # Dropout, decay rates of moments.


class OutOfBounds(InputError):
    """A value is not what its field declares. `path` leads to the field, `rule` says what is allowed."""

    def __init__(self, path: Path, value: object, rule: str):
        self.path, self.value, self.rule, shown = path, value, rule, json.dumps(value, default=repr)
        self.shown = shown if len(shown) <= 60 else f"{shown[:60]}…"
        super().__init__(f"{'.'.join(map(str, path)) or 'the value'} is {self.shown}: {rule}")


def check(value: object, annotation: object = Any, path: Path = ()) -> None:
    """Raises OutOfBounds if a value in Python, or a field of a dataclass at any depth, is not as annotated."""
    _convert(annotation, value, path, "python")


def read(annotation: type[Kind], value: object, source: object, foreign: bool = False, **keys: str) -> Kind:
    """A value from JSON as it is annotated: arrays as tuples, objects as dataclasses.

    Raises InputError, naming `source` and the key. `foreign`: keys that a dataclass does not have are ignored.
    `keys`: what fields of the outermost dataclass are called in the file.
    """
    try:
        return _convert(annotation, value, (), "foreign json" if foreign else "json")
    except OutOfBounds as error:
        path = tuple(keys.get(str(name), name) for name in error.path)
        raise InputError(f"{source}: {OutOfBounds(path, error.value, error.rule)}") from None


def _convert(annotation: Any, value: Any, path: Path, origin: Origin) -> Any:
    kind, arguments, rule = typing.get_origin(annotation) or annotation, typing.get_args(annotation), None
    if dataclasses.is_dataclass(kind) or dataclasses.is_dataclass(value):
        return _convert_fields(kind, value, path, origin)
    if kind in (typing.Union, types.UnionType):
        *others, last = sorted(arguments, key=lambda member: member is not types.NoneType)
        for member in others:
            with contextlib.suppress(OutOfBounds):
                return _convert(member, value, path, origin)
        return _convert(last, value, path, origin)
    if kind is Annotated:
        value = _convert(arguments[0], value, path, origin)
        rule = next((rule for each in arguments[1:] if isinstance(each, Bounds) and (rule := each.rule(value))), None)
    elif kind is Literal and value not in arguments:
        rule = " or ".join(map(str, arguments))
    elif kind in NAMES and not _is(value, kind, origin):
        rule = NAMES[kind]
    elif kind is float and origin != "python":
        return float(value)
    elif kind is dict and arguments:
        return {key: _convert(arguments[1], x, (*path, key), origin) for key, x in value.items()}
    elif kind in (tuple, list) and arguments:
        kinds = arguments[:1] * len(value) if kind is list or arguments[-1] is Ellipsis else arguments
        if len(kinds) == len(value):
            return kind(_convert(kinds[i], x, (*path, i), origin) for i, x in enumerate(value))
        rule = f"a list of {len(kinds)}"
    if rule is not None:
        raise OutOfBounds(path, value, f"must be {rule}")
    return value


def _is(value: Any, kind: type, origin: Origin) -> bool:
    if kind is float:  # A bool is an int, and NaN is not below anything.
        return isinstance(value, int | float) and type(value) is not bool and abs(value) <= FLOAT32_MAX
    if kind is str:
        return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)
    return type(value) is (list if kind is tuple and origin != "python" else kind)


def _convert_fields(kind: Any, value: Any, path: Path, origin: Origin) -> Any:
    if dataclasses.is_dataclass(value):
        declared = dataclasses.is_dataclass(kind) and not isinstance(value, kind)
        kind, origin = kind if declared else type(value), "python"
    if not isinstance(value, kind if origin == "python" else dict):
        raise OutOfBounds(path, value, f"must be {'an object' if origin != 'python' else kind.__name__}")
    given, converted = vars(value) if origin == "python" else value, {}
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if origin == "json" and (unknown := next((name for name in given if name not in fields), None)):
        raise OutOfBounds((*path, unknown), given[unknown], f"there is no such field; fields: {', '.join(fields)}")
    for name, field in fields.items():
        if name in given:
            converted[name] = _convert(_hints(kind)[name], given[name], (*path, name), origin)
        elif field.default is field.default_factory:  # There is neither.
            raise OutOfBounds((*path, name), None, "must be given")
    result = value if origin == "python" else kind(**converted)
    try:
        getattr(result, "check_together", lambda: None)()
    except OutOfBounds as error:
        raise OutOfBounds((*path, *error.path), error.value, error.rule) from None
    return result


_hints = functools.cache(functools.partial(typing.get_type_hints, include_extras=True))
