r"""Labelled files to examples.

The ending of a file's name says how it is read, or the option `format` of its SPEC:

    LOCATION[,OPTION=VALUE]...        train.tsv        sts-train.csv,format=tsv        tfds:glue/mrpc:validation

tsv          cells between tabs; quotation marks are characters like any other
csv          cells between commas, quoted where they hold commas, quotation marks or line ends
jsonl        one JSON object a line, or one array of objects
parquet      one example a row; classes of Hugging Face's datasets are read as their names
conll        a word and its tags a line, between spaces or tabs; a blank line ends a sentence
conllu       CoNLL-U: ten columns between tabs; comments, multiword tokens and empty nodes are left out
squad        SQuAD's JSON, 1.1 and 2.0
label-text   a label, a space and a text a line

Text files are UTF-8 and may be compressed; lines end at \n, \r\n or \r. A file has a header unless all its columns are
given by number. Nothing is left out without being counted, and errors name the file and the line, row or question.
"""

import csv
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, cast, get_args

from prelm_jax.corpus import readers, tfds
from prelm_jax.corpus.readers import File
from prelm_jax.corpus.sources import matching_files
from prelm_jax.corpus.spec import split_options
from prelm_jax.data.examples import Answers, Columns, Example, Kind, Label
from prelm_jax.errors import InputError
from prelm_jax.storage import decode_utf8

Format = Literal["tsv", "csv", "jsonl", "parquet", "conll", "conllu", "squad", "label-text"]
ENDINGS: dict[Format, tuple[str, ...]] = {
    "tsv": (".tsv", ".tab"),
    "csv": (".csv",),
    "conll": (".conll", ".bio", ".iob", ".iob2", ".bioes", ".bmes", ".ner"),
    "conllu": (".conllu",),
}
CONLLU = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")


DEFAULTS: dict[Kind, Columns] = {
    "label": Columns("text", None, "label"),
    "labels": Columns("text", None, "labels"),
    "number": Columns("text", None, "label"),
    "choice": Columns("text", None, "label", options=("options",)),
    "tags": Columns("tokens", None, "tags"),
    "spans": Columns("question", "context", "answers"),
}


class LabelledData(NamedTuple):
    """Examples, and by name how many lines were left out or read otherwise than they are written."""

    examples: list[Example]
    counts: dict[str, int]


@dataclass(frozen=True)
class FileSpec:
    """A parsed SPEC of a labelled file."""

    location: str
    format: Format | None = None  # By the ending of the name if unset.
    header: bool | None = None  # Whether a table has one; if unset, unless all columns are given by number.
    skip_malformed: bool = False  # Leave malformed lines out and count them, instead of refusing the file.

    @classmethod
    def parse(cls, item: str) -> "FileSpec":
        """Raises InputError for an unknown option or value."""
        values = {"format": get_args(Format), "header": ("yes", "no"), "malformed": ("error", "skip")}
        location, options = split_options(item, tuple(values))
        for name, value in options.items():
            if value not in values[name]:
                raise InputError(f"{item}: {name} is one of {', '.join(values[name])}, not {value or 'nothing'}")
        header = options.get("header")
        return cls(
            location,
            cast(Format | None, options.get("format")),
            None if header is None else header == "yes",
            options.get("malformed") == "skip",
        )

    def format_of(self, path: str, kind: Kind) -> Format:
        """How a file is read; names that say nothing are those of sentences with tags, else of tables with tabs."""
        if self.format:
            return self.format
        ending = readers.extension(path)
        if ending in readers.KINDS:
            if ending == ".json" and kind == "spans":
                return "squad"
            return "jsonl" if readers.KINDS[ending] == readers.JSON_LINES else "parquet"
        named = (name for name, endings in ENDINGS.items() if ending in endings)
        return next(named, "conll" if kind == "tags" else "tsv")


class Malformed(Exception):
    """What is wrong with one line, row or question; `where` replaces the place that the reader names."""

    def __init__(self, message: str, where: str | None = None):
        super().__init__(message)
        self.where = where


Fields = Callable[[str], object]  # The value of a column, by its name or number. Raises Malformed if there is none.
Record = tuple[str, Fields]  # The place in a file, FILE:LINE for example, and what is there.


def read_examples(spec: str, kind: Kind, columns: Columns | None = None, labelled: bool = True) -> LabelledData:
    """The examples of the files of a SPEC, in their order.

    labelled=False does not read labels: `label` of each example is None. Raises InputError for a column that is not
    there, and for the first malformed line: a cell too few or too many, no text, a label of another kind.

    Example: `read_examples("train.tsv", "label", Columns(text="0", label="1")).examples`
    """
    parsed = FileSpec.parse(spec)
    counts: Counter[str] = Counter()
    examples: list[Example] = []
    number, unheaded = 0, False
    for name, location in _sources(parsed, kind):
        own = _completed(columns or Columns(), _defaults(name, kind))
        used = _used(kind, own, labelled)
        unheaded = parsed.header is None and name in ("tsv", "csv") and None not in map(_number, used)
        for where, fields in _READERS[name](location, used, parsed.header, counts):
            try:
                examples.append(_example(kind, own, fields, labelled, number))
            except Malformed as error:
                if not parsed.skip_malformed:
                    raise InputError(f"{error.where or where} {error}") from None
                counts["malformed"] += 1
            number += 1
    if not examples:
        raise InputError(
            f"{spec} has no examples ({', '.join(f'{n} {name}' for name, n in counts.items()) or 'empty'})"
        )
    name, occurrences = Counter(example.id for example in examples).most_common(1)[0]
    if occurrences > 1:
        raise InputError(f"{spec}: {occurrences} examples have the identifier {name}: name another column")
    if kind == "label" and labelled and unheaded:
        _check_first(spec, examples)
    if kind == "tags" and labelled:
        examples = _with_bio_tags(examples, counts)
    return LabelledData(examples, dict(counts))


def _check_first(spec: str, examples: Sequence[Example]) -> None:
    """Raises InputError if the label of the first line occurs nowhere else, and others do: it looks like a header."""
    labels = Counter(example.label for example in examples)
    first = examples[0].label
    if len(labels) > 2 and labels[first] == 1 and all(number > 1 for label, number in labels.items() if label != first):
        raise InputError(
            f"{spec}: the label of the first line ({first}) occurs nowhere else: give ,header=yes if that line is a "
            "header, else ,header=no"
        )


def label_names(examples: Iterable[Example], kind: Kind) -> tuple[str, ...]:
    """The names of the labels that occur, sorted; numerically if all are integers. Nothing for other kinds.

    Example: the labels "10", "9" are ("9", "10").
    """
    if kind not in ("label", "labels", "tags"):
        return ()
    names = {name for example in examples for name in _names(example.label)}
    integers = all(re.fullmatch(r"-?\d+", name, re.ASCII) for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if integers else 0, name)))


def check_labels(spec: str, data: LabelledData, kind: Kind, known: Sequence[str]) -> None:
    """Raises InputError for labels that a model does not know, and where all examples have the same label."""
    names = label_names(data.examples, kind)
    if unknown := sorted(set(names) - set(known)):
        raise InputError(
            f"{spec} has labels that the model does not know ({_listed(unknown)}): it knows {_listed(known)}"
        )
    if kind == "label" and len(names) == 1:
        raise InputError(f"{spec}: all examples have the label {names[0]}: there is nothing to learn or to measure")


def print_counts(spec: str, counts: Mapping[str, int], num_cut: int, number: int, max_length: int) -> None:
    """Prints what was left out of the examples of a file, read otherwise, or cut, on the standard error."""
    for name, count in counts.items():
        print(f"{spec}: {count:,} {name}", file=sys.stderr)
    if num_cut:
        share = f"{num_cut:,} of {number:,} examples ({num_cut / number:.1%})"
        print(f"{spec}: {share} cut to {max_length} tokens", file=sys.stderr)


def _names(label: Label | None) -> Sequence[str]:
    return (label,) if isinstance(label, str) else label if isinstance(label, tuple) else ()


def _listed(names: Iterable[object]) -> str:
    shown = [str(name) for name in names]
    return ", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "")


# ---- Files to records ------------------------------------------------------------------------------------------------


def _sources(spec: FileSpec, kind: Kind) -> list[tuple[Format | Literal["tfds"], str]]:
    if spec.location.startswith("tfds:"):
        return [("tfds", spec.location)]
    return [(spec.format_of(path, kind), path) for path in matching_files(spec.location)]


def _defaults(name: str, kind: Kind) -> Columns:
    own = {
        "conll": Columns("0", None, "-1"),
        "conllu": Columns("form", None, "upos"),
        "label-text": Columns("1", None, "0"),
        "squad": Columns("question", "context", "answers", id="id"),
    }
    return own.get(name, DEFAULTS[kind])


def _completed(columns: Columns, defaults: Columns) -> Columns:
    given = {name: value for name, value in vars(columns).items() if value not in (None, ())}
    return replace(defaults, **given)


def _used(kind: Kind, columns: Columns, labelled: bool) -> list[str]:
    """The columns that examples of a kind are made of."""
    used = [columns.text, columns.pair, columns.id, *(columns.options if kind == "choice" else ())]
    if labelled:
        used += columns.indicators if kind == "labels" and columns.indicators else [columns.label]
    return [name for name in used if name is not None]


def _lines(path: str) -> Iterator[tuple[str, str]]:
    """(FILE:LINE, the line with its end) of a text file without its byte order mark."""
    for number, (offset, line) in enumerate(readers.lines(File.at(path), lambda size: None), start=1):
        text = decode_utf8(path, offset, line)
        yield f"{path}:{number}", text.removeprefix("\ufeff") if offset == 0 else text


def _filled(text: str, counts: Counter[str]) -> bool:
    if text.strip():
        return True
    counts["blank lines"] += 1
    return False


def _tsv(path: str, used: Sequence[str], header: bool | None, counts: Counter[str]) -> Iterator[Record]:
    rows = ((where, line.rstrip("\r\n").split("\t")) for where, line in _lines(path) if _filled(line, counts))
    return _table(path, rows, used, header, counts)


def _label_text(path: str, used: Sequence[str], header: bool | None, counts: Counter[str]) -> Iterator[Record]:
    rows = ((where, line.rstrip("\r\n").split(" ", 1)) for where, line in _lines(path) if _filled(line, counts))
    return _table(path, rows, used, header, counts)


def _csv(path: str, used: Sequence[str], header: bool | None, counts: Counter[str]) -> Iterator[Record]:
    def rows() -> Iterator[tuple[str, list[str]]]:
        csv.field_size_limit(2**31 - 1)  # A passage may be longer than the default, 131,072 characters.
        table, number = csv.reader((line for _, line in _lines(path)), strict=True), 1
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
            if _filled("".join(cells), counts):
                yield f"{path}:{number}", cells
            number = table.line_num + 1

    return _table(path, rows(), used, header, counts)


def _table(
    path: str, rows: Iterator[tuple[str, list[str]]], used: Sequence[str], header: bool | None, counts: Counter[str]
) -> Iterator[Record]:
    """Rows of cells: with a header as many in each row as in it, without one at least those that are read."""
    numbers = {column: _number(column) for column in used}
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
            found = f"only {_listed(names)}" if names else "for it has no header: give numbers of columns, from 0"
            raise InputError(f"{path} has no column `{column}`, {found} (--columns)")
    width = len(names)
    for where, cells in rows:
        width = width or len(cells)
        if not names and len(cells) > width:
            counts["lines with more columns than the first"] += 1
        yield where, _of_cells(cells, cast(dict[str, int], numbers), width if names else None)


def _number(column: str) -> int | None:
    return int(column) if re.fullmatch(r"-?\d+", column, re.ASCII) else None


def _of_cells(cells: list[str], numbers: dict[str, int], width: int | None) -> Fields:
    def value(column: str) -> str:
        if width is not None and len(cells) != width:
            raise Malformed(f"has {len(cells)} columns, its header has {width}")
        if not -len(cells) <= numbers[column] < len(cells):
            raise Malformed(f"has {len(cells)} columns, none with the number {numbers[column]}")
        return cells[numbers[column]]

    return value


def _json(path: str, used: Sequence[str], header: bool | None, counts: Counter[str]) -> Iterator[Record]:
    lines = _lines(path)
    for where, line in lines:
        if not _filled(line, counts):
            continue
        if line.lstrip().startswith("["):
            records = _parse_json(line + "".join(text for _, text in lines))
            if not isinstance(records, list):
                raise InputError(f"{path} is not JSON: {records}")
            for number, record in enumerate(records):
                yield f"{path}: record {number}", _of_object(record)
        else:
            yield where, _of_object(_parse_json(line))


def _parse_json(text: str) -> object:
    """The value, or the error that says why there is none."""
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # An escape may be half of a surrogate pair.
    except (ValueError, RecursionError) as error:
        return error
    return value


def _of_object(record: object) -> Fields:
    def value(column: str) -> object:
        if isinstance(record, Exception):
            raise Malformed(f"is not JSON: {record}")
        if not isinstance(record, dict):
            raise Malformed("is not a JSON object")
        if record.get(column) is None:
            raise Malformed(f"has no `{column}`, only {_listed(record)}")
        return record[column]

    return value


def _parquet(path: str, used: Sequence[str], header: bool | None, counts: Counter[str]) -> Iterator[Record]:
    for number, row in enumerate(readers.parquet_rows(File.at(path), used)):
        yield f"{path}: row {number}", _of_object(row)


def _tfds(path: str, used: Sequence[str], header: bool | None, counts: Counter[str]) -> Iterator[Record]:
    for number, record in enumerate(tfds.labelled_records(path, used)):
        yield f"{path}: record {number}", _of_object(record)


def _squad(path: str, used: Sequence[str], header: bool | None, counts: Counter[str]) -> Iterator[Record]:
    content = _parse_json("".join(line for _, line in _lines(path)))
    try:
        for article in cast(dict, content)["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    record = question | {"context": paragraph["context"]}
                    yield f"{path}: question {question['id']}", _of_object(record)
    except (KeyError, TypeError, AttributeError) as error:
        problem = content if isinstance(content, Exception) else f"{type(error).__name__}: {error}"
        raise InputError(
            f"{path} is not SQuAD's JSON, data > paragraphs > context, qas > id, question, answers ({problem}); if it "
            "has an object a line, give ,format=jsonl"
        ) from None


def _conll(path: str, used: Sequence[str], header: bool | None, counts: Counter[str]) -> Iterator[Record]:
    width = 0
    for lines in _sentences(path):
        rows = [(where, line.split("\t") if "\t" in line else re.split(" +", line)) for where, line in lines]
        width = width or len(rows[0][1])
        if rows[0][1][0] == "-DOCSTART-":
            counts["document boundaries"] += 1
        else:
            yield rows[0][0], _of_words(rows, {}, width)


def _conllu(path: str, used: Sequence[str], header: bool | None, counts: Counter[str]) -> Iterator[Record]:
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
            yield rows[0][0], _of_words(rows, {name: i for i, name in enumerate(CONLLU)}, len(CONLLU))


def _sentences(path: str) -> Iterator[list[tuple[str, str]]]:
    """The lines of each sentence, without white space around them."""
    sentence = []
    for where, line in _lines(path):
        if text := line.strip(" \t\r\n"):
            sentence.append((where, text))
        elif sentence:
            yield sentence
            sentence = []
    if sentence:
        yield sentence


def _of_words(rows: list[tuple[str, list[str]]], names: dict[str, int], width: int) -> Fields:
    """A column of a sentence as a list, an item a word."""

    def value(column: str) -> list[str]:
        number = names.get(column.lower(), _number(column))
        if number is None or not -width <= number < width:
            raise InputError(f"{rows[0][0]} has no column {column}, only {_listed(names or range(width))} (--columns)")
        for where, cells in rows:
            if len(cells) != width:
                raise Malformed(f"has {len(cells)} columns, not {width}", where)
        return [cells[number] for _, cells in rows]

    return value


_READERS = {
    "tsv": _tsv,
    "csv": _csv,
    "jsonl": _json,
    "parquet": _parquet,
    "conll": _conll,
    "conllu": _conllu,
    "squad": _squad,
    "label-text": _label_text,
    "tfds": _tfds,
}


# ---- Records to examples ---------------------------------------------------------------------------------------------


def _example(kind: Kind, columns: Columns, fields: Fields, labelled: bool, number: int) -> Example:
    name = str(number) if columns.id is None else _name(fields(columns.id), columns.id)
    text, pair = cast(str, columns.text), columns.pair
    if kind == "tags":
        words = _words(fields(text), text)
        tags = tuple(_items(fields(cast(str, columns.label)))) if labelled else None
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
    return _answers(value, sequences[0][1]) if kind == "spans" else _name(value, column)


def _text(value: object, column: str) -> str:
    if not isinstance(value, str):
        raise Malformed(f"has `{column}` {_shown(value)}, which is not text")
    if not value.strip():
        raise Malformed(f"has no text in `{column}`")
    return value


def _name(value: object, column: str) -> str:
    """A name; integers and truth values are names too."""
    if isinstance(value, bool | int):
        return str(value).lower()
    if not isinstance(value, str):
        raise Malformed(f"has `{column}` {_shown(value)}, which is not a name")
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
        raise Malformed(f"has {_shown(value)}, which is not a list")
    return items


def _options(columns: Sequence[str], fields: Fields) -> list[str]:
    values = [fields(column) for column in columns]
    if len(values) == 1:
        values = _items(values[0]) if isinstance(values[0], list) else values
    if len(values) < 2:
        raise Malformed(f"has {len(values)} option: a choice needs two columns or more, or a list (--columns.options)")
    return [_text(value, ", ".join(columns)) for value in values]


def _choice(value: object, columns: Columns, number: int) -> int:
    """The number of the right option, from 0, given by its number, its letter or the name of its column."""
    name = _name(value, cast(str, columns.label))
    if name in columns.options[1:] or name == columns.options[0]:
        index = columns.options.index(name)
    elif re.fullmatch("[A-Za-z]", name):
        index = ord(name.upper()) - ord("A")
    else:
        given = _number(name)
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
        raise Malformed(f"has `{column}` {_shown(value)}, which is not a number")
    return float(text)


def _is_set(value: object, column: str) -> bool:
    text = str(value).strip().lower()
    if text not in ("0", "1", "true", "false", "0.0", "1.0"):
        raise Malformed(f"has `{column}` {_shown(value)}, which is neither 0 nor 1")
    return text in ("1", "true", "1.0")


def _answers(value: object, passage: str) -> Answers:
    """Answers from [{"text", "answer_start"}, …] or {"text": […], "answer_start": […]}, checked against the passage."""
    try:
        if isinstance(value, dict):
            pairs = list(zip(value["text"], value["answer_start"], strict=True))
        else:
            pairs = [(each["text"], each["answer_start"]) for each in cast(list[dict], value)]
        found = [passage[start : start + len(text)] == text != "" for text, start in pairs]
    except (KeyError, TypeError, ValueError):
        raise Malformed(f"has answers {_shown(value)}, which are not objects with text and answer_start") from None
    if not all(found):
        text, start = pairs[found.index(False)]
        raise Malformed(f"has the answer {_shown(text)}, which is not in its passage at character {start}")
    return Answers(tuple(text for text, _ in pairs), tuple(start for _, start in pairs))


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else f"{text[:60]}…"


# ---- Tags ------------------------------------------------------------------------------------------------------------


def is_bio(names: Iterable[str]) -> bool:
    """Whether tags mark spans in BIO: `B-` and `I-` before a type, and `O`."""
    types = set(names) - {"O"}
    return bool(types) and all(re.match(r"[BI]-.", name, re.DOTALL) for name in types)


def _with_bio_tags(examples: list[Example], counts: Counter[str]) -> list[Example]:
    """The examples with spans in BIO, where all tags are of BIO, IOB1, BIOES, BILOU or BMES; else as they are."""
    names = set(label_names(examples, "tags")) - {"O"}
    if not names or not all(re.match(r"[BIMESLU]-.", name, re.DOTALL) for name in names):
        return examples
    converted = []
    for example in examples:
        tags = cast(tuple[str, ...], example.label)
        bio = bio_tags(tags)
        counts["tags converted to BIO"] += sum(a != b for a, b in zip(tags, bio, strict=True))
        converted.append(replace(example, label=bio))
    return converted


def bio_tags(tags: Sequence[str]) -> tuple[str, ...]:
    """Tags of IOB1, BIOES, BILOU or BMES in BIO; those in BIO stay.

    Example: I-PER I-PER O S-LOC B-ORG E-ORG is B-PER I-PER O B-LOC B-ORG I-ORG.
    """
    result, inside = [], ""  # The type of the span that the next word may continue.
    for tag in tags:
        prefix, _, name = tag.partition("-")
        continues = prefix in "IMEL" and name == inside
        result.append(tag if tag == "O" else f"{'I' if continues else 'B'}-{name}")
        inside = "" if tag == "O" else name
    return tuple(result)
