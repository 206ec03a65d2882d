"""Records: what a test found out about a subject, one row an item. The only thing that reports are made of.

DIRECTORY/TEST/SUBJECT-<8 hex>.jsonl: the header, then a row a line; the digits are a digest of the model, the data and
the settings. A record is complete or absent. Measured with another model, other data or other settings, it is another
file.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from prelm_jax import __version__
from prelm_jax.bounds import NotNegative
from prelm_jax.cache import digest
from prelm_jax.errors import InputError
from prelm_jax.storage import output_file, read_lines
from prelm_jax.validation import read as read_json

FORMAT = 1


class Row(NamedTuple):
    """One item of a test."""

    item: str  # Unique in its record among the rows of the same layer and kind.
    group: str  # What intervals resample: the paradigm of a minimal pair, a word, a sentence.
    value: float  # 1 right, 0 wrong, 0.5 a tie; or a distance, a similarity.
    layer: int | None = None  # None: the test has no layers.
    kind: str = ""  # A line of its own within the test: "control", "majority", "dev".
    tie: bool = False
    unknown: int = 0  # Words that the subject does not know.
    gold: float | None = None  # What the value should correlate with, for such metrics.


Lines = dict[tuple[str, int | None], list[Row]]  # (kind, layer) -> rows


@dataclasses.dataclass(frozen=True)
class Header:
    """Whose rows a record has, and what it takes to repeat them."""

    test: str
    metric: str  # How the rows become a number, a name of statistics.METRICS.
    subject: str
    family: str
    model: str  # Fingerprint of the weights and the vocabulary.
    data: str  # Fingerprint of what the test asks.
    settings: dict[str, object]
    step: int | None = None  # Of a training; None: unknown, as for the numbers below.
    words_seen: int | None = None
    flops: float | None = None  # Of the training up to there.
    seed: int | None = None
    seconds: float = 0.0  # That the test took.
    rows: NotNegative = 0
    version: str = __version__
    format: int = FORMAT


@dataclasses.dataclass(frozen=True)
class Record:
    """A header and its rows."""

    header: Header
    rows: tuple[Row, ...]


def record_path(directory: str | os.PathLike, header: Header) -> Path:
    """The file of a record."""
    key = digest([header.model, header.data, header.settings])[:8]
    return Path(directory) / slug(header.test) / f"{slug(header.subject)}-{key}.jsonl"


def slug(name: str) -> str:
    """A name as a part of a file's name: `slug("runs/bert-mini@500")` is "runs-bert-mini-500"."""
    return re.sub(r"[^\w.]+", "-", name).strip("-.")[-80:].strip("-.") or "unnamed"


def write(directory: str | os.PathLike, header: Header, rows: Sequence[Row]) -> Path:
    """Writes a record and returns its path. Raises InputError for a value that is not finite."""
    path = record_path(directory, header)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = dataclasses.replace(header, rows=len(rows))
    with output_file(path) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(header), ensure_ascii=False) + "\n")
        for row in rows:
            if not math.isfinite(row.value):
                raise InputError(f"{header.subject}: {header.test} gives {row.value} for {row.item}: check its weights")
            file.write(json.dumps(_without_defaults(row), ensure_ascii=False) + "\n")
    return path


def read(path: str | os.PathLike) -> Record:
    """The record in a file. Raises InputError, with the line, for a file that is none or lacks rows."""
    first, *lines = read_lines(path) or [""]
    header = read_json(Header, _object(f"{path}:1", first), f"{path}:1")
    if header.format != FORMAT:
        raise InputError(f"{path} has format {header.format}, which this version does not read: measure it again")
    rows = tuple(_row(f"{path}:{number}", fields) for number, fields in enumerate(_objects(path, lines), 2))
    if len(rows) != header.rows:
        raise InputError(f"{path} has {len(rows)} rows, its header says {header.rows}: delete it and measure it again")
    return Record(header, rows)


def find(directory: str | os.PathLike) -> list[Path]:
    """The files of all records in a directory, sorted."""
    return sorted(Path(directory).glob("*/*.jsonl"))


def _without_defaults(row: Row) -> dict[str, object]:
    fields, defaults = row._asdict(), Row._field_defaults
    return {name: value for name, value in fields.items() if name not in defaults or value != defaults[name]}


# There may be many rows: types are checked here, much faster than by `validation`.
_TYPES: Mapping[str, tuple[type, ...]] = {
    "item": (str,),
    "group": (str,),
    "value": (float, int),
    "layer": (int, type(None)),
    "kind": (str,),
    "tie": (bool,),
    "unknown": (int,),
    "gold": (float, int, type(None)),
}


def _row(source: str, fields: dict) -> Row:
    for name, value in fields.items():
        if type(value) not in _TYPES.get(name, ()):
            raise InputError(f"{source}: {name} is {value!r}: not the row of a record")
    try:
        return Row(**fields)
    except TypeError:
        raise InputError(f"{source}: only {', '.join(fields)}: not the row of a record") from None


def _objects(path: str | os.PathLike, lines: Sequence[str]) -> list[dict]:
    """The JSON objects in the lines after the header, at once if none of them is broken: a record may have 100,000."""
    try:
        found = json.loads(f"[{','.join(lines)}]")
    except (ValueError, RecursionError):
        found = []
    whole = len(found) == len(lines) and all(line.startswith("{") and line.endswith("}") for line in lines)
    if whole and all(isinstance(each, dict) for each in found):
        return found
    return [_object(f"{path}:{number}", line) for number, line in enumerate(lines, 2)]


def _object(source: str, line: str) -> dict:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise InputError(f"{source} is no JSON object: not a record of prelm study")
    return fields


def rows_by_line(rows: Sequence[Row]) -> Lines:
    """The rows of each line of a report, in the order of their first rows."""
    lines: Lines = {}
    for row in rows:
        lines.setdefault((row.kind, row.layer), []).append(row)
    return lines
