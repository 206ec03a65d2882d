"""The page of a study: its protocol, a table of scores with intervals, curves, and the data of each of them.

A pure function of records: the same ones give the same bytes.

    sections, files = draw(read_results([Path("study")]))
"""

import base64
import csv
import io
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from prelm_jax.finetuning.results import Results as Tuned
from prelm_jax.finetuning.results import points
from prelm_jax.report.page import COLORS, INK, picture, table
from prelm_jax.study.scores import Column, Model, Results, Score, model_name

if TYPE_CHECKING:
    from prelm_jax.report.page import Axes

RULES = (
    "Minimal pairs: the sum of log-probabilities decides; a tie counts one half. The details have the share of ties, "
    "that of pairs with unknown words, and the score of the other pairs.",
    "Layers: the score of a test with layers is that of the layer that is best on the test's dev set, or of the top "
    "layer where it has none; the curves show all layers on the test set. Layer 0 has no context. A layer of a "
    "left-to-right model knows the left context only: its probes and those of a bidirectional model are not one task.",
    "Intervals: 95 %, by 10,000 bootstrap samples of groups (paradigms, sentences, words), not of items; those of "
    "differences are paired. Two models are called different if the interval of their difference excludes zero and, of "
    "several seeds, all of one model are above all of the other.",
)
NAMES = {"bert": "BERT", "openai-gpt": "GPT", "elmo": "ELMo"}
FAMILIES = ("bert", "openai-gpt", "elmo", "word2vec", "trigram", "unigram")  # Each has a color.
GROUPS = 100  # A table of groups is on the page for tests with at most as many.
SIDE = 3.4  # Inches of a map.
LARGEST = 7  # Columns of a map that has its numbers in it.

Rows = Sequence[Sequence[str]]


class Page(NamedTuple):
    """HTML, and by name the files that go with it."""

    html: str
    files: dict[str, str]


class _Parts:
    """The HTML and the files of a page as they grow."""

    def __init__(self) -> None:
        self.html: list[str] = []
        self.files: dict[str, str] = {}

    def add(self, html: str) -> None:
        self.html.append(html)

    def link(self, name: str, content: str, kind: str = "text/csv") -> str:
        """A link that holds the content of a file, which is written beside the page, too."""
        self.files[name] = content
        data = base64.b64encode(content.encode()).decode()
        return f'<a class="data" download="{name}" href="data:{kind};base64,{data}">{name}</a>'

    def figure(self, name: str, caption: str, svg: str, header: Sequence[str], rows: Rows) -> str:
        link = self.link(f"{name}.csv", _csv(header, rows))
        return f"<figure><figcaption>{escape(caption)}</figcaption>{svg}{link}</figure>"

    def grid(self, title: str, text: str, figures: Sequence[str]) -> None:
        if figures:
            self.add(f'<h2>{title}</h2><p>{text}</p><div class="grid">{"".join(figures)}</div>')


def draw(results: Results, tuned: Mapping[str, Tuned] | None = None) -> Page:
    """The page of some records, and of fine-tunings by directory."""
    parts = _Parts()
    _protocol(parts, results)
    _summary(parts, results, tuned or {})
    _differences(parts, results)
    _learning_curves(parts, results)
    _layer_curves(parts, results)
    _similarities(parts, results)
    _replacements(parts, results)
    _neighbors(parts, results)
    _details(parts, results)
    return Page("\n".join(parts.html), parts.files)


# ---- Tables ----------------------------------------------------------------------------------------------------------


def _protocol(parts: _Parts, results: Results) -> None:
    rows = []
    for column in results.columns:
        settings = "; ".join(f"{name} {x}" for name, x in column.settings)
        rows.append([column.test, column.metric.replace("_", " "), settings, column.data[:8]])
    scoring = {
        _family(header.family): str(header.settings["scoring"])
        for model in results.all_models
        for header in model.headers
        if header.settings.get("scoring")
    }
    versions = sorted({header.version for model in results.all_models for header in model.headers})
    families = "".join(f"<p>{escape(name)}: {escape(text)}.</p>" for name, text in sorted(scoring.items()))
    rules = "".join(f"<p>{escape(rule)}</p>" for rule in RULES)
    parts.add(
        f'<div class="box"><h2>Protocol</h2>{rules}{families}'
        f"{_table(('test', 'metric', 'settings', 'data'), rows)}"
        f"<p>prelm_jax {escape(', '.join(versions))}</p></div>"
    )


def _summary(parts: _Parts, results: Results, tuned: Mapping[str, Tuned]) -> None:
    """A row for each model: what it was trained on, a cell for each test, and its fine-tunings."""
    labels = short_names([model.name for model in results.models])
    columns = results.scored
    cells = {(model.name, column): results.score(model, column) for model in results.models for column in columns}
    best = {
        column: max((score.value for model in results.models if (score := cells[model.name, column])), default=None)
        for column in columns
    }
    tasks = {directory: _task(found) for directory, found in tuned.items()}
    names = list(dict.fromkeys(tasks.values()))
    by_model: dict[str, dict[str, Tuned]] = {model.name: {} for model in results.models}
    for directory, found in tuned.items():
        by_model.setdefault(_tuned_model(found, results), {})[tasks[directory]] = found
    header = ["model", "words seen", "TFLOP", "seeds", *map(results.label, columns), *(f"tuned: {x}" for x in names)]
    html, latex, plain = [], [], []
    models: Mapping[str, Model] = {model.name: model for model in results.models}
    for name, tunings in by_model.items():
        model = models.get(name)
        facts = _facts(model) if model else ["", "", ""]
        label = labels.get(name, name)
        row, tex, numbers = [escape(label), *facts], [_tex(label), *facts], [label, *facts]
        for column in columns:
            score = cells.get((name, column))
            is_best = column.is_better_if_higher and score is not None and score.value == best[column]
            row.append(_cell(score, column, is_best))
            tex.append(_tex_cell(score, column, is_best))
            numbers.append("" if score is None else f"{score.value:.6g}")
        for task in names:
            text = _tuned_cell(tunings[task]) if task in tunings else ""
            row.append(escape(text))
            tex.append(_tex(text))
            numbers.append(text)
        html.append(row)
        latex.append(tex)
        plain.append(numbers)
    links = [
        parts.link("summary.csv", _csv(header, plain)),
        parts.link("summary.tex", _latex(header, latex), "text/x-tex"),
    ]
    parts.add(f"<h2>Scores</h2>{table([escape(each) for each in header], html)}{' '.join(links)}")


def _facts(model: Model) -> list[str]:
    words, flops = model.mean("words_seen"), model.mean("flops")
    return [
        "" if words is None else f"{words / 1e6:.3g} M",
        "" if flops is None else f"{flops / 1e12:,.1f}",
        str(len(model.headers)),
    ]


def _cell(score: Score | None, column: Column, is_best: bool) -> str:
    if score is None:
        return ""
    number = column.show(score.value)
    text = f"<b>{number}</b>" if is_best else number
    notes = [f"{column.show(score.low)} to {column.show(score.high)}"]
    if score.lowest != score.highest:
        notes.append(f"seeds {column.show(score.lowest)} to {column.show(score.highest)}")
    if score.layer is not None:
        notes.append(f"layer {score.layer}")
    return f"{text} <small>{'<br>'.join(notes)}</small>"


def _tex_cell(score: Score | None, column: Column, is_best: bool) -> str:
    if score is None:
        return "--"
    number = column.show(score.value)
    text = rf"\textbf{{{number}}}" if is_best else number
    return _minus(f"{text} {{\\scriptsize [{column.show(score.low)}, {column.show(score.high)}]}}")


def _differences(parts: _Parts, results: Results) -> None:
    """For each test, each model minus each other one of another family."""
    labels, pairs = short_names([model.name for model in results.models]), results.pairs()
    columns, html, plain = results.scored, [], []
    for a, b, budget in pairs:
        row = [f"{escape(labels[a.name])} − {escape(labels[b.name])}", budget]
        for column in columns:
            found = results.difference(a, b, column)
            if found is None:
                row.append("")
                continue
            (number, low, high), differ = found
            text = column.show(number, "+")
            interval = f"<small>{column.show(low, '+')} to {column.show(high, '+')}</small>"
            row.append(f"{f'<b>{text}</b>' if differ else text} {interval}")
            names = (labels[a.name], labels[b.name], budget, results.label(column))
            plain.append([*names, f"{number:.6g}", f"{low:.6g}", f"{high:.6g}", "yes" if differ else "no"])
        html.append(row)
    if plain:
        header = ["model", "minus", "budget", "test", "difference", "low", "high", "different"]
        link = parts.link("differences.csv", _csv(header, plain))
        tests = [escape(results.label(column)) for column in columns]
        found = table(["models", "budget", *tests], html)
        parts.add(f"<h2>Differences</h2><p>Bold: the models differ.</p>{found}{link}")


def _details(parts: _Parts, results: Results) -> None:
    """Ties, unknown words, other lines of the tests, and the groups of tests with few of them."""
    labels, rows = short_names([model.name for model in results.models]), []
    for column in results.scored:
        for model in results.models:
            score = results.score(model, column)
            if score is None:
                continue
            kinds = {kind: column.show(x) for kind, x in score.kinds.items()}
            if "control" in score.kinds:
                kinds["selectivity"] = column.show(score.value - score.kinds["control"])
            how = results.chosen(model, column)[1]
            rows.append(
                [
                    *(results.label(column), labels[model.name], column.show(score.value)),
                    "" if score.layer is None else f"{score.layer} ({how})",
                    *(f"{share:.1%}" for share in (score.ties, score.unknown)),
                    "" if score.known is None else column.show(score.known),
                    ", ".join(f"{kind} {text}" for kind, text in kinds.items()),
                ]
            )
    header = ["test", "model", "score", "layer", "ties", "with unknown words", "score without these", "other lines"]
    link = parts.link("details.csv", _csv(header, rows))
    parts.add(f"<h2>Details</h2><details open><summary>All scores</summary>{_table(header, rows)}</details>{link}")
    for column in results.scored:
        _groups(parts, results, column, labels)


def _groups(parts: _Parts, results: Results, column: Column, labels: Mapping[str, str]) -> None:
    """The score of each group of a test, a paradigm for example, by model."""
    found: dict[str, dict[str, float]] = {}
    for model in results.models:
        groups: dict[str, list[float]] = {}
        for row in results.rows(model, column):
            groups.setdefault(row.group, []).append(row.value)
        for group, values in groups.items():
            found.setdefault(group, {})[model.name] = sum(values) / len(values)
    if not 1 < len(found) <= GROUPS or column.metric == "spearman":
        return
    models = [model.name for model in results.models if any(model.name in of for of in found.values())]
    rows = [
        [group, *(column.show(of[name]) if name in of else "" for name in models)]
        for group, of in sorted(found.items())
    ]
    header, label = ["group", *(labels[name] for name in models)], results.label(column)
    link = parts.link(f"{_file(label)}-groups.csv", _csv(header, rows))
    parts.add(f"<details><summary>{escape(label)} by group</summary>{_table(header, rows)}</details>{link}")


# ---- Figures ---------------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """A line of a chart."""

    title: str
    x: Sequence[float]
    y: Sequence[float]
    color: str
    style: str  # As matplotlib calls it; "none" for a star alone.


def _chart(lines: Sequence[Line], constant: Mapping[str, float], scale: int, label: str) -> str:
    """SVG of lines, and of constants as dashed horizontal ones; `label` names the axis of x."""

    def draw_lines(axes: "Axes") -> None:
        for number, line in enumerate(lines):
            (drawn,) = axes.plot(
                line.x,
                [scale * y for y in line.y],
                color=line.color,
                linestyle=line.style,
                marker="*" if line.style == "none" else "o",
                markersize=9 if line.style == "none" else 3,
                linewidth=1.0 if line.style == "dotted" else 1.4,
            )
            drawn.set_gid(f"line-{number}")
        for name, y in constant.items():
            axes.axhline(scale * y, color=INK, alpha=0.6, linewidth=0.8, linestyle=(0, (4, 3)))
            place = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "bottom"}
            axes.text(1, scale * y, name, fontsize=7, **place)
        axes.set_xlabel(label, color=INK)

    return picture(draw_lines, [line.title for line in lines])


def _learning_curves(parts: _Parts, results: Results) -> None:
    """Score against words seen: a line for the checkpoints of a run, a star for a model that has cooled down."""
    labels, figures = short_names([model.base for model in results.all_models]), []
    trained = [each for each in results.all_models if not each.is_baseline]
    for column in results.scored:
        found: dict[tuple[str, str, bool], list[tuple[float, float]]] = {}
        for model in trained:
            score, words = results.score(model, column), model.mean("words_seen")
            if score is not None and words is not None:
                found.setdefault((model.base, model.family, model.is_point), []).append((words, score.value))
        if not any(is_point for _, _, is_point in found):
            continue
        lines, rows = [], []
        for (name, family, is_point), each in found.items():
            x, y = zip(*sorted(each), strict=True)
            lines.append(Line(labels[name], x, y, _color(family), "solid" if is_point else "none"))
            rows += [[labels[name], family, f"{a:.0f}", f"{b:.6g}"] for a, b in sorted(each)]
        constant = {
            labels[model.name]: score.value
            for model in results.models
            if model.is_baseline and (score := results.score(model, column))
        }
        rows += [[name, "baseline", "", f"{y:.6g}"] for name, y in constant.items()]
        label = results.label(column)
        svg = _chart(lines, constant, column.scale, "words seen")
        header = ["model", "family", "words_seen", "score"]
        figures.append(parts.figure(f"{_file(label)}-words", label, svg, header, rows))
    text = f"{_legend(trained)} Lines: checkpoints at a constant learning rate; stars: models that have cooled down."
    parts.grid("Learning curves", text, figures)


def _layer_curves(parts: _Parts, results: Results) -> None:
    """Score against relative depth; untrained models dashed, control tasks dotted."""
    labels, figures = short_names([model.name for model in results.models]), []
    drawn: list[Model] = []
    for column in results.scored:
        lines, rows = [], []
        constant: dict[str, float] = {}
        for model in results.models:
            of_model = results.lines(model, column)
            for kind in dict.fromkeys(kind for kind, _ in of_model if kind != "dev"):
                layers, title = results.layers(model, column, kind), f"{labels[model.name]} {kind}".strip()
                if len(layers) > 1:
                    drawn.append(model)
                    style = "dotted" if kind else "dashed" if model.is_untrained else "solid"
                    x = [layer / max(layers) for layer in layers]
                    lines.append(Line(title, x, list(layers.values()), _color(model.family), style))
                    rows += [
                        [labels[model.name], kind, str(layer), f"{depth:.4f}", f"{y:.6g}"]
                        for depth, (layer, y) in zip(x, layers.items(), strict=True)
                    ]
                elif kind and (kind, None) in of_model:
                    constant[kind] = results.value(model, column, kind, None)
                elif not kind and (score := results.score(model, column)):
                    constant[labels[model.name]] = score.value
        if lines:
            rows += [[name, "all layers", "", "", f"{y:.6g}"] for name, y in constant.items()]
            label = results.label(column)
            svg = _chart(lines, constant, column.scale, "relative depth")
            header = ["model", "line", "layer", "relative_depth", "score"]
            figures.append(parts.figure(f"{_file(label)}-layers", label, svg, header, rows))
    text = f"{_legend(drawn)} Dashed: untrained; dotted: control tasks and other lines. Layer 0 is at 0."
    parts.grid("Layers", text, figures)


def _map(values: Sequence[Sequence[float]], below: Sequence[str], beside: Sequence[str], highest: float) -> str:
    """SVG of a map from 0 (dark) to `highest` (bright), the first row at the top, with numbers in small ones."""

    def draw_map(axes: "Axes") -> None:
        axes.grid(visible=False)
        axes.set_position((0.2, 0.2, 0.77, 0.77))
        axes.pcolormesh(values, cmap="cividis", vmin=0, vmax=highest, edgecolors="face")
        axes.invert_yaxis()
        for y, row in enumerate(values):
            for x, each in enumerate(row if len(row) <= LARGEST else ()):
                color = "#000000" if each > highest / 2 else "#ffffff"
                axes.text(x + 0.5, y + 0.5, f"{each:.2f}", ha="center", va="center", color=color, fontsize=7)
        axes.set_xticks([x + 0.5 for x in range(len(below))], below, rotation=90 if max(map(len, below)) > 2 else 0)
        axes.set_yticks([y + 0.5 for y in range(len(beside))], beside)

    return picture(draw_map, size=(SIDE, SIDE))


def _similarities(parts: _Parts, results: Results) -> None:
    """The similarity of the layers of a model with each other, or with those of another model."""
    labels, figures = short_names([model.name for model in results.models]), []
    for column in results.columns:
        kind, _, other = column.test.partition(":")
        for model in results.models if kind == "cka" else ():
            cells = {tuple(map(int, row.item.split())): row.value for row in results.rows(model, column)}
            if cells:
                name, others = labels[model.name], labels.get(model_name(other), other)
                height, width = (1 + max(place[i] for place in cells) for i in (0, 1))
                values = [[cells.get((y, x), math.nan) for x in range(width)] for y in range(height)]
                svg = _map(values, [str(x) for x in range(width)], [str(y) for y in range(height)], 1.0)
                rows = [[str(y), str(x), f"{each:.6g}"] for (y, x), each in sorted(cells.items())]
                caption, header = f"{name}, and to the right {others or 'itself'}", ["layer", "other_layer", "cka"]
                figures.append(parts.figure(_file(f"cka {name} {others}"), caption, svg, header, rows))
    text = "Linear CKA of two layers: 1 where their vectors of the same words differ by a rotation and a factor alone."
    parts.grid("Similarity of layers", text, figures)


def _replacements(parts: _Parts, results: Results) -> None:
    """How far each word of a sentence moves if another one is replaced."""
    labels, figures = short_names([model.name for model in results.models]), []
    for column in results.columns:
        for model in results.models if column.test == "replacement" else ():
            sentences: dict[str, dict[tuple[int, int], float]] = {}
            for row in results.rows(model, column):
                _, moved, replaced = map(int, row.item.split())
                sentences.setdefault(row.group, {})[moved, replaced] = row.value
            for number, (sentence, cells) in enumerate(sentences.items(), 1):
                words, name = sentence.split(), labels[model.name]
                values = [[cells.get((y, x), math.nan) for x in range(len(words))] for y in range(len(words))]
                # The word that is replaced moves most itself, and would leave all others dark.
                highest = max((each for (y, x), each in cells.items() if x != y), default=0.0)
                svg = _map(values, words, words, highest or 1.0)
                rows = [[words[y], words[x], str(y), str(x), f"{each:.6g}"] for (y, x), each in sorted(cells.items())]
                header = ["moved", "replaced", "moved_position", "replaced_position", "distance"]
                figures.append(parts.figure(_file(f"replacement {name} {number}"), name, svg, header, rows))
    text = "How far the top layer's vector of each word (a row) moves if another one (a column) becomes a neutral word."
    parts.grid("What a word depends on", text, figures)


def _neighbors(parts: _Parts, results: Results) -> None:
    """The nearest occurrences of words in other sentences, by model."""
    labels, rows = short_names([model.name for model in results.models]), []
    for column in results.columns:
        if column.test.partition(":")[0] != "neighbors":
            continue
        for model in results.models:
            for row in results.rows(model, column):
                query, _, neighbor = row.item.partition(" ⇒ ")
                rows.append([row.group, query, labels[model.name], neighbor, f"{row.value:.2f}"])
    if not rows:
        return
    header = ["word", "occurrence", "model", "nearest", "cosine"]
    rows.sort(key=lambda row: row[:2])  # Stable: models and neighbors stay in their order.
    link, html, before = parts.link("neighbors.csv", _csv(header, rows)), [], ["", "", ""]
    for row in rows:
        same = next((i for i in range(3) if row[i] != before[i]), 3)
        html.append(["" if i < same else cell for i, cell in enumerate(row)])
        before = row[:3]
    text = "The nearest occurrences of any word in other sentences, by the cosine of centered vectors of the top layer."
    parts.add(f"<h2>Neighbors in context</h2><p>{text}</p>{_table(header, html)}{link}")


def _color(family: str) -> str:
    return COLORS[FAMILIES.index(family) % len(COLORS)] if family in FAMILIES else COLORS[-1]


def _family(name: str) -> str:
    return NAMES.get(name, name)


def _legend(models: Sequence[Model]) -> str:
    families = [family for family in FAMILIES if any(model.family == family for model in models)]
    return " ".join(f'<span style="color: {_color(each)}">■</span> {escape(_family(each))}.' for each in families)


# ---- Fine-tunings ----------------------------------------------------------------------------------------------------


def _task(found: Tuned) -> str:
    return f"{found.task.partition(':')[2] or found.task}, {Path(found.train.partition(',')[0]).name.partition('.')[0]}"


def _tuned_model(found: Tuned, results: Results) -> str:
    """The model that was fine-tuned: one of the study, or the name of its directory."""
    start = "from scratch" if found.init_from is None else os.path.normpath(found.init_from)
    return next((model.name for model in results.models if os.path.normpath(model.name) == start), start)


def _tuned_cell(found: Tuned) -> str:
    spread = found.spread(found.metric)
    seeds = f" ({points(spread.lowest)} to {points(spread.highest)})" if len(found.seeds) > 1 else ""
    baseline = "" if spread.baseline is None else f", baseline {points(spread.baseline)}"
    return f"{points(spread.mean)}{seeds}{baseline}"


# ---- Formats ---------------------------------------------------------------------------------------------------------


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Names without the directories that all of those with directories have in common.

    `short_names(["a/b/c", "a/b/d/e", "untrained:a/b/c"])` has the values c, d/e and untrained:c.
    """
    paths = [name.split("/")[:-1] for name in names if "/" in name and ":" not in name]
    common = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    prefix = "".join(f"{parts[0]}/" for parts in common)
    kinds = {name: name.partition(":") for name in names}
    return {
        name: f"{kind}:{rest.removeprefix(prefix)}" if colon else name.removeprefix(prefix)
        for name, (kind, colon, rest) in kinds.items()
    }


def _table(header: Sequence[str], rows: Rows) -> str:
    return table([escape(cell) for cell in header], [[escape(cell) for cell in row] for row in rows])


def _csv(header: Sequence[str], rows: Rows) -> str:
    output = io.StringIO()
    csv.writer(output, lineterminator="\n").writerows([header, *rows])
    return output.getvalue()


def _latex(header: Sequence[str], rows: Rows) -> str:
    """A table for the LaTeX package booktabs; cells are LaTeX already."""
    lines = [
        rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
        r"\toprule",
        " & ".join(map(_tex, header)) + r" \\",
        r"\midrule",
        *(" & ".join(row) + r" \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def _tex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return _minus("".join(special.get(x, f"\\{x}" if x in "&%$#_{}" else x) for x in text))


def _minus(text: str) -> str:
    return text.replace("−", "$-$")


def _file(label: str) -> str:
    """A label as a part of a file's name."""
    return "-".join("".join(x if x.isalnum() or x in "-." else " " for x in label).split())
