"""What a page says of records: a model a row, a test a column, a number with its interval in each cell.

Subjects whose names differ in a part `seed-N` of their paths alone are seeds of one model. RUN@STEP is a point of the
learning curves of RUN; only where a study has nothing else it is a row of the table.
"""

import dataclasses
import re
import statistics as means
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from prelm_jax.errors import InputError
from prelm_jax.progress import Progress
from prelm_jax.study import records, statistics
from prelm_jax.study.records import Header, Lines, Record, Row, rows_by_line
from prelm_jax.study.tests import TESTS

# Tests that are pictures and texts, without a number in the table.
SHOWN = ("cka", "neighbors", "replacement")
# Subjects that are no model of a comparison, in the order of the table.
BASELINES = ("unigram", "trigram", "word2vec")
FRACTIONS = ("accuracy", "macro_accuracy")  # Metrics that are printed in percent.
POINT = re.compile(r"(?!hub:)(.+)@(\d+|best|newest)")  # RUN@STEP; a revision of a hub's model is no step.
TOLERANCE = 0.03  # Relative difference of budgets that count as equal: batches have more or less padding.


class Score(NamedTuple):
    """A cell: the mean over seeds, the interval over groups, and what else people should know of it."""

    value: float
    low: float
    high: float
    layer: int | None  # None: the test has no layers.
    lowest: float  # Of the seeds, as `highest`.
    highest: float
    ties: float  # The share of rows that are ties, as for `unknown`.
    unknown: float
    ties_right: float | None  # The value if ties are right, BabyLM's rule; None without ties.
    known: float | None  # The value on the rows without unknown words; None without such rows.
    kinds: dict[str, float]  # Other lines of the test: "control", "majority" …


@dataclasses.dataclass(frozen=True)
class Column:
    """A test with its data and settings; results of other data are another column."""

    test: str
    data: str
    settings: tuple[tuple[str, str], ...]
    metric: str

    @property
    def is_better_if_higher(self) -> bool:
        """Whether a higher value is a better one; a similarity of vectors is no merit."""
        return self.metric != "mean"

    @property
    def scale(self) -> int:
        """By what values are multiplied to be printed."""
        return 100 if self.metric in FRACTIONS else 1

    def show(self, value: float, sign: str = "") -> str:
        """A value as it is printed."""
        digits = 1 if self.scale > 1 else 2
        rounded = round(self.scale * value, digits) + 0.0  # −0.0 + 0.0 is 0.0.
        return f"{rounded:{sign}.{digits}f}".replace("-", "−")


@dataclasses.dataclass(frozen=True)
class Model:
    """A row: a subject, or several that differ by their seeds."""

    name: str
    family: str
    headers: tuple[Header, ...]

    @property
    def base(self) -> str:
        """The name without the step of a checkpoint."""
        found = POINT.fullmatch(self.name)
        return found[1] if found else self.name

    @property
    def is_point(self) -> bool:
        """Whether it is a checkpoint of a learning curve."""
        return self.base != self.name

    @property
    def is_baseline(self) -> bool:
        """Whether nothing was trained that this package compares: counts of words, or an untrained model."""
        return self.family in BASELINES or self.is_untrained

    @property
    def is_untrained(self) -> bool:
        return self.name.startswith("untrained:")

    def mean(self, field: str) -> float | None:
        """The mean over seeds of a number in the header; None where it is unknown."""
        values = [getattr(header, field) for header in self.headers]
        known = [float(value) for value in values if value is not None]
        return means.fmean(known) if known else None


class Results:
    """Records by model and column. Raises InputError where two models were measured under one name.

    Of a run that was measured, trained on and measured again, there are the records of the last step alone;
    `num_left_out` is the number of the others.
    """

    def __init__(self, found: Sequence[tuple[Path, Record]]):
        newest: dict[str, tuple[Path, Record]] = {}
        for each in found:
            name = each[1].header.subject
            newest[name] = _newer(newest[name], each) if name in newest else each
        kept = [record for _, record in found if record.header.model == newest[record.header.subject][1].header.model]
        self.num_left_out = len(found) - len(kept)
        self._records: dict[tuple[str, Column], dict[str, Record]] = {}
        headers: dict[str, dict[str, Header]] = {}
        for record in kept:
            header = record.header
            name = model_name(header.subject)
            self._records.setdefault((name, column_of(header)), {})[header.subject] = record
            headers.setdefault(name, {})[header.subject] = header
        models = [
            Model(name, next(iter(of.values())).family, tuple(of[subject] for subject in sorted(of)))
            for name, of in headers.items()
        ]
        self.all_models = sorted(models, key=_order_of_models)
        rows = [model for model in self.all_models if not model.is_point]
        self.models = rows or self.all_models
        self.columns = sorted({column for _, column in self._records}, key=_order_of_columns)
        self._scores: dict[tuple[str, Column], Score | None] = {}
        self._lines: dict[tuple[str, Column], tuple[Lines, list[Lines]]] = {}
        self._values: dict[tuple[str, Column, str, int | None], float] = {}

    @property
    def scored(self) -> list[Column]:
        """The columns of the table."""
        return [column for column in self.columns if column.test.partition(":")[0] not in SHOWN]

    def label(self, column: Column) -> str:
        """The name of a test, with its settings or its data where two columns have the same name."""
        same = [other for other in self.columns if other.test == column.test]
        if len(same) == 1:
            return column.test
        settings = [item for item in column.settings if any(item not in other.settings for other in same)]
        data = f" data {column.data[:8]}" if len({other.data for other in same}) == len(same) and not settings else ""
        return column.test + "".join(f" {name} {value}" for name, value in settings) + data

    def records(self, model: Model, column: Column) -> list[Record]:
        """The records of all seeds; [] if there is none."""
        seeds = self._records.get((model.name, column), {})
        return [seeds[subject] for subject in sorted(seeds)]

    def lines(self, model: Model, column: Column) -> Lines:
        """The rows of each line, whose values are means over seeds."""
        return self._of(model, column)[0]

    def value(self, model: Model, column: Column, kind: str, layer: int | None) -> float:
        """The number of a line: the mean over the seeds that have it."""
        key = model.name, column, kind, layer
        if key not in self._values:
            found = [lines[kind, layer] for lines in self._of(model, column)[1] if (kind, layer) in lines]
            self._values[key] = means.fmean(statistics.value(rows, column.metric) for rows in found)
        return self._values[key]

    def _of(self, model: Model, column: Column) -> tuple[Lines, list[Lines]]:
        """The lines of the mean of all seeds, and those of each."""
        key = model.name, column
        if key not in self._lines:
            seeds: list[Lines] = [rows_by_line(record.rows) for record in self.records(model, column)]
            names = seeds[0] if seeds else {}
            mean = {name: _mean_rows([lines[name] for lines in seeds if name in lines]) for name in names}
            self._lines[key] = mean, seeds
        return self._lines[key]

    def layers(self, model: Model, column: Column, kind: str = "") -> dict[int, float]:
        """Layer -> value; {} for a test without layers."""
        found = {layer for name, layer in self.lines(model, column) if name == kind and layer is not None}
        return {layer: self.value(model, column, kind, layer) for layer in sorted(found)}

    def chosen(self, model: Model, column: Column) -> tuple[int | None, str]:
        """The layer of the table, and how it was chosen: by the dev set, or the top one where there is none."""
        layers = self.layers(model, column)
        if not layers:
            return None, ""
        dev = self.layers(model, column, "dev")
        return (max(dev, key=lambda layer: (dev[layer], -layer)), "dev") if dev else (max(layers), "top")

    def rows(self, model: Model, column: Column) -> list[Row]:
        """The rows that the number in the table comes from; [] without a record."""
        lines = self.lines(model, column)
        layer, _ = self.chosen(model, column)
        return lines.get(("", layer), lines.get(("", None), []))

    def score(self, model: Model, column: Column) -> Score | None:
        """The cell of a model and a test; None if it was not measured."""
        key = model.name, column
        if key not in self._scores:
            self._scores[key] = self._score(model, column)
        return self._scores[key]

    def _score(self, model: Model, column: Column) -> Score | None:
        rows = self.rows(model, column)
        if not rows:
            return None
        layer, _ = self.chosen(model, column)
        _, seeds = self._of(model, column)
        line = ("", layer) if ("", layer) in seeds[0] else ("", None)
        of_seeds = [lines[line] for lines in seeds if line in lines]
        values = [statistics.value(each, column.metric) for each in of_seeds]
        right = [statistics.value(statistics.with_ties(each, 1.0), column.metric) for each in of_seeds]
        center, low, high = statistics.interval(rows, column.metric)
        shift = means.fmean(values) - center  # Not zero only where the metric is no mean.
        known = statistics.known(rows)
        kinds = {
            kind: self.value(model, column, kind, at)
            for kind, at in seeds[0]
            if kind not in ("", "dev") and at in (layer, None)
        }
        return Score(
            value=means.fmean(values),
            low=low + shift,
            high=high + shift,
            layer=layer,
            lowest=min(values),
            highest=max(values),
            ties=statistics.ties(rows),
            unknown=statistics.unknown(rows),
            ties_right=means.fmean(right) if statistics.ties(rows) else None,
            known=statistics.value(known, column.metric) if 0 < len(known) < len(rows) else None,
            kinds=kinds,
        )

    def pairs(self) -> list[tuple[Model, Model, str]]:
        """The models to compare: of two families, at an equal budget; or all of them where no two have one."""
        trained = [model for model in self.models if not model.is_baseline]
        pairs = [(a, b) for i, a in enumerate(trained) for b in trained[i + 1 :] if a.family != b.family]
        budgets = {"words": "words_seen", "FLOPs": "flops"}
        found = []
        for a, b in pairs:
            equal = [name for name, field in budgets.items() if _close(a.mean(field), b.mean(field))]
            if equal:
                found.append((a, b, f"equal {' and '.join(equal)}"))
        return found or [(a, b, "") for a, b in pairs]

    def difference(self, a: Model, b: Model, column: Column) -> tuple[statistics.Interval, bool] | None:
        """The score of `a` minus that of `b`, and whether they differ; None if one of them was not measured.

        They differ if the interval excludes zero and, of several seeds, all of one are above all of the other.
        """
        of_a, of_b = self.rows(a, column), self.rows(b, column)
        first, second = self.score(a, column), self.score(b, column)
        if first is None or second is None or not {row.item for row in of_a} & {row.item for row in of_b}:
            return None
        found = statistics.difference(of_a, of_b, column.metric)
        apart = first.lowest > second.highest or second.lowest > first.highest
        return found, apart and not found.low <= 0 <= found.high


def model_name(subject: str) -> str:
    """The name of a subject without its seed: "study/seed-1/bert" is "study/bert"."""
    return re.sub(r"/seed-\d+(?=/|@|$)|^seed-\d+/", "", subject)


def column_of(header: Header) -> Column:
    """The column of a record. How a family scores sentences is no other test."""
    settings = {name: _text(x) for name, x in header.settings.items() if name != "scoring" and x is not None}
    return Column(header.test, header.data, tuple(sorted(settings.items())), header.metric)


def read_results(directories: Sequence[Path]) -> Results:
    """All records of some directories."""
    paths = [path for directory in directories for path in records.find(directory)]
    sizes = [path.stat().st_size for path in paths]
    found = []
    with Progress("read records", sum(sizes), "bytes") as progress:
        for path, size in zip(paths, sizes, strict=True):
            found.append((path, records.read(path)))
            progress.advance(size)
    results = Results(found)
    if results.num_left_out:
        print(f"records of earlier steps of the same runs, left out: {results.num_left_out}", file=sys.stderr)
    return results


def _text(setting: object) -> str:
    """A setting, a value of JSON, as people read it."""
    if isinstance(setting, dict):
        return ", ".join(f"{name} {_text(x)}" for name, x in sorted(setting.items()))
    if isinstance(setting, list):
        return " ".join(map(_text, setting))
    return re.sub(r"^([0-9a-f]{8})[0-9a-f]{24,}$", r"\1", str(setting))  # Of a fingerprint the beginning.


def _newer(a: tuple[Path, Record], b: tuple[Path, Record]) -> tuple[Path, Record]:
    """Of the records of two models with one name, that of the later step."""
    steps = [each[1].header.step or 0 for each in (a, b)]
    if a[1].header.model != b[1].header.model and steps[0] == steps[1]:
        raise InputError(f"{a[0]} and {b[0]} are of two models that were both named {a[1].header.subject}: delete one")
    return a if steps[0] >= steps[1] else b


def _mean_rows(seeds: Sequence[Sequence[Row]]) -> list[Row]:
    """The rows of the first seed, with the mean of all seeds' values; of the items that all of them have."""
    if len(seeds) == 1:
        return list(seeds[0])
    values = [{row.item: row.value for row in rows} for rows in seeds]
    return [
        row._replace(value=means.fmean(of[row.item] for of in values))
        for row in seeds[0]
        if all(row.item in of for of in values)
    ]


def _order_of_models(model: Model) -> tuple:
    kind = BASELINES.index(model.family) if model.family in BASELINES else len(BASELINES) + (not model.is_untrained)
    return kind, model.base, model.mean("words_seen") or 0, model.name


def _order_of_columns(column: Column) -> tuple:
    name = column.test.partition(":")[0]
    order = list(TESTS)
    return order.index(name) if name in order else len(order), column.test, column.data, repr(column.settings)


def _close(a: float | None, b: float | None) -> bool:
    return a is not None and b is not None and abs(a - b) <= TOLERANCE * max(a, b)
