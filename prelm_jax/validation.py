"""The validator of configs, options and JSON from files: types and bounds are those that the annotations declare.

A condition on several fields is a method `check_together` of the dataclass, which raises OutOfBounds.
"""

import contextlib
import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from prelm_jax.bounds import Bounds, OutOfBounds, Path
from prelm_jax.errors import InputError

Kind = TypeVar("Kind")

TYPES = {  # What a value of the type is called, and whether one is.
    int: ("an integer", lambda x: type(x) is int),
    float: ("a finite number", lambda x: type(x) is not bool and isinstance(x, int | float) and abs(x) <= 3.4e38),
    bool: ("true or false", lambda x: type(x) is bool),
    str: ("UTF-8 text", lambda x: type(x) is str and not any("\ud800" <= each <= "\udfff" for each in x)),
    dict: ("an object", lambda x: type(x) is dict),
    list: ("a list", lambda x: type(x) is list),
    tuple: ("a list", lambda x: type(x) in (list, tuple)),
    types.NoneType: ("null", lambda x: x is None),
}


def check(value: object, annotation: object = Any, path: Path = ()) -> None:
    """Raises OutOfBounds if a value in Python, or a field of a dataclass at any depth, is not as annotated."""
    _converted(annotation, value, path)


def read(annotation: type[Kind], value: object, source: object, keys: Mapping[str, str] | None = None) -> Kind:
    """A value from JSON as it is annotated: arrays as tuples, objects as dataclasses.

    Raises InputError, naming `source` and the key; `keys`: what the file calls fields of the outermost dataclass.
    A key without a field is an error, unless the dataclass has an attribute `other_keys`, which is True.
    """
    try:
        return _converted(annotation, value, ())
    except OutOfBounds as error:
        path = tuple((keys or {}).get(str(name), name) for name in error.path)
        raise InputError(f"{source}: {OutOfBounds(path, error.value, error.rule)}") from None


def _converted(annotation: Any, value: Any, path: Path) -> Any:
    kind, arguments, rule = typing.get_origin(annotation) or annotation, typing.get_args(annotation), None
    if kind in (typing.Union, types.UnionType):
        *others, last = sorted(arguments, key=lambda member: member is not types.NoneType)
        for member in others:
            with contextlib.suppress(OutOfBounds):
                return _converted(member, value, path)
        return _converted(last, value, path)
    if dataclasses.is_dataclass(kind) or dataclasses.is_dataclass(value):
        return _converted_fields(kind, value, path)
    converted, (name, is_one) = value, TYPES.get(kind, ("", lambda x: True))
    if not is_one(value):
        rule = name
    elif kind is Annotated:
        converted = _converted(arguments[0], value, path)
        rule = next((rule for each in arguments[1:] if isinstance(each, Bounds) and (rule := each.rule(value))), None)
    elif kind is Literal and value not in arguments:
        rule = " or ".join(map(str, arguments))
    elif kind is float:
        converted = float(value)
    elif kind is dict and arguments:
        converted = {key: _converted(arguments[1], x, (*path, key)) for key, x in value.items()}
    elif kind in (list, tuple) and arguments:
        kinds = arguments[:1] * len(value) if kind is list or arguments[-1] is Ellipsis else arguments
        converted = kind(_converted(each, x, (*path, i)) for i, (each, x) in enumerate(zip(kinds, value, strict=False)))
        rule = None if len(kinds) == len(value) else f"a list of {len(kinds)}"
    if rule is not None:
        raise OutOfBounds(path, value, f"must be {rule}")
    return converted


def _converted_fields(kind: Any, value: Any, path: Path) -> Any:
    """An instance for an object from JSON. An instance itself, if no field has a list for a tuple and the like."""
    if dataclasses.is_dataclass(kind) and not isinstance(value, kind | dict):
        raise OutOfBounds(path, value, "must be an object")
    from_json = type(value) is dict
    kind, given, converted = (kind, value, {}) if from_json else (type(value), vars(value), {})
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = next((name for name in given if name not in fields), None)
    if unknown is not None and from_json and not getattr(kind, "other_keys", False):
        raise OutOfBounds((*path, unknown), given[unknown], f"there is no such field; fields: {', '.join(fields)}")
    for name, field in fields.items():
        if name in given:
            converted[name] = _converted(_hints(kind)[name], given[name], (*path, name))
            if not from_json and converted[name] != given[name]:
                raise OutOfBounds((*path, name), given[name], f"must be {converted[name]!r} in Python")
        elif field.default is field.default_factory:  # There is neither.
            raise OutOfBounds((*path, name), None, "must be given")
    result = kind(**converted) if from_json else value
    try:
        getattr(result, "check_together", lambda: None)()
    except OutOfBounds as error:
        raise OutOfBounds((*path, *error.path), error.value, error.rule) from None
    return result


_hints = functools.cache(functools.partial(typing.get_type_hints, include_extras=True))
