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

import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, cast, get_args

from prelm_jax.corpus import readers
from prelm_jax.corpus.sources import matching_files
from prelm_jax.corpus.spec import split_options
from prelm_jax.data.examples import Columns, Example, Kind, Label
from prelm_jax.data.framing import QUESTION_LENGTH
from prelm_jax.data.tags import with_bio_tags
from prelm_jax.errors import InputError
from prelm_jax.finetuning.conll import read_conll, read_conllu
from prelm_jax.finetuning.records import Malformed, column_number, listed
from prelm_jax.finetuning.squad import read_squad
from prelm_jax.finetuning.tables import read_csv, read_jsonl, read_label_text, read_parquet, read_tfds, read_tsv
from prelm_jax.finetuning.values import make_example

Format = Literal["tsv", "csv", "jsonl", "parquet", "conll", "conllu", "squad", "label-text"]
ENDINGS: dict[Format, tuple[str, ...]] = {
    "tsv": (".tsv", ".tab"),
    "csv": (".csv",),
    "conll": (".conll", ".bio", ".iob", ".iob2", ".bioes", ".bmes", ".ner"),
    "conllu": (".conllu",),
}

DEFAULTS: dict[Kind, Columns] = {
    "label": Columns("text", None, "label"),
    "labels": Columns("text", None, "labels"),
    "number": Columns("text", None, "label"),
    "choice": Columns("text", None, "label", options=("options",)),
    "tags": Columns("tokens", None, "tags"),
    "spans": Columns("question", "context", "answers"),
}


class LabelledData(NamedTuple):
    """Examples, and the number of lines that were left out or changed, by the reason."""

    examples: list[Example]
    counts: dict[str, int]


@dataclass(frozen=True)
class FileSpec:
    """A parsed SPEC of a labeled file."""

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
        """How a file is read, by the ending of its name; any other ending: as conll for tags, else as tsv."""
        if self.format:
            return self.format
        ending = readers.extension(path)
        if ending in readers.KINDS:
            if ending == ".json" and kind == "spans":
                return "squad"
            return "jsonl" if readers.KINDS[ending] == readers.JSON_LINES else "parquet"
        named = (name for name, endings in ENDINGS.items() if ending in endings)
        return next(named, "conll" if kind == "tags" else "tsv")


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
        unheaded = parsed.header is None and name in ("tsv", "csv") and None not in map(column_number, used)
        for where, fields in _READERS[name](location, used, parsed.header, counts):
            try:
                examples.append(make_example(kind, own, fields, labelled, number))
            except Malformed as error:
                if not parsed.skip_malformed:
                    raise InputError(f"{error.where or where} {error}") from None
                counts["malformed"] += 1
            number += 1
    _check_examples(spec, examples, counts)
    if kind == "label" and labelled and unheaded:
        _check_first(spec, examples)
    if kind == "tags" and labelled:
        examples = with_bio_tags(examples, counts)
    return LabelledData(examples, dict(+counts))  # Without reasons that never occurred.


def _check_examples(spec: str, examples: Sequence[Example], counts: Mapping[str, int]) -> None:
    """Raises InputError if there are no examples, or two with one identifier."""
    if not examples:
        left_out = ", ".join(f"{number} {name}" for name, number in counts.items())
        raise InputError(f"{spec} has no examples ({left_out or 'empty'})")
    name, occurrences = Counter(example.id for example in examples).most_common(1)[0]
    if occurrences > 1:
        raise InputError(f"{spec}: {occurrences} examples have the identifier {name}: name another column")


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
            f"{spec} has labels that the model does not know ({listed(unknown)}): it knows {listed(known)}"
        )
    if kind == "label" and len(names) == 1:
        raise InputError(f"{spec}: all examples have the label {names[0]}: there is nothing to learn or to measure")
    if (kind == "labels" and not known) or (kind == "tags" and len(known) == 1):
        found = f"all words have the tag {known[0]}" if known else "no example has a label"
        raise InputError(f"{spec}: {found}: there is nothing to learn")


def print_counts(spec: str, counts: Mapping[str, int], num_cut: int, number: int, kind: Kind, max_length: int) -> None:
    """Prints what was left out of the examples of a file, read otherwise, or cut, on the standard error."""
    for name, count in counts.items():
        print(f"{spec}: {count:,} {name}", file=sys.stderr)
    if num_cut:
        # Passages are never cut.
        what, length = ("questions", QUESTION_LENGTH) if kind == "spans" else ("examples", max_length)
        share = f"{num_cut:,} of {number:,} {what} ({num_cut / number:.1%})"
        print(f"{spec}: {share} cut to {length} tokens", file=sys.stderr)


def _names(label: Label | None) -> Sequence[str]:
    return (label,) if isinstance(label, str) else label if isinstance(label, tuple) else ()


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


_READERS = {
    "tsv": read_tsv,
    "csv": read_csv,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    "conll": read_conll,
    "conllu": read_conllu,
    "squad": read_squad,
    "label-text": read_label_text,
    "tfds": read_tfds,
}
