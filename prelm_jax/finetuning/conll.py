"""Readers of sentences with tags (conll, conllu)."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from prelm_jax.errors import InputError
from prelm_jax.finetuning.records import Fields, Malformed, Record, column_number, listed, text_lines

CONLLU = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")


def read_conll(path: str, used: Sequence[str], header: bool | None, counts: Counter[str]) -> Iterator[Record]:
    """Sentences of a word and its tags a line."""
    width = 0
    for lines in _sentences(path):
        rows = [(where, line.split("\t") if "\t" in line else re.split(" +", line)) for where, line in lines]
        if rows[0][1][0] == "-DOCSTART-":
            counts["document boundaries"] += 1
            del rows[0]  # Some files have no blank line after it.
        if rows:
            width = width or len(rows[0][1])
            if width == 1 and len(used) > 1:
                raise InputError(f"{rows[0][0]} has one column: give a word and its tag a line, between spaces or tabs")
            yield rows[0][0], _word_fields(rows, {}, width)


def read_conllu(path: str, used: Sequence[str], header: bool | None, counts: Counter[str]) -> Iterator[Record]:
    """Sentences of CoNLL-U."""
    for lines in _sentences(path):
        rows = []
        for where, line in lines:
            if line.startswith("#"):
                continue
            if re.match(r"\d+[-.]\d+\t", line):
                counts["multiword tokens and empty nodes"] += 1
            else:
                rows.append((where, line.split("\t")))
        if rows:
            yield rows[0][0], _word_fields(rows, {name: i for i, name in enumerate(CONLLU)}, len(CONLLU))


def _sentences(path: str) -> Iterator[list[tuple[str, str]]]:
    """The lines of each sentence, without white space around them."""
    sentence = []
    for where, line in text_lines(path):
        if text := line.strip(" \t\r\n"):
            sentence.append((where, text))
        elif sentence:
            yield sentence
            sentence = []
    if sentence:
        yield sentence


def _word_fields(rows: list[tuple[str, list[str]]], names: dict[str, int], width: int) -> Fields:
    """A column of a sentence as a list, an item a word."""

    def value(column: str) -> list[str]:
        number = names.get(column.lower(), column_number(column))
        if number is None or not -width <= number < width:
            raise InputError(f"{rows[0][0]} has no column {column}, only {listed(names or range(width))} (--columns)")
        for where, cells in rows:
            if len(cells) != width:
                raise Malformed(f"has {len(cells)} columns, those before it have {width}", where)
        return [cells[number] for _, cells in rows]

    return value
