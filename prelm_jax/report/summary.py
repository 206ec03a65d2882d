"""Tables on the terminal, the header of a run, and the model card of an export."""

import dataclasses
import math
import shlex
import sys
from typing import Literal, cast

import jax
from rich.console import Console
from rich.table import Table

from prelm_jax.corpus.documents import Corpus
from prelm_jax.corpus.store import Store
from prelm_jax.formats.base import Format, LoadedModel
from prelm_jax.run import Run, RunRecord, Statistic, Training
from prelm_jax.training.contract import Batch, HostBatch, Model, Params
from prelm_jax.training.metrics import EVALUATION
from prelm_jax.training.parameters import path_name
from prelm_jax.workdir import WorkDir

QUANTILES = "* median / 90 % / 99 % / longest"


@dataclasses.dataclass(frozen=True)
class Summary:
    """The evaluation of a model on a text: metrics, their trivial baselines, and the rate of unknown tokens."""

    evaluation: dict[str, float]
    baselines: dict[str, dict[str, float]]
    unknown_tokens: float
    tokens_per_second: float  # The median speed of its training.
    step: int  # Of its weights.
    share: float | None = None  # Fraction of the text that was read; None: the sample that the training evaluates on.
    targets: dict[str, int] = dataclasses.field(default_factory=dict)  # Number of targets of each metric, if known.


def print_table(table: Table, stderr: bool = False) -> None:
    """Prints a table as wide as the terminal, or 120 columns wide into a file or pipe."""
    stream = sys.stderr if stderr else sys.stdout
    Console(file=stream, width=None if stream.isatty() else 120).print(table)


def summary_table(summary: Summary) -> Table:
    """Metrics of a text, each with its trivial baselines and the number of targets that it was measured on."""
    text = "sample of the held-out text" if summary.share is None else "all of the text"
    if summary.share is not None and summary.share < 1:
        text = f"{summary.share:.2%} of the text"
    if not summary.evaluation:
        text = "not evaluated: nothing is held out"
    table = Table(f"step {summary.step:,}, {text}", "model", "baseline", *(["targets"] if summary.targets else []))
    for name, value in summary.evaluation.items():
        targets = [f"{summary.targets[name]:,}"] if name in summary.targets else []
        table.add_row(words(name), f"{value:.3f}", _baselines(summary.baselines.get(name, {}), ".3f"), *targets)
    table.add_section()
    if summary.evaluation:
        table.add_row("unknown tokens", f"{summary.unknown_tokens:.2%}", "")
    if not math.isnan(summary.tokens_per_second):  # NaN where training ended before its first measurement.
        table.add_row("training, tokens/s", f"{summary.tokens_per_second:,.0f}", "")
    return table


def corpus_table(corpus: Corpus, training: Store, held_out: Store) -> Table:
    """Counts of both sides of a prepared corpus."""
    table = Table("corpus", "training", "held-out", caption=QUANTILES)
    for name, values in corpus_statistics(corpus, training, held_out).items():
        table.add_row(name, *map(shown, values))
    return table


def corpus_statistics(corpus: Corpus, training: Store, held_out: Store) -> dict[str, list[Statistic]]:
    """Name -> the numbers of the training and of the held-out side of a prepared corpus."""
    stores = (training, held_out)

    def percent(count: int, number: int, digits: int) -> float:
        return round(100 * count / max(number, 1), digits)

    def of_length_one(unit: Literal["documents", "sentences"]) -> list[Statistic]:
        return [percent(store.count_of_length_one(unit), store.manifest[unit], 1) for store in stores]

    names = ("documents", "sentences", "words", "tokens", "bytes")
    found: dict[str, list[Statistic]] = {name: [store.manifest[name] for store in stores] for name in names}
    found["bytes per token"] = [round(store.manifest["bytes"] / max(store.num_tokens, 1), 2) for store in stores]
    found["unknown tokens, %"] = [percent(s.manifest["unknown_tokens"], s.num_tokens, 3) for s in stores]
    found["longest word, characters"] = [store.manifest["longest_word"] for store in stores]
    found["tokens per document*"] = [store.length_quantiles("documents") for store in stores]
    found["tokens per sentence*"] = [store.length_quantiles("sentences") for store in stores]
    found["documents of one sentence, %"] = of_length_one("documents")
    found["sentences of one token, %"] = of_length_one("sentences")
    found["empty documents, dropped"] = [store.manifest["empty_documents"] for store in stores]
    if corpus.deduplicate:
        found["duplicates of both sides, dropped"] = [corpus.duplicates]
    return found


def shown(value: Statistic) -> str:
    """A statistic as people read it; a record of an earlier version has it like that."""
    if isinstance(value, list):
        return " / ".join(map(shown, value))
    return value if isinstance(value, str) else f"{value:,}"


def print_run_header(
    model_type: str, run: Training, model: Model, batch: HostBatch, params: Params, step: int, mesh: jax.sharding.Mesh
) -> None:
    """Prints, on process 0, the model, devices and steps of a run; `batch`: any batch of the run, for its shapes."""
    if jax.process_index() != 0:
        return
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(
        f"{model_type} with {parameters:,} parameters on {mesh.size} × {jax.devices()[0].device_kind}, "
        f"steps {step:,} to {run.loop.steps:,}",
        file=sys.stderr,
    )
    flops = run.optimizer.flops(params, model.matrices, mesh.shape["data"])
    if flops:
        share = flops / (flops + model.flops(cast(Batch, batch)) / mesh.size)
        name, size = type(run.optimizer).__name__, f"{flops / 1e9:,.2f} GFLOP on each device"
        print(f"{name} takes {share:.1%} of a step's matrix products: {size}", file=sys.stderr)


LOSS = f"{EVALUATION}loss"


def model_card(workdir: WorkDir, run: Run, step: int, model: LoadedModel, format: Format, name: str) -> str:
    """README.md of an exported checkpoint: usage, size, corpus, held-out metrics with their baselines, command."""
    record = workdir.read_record()
    parameters = _num_parameters(model, format)
    positions = step * run.batch_size * run.data.max_length
    sources = "\n".join(f"- `{source}`" for source in run.corpus)
    fingerprint = str(record.identity.get("corpus_fingerprint"))[:16]
    return f"""---
library_name: {format.library}
license: # the license of your corpus and weights, for example apache-2.0
tags:
- {record.model_type}
- prelm_jax
---

# {name}

{record.model_type}, pretrained with prelm_jax.

{format.usage.format(name=name)}

- Weights: step {step:,} of the run{_other_losses(workdir, step)}.
- Size: {parameters:,} parameters; {model.config.vocab_size:,} tokens in the vocabulary.
- Training: {step:,} steps of {run.batch_size} × {run.data.max_length} tokens ({positions:,} positions, padding \
included), seed {run.seed}, {run.precision}.
- Corpus ({run.split:.1%} of its documents held out; content `{fingerprint}`):

{sources}

{_held_out(workdir, run, step)}

{_commands(record, step)}
"""


def _num_parameters(model: LoadedModel, format: Format) -> int:
    """The number of parameters as published: without the rows that pad vocabulary tables."""
    return sum(
        leaf.size // len(leaf) * model.config.vocab_size if path_name(path) in format.vocabulary_tables else leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(model.params)
    )


def _commands(record: RunRecord, step: int) -> str:
    """The commands that trained the weights of a step, as lines of a model card."""
    extensions = [segment for segment in record.segments if segment.command and segment.from_step < step]
    lines = [f"Command: `prelm {shlex.join(record.command)}`"]
    lines += [f"From step {each.from_step:,}: `prelm {shlex.join(each.command or [])}`" for each in extensions]
    return "\n\n".join(lines)


def _other_losses(workdir: WorkDir, step: int) -> str:
    """` (held-out loss 4.0700; 4.1200 at the last evaluation, step 1,000)`; empty if the step was not evaluated."""
    losses = {line["step"]: line[LOSS] for line in workdir.read_metrics() if LOSS in line}
    if step not in losses:
        return ""
    last, lowest = max(losses), min(losses, key=losses.__getitem__)
    others = [] if step == last else [f"{losses[last]:.4f} at the last evaluation, step {last:,}"]
    others += [] if step == lowest else [f"{losses[lowest]:.4f} at the best, step {lowest:,}"]
    return f" (held-out loss {'; '.join([f'{losses[step]:.4f}', *others])})"


def _held_out(workdir: WorkDir, run: Run, step: int) -> str:
    """The evaluation of a step, as a table of a model card; without one, a sentence that says so."""
    if not run.split and not run.validation:
        return "Not evaluated: nothing was held out."
    lines = [line for line in workdir.read_metrics() if line["step"] == step and LOSS in line]
    if not lines:
        return f"Not evaluated at step {step:,}."
    baselines = workdir.read_baselines() or {}
    found = {name.partition(EVALUATION)[2]: value for name, value in lines[-1].items() if name.startswith(EVALUATION)}
    rows = [
        f"| {words(name)} | {value:.4f} | {_baselines(baselines.get(name, {}), '.4f')} |"
        for name, value in found.items()
    ]
    table = "\n".join(["| metric | model | baseline |", "|---|---|---|", *rows])
    text = "Held-out text"
    if run.validation:
        text = f"Validation text ({', '.join(f'`{source}`' for source in run.validation)})"
    return f"{text}, after step {step:,}:\n\n{table}"


def words(name: str) -> str:
    """A metric's name for people: "masked_lm_loss" is "masked lm loss"."""
    return name.replace("_", " ")


def _baselines(values: dict[str, float], form: str) -> str:
    return ", ".join(f"{name} {value:{form}}" for name, value in values.items() if not math.isnan(value))
