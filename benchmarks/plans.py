"""Writes the table of tpu/README.md: `prelm plan` for each experiment and slice, some minutes per row.

    python benchmarks/plans.py [--only v5e:4x4]

Updates the rows whose name or slice contains `--only`. Needs the extra `tpu`, but no TPU.
"""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import tyro

ROOT = Path(__file__).parents[1]
README = ROOT / "tpu" / "README.md"
BEGIN, END = "<!-- written by benchmarks/plans.py -->\n", "<!-- end -->"

# Name, experiment, slice, options. Default batch sizes, except on 256 chips: as many rows per chip as on 16.
WIDE = ("--batch-size", "512")
PLANS = (
    ("BERT base, T=128", "bert.py:base", "v5e:4x4", ()),
    ("BERT base, T=512", "bert.py:base_512", "v5e:4x4", ()),
    ("BERT base, T=512", "bert.py:base_512", "v5e:4x4", WIDE),
    (
        "BERT base, T=512, no attention dropout",
        "bert.py:base_512",
        "v5e:4x4",
        (*WIDE, "--model.attention-dropout", "0"),
    ),
    ("BERT large, T=128", "bert.py:large", "v5e:4x4", ()),
    ("GPT base, T=512", "gpt1.py:base", "v5e:4x4", ()),
    ("ELMo original, T=20", "elmo.py:original", "v5e:4x4", ()),
    ("BERT base, T=128", "bert.py:base", "v4:2x2x1", ()),
    ("BERT base, T=128", "bert.py:base", "v5p:2x2x1", ()),
    ("BERT base, T=128", "bert.py:base", "v6e:2x4", ()),
    ("BERT base, T=128", "bert.py:base", "v5e:16x16", ("--batch-size", "4096")),
)
COLUMNS = (
    "run",
    "slice",
    "rows per chip",
    "HBM per chip, GiB",
    "ms, at least: compute, memory, links",
    "bound by",
    "MFU, at most (by all bytes)",
    "tokens/s, at most",
    "hours, at least",
    "compiled in",
)
HEADER = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which rows to update."""

    only: str = ""


def row(name: str, topology: str, plan: dict[str, Any]) -> str:
    """A line of the table."""
    times = plan["seconds_by"]
    cells = (
        name,
        f"`{topology}`",
        f"{plan['batch_size'] / plan['chips']:g}",
        f"{plan['memory_needed'] / 2**30:.1f} of {plan['memory_available'] / 2**30:.2f}"
        + ("" if plan["fits"] else ": too much"),
        ", ".join(f"{1e3 * times[side]:.1f}" for side in ("compute", "memory", "links")),
        plan["bound"],
        f"{plan['mfu']:.0%} ({plan['mfu_by_all_bytes']:.0%})",
        f"{plan['tokens_per_second']:,.0f}",
        f"{24 * plan['days']:.1f}",
        f"{plan['compile_seconds']:.0f} s",
    )
    return f"| {' | '.join(cells)} |\n"


def main(settings: Settings) -> None:
    """Computes the rows and writes the table after each."""
    for number, (name, experiment, topology, options) in enumerate(PLANS):
        if settings.only not in f"{name} {topology}":
            continue
        command = (sys.executable, "-m", "prelm_jax", "plan", f"experiments/{experiment}", "--topology", topology)
        done = subprocess.run([*command, "--json", *options], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed")
        line = row(name, topology, json.loads(done.stdout))
        print(line, end="", flush=True)
        write(number, line)


def write(number: int, line: str) -> None:
    """Replaces one row of the table; a missing table is filled from the first row on."""
    before, table, after = re.split(f"{BEGIN}|{END}", README.read_text())
    rows = table.removeprefix(HEADER).splitlines(keepends=True)
    rows += [""] * (len(PLANS) - len(rows))
    rows[number] = line
    README.write_text(f"{before}{BEGIN}{HEADER}{''.join(rows)}{END}{after}")


if __name__ == "__main__":
    main(tyro.cli(Settings))
