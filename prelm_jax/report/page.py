"""The report page: the curves of one or more runs with their baselines, in one self-contained HTML file.

Samples, settings and counts of the text follow. The page is a pure function of the work directories: the same metrics
give the same bytes.

    Path("report.html").write_text(render([read_curves("runs/bert-demo"), read_curves("runs/bert-muon")]))
"""

import array
import dataclasses
import io
import itertools
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Literal

import numpy as np

from prelm_jax.errors import InputError
from prelm_jax.inference.base import Sample
from prelm_jax.report.summary import QUANTILES, shown, words
from prelm_jax.run import Statistic, flatten
from prelm_jax.storage import reachable, write_file
from prelm_jax.training.metrics import EVALUATION
from prelm_jax.workdir import WorkDir, add_baselines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What curves are drawn against; a radio button of the page chooses.
AXES = ("steps", "tokens", "minutes")
TRAINING = {
    "train/loss": "loss of a batch",
    "train/grad_norm": "gradient norm before clipping",
    "train/learning_rate": "learning rate",
    "perf/tokens_per_second": "tokens per second, padding not counted",
    "perf/mfu": "fraction of the peak FLOP/s (MFU)",
    "train/padding": "fraction of padding",
}
TOKENS, SECONDS = "train/tokens_seen", "perf/seconds_per_step"
# After Okabe and Ito, for any color vision; readable on white and on black. Further runs differ by their dashes.
COLORS = ("#2e86d1", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#7f7f7f")
DASHES = {"solid": "none", "dashed": "7 4", "dotted": "2 3"}  # As matplotlib and as SVG call them.
# A curve has at most this many points, and all curves of a picture together; a point is the mean of its neighbors.
POINTS, POINTS_OF_PICTURE = 400, 2400
BANDS = 3  # With more runs a picture has no bands from the lowest to the highest of the values behind each point.
LOGARITHMIC = ("perplexity", "grad_norm")  # What the names of series contain that have a logarithmic scale if it helps.
FROM_ZERO = ("learning_rate", "perf/", "padding")  # Where the vertical axis starts at 0, so that noise looks small.
EVALUATIONS = 6  # whose samples are shown
REFRESH = '<meta http-equiv="refresh" content="30">'  # Reloads the page of a running training.
# A placeholder for the text color of the page, which differs between light and dark; no other color equals it.
INK = "#123456"

STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 84rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; overflow-wrap: anywhere; } h2 { margin: 2rem 0 .5rem; font-size: 1.15rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: max-content; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; }
th { white-space: nowrap; } td { max-width: min(30rem, 65vw); overflow-wrap: break-word; }
td:first-child { position: sticky; left: 0; background: Canvas; max-width: min(30rem, 45vw); }
figure { margin: 0; } figcaption { font-weight: 600; }
svg { width: 100%; height: auto; }
.grid { display: grid; gap: 1rem 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(24rem, 100%), 1fr)); }
nav { position: sticky; top: 0; background: Canvas; padding: .4rem 0; border-bottom: 1px solid var(--line); }
nav a, nav span { display: inline-block; margin-right: 1rem; } a { color: inherit; }
.key { width: 30px; height: 8px; flex: none; }
.sample { margin: 1rem 0; } .sample table { margin: .2rem 0 0; } .sample i { opacity: .7; }
.tokens, .minutes { display: none; }
.box { border: 1px solid var(--line); border-radius: .5rem; padding: 0 1rem; font-size: .9rem; }
small { display: block; opacity: .75; white-space: nowrap; } a.data { font-size: .8rem; } summary { margin: .5rem 0; }
@media print {
  body { margin: 0; max-width: none; font-size: 9pt; } nav, a.data { display: none; }
  figure, tr { break-inside: avoid; } table { width: auto; font-size: 8pt; } small { white-space: normal; }
  th { white-space: normal; } .grid { grid-template-columns: 1fr 1fr; }
}
"""
# The address of the page holds the axis, page.html#tokens, so that it stays when the page is reloaded.
OTHERS = ":has(" + ", ".join(f"#{axis}:target" for axis in AXES[1:]) + ")"
STYLE += f"body{OTHERS} .steps {{ display: none; }} body:not({OTHERS}) #steps, nav a:target {{ font-weight: 700; }}\n"
STYLE += "".join(f"body:has(#{axis}:target) div.{axis} {{ display: block; }}\n" for axis in AXES[1:])


@dataclasses.dataclass(frozen=True)
class Curves:
    """What the page shows of a run.

    `series`: name -> float64 [points, 2], (step, value). `progress`: float64 [points, 3], (steps, tokens, minutes), to
    place a step on the other axes; minutes of training alone, without evaluations and saves. `settings`: what run.json
    says of the run, by dotted names. `samples`: by step. `statistics`: counts of both sides of the text.
    """

    name: str
    settings: dict[str, object]
    series: dict[str, np.ndarray]
    progress: np.ndarray
    baselines: dict[str, dict[str, float]]
    samples: dict[int, list[Sample]]
    statistics: dict[str, list[Statistic]]


def read_curves(path: str | os.PathLike) -> Curves:
    """The curves of a run. Raises InputError if `path` is not a work directory."""
    workdir = WorkDir(path)
    record = workdir.read_record()
    columns: defaultdict[str, array.array[float]] = defaultdict(lambda: array.array("d"))  # step, value, step, value, …
    baselines: dict[str, dict[str, float]] = {}
    for line in workdir.stream_metrics():
        for name, value in line.items():
            if name in TRAINING or name in (TOKENS, SECONDS) or name.startswith(EVALUATION):
                columns[name].extend((line["step"], value))
        add_baselines(baselines, line)
    series = {name: _latest(np.array(column).reshape(-1, 2)) for name, column in columns.items()}
    tokens, seconds = (series.pop(name, np.empty((0, 2))) for name in (TOKENS, SECONDS))
    # The first line after a pause has no speed of its own.
    seconds_per_step = np.full(len(tokens), np.median(seconds[:, 1]) if len(seconds) else 0.0)
    seconds_per_step[np.isin(tokens[:, 0], seconds[:, 0])] = seconds[np.isin(seconds[:, 0], tokens[:, 0]), 1]
    minutes = np.cumsum(np.diff(tokens[:, 0], prepend=0) * seconds_per_step) / 60
    first, *extensions = record.segments
    optimizers = {"optimizer": first.optimizer}
    optimizers |= {f"optimizer from step {each.from_step}": each.optimizer for each in extensions}
    return Curves(
        name=str(path),
        settings=flatten({**record.identity, **record.sources, **optimizers}),
        series=series,
        progress=np.vstack([np.zeros(3), np.column_stack([tokens, minutes])]),
        baselines=baselines,
        samples=workdir.read_samples(),
        statistics=record.statistics,
    )


def _latest(points: np.ndarray) -> np.ndarray:
    """Points ordered by step; of several points at a step the last one."""
    _, last = np.unique(points[::-1, 0], return_index=True)
    return points[::-1][last]


def main(workdir: str, page: str, state: Literal["running", "finished"]) -> None:
    """Writes the page of a work directory, of a run that is training or has ended."""
    text = render([read_curves(workdir)], running=state == "running")
    write_file(reachable(page), text.encode())


def render(runs: Sequence[Curves], sections: Sequence[str] = (), running: bool = False, title: str = "") -> str:
    """The page of some runs, as HTML; `sections` are HTML too, and stand before the curves.

    running: the browser reloads the page every 30 seconds.
    title: of a page with sections; if empty, it is about the runs.
    """
    if not runs and not sections:
        raise InputError("a report needs a run or a study: give the path of a directory")
    held_out = dict.fromkeys(name for run in runs for name in run.series if name.startswith(EVALUATION))
    labels = _labels(runs)
    axes = "".join(f'<a id="{axis}" href="#{axis}">{axis}</a>' for axis in AXES)
    legend = "".join(f"<span>{_key(i)} {escape(label)}</span>" for i, label in enumerate(labels) if len(runs) > 1)
    title = title or (runs[0].name if len(runs) == 1 else f"{len(runs)} runs")
    curves = [
        f"<main><nav>{axes} {legend}</nav>",
        _section("Held-out text", [(name, words(name.removeprefix(EVALUATION))) for name in held_out], runs, labels),
        _section("Training", list(TRAINING.items()), runs, labels),
        f"</main>{_samples(runs, labels)}{_differences(runs, labels)}{_statistics(runs, labels)}",
    ]
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        *([REFRESH] if running else []),
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>{_summary(runs, labels) if runs else ''}",
        *sections,
        *(curves if runs else []),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _labels(runs: Sequence[Curves]) -> list[str]:
    """The names of the runs, without the directories that they have in common."""
    parts = [run.name.rstrip("/").split("/") for run in runs]
    columns = zip(*(each[:-1] for each in parts), strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda names: len(set(names)) == 1, columns))
    return ["/".join(each[common:]) for each in parts]


def _key(i: int) -> str:
    """A piece of the line of run `i`."""
    color, dashes = _stroke(i)
    line = f'<line x1="0" x2="30" y1="4" y2="4" stroke="{color}" stroke-width="3" stroke-dasharray="{DASHES[dashes]}"/>'
    return f'<svg class="key" viewBox="0 0 30 8">{line}</svg>'


def _summary(runs: Sequence[Curves], labels: Sequence[str]) -> str:
    """A row for each run: its last step, tokens and minutes, its lowest held-out loss and the step of that loss."""
    rows = []
    for i, run in enumerate(runs):
        loss = run.series.get(f"{EVALUATION}loss")
        best = loss[np.nanargmin(loss[:, 1])] if loss is not None and np.isfinite(loss[:, 1]).any() else None
        step, tokens, minutes = run.progress[-1]
        rows.append(
            [
                f"{_key(i)} {escape(labels[i])}",
                *(f"{x:,.0f}" for x in (step, tokens)),
                f"{minutes:,.1f}",
                *((f"{best[1]:.4f}", f"{best[0]:,.0f}") if best is not None else ("not evaluated", "")),
            ]
        )
    return table(("run", *AXES, "best held-out loss", "at step"), rows)


def _samples(runs: Sequence[Curves], labels: Sequence[str]) -> str:
    """Texts and what models did with them: of one run after some evaluations, of several after the last one of each."""
    results: dict[tuple[str, str], list[list[str]]] = {}
    for run, label in zip(runs, labels, strict=True):
        steps = list(run.samples)
        spread = np.linspace(0, len(steps) - 1, min(len(steps), EVALUATIONS)).round().astype(int)
        for step in [steps[i] for i in spread] if len(runs) == 1 else steps[-1:]:
            for each in run.samples[step]:
                row = [] if len(runs) == 1 else [escape(label)]
                results.setdefault((each.given, each.expected), []).append([*row, f"{step:,}", escape(each.result)])
    header = [*([] if len(runs) == 1 else ["run"]), "step", "model"]
    samples = [
        f'<div class="sample">{escape(given)} <i>{escape(expected)}</i>{table(header, rows)}</div>'
        for (given, expected), rows in results.items()
    ]
    return f"<h2>Samples of the held-out text</h2>{''.join(samples)}" if samples else ""


def _statistics(runs: Sequence[Curves], labels: Sequence[str]) -> str:
    """Counts of the text of each run; once of runs that have the same text and tokenizer."""
    found: dict[str, list[str]] = {}
    for run, label in zip(runs, labels, strict=True):
        if run.statistics:
            rows = [
                [escape(name), *(escape(shown(value)) for value in values)] for name, values in run.statistics.items()
            ]
            found.setdefault(table(("", "training", "held-out"), rows), []).append(escape(label))
    texts = [(f"<h3>{', '.join(each)}</h3>" if len(found) > 1 else "") + text for text, each in found.items()]
    return f"<h2>Text</h2>{''.join(texts)}<p>{QUANTILES}</p>" if texts else ""


def _differences(runs: Sequence[Curves], labels: Sequence[str]) -> str:
    """The settings in which the runs differ; all settings if there is one run."""
    names = sorted({name for run in runs for name in run.settings})
    found = {name: [run.settings.get(name) for run in runs] for name in names}
    values = {name: [_setting(name, value) for value in each] for name, each in found.items()}
    shown = [name for name in names if len(runs) == 1 or len(set(values[name])) > 1]
    if not shown:
        return "<h2>Settings</h2><p>The runs have the same settings.</p>"
    title = "Settings" if len(runs) == 1 else "Settings that differ"
    cells = [["", *labels], *([name, *values[name]] for name in shown)]
    if len(runs) > len(shown):
        cells = list(zip(*cells, strict=True))
    header, *rows = [[escape(cell) for cell in row] for row in cells]
    return f"<h2>{title}</h2>{table(header, rows)}"


def _setting(name: str, value: object) -> str:
    """A setting for people."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    text = "" if value is None else str(value)
    return text[:16] if name.endswith("fingerprint") else text


def _section(title: str, series: Sequence[tuple[str, str]], runs: Sequence[Curves], labels: Sequence[str]) -> str:
    """Pictures of some series, each against every axis."""
    figures = []
    for name, caption in series:
        if any(name in run.series for run in runs):
            pictures = "".join(f'<div class="{axis}">{_picture(name, axis, runs, labels)}</div>' for axis in AXES)
            figures.append(f"<figure><figcaption>{escape(caption)}</figcaption>{pictures}</figure>")
    return f'<h2>{title}</h2><div class="grid">{"".join(figures)}</div>' if figures else ""


def _picture(name: str, axis: str, runs: Sequence[Curves], labels: Sequence[str]) -> str:
    """SVG of one series of all runs against an axis, with the trivial baselines as dashed lines."""
    from matplotlib.ticker import LogLocator, NullFormatter

    def draw(axes: "Axes") -> None:
        count = max(40, min(POINTS, POINTS_OF_PICTURE // len(runs)))
        for i, run in enumerate(runs):
            if name in run.series:
                x, values, low, high = _thinned(run.series[name], count).T
                if axis != "steps":
                    x = np.interp(x, run.progress[:, 0], run.progress[:, AXES.index(axis)])
                color, dashes = _stroke(i)
                marker = "o" if len(x) < 30 else None
                (line,) = axes.plot(
                    x, values, color=color, linestyle=dashes, marker=marker, markersize=3, linewidth=1.4
                )
                line.set_gid(f"line-{i}")
                if len(x) < len(run.series[name]) and len(runs) <= BANDS:
                    axes.fill_between(x, low, high, color=color, alpha=0.25, linewidth=0.8)
        for label, values in _baselines(name, runs).items():
            for value in values:
                axes.axhline(value, color=INK, alpha=max(0.3, 1 / len(values)), linewidth=0.8, linestyle=(0, (4, 3)))
            axes.text(1, values[-1], label, transform=axes.get_yaxis_transform(), ha="right", va="bottom", fontsize=8)
        low, high = axes.dataLim.intervaly
        if any(part in name for part in LOGARITHMIC) and 0 < 10 * low < high:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        if any(part in name for part in FROM_ZERO):
            axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.set_xlabel(axis, color=INK)

    return picture(draw, labels)


def picture(draw: "Callable[[Axes], None]", titles: Sequence[str] = (), size: tuple[float, float] = (4.4, 2.7)) -> str:
    """SVG of what `draw` draws, in the style of the page; the same drawing gives the same bytes.

    Text is INK, which becomes the text color of the page. An artist whose gid is line-N gets titles[N], which a browser
    shows as its name.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    thousands = EngFormatter(sep="")
    style = {"svg.hashsalt": "prelm", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}
    with rc_context(style | dict.fromkeys(("text.color", "axes.edgecolor", "xtick.color", "ytick.color"), INK)):
        figure = Figure(figsize=size)
        figure.subplots_adjust(left=0.66 / size[0], right=0.97, bottom=0.459 / size[1], top=0.97)
        axes = figure.subplots()
        axes.grid(color=INK, alpha=0.15, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_formatter(lambda x, _: thousands(x) if x >= 1000 else f"{x:g}")
        draw(axes)
        output = io.StringIO()
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        FigureCanvasSVG(figure).print_svg(output, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = output.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    # A tenth of a point is enough for a line; and the browser says which one it is.
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"\d+\.\d+", lambda x: f"{float(x[0]):.1f}", path[0]), svg)
    svg = re.sub(r'<g id="line-(\d+)">', lambda group: f"<g><title>{escape(titles[int(group[1])])}</title>", svg)
    # Names of groups would occur in every picture of the page; only those of clip paths and markers are referred to.
    return re.sub(r' id="[a-z]+[\w.]*_\d+"', "", svg)


def _baselines(name: str, runs: Sequence[Curves]) -> dict[str, list[float]]:
    """The trivial baselines of a series by name, the distinct values of all runs in ascending order."""
    found: dict[str, set[float]] = {}
    for run in runs:
        for label, value in run.baselines.get(name.removeprefix(EVALUATION), {}).items():
            if name.startswith(EVALUATION) and math.isfinite(value):
                found.setdefault(label, set()).add(value)
    return {label: sorted(values) for label, values in sorted(found.items())}


def _stroke(i: int) -> tuple[str, str]:
    """The color and the dashes of run `i`."""
    return COLORS[i % len(COLORS)], list(DASHES)[i // len(COLORS) % len(DASHES)]


def _thinned(points: np.ndarray, count: int) -> np.ndarray:
    """At most `count` rows of means of neighboring points, float64 [rows, 4]: step, value, lowest and highest value."""
    if len(points) <= count:
        return points[:, [0, 1, 1, 1]]
    starts = np.linspace(0, len(points), count, endpoint=False).astype(np.int64)
    means = np.add.reduceat(points, starts) / np.diff(starts, append=len(points))[:, None]
    bounds = [bound.reduceat(points[:, 1], starts) for bound in (np.fmin, np.fmax)]
    return np.column_stack([means, *bounds])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    lines = ["".join(f"<th>{cell}</th>" for cell in header)]
    lines += ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    return f'<div class="scroll"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are text."""
    return table([escape(cell) for cell in header], [[escape(cell) for cell in row] for row in rows])
