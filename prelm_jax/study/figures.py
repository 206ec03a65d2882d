"""The pictures of a page of a study: curves over words seen and over layers, and maps."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from prelm_jax.report.page import INK, picture
from prelm_jax.study.parts import Parts, color, legend
from prelm_jax.study.scores import Model, model_name

if TYPE_CHECKING:
    from prelm_jax.report.page import Axes

SIDE = 3.4  # Inches of a map.
LEAST_DISTANCE = 0.05  # Of the labels of constant lines, as a fraction of the height of a chart.
LARGEST = 7  # Columns of a map that has its numbers in it.


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
        for y in constant.values():
            axes.axhline(scale * y, color=INK, alpha=0.6, linewidth=0.8, linestyle=(0, (4, 3)))
        low, high = axes.get_ylim()
        place = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "bottom"}
        for y, text in _labels(constant, LEAST_DISTANCE * (high - low) / scale):
            axes.text(1, scale * y, text, fontsize=7, **place)
        axes.set_xlabel(label, color=INK)

    return picture(draw_lines, [line.title for line in lines])


def _labels(constant: Mapping[str, float], distance: float) -> list[tuple[float, str]]:
    """(height, text) of each label of constants: those that are less than a distance apart share one, at the highest.

    `_labels({"a": 1.0, "b": 2.0, "c": 1.1}, 0.5)` is `[(1.1, "a, c"), (2.0, "b")]`.
    """
    found: list[tuple[float, str]] = []
    for name, y in sorted(constant.items(), key=lambda item: item[1]):
        near = found and y - found[-1][0] < distance
        found[len(found) - bool(near) :] = [(y, f"{found[-1][1]}, {name}" if near else name)]
    return found


def learning_curves(parts: Parts) -> None:
    """Score against words seen: a line for the checkpoints of a run, a star for a model that has cooled down."""
    results, labels, figures = parts.results, parts.labels, []
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
            lines.append(Line(labels[name], x, y, color(family), "solid" if is_point else "none"))
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
        figures.append(parts.figure(f"{label}-words", label, svg, header, rows))
    text = f"{legend(trained)} Lines: checkpoints at a constant learning rate; stars: models that have cooled down."
    parts.grid("Learning curves", text, figures)


def layer_curves(parts: Parts) -> None:
    """Score against relative depth; untrained models dashed, control tasks dotted."""
    results, labels, figures = parts.results, parts.labels, []
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
                    lines.append(Line(title, x, list(layers.values()), color(model.family), style))
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
            figures.append(parts.figure(f"{label}-layers", label, svg, header, rows))
    text = f"{legend(drawn)} Dashed: untrained; dotted: control tasks and other lines. Layer 0 is at 0."
    parts.grid("Layers", text, figures)


def _map(values: Sequence[Sequence[float]], below: Sequence[str], beside: Sequence[str], highest: float) -> str:
    """SVG of a map from 0 (dark) to `highest` (bright), the first row at the top, with numbers in small ones."""

    def draw_map(axes: "Axes") -> None:
        axes.grid(visible=False)
        margin = 0.2 if max(map(len, below)) > 2 else 0.1
        axes.set_position((margin, margin, 0.97 - margin, 0.97 - margin))
        axes.pcolormesh(values, cmap="cividis", vmin=0, vmax=highest, edgecolors="face")
        axes.invert_yaxis()
        for y, row in enumerate(values):
            for x, each in enumerate(row if len(row) <= LARGEST else ()):
                color = "#000000" if each > highest / 2 else "#ffffff"
                axes.text(x + 0.5, y + 0.5, f"{each:.2f}", ha="center", va="center", color=color, fontsize=7)
        axes.set_xticks([x + 0.5 for x in range(len(below))], below, rotation=90 if max(map(len, below)) > 2 else 0)
        axes.set_yticks([y + 0.5 for y in range(len(beside))], beside)

    return picture(draw_map, size=(SIDE, SIDE))


def similarities(parts: Parts) -> None:
    """The similarity of the layers of a model with each other, or with those of another model."""
    results, labels, figures = parts.results, parts.labels, []
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
                caption = f"{name} (rows) and {others} (columns)" if other else name
                header = ["layer", "other_layer", "cka"]
                figures.append(parts.figure(f"cka {name} {others}", caption, svg, header, rows))
    text = "Linear CKA of two layers: 1 where their vectors of the same words differ by a rotation and a factor alone."
    parts.grid("Similarity of layers", text, figures)


def replacements(parts: Parts) -> None:
    """How far each word of a sentence moves if another one is replaced."""
    results, labels, figures = parts.results, parts.labels, []
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
                figures.append(parts.figure(f"replacement {name} {number}", name, svg, header, rows))
    text = "How far the top layer's vector of each word (a row) moves if another one (a column) becomes a neutral word."
    parts.grid("What a word depends on", text, figures)
