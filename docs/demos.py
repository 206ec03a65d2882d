"""Draws docs/demos.svg: held-out loss of the three demos over training, with their trivial baselines.

make demo && make demo MODEL=gpt1 && make demo MODEL=elmo
python docs/demos.py runs docs/demos.svg
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "prelm_jax"  # the same file for the same metrics

import matplotlib.pyplot as plt  # noqa: E402

from prelm_jax.workdir import WorkDir  # noqa: E402

PANELS = (
    ("bert-demo", "BERT", "masked_lm_loss", "masked-LM loss, nats", ("unigram",)),
    ("gpt1-demo", "GPT-1", "bits_per_byte", "bits per byte", ("unigram", "trigram")),
    ("elmo-demo", "ELMo", "perplexity", "perplexity, both directions", ("unigram", "trigram")),
)
COLORS = {"model": "#1f6feb", "unigram": "#8b949e", "trigram": "#bf8700"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="directory that holds the three work directories")
    parser.add_argument("output", type=Path, help="SVG file to write")
    arguments = parser.parse_args()
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.8), layout="constrained")
    for axis, (name, title, metric, unit, shown) in zip(axes, PANELS, strict=True):
        workdir = WorkDir(arguments.runs / name)
        key = f"evaluation/{metric}"
        points = [(line["step"], line[key]) for line in workdir.read_metrics() if key in line]
        steps, values = zip(*points, strict=True)
        axis.plot(steps, values, color=COLORS["model"], marker="o", markersize=3, label="model")
        baselines = (workdir.read_baselines() or {})[metric]
        for baseline in shown:
            axis.axhline(baselines[baseline], color=COLORS[baseline], linestyle="--", linewidth=1)
            axis.annotate(
                baseline,
                (0.99, baselines[baseline]),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                color=COLORS[baseline],
                fontsize=8,
            )
        if metric == "perplexity":
            axis.set_yscale("log")
        axis.set_title(title, fontsize=10)
        axis.set_ylabel(unit, fontsize=8)
        axis.set_xlabel("steps", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(arguments.output, metadata={"Date": None})
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
