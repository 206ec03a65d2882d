"""Tables for a person at a terminal."""

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

GiB = 2**30


def print_table(table: Table | str) -> None:
    """Prints it as wide as the terminal; where there is none, 120 columns wide."""
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def summary_table(summary: Any) -> Table:
    """What was reached on held-out text, beside what models that know next to nothing reach."""
    table = Table("held-out", "model", "baseline")
    for name, value in summary.evaluation.items():
        baselines = ", ".join(f"{known} {x:.3f}" for known, x in summary.baselines.get(name, {}).items())
        table.add_row(name.replace("_", " "), f"{value:.3f}", baselines)
    table.add_section()
    table.add_row("unknown tokens", f"{summary.unknown_tokens:.2%}", "")
    table.add_row("training, tokens/s", f"{summary.tokens_per_second:,.0f}", "")
    return table


def of_plan(plan: Any) -> Table:
    """What a step takes, and what bounds it, for a person who decides what to rent."""
    table = Table("", f"a step on each of {plan.chips} × {plan.device}")
    fits = "fits" if plan.fits else f"DOES NOT FIT: {plan.advice}. What follows is of the largest batch"
    table.add_row("memory", f"{plan.memory_needed / GiB:.2f} of {plan.memory_available / GiB:.2f} GiB: {fits}")
    for name, (whole, share) in plan.shares.items():
        if whole:
            table.add_row(f"  {name}", f"{whole / 1e6:,.1f} MB in all, {share / 1e6:,.1f} MB on a chip")
    table.add_row("batch", f"{plan.batch_size} rows, {plan.tokens:,} places")
    table.add_section()
    table.add_row(
        "operations", f"{plan.model_flops / 1e12:.2f} TFLOP by the model, {plan.compiled_flops / 1e12:.2f} as compiled"
    )
    table.add_row("bytes touched", f"{plan.bytes / 1e9:.1f} GB, in memory {plan.memory_bytes / 1e9:.1f}")
    for each, seconds in plan.collectives:
        among = "slices" if each.between_slices else "chips"
        size = f"{each.count} × {each.devices} {among}, {each.bytes / 1e6:,.2f} MB"
        table.add_row(f"  {each.kind}", size if seconds is None else f"{size}: {seconds * 1e3:.3f} ms")
    table.add_section()
    times = ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in plan.seconds_by.items())
    table.add_row("at least, ms", f"{times}: bound by {plan.bound}")
    by_all_bytes = plan.mfu_by_all_bytes
    note = "" if by_all_bytes is None else f"; {by_all_bytes:.1%} if all bytes touched were in memory"
    table.add_row("MFU at most", f"{plan.mfu:.1%}{note}")
    table.add_row("tokens/s at most", f"{plan.tokens_per_second:,.0f}")
    table.add_row("days at least", f"{plan.days:.2f} for {plan.steps:,} steps")
    table.add_row("compiled in", f"{plan.compile_seconds:.0f} s")
    return table


def corpus_table(corpus, training, held_out) -> str:
    """Counts of both sides of a prepared corpus."""
    from prelm_jax import pretrain

    return pretrain.figures(pretrain.Prepared(corpus, None, training, held_out, False))
