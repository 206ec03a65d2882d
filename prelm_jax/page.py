"""The report page: the curves of one or several runs beside their baselines, in one HTML file that loads nothing else.

The page is a pure function of the work directories: the same metrics give the same bytes.

    Path("report.html").write_text(render([read_curves("runs/bert-demo"), read_curves("runs/bert-muon")]))
"""

import dataclasses
import io
import math
import os
import re
from collections.abc import Sequence
from html import escape

import numpy as np

from prelm_jax.errors import InputError
from prelm_jax.report import words
from prelm_jax.run import flatten
from prelm_jax.workdir import WorkDir

# What curves are drawn against; a radio button of the page chooses.
AXES = ("steps", "tokens", "minutes")
HELD_OUT = "evaluation/"
TRAINING = {
    "train/loss": "loss of a batch",
    "train/grad_norm": "gradient norm before clipping",
    "train/learning_rate": "learning rate",
    "perf/tokens_per_second": "tokens per second, padding not counted",
    "perf/mfu": "fraction of the peak FLOP/s (MFU)",
    "train/padding": "fraction of padding",
}
# Okabe and Ito's colors, which people with any color vision tell apart. More runs than colors are told apart by dashes.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = {"solid": "none", "dashed": "7 4", "dotted": "2 3"}  # As matplotlib and as SVG call them.
POINTS = 500  # of a curve at most; each is the mean of its neighbors
# A placeholder for the text color of the page, which differs between light and dark; no other color equals it.
INK = "#123456"

STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 84rem; padding: 0 1rem; }
h2 { margin: 2rem 0 .5rem; font-size: 1.15rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; }
td.number { text-align: right; }
figure { margin: 0; } figcaption { font-weight: 600; }
svg { width: 100%; height: auto; }
.grid { display: grid; gap: 1rem 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(24rem, 100%), 1fr)); }
.axis { position: sticky; top: 0; background: Canvas; padding: .4rem 0; display: inline-block; }
.steps, .tokens, .minutes { display: none; }
"""
STYLE += "".join(f"#{axis}:checked ~ main .{axis} {{ display: block; }}\n" for axis in AXES)


@dataclasses.dataclass(frozen=True)
class Curves:
    """What the page shows of a run.

    `series`: name -> float64 [points, 2], (step, value). `progress`: float64 [points, 3], (steps, tokens, minutes), to
    place a step on the other axes; minutes of training alone, without evaluations and saves. `settings`: what run.json
    says of the run, by dotted names.
    """

    name: str
    settings: dict[str, object]
    series: dict[str, np.ndarray]
    progress: np.ndarray
    baselines: dict[str, dict[str, float]]


def read_curves(path: str | os.PathLike) -> Curves:
    """The curves of a run. Raises InputError if `path` is not a work directory."""
    workdir = WorkDir(path)
    record = workdir.read_record()
    points: dict[str, list[tuple[float, float]]] = {}
    progress, seconds = [(0.0, 0.0)], [0.0]
    for line in workdir.read_metrics():
        for name, value in line.items():
            if name in TRAINING or name.startswith(HELD_OUT):
                points.setdefault(name, []).append((line["step"], float(value)))
        if "train/tokens_seen" in line:
            progress.append((line["step"], line["train/tokens_seen"]))
            seconds.append(line.get("perf/seconds_per_step", math.nan))
    steps = np.array(progress)[:, 0]
    seconds_per_step = np.array(seconds)
    if len(steps) > 1:  # The first line after a pause has no speed of its own.
        usual = np.nanmedian(seconds_per_step[1:]) if np.isfinite(seconds_per_step[1:]).any() else 0.0
        seconds_per_step[np.isnan(seconds_per_step)] = usual
    minutes = np.cumsum(np.diff(steps, prepend=0) * seconds_per_step) / 60
    first, *extensions = record.segments
    optimizers = {"optimizer": first.optimizer}
    optimizers |= {f"optimizer from step {each.from_step}": each.optimizer for each in extensions}
    return Curves(
        name=str(path),
        settings=flatten({**record.identity, **record.sources, **optimizers}),
        series={name: np.array(each, np.float64) for name, each in points.items()},
        progress=np.column_stack([progress, minutes]),
        baselines=workdir.read_baselines() or {},
    )


def render(runs: Sequence[Curves], sections: Sequence[str] = ()) -> str:
    """The page of one or more runs, as HTML; `sections` are HTML too, and stand before the curves."""
    if not runs:
        raise InputError("a report needs a run: give the path of a work directory")
    held_out = dict.fromkeys(name for run in runs for name in run.series if name.startswith(HELD_OUT))
    buttons = "".join(
        f'<input type="radio" name="axis" id="{axis}"{" checked" if axis == AXES[0] else ""}> '
        f'<label for="{axis}">{axis}</label> '
        for axis in AXES
    )
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>{_summary(runs)}",
        *sections,
        f"<h2>Curves</h2>against {buttons}<main>",
        _section("Held-out text", [(name, words(name.removeprefix(HELD_OUT))) for name in held_out], runs),
        _section("Training", list(TRAINING.items()), runs),
        f"</main>{_differences(runs)}</body></html>\n",
    ]
    return "\n".join(parts)


def _summary(runs: Sequence[Curves]) -> str:
    """A row for each run: its last step, tokens and minutes, its lowest held-out loss and the step of that loss."""
    rows = []
    for i, run in enumerate(runs):
        color, dashes = _stroke(i)
        loss = run.series.get(f"{HELD_OUT}loss")
        best = loss[np.nanargmin(loss[:, 1])] if loss is not None and np.isfinite(loss[:, 1]).any() else None
        step, tokens, minutes = run.progress[-1]
        rows.append(
            [
                f'<svg viewBox="0 0 30 8" style="width:30px;height:8px"><line x1="0" x2="30" y1="4" y2="4" '
                f'stroke="{color}" stroke-width="3" stroke-dasharray="{DASHES[dashes]}"/></svg> {escape(run.name)}',
                *(f"{x:,.0f}" for x in (step, tokens)),
                f"{minutes:,.1f}",
                *((f"{best[1]:.4f}", f"{best[0]:,.0f}") if best is not None else ("not evaluated", "")),
            ]
        )
    return table(("run", *AXES, "best held-out loss", "at step"), rows)


def _differences(runs: Sequence[Curves]) -> str:
    """The settings in which the runs differ; all settings if there is one run."""
    names = sorted({name for run in runs for name in run.settings})
    found = {name: [run.settings.get(name) for run in runs] for name in names}
    values = {name: ["" if value is None else str(value) for value in each] for name, each in found.items()}
    shown = [name for name in names if len(runs) == 1 or len(set(values[name])) > 1]
    if not shown:
        return "<h2>Settings</h2><p>The runs have the same settings.</p>"
    title = "Settings" if len(runs) == 1 else "Settings that differ"
    rows = [[escape(name), *map(escape, values[name])] for name in shown]
    return f"<h2>{title}</h2>{table(('', *(escape(run.name) for run in runs)), rows)}"


def _section(title: str, series: Sequence[tuple[str, str]], runs: Sequence[Curves]) -> str:
    """Pictures of some series, each against every axis."""
    figures = []
    for name, caption in series:
        if any(name in run.series for run in runs):
            pictures = "".join(f'<div class="{axis}">{_picture(name, axis, runs)}</div>' for axis in AXES)
            figures.append(f"<figure><figcaption>{escape(caption)}</figcaption>{pictures}</figure>")
    return f'<h2>{title}</h2><div class="grid">{"".join(figures)}</div>' if figures else ""


def _picture(name: str, axis: str, runs: Sequence[Curves]) -> str:
    """SVG of one series of all runs against an axis, with the trivial baselines as dashed lines."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    style = {"svg.hashsalt": "prelm", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}
    with rc_context(style | dict.fromkeys(("text.color", "axes.edgecolor", "xtick.color", "ytick.color"), INK)):
        figure = Figure(figsize=(5, 2.9))
        figure.subplots_adjust(left=0.14, right=0.97, bottom=0.17, top=0.97)
        axes = figure.subplots()
        for i, run in enumerate(runs):
            if name in run.series:
                x, values = _thinned(run.series[name]).T
                if axis != "steps":
                    x = np.interp(x, run.progress[:, 0], run.progress[:, AXES.index(axis)])
                color, dashes = _stroke(i)
                marker = "o" if len(x) < 30 else None
                axes.plot(x, values, color=color, linestyle=dashes, marker=marker, markersize=3, linewidth=1.4)
        baselines = {item for run in runs for item in run.baselines.get(name.removeprefix(HELD_OUT), {}).items()}
        for label, value in sorted(baselines) if name.startswith(HELD_OUT) else ():
            if math.isfinite(value):
                axes.axhline(value, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
                axes.text(1, value, label, transform=axes.get_yaxis_transform(), ha="right", va="bottom", fontsize=8)
        axes.set_xlim(left=0)
        axes.grid(color=INK, alpha=0.15, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel(axis, color=INK)
        output = io.StringIO()
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        FigureCanvasSVG(figure).print_svg(output, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = output.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    # Names of groups would occur in every picture of the page; only those of clip paths and markers are referred to.
    return re.sub(r' id="[a-z]+[\w.]*_\d+"', "", svg)


def _stroke(i: int) -> tuple[str, str]:
    """The color and the dashes of run `i`."""
    return COLORS[i % len(COLORS)], list(DASHES)[i // len(COLORS) % len(DASHES)]


def _thinned(points: np.ndarray) -> np.ndarray:
    """At most POINTS points: means of as many neighbors each; float64 [points, 2]."""
    return np.stack([part.mean(0) for part in np.array_split(points, POINTS)]) if len(points) > POINTS else points


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    lines = ["".join(f"<th>{cell}</th>" for cell in header)]
    lines += ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
