"""Draws docs/losses.svg: training and held-out loss of some runs beside their baselines, and their gradient norms.

make demo && make demo MODEL=gpt1 && make demo MODEL=elmo
python docs/losses.py runs/bert-demo runs/gpt1-demo runs/elmo-demo --output docs/losses.svg
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "prelm_jax"  # the same file for the same metrics

import matplotlib.pyplot as plt  # noqa: E402

from prelm_jax.workdir import WorkDir  # noqa: E402

COLORS = {"training": "#8b949e", "held out": "#1f6feb", "unigram": "#6e7781", "trigram": "#bf8700"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="work directories, a column of the picture each")
    parser.add_argument("--output", type=Path, default=Path("losses.svg"), help="SVG file to write")
    arguments = parser.parse_args()
    shape = {"figsize": (3.4 * len(arguments.runs), 4.2), "height_ratios": (3, 1), "sharex": "col"}
    figure, axes = plt.subplots(2, len(arguments.runs), layout="constrained", squeeze=False, **shape)
    for run, (above, below) in zip(arguments.runs, axes.T, strict=True):
        draw(run, above, below)
    figure.legend(*above.get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    figure.savefig(arguments.output, metadata={"Date": None})
    print(f"wrote {arguments.output}")


def draw(run: Path, above: plt.Axes, below: plt.Axes) -> None:
    """The losses of a run above, its gradient norm below."""
    workdir = WorkDir(run)
    lines, baselines = workdir.read_metrics(), workdir.read_baselines() or {}
    metrics = [name for name, values in baselines.items() if name.endswith("loss") and "unigram" in values]
    metric = "loss" if "loss" in metrics else metrics[0]
    above.plot(*points(lines, f"train/{metric}"), color=COLORS["training"], linewidth=1, label="training, one batch")
    above.plot(
        *points(lines, f"evaluation/{metric}"), color=COLORS["held out"], marker="o", markersize=3, label="held out"
    )
    for name, value in baselines[metric].items():
        if name in COLORS:
            above.axhline(value, color=COLORS[name], linestyle="--", linewidth=1)
            above.text(0.99, value, name, transform=above.get_yaxis_transform(), ha="right", va="bottom", fontsize=8)
    below.plot(*points(lines, "train/grad_norm"), color=COLORS["training"], linewidth=1)
    above.set_title(run.name, fontsize=10)
    above.set_ylabel(f"{metric.replace('_', ' ')}, nats", fontsize=8)
    below.set_ylabel("gradient norm", fontsize=8)
    below.set_xlabel("steps", fontsize=8)
    for axis in (above, below):
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)


def points(lines: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
    """The steps and the values of a series."""
    found = [(line["step"], line[name]) for line in lines if name in line]
    return [step for step, _ in found], [value for _, value in found]


if __name__ == "__main__":
    main()
