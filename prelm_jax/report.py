"""Tables for a person at a terminal."""

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def print_table(table: Table) -> None:
    """Prints it as wide as the terminal; where there is none, 120 columns wide."""
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def of_summary(summary: Any) -> Table:
    """What was reached on held-out text, beside what models that know next to nothing reach."""
    table = Table("held-out", "model", "baseline")
    for name, value in summary.evaluation.items():
        baselines = ", ".join(f"{known} {x:.3f}" for known, x in summary.baselines.get(name, {}).items())
        table.add_row(name.replace("_", " "), f"{value:.3f}", baselines)
    table.add_section()
    table.add_row("unknown tokens", f"{summary.unknown_tokens:.2%}", "")
    table.add_row("training, tokens/s", f"{summary.tokens_per_second:,.0f}", "")
    return table


def of_tokenizer(tokenizer: Any, lines: Sequence[str] | None) -> Table:
    """What a tokenizer is; with lines of text, what it makes of them and which of them it knows least of."""
    table = Table(show_header=False)
    table.add_row("kind", type(tokenizer).__name__)
    table.add_row("entries", f"{tokenizer.vocab_size:,}")
    table.add_row(
        "special tokens", escape(", ".join(f"{name} {index}" for name, index in tokenizer.special_ids.items()))
    )
    table.add_row("lower-cased", "yes" if tokenizer.lowercase else "no")
    table.add_row("longest entries", escape("  ".join(sorted(tokenizer.tokens, key=len, reverse=True)[:5])))
    if lines is not None:
        encoded = tokenizer.encode_batch(lines)
        unknown = [ids.count(tokenizer.unknown_id) for ids in encoded]
        tokens = max(1, sum(map(len, encoded)))
        table.add_section()
        table.add_row("tokens", f"{sum(map(len, encoded)):,}")
        table.add_row("bytes per token", f"{sum(len(line.encode()) for line in lines) / tokens:.3f}")
        table.add_row("tokens per word", f"{tokens / max(1, sum(len(line.split()) for line in lines)):.3f}")
        table.add_row("unknown tokens", f"{sum(unknown) / tokens:.2%}")
        for i in sorted(range(len(lines)), key=unknown.__getitem__, reverse=True)[:5]:
            if unknown[i]:
                table.add_row(f"line {i + 1}: {unknown[i]} unknown", escape(lines[i][:200]))
    return table
