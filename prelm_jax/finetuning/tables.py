"""Readers of tables: an example in a row of cells (tsv, csv, label-text) or in an object (jsonl, parquet, tfds)."""

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import cast

from prelm_jax.corpus import readers, tfds
from prelm_jax.corpus.readers import File
from prelm_jax.errors import InputError
from prelm_jax.finetuning.records import (
    Fields,
    Malformed,
    Record,
    column_number,
    is_filled,
    listed,
    object_fields,
    parse_json,
    text_lines,
)


def read_tsv(path: str, used: Sequence[str], header: bool | None, counts: Counter[str]) -> Iterator[Record]:
    """Rows of cells between tabs."""
    rows = ((where, line.rstrip("\r\n").split("\t")) for where, line in text_lines(path) if is_filled(line, counts))
    return _table(path, rows, used, header, counts)


def read_label_text(path: str, used: Sequence[str], header: bool | None, counts: Counter[str]) -> Iterator[Record]:
    """Rows of a label and a text."""
    rows = ((where, line.rstrip("\r\n").split(" ", 1)) for where, line in text_lines(path) if is_filled(line, counts))
    return _table(path, rows, used, header, counts)


def read_csv(path: str, used: Sequence[str], header: bool | None, counts: Counter[str]) -> Iterator[Record]:
    """Rows of cells as CSV quotes them."""

    def rows() -> Iterator[tuple[str, list[str]]]:
        csv.field_size_limit(2**31 - 1)  # A passage may be longer than the default, 131,072 characters.
        table, number = csv.reader((line for _, line in text_lines(path)), strict=True), 1
        while True:
            try:
                cells = next(table)
            except StopIteration:
                return
            except csv.Error as error:
                raise InputError(
                    f"{path}:{number} is not CSV ({error}): write a quotation mark in a quoted cell twice, or give "
                    ",format=tsv for a file without quoting"
                ) from None
            if is_filled("".join(cells), counts):
                yield f"{path}:{number}", cells
            number = table.line_num + 1

    return _table(path, rows(), used, header, counts)


def _table(
    path: str, rows: Iterator[tuple[str, list[str]]], used: Sequence[str], header: bool | None, counts: Counter[str]
) -> Iterator[Record]:
    """Rows of cells. With a header, each row must have as many cells; without one, at least those that are read."""
    numbers = {column: column_number(column) for column in used}
    names: list[str] = []
    if header or (header is None and None in numbers.values()):
        names = [name.strip() for name in next(rows, ("", []))[1]]
        if not names:
            return
        for column in used:
            if names.count(column) > 1:
                raise InputError(f"{path} has {names.count(column)} columns `{column}`: give the number of one, from 0")
            if column in names:
                numbers[column] = names.index(column)
    for column, number in numbers.items():
        if number is None or (names and not -len(names) <= number < len(names)):
            found = f"only {listed(names)}" if names else "for it has no header: give numbers of columns, from 0"
            raise InputError(f"{path} has no column `{column}`, {found} (--columns)")
    width = len(names)
    for where, cells in rows:
        width = width or len(cells)
        if not names and len(cells) > width:
            counts["lines with more columns than the first"] += 1
        yield where, _cell_fields(cells, cast(dict[str, int], numbers), width if names else None)


def _cell_fields(cells: list[str], numbers: dict[str, int], width: int | None) -> Fields:
    def value(column: str) -> str:
        if width is not None and len(cells) != width:
            raise Malformed(f"has {len(cells)} columns, its header has {width}")
        if not -len(cells) <= numbers[column] < len(cells):
            raise Malformed(f"has {len(cells)} columns, none with the number {numbers[column]}")
        return cells[numbers[column]]

    return value


def read_jsonl(path: str, used: Sequence[str], header: bool | None, counts: Counter[str]) -> Iterator[Record]:
    """JSON objects: one a line, or one array."""
    lines = text_lines(path)
    for where, line in lines:
        if not is_filled(line, counts):
            continue
        if line.lstrip().startswith("["):
            records = parse_json(line + "".join(text for _, text in lines))
            if not isinstance(records, list):
                raise InputError(f"{path} is not JSON: {records}")
            for number, record in enumerate(records):
                yield f"{path}: record {number}", object_fields(record)
        else:
            yield where, object_fields(parse_json(line))


def read_parquet(path: str, used: Sequence[str], header: bool | None, counts: Counter[str]) -> Iterator[Record]:
    """Rows of a Parquet file."""
    for number, row in enumerate(readers.parquet_rows(File.at(path), used)):
        yield f"{path}: row {number}", object_fields(row)


def read_tfds(path: str, used: Sequence[str], header: bool | None, counts: Counter[str]) -> Iterator[Record]:
    """Records of a prepared dataset, tfds:NAME:SPLIT."""
    for number, record in enumerate(tfds.labelled_records(path, used)):
        yield f"{path}: record {number}", object_fields(record)
