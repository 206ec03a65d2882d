"""The tables of a page of a study: its protocol, scores with intervals, differences, neighbors and details."""

import itertools
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from prelm_jax.finetuning.results import Results as Tuned
from prelm_jax.finetuning.results import points
from prelm_jax.report.page import table, text_table
from prelm_jax.study.parts import Parts, Rows, family_name
from prelm_jax.study.scores import Column, Model, Results, Score, model_name

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
GROUPS = 100  # A table of groups is on the page for tests with at most as many.


def protocol(parts: Parts) -> None:
    """The rules, how each family scores sentences, and the settings of the tests."""
    results, rows = parts.results, []
    for column in results.columns:
        settings = "; ".join(f"{name} {x}" for name, x in column.settings)
        kind, colon, rest = column.test.partition(":")
        test = f"{kind}{colon}{parts.labels.get(model_name(rest), rest)}"
        rows.append([test, column.metric.replace("_", " "), settings, column.data[:8]])
    scoring = {
        family_name(header.family): str(header.settings["scoring"])
        for model in results.all_models
        for header in model.headers
        if header.settings.get("scoring")
    }
    versions = sorted({header.version for model in results.all_models for header in model.headers})
    families = "".join(f"<p>{escape(name)}: {escape(text)}.</p>" for name, text in sorted(scoring.items()))
    rules = "".join(f"<p>{escape(rule)}</p>" for rule in RULES)
    parts.add(
        f'<div class="box"><h2>Protocol</h2>{rules}{families}'
        f"{text_table(('test', 'metric', 'settings', 'data'), rows)}"
        f"<p>prelm_jax {escape(', '.join(versions))}</p></div>"
    )


def summary(parts: Parts, tuned: Mapping[str, Tuned]) -> None:
    """A row for each model: what it was trained on, a cell for each test, and its fine-tunings."""
    results, labels = parts.results, parts.labels
    columns = results.scored
    cells = {(model.name, column): results.score(model, column) for model in results.models for column in columns}
    best = {
        column: max((score.value for model in results.models if (score := cells[model.name, column])), default=None)
        for column in columns
    }
    starts = {directory: _tuned_model(found, results) for directory, found in tuned.items()}
    same = Counter((starts[directory], _task(found)) for directory, found in tuned.items())
    tasks = {
        directory: _task(found) + (f" ({directory})" if same[starts[directory], _task(found)] > 1 else "")
        for directory, found in tuned.items()
    }
    names = list(dict.fromkeys(tasks.values()))
    by_model: dict[str, dict[str, Tuned]] = {model.name: {} for model in results.models}
    for directory, found in tuned.items():
        by_model.setdefault(starts[directory], {})[tasks[directory]] = found
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
        parts.link_csv("summary", header, plain),
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


def differences(parts: Parts) -> None:
    """For each test, each model minus each other one of another family."""
    results, labels = parts.results, parts.labels
    columns, html, plain = results.scored, [], []
    for a, b, budget in results.pairs():
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
        link = parts.link_csv("differences", header, plain)
        tests = [escape(results.label(column)) for column in columns]
        found = table(["models", "budget", *tests], html)
        parts.add(f"<h2>Differences</h2><p>Bold: the models differ.</p>{found}{link}")


def details(parts: Parts) -> None:
    """Ties, unknown words, other lines of the tests, and the groups of tests with few of them."""
    results, labels, rows = parts.results, parts.labels, []
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
                    f"{score.ties:.1%}",
                    "" if score.ties_right is None else column.show(score.ties_right),
                    f"{score.unknown:.1%}",
                    "" if score.known is None else column.show(score.known),
                    ", ".join(f"{kind} {text}" for kind, text in kinds.items()),
                ]
            )
    scores = ["score", "layer", "ties", "score if ties are right", "with unknown words", "score without these"]
    header = ["test", "model", *scores, "other lines"]
    link = parts.link_csv("details", header, rows)
    parts.add(f"<h2>Details</h2><details open><summary>All scores</summary>{text_table(header, rows)}</details>{link}")
    for column in results.scored:
        _groups(parts, column)


def _groups(parts: Parts, column: Column) -> None:
    """The score of each group of a test, a paradigm for example, by model."""
    results, labels = parts.results, parts.labels
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
    link = parts.link_csv(f"{label}-groups", header, rows)
    parts.add(f"<details><summary>{escape(label)} by group</summary>{text_table(header, rows)}</details>{link}")


def neighbors(parts: Parts) -> None:
    """The nearest occurrences of words in other sentences, by model."""
    results, labels, rows = parts.results, parts.labels, []
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
    link, html = parts.link_csv("neighbors", header, rows), ""
    for word, group in itertools.groupby(rows, key=lambda row: row[0]):
        before, cells = ["", ""], []
        for _, *row in group:
            same = next((i for i in range(2) if row[i] != before[i]), 2)
            cells.append(["" if i < same else cell for i, cell in enumerate(row)])
            before = row[:2]
        begin = "<details>" if html else "<details open>"
        html += f"{begin}<summary>{escape(word)}</summary>{text_table(header[1:], cells)}</details>"
    text = "The nearest occurrences of any word in other sentences, by the cosine of centered vectors of the top layer."
    parts.add(f"<h2>Neighbors in context</h2><p>{text}</p>{html}{link}")


def _task(found: Tuned) -> str:
    return f"{found.task.partition(':')[2] or found.task}, {Path(found.train.partition(',')[0]).name.partition('.')[0]}"


def _tuned_model(found: Tuned, results: Results) -> str:
    """The model that was fine-tuned: one of the study, or the name of its directory, without its seed."""
    start = "from scratch" if found.init_from is None else os.path.normpath(model_name(found.init_from))
    return next((model.name for model in results.models if os.path.normpath(model.name) == start), start)


def _tuned_cell(found: Tuned) -> str:
    spread = found.spread(found.metric)
    seeds = f" ({points(spread.lowest)} to {points(spread.highest)})" if len(found.seeds) > 1 else ""
    baseline = "" if spread.baseline is None else f", baseline {points(spread.baseline)}"
    return f"{points(spread.mean)}{seeds}{baseline}"


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
