"""Records: what the readers of labeled files yield, and the functions that several of them need."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from prelm_jax.corpus import readers
from prelm_jax.corpus.readers import File
from prelm_jax.storage import decode_utf8


class Malformed(Exception):
    """What is wrong with one line, row or question; `where` replaces the location that the reader gave."""

    def __init__(self, message: str, where: str | None = None):
        super().__init__(message)
        self.where = where


Fields = Callable[[str], object]  # The value of a column, by its name or number. Raises Malformed if there is none.
Record = tuple[str, Fields]  # The location in a file, FILE:LINE for example, and the fields found there.


def text_lines(path: str) -> Iterator[tuple[str, str]]:
    """(FILE:LINE, the line with its end) of a text file without its byte order mark."""
    for number, (offset, line) in enumerate(readers.lines(File.at(path), lambda size: None), start=1):
        text = decode_utf8(f"{path}:{number}", offset, line)
        yield f"{path}:{number}", text.removeprefix("\ufeff") if offset == 0 else text


def is_filled(text: str, counts: Counter[str]) -> bool:
    """Whether a line is not blank; counts it if it is."""
    if text.strip():
        return True
    counts["blank lines"] += 1
    return False


def parse_json(text: str) -> object:
    """The value of a JSON text; for a malformed one the error, which `object_fields` raises when a field is read."""
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # An escape may be half of a surrogate pair.
    except (ValueError, RecursionError) as error:
        return error
    return value


def object_fields(record: object) -> Fields:
    """The fields of what `parse_json` returned; each raises Malformed if that is not a JSON object."""

    def value(column: str) -> object:
        if isinstance(record, Exception):
            raise Malformed(f"is not JSON ({record}): write an object a line, or one array")
        if not isinstance(record, dict):
            raise Malformed("is not a JSON object")
        if record.get(column) is None:
            raise Malformed(f"has no `{column}`, only {listed(record)}")
        return record[column]

    return value


def column_number(column: str) -> int | None:
    """The number by which a column is given; None for a name."""
    return int(column) if re.fullmatch(r"-?\d+", column, re.ASCII) else None


def listed(names: Iterable[object]) -> str:
    """The first twenty names, and how many more there are."""
    texts = [str(name) for name in names]
    return ", ".join(texts[:20]) + (f" and {len(texts) - 20} more" if len(texts) > 20 else "")


def shown(value: object) -> str:
    """The beginning of a value as JSON, for messages."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else f"{text[:60]}…"
