"""Writes the tables of tpu/README.md: `prelm plan` for each experiment and slice, two minutes of a core per row.

    python benchmarks/plans.py [--only v5e:4x4]

Computes the rows whose name or slice contains `--only`; the others stay as they are in benchmarks/results/plans.json,
which holds each plan with the machine that compiled it. Needs the extra `tpu`, but no TPU.
"""

import dataclasses
import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import tyro
from harness import machine

from prelm_jax.training.chips import CHIPS

ROOT = Path(__file__).parents[1]
README, RESULTS = ROOT / "tpu" / "README.md", ROOT / "benchmarks" / "results" / "plans.json"
BEGIN, END = "<!-- written by benchmarks/plans.py -->\n", "<!-- end -->"

# Name, experiment, slice, options. Default batch sizes, except on 256 chips: as many rows per chip as on 16.
WIDE, PACKED = ("--batch-size", "512"), ("--data.packing",)
PLANS = (
    ("BERT base, T=128", "bert.py:base", "v5e:4x4", ()),
    ("BERT base, T=512", "bert.py:base_512", "v5e:4x4", ()),
    ("BERT base, T=512", "bert.py:base_512", "v5e:4x4", WIDE),
    ("BERT base, T=128, packed", "bert.py:base", "v5e:4x4", PACKED),
    ("BERT base, T=512, packed", "bert.py:base_512", "v5e:4x4", PACKED),
    ("BERT large, T=128", "bert.py:large", "v5e:4x4", ()),
    ("GPT base, T=512", "gpt1.py:base", "v5e:4x4", ()),
    ("ELMo original, T=20", "elmo.py:original", "v5e:4x4", ()),
    ("BERT base, T=128", "bert.py:base", "v4:2x2x1", ()),
    ("BERT base, T=128", "bert.py:base", "v5p:2x2x1", ()),
    ("BERT base, T=128", "bert.py:base", "v6e:2x4", ()),
    ("BERT base, T=128", "bert.py:base", "v5e:16x16", ("--batch-size", "4096")),
)
TIMES = ("compute", "memory", "links", "vector", "recurrence")
COLUMNS = (
    "run",
    "slice",
    "rows per chip",
    "HBM per chip, GiB",
    f"ms, at least: {', '.join(TIMES)}",
    "bound by",
    "MFU, at most (by all bytes)",
    "tokens/s, at most",
    "hours, at least",
    "CPU s to compile",
)
LIMITS = (
    "limits of a chip",
    "TFLOP/s in bf16",
    "HBM, GB/s",
    "links, GB/s, to all neighbors",
    "vector operations, 10¹²/s",
    "wait for a product, µs",
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which rows to compute."""

    only: str = ""


def key(name: str, topology: str, options: tuple[str, ...]) -> str:
    """The name of a plan in the results."""
    return " ".join((name, topology, *options))


def line(*cells: str) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |\n"


def row(name: str, topology: str, cpu_seconds: float, plan: dict[str, Any]) -> str:
    """The line of a plan."""
    return line(
        name,
        f"`{topology}`",
        f"{plan['batch_size'] / plan['chips']:g}",
        f"{plan['memory_needed'] / 2**30:.1f} of {plan['memory_available'] / 2**30:.2f}"
        + ("" if plan["fits"] else ": too much"),
        ", ".join(f"{1e3 * plan['seconds_by'][side]:.1f}" for side in TIMES),
        plan["bound"],
        f"{plan['mfu']:.0%} ({plan['mfu_by_all_bytes']:.0%})",
        f"{plan['tokens_per_second']:,.0f}",
        f"{24 * plan['days']:.1f}",
        f"{cpu_seconds:.0f}",
    )


def tables(results: dict[str, Any]) -> str:
    """The plans that there are results of, and the limits of their chips."""
    found = [(name, topology, results.get(key(name, topology, options))) for name, _, topology, options in PLANS]
    plans = [row(name, topology, result["cpu_seconds"], result["plan"]) for name, topology, result in found if result]
    limits = []
    for kind, chip in CHIPS.items():
        if kind.startswith("TPU"):
            giga = [f"{rate / 1e9:,.0f}" for rate in (chip.bandwidth, chip.links)]
            last = (f"{chip.vector / 1e12:.1f}", f"{1e6 * chip.latency:.2f}")
            limits.append(line(kind, f"{chip.flops / 1e12:.0f}", *giga, *last))
    rule = {columns: line(*columns) + line(*["---"] * len(columns)) for columns in (COLUMNS, LIMITS)}
    return f"{rule[COLUMNS]}{''.join(plans)}\n{rule[LIMITS]}{''.join(limits)}"


def main(settings: Settings) -> None:
    """Computes the plans, and writes results and tables after each."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, experiment, topology, options in PLANS:
        if settings.only not in f"{name} {topology}":
            continue
        command = (sys.executable, "-m", "prelm_jax", "plan", f"experiments/{experiment}", "--topology", topology)
        before = cpu_seconds()
        done = subprocess.run([*command, "--json", *options], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed")
        result = {"machine": machine(), "cpu_seconds": cpu_seconds() - before, "plan": json.loads(done.stdout)}
        print(row(name, topology, result["cpu_seconds"], result["plan"]), end="", flush=True)
        results[key(name, topology, options)] = result
        write(results)


def cpu_seconds() -> float:
    """CPU time of all children so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def write(results: dict[str, Any]) -> None:
    """Writes the results, and the tables between the marks in the README."""
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    before, _, after = re.split(f"{BEGIN}|{END}", README.read_text())
    README.write_text(f"{before}{BEGIN}{tables(results)}{END}{after}")


if __name__ == "__main__":
    main(tyro.cli(Settings))
