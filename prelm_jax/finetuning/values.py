"""Records to examples: the values of columns as texts, words and labels."""

import math
import re
from collections.abc import Sequence
from typing import cast

from prelm_jax.data.examples import Columns, Example, Kind, Label
from prelm_jax.finetuning.records import Fields, Malformed, column_number, shown
from prelm_jax.finetuning.squad import answers


def make_example(kind: Kind, columns: Columns, fields: Fields, labelled: bool, number: int) -> Example:
    """The example of a record; `number` names it where no column does. Raises Malformed."""
    name = str(number) if columns.id is None else _name(fields(columns.id), columns.id)
    text, pair = cast(str, columns.text), columns.pair
    if kind == "tags":
        words = _words(fields(text), text)
        column = cast(str, columns.label)
        tags = tuple(_name(tag, column) for tag in _items(fields(column))) if labelled else None
        if tags is not None and len(tags) != len(words):
            raise Malformed(f"has {len(words)} words and {len(tags)} tags")
        return Example(name, ((words,),), tags)
    parts = [_text(fields(text), text), *([] if pair is None else [_text(fields(pair), pair)])]
    sequences = (tuple(parts),)
    if kind == "choice":
        beginning = "".join(f"{part} " for part in parts[1:])
        options = _options(columns.options, fields)
        sequences = tuple((parts[0], beginning + option) for option in options)
    return Example(name, sequences, _label(kind, columns, fields, sequences) if labelled else None)


def _label(kind: Kind, columns: Columns, fields: Fields, sequences: tuple[tuple[str, ...], ...]) -> Label:
    column = cast(str, columns.label)
    if kind == "labels":
        if columns.indicators:
            return tuple(each for each in columns.indicators if _is_set(fields(each), each))
        value = fields(column)
        names = value.split(",") if isinstance(value, str) and value.strip() else _items(value)
        return tuple(dict.fromkeys(_name(each, column) for each in names))
    value = fields(column)
    if kind == "number":
        return _float(value, column)
    if kind == "choice":
        return _choice(value, columns, len(sequences))
    return answers(value, sequences[0][1]) if kind == "spans" else _name(value, column)


def _text(value: object, column: str) -> str:
    if not isinstance(value, str):
        raise Malformed(f"has `{column}` {shown(value)}, which is not text")
    if not value.strip():
        raise Malformed(f"has no text in `{column}`")
    return value


def _name(value: object, column: str) -> str:
    """A name; integers and truth values are names too."""
    if isinstance(value, bool | int):
        return str(value).lower()
    if not isinstance(value, str):
        raise Malformed(f"has `{column}` {shown(value)}, which is not a name")
    if not value.strip():
        raise Malformed(f"has nothing in `{column}`")
    return value.strip()


def _words(value: object, column: str) -> tuple[str, ...]:
    words = tuple(_text(word, column) for word in _items(value))
    if not words:
        raise Malformed(f"has no words in `{column}`")
    return words


def _items(value: object) -> list:
    """A list, or the words of a text that are separated by spaces."""
    items = value.split() if isinstance(value, str) else value
    if not isinstance(items, list):
        raise Malformed(f"has {shown(value)}, which is not a list")
    return items


def _options(columns: Sequence[str], fields: Fields) -> list[str]:
    values = [fields(column) for column in columns]
    if len(values) == 1:
        values = _items(values[0]) if isinstance(values[0], list) else values
    if len(values) < 2:
        raise Malformed(f"has {len(values)} option: a choice needs two columns or more, or a list (--columns.options)")
    return [_text(value, ", ".join(columns)) for value in values]


def _choice(value: object, columns: Columns, number: int) -> int:
    """The number of the right option, from 0, given by its number, its letter or the name of its column.

    The number of a column is no name: with the options in columns 1 and 2, the label 1 is the second option.
    """
    name = _name(value, cast(str, columns.label))
    if column_number(name) is None and name in columns.options:
        index = columns.options.index(name)
    elif re.fullmatch("[A-Za-z]", name):
        index = ord(name.upper()) - ord("A")
    else:
        given = column_number(name)
        index = -1 if given is None else given - columns.first_option
    if not 0 <= index < number:
        raise Malformed(
            f"has the label {name}, which is none of the {number} options: give a number from {columns.first_option} "
            "(--columns.first-option), a letter from A, or the name of a column"
        )
    return index


def _float(value: object, column: str) -> float:
    text = value.strip() if isinstance(value, str) else value
    if isinstance(text, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text, re.ASCII):
        text = float(text)
    if isinstance(text, bool) or not isinstance(text, int | float) or not math.isfinite(text):
        raise Malformed(f"has `{column}` {shown(value)}, which is not a number")
    return float(text)


def _is_set(value: object, column: str) -> bool:
    text = str(value).strip().lower()
    if text not in ("0", "1", "true", "false", "0.0", "1.0"):
        raise Malformed(f"has `{column}` {shown(value)}, which is neither 0 nor 1")
    return text in ("1", "true", "1.0")
