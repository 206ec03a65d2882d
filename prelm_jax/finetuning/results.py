"""Results of a fine-tuning with one or several seeds, and what people read of them: a table, and the model card.

results.json               Results, above the work directories of the seeds
seed-N/predictions.jsonl   the predictions for the held-out examples after the last step, one object a line
"""

import dataclasses
import json
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from prelm_jax import __version__
from prelm_jax.bounds import NotNegative, Positive, Seed
from prelm_jax.data.examples import Answers, Example, Kind
from prelm_jax.errors import InputError
from prelm_jax.finetuning.files import FileSpec
from prelm_jax.finetuning.metrics import Score
from prelm_jax.inference import decoding
from prelm_jax.report.summary import words
from prelm_jax.storage import prefix_errors, reachable, read_json, read_lines, write_file
from prelm_jax.validation import read

RESULTS = "results.json"
PREDICTIONS = "predictions.jsonl"
SHOWN = 200  # Characters of an example's text that its prediction quotes.

# What hubs call the tasks and metrics.
PIPELINES: dict[Kind, str] = {
    "label": "text-classification",
    "labels": "text-classification",
    "number": "text-classification",
    "choice": "multiple-choice",
    "tags": "token-classification",
    "spans": "question-answering",
}
# How a model of a kind is used in Python; what it prints is in the form of `Example.label`.
_CLASSIFY = 'classify(["A text.", ("A text", "and the other of a pair.")])'
USES: dict[Kind, str] = {
    "label": _CLASSIFY,
    "labels": _CLASSIFY,
    "number": _CLASSIFY,
    "choice": 'choose([("A text.", ["An option.", "Another."])])',
    "tags": 'tag(["Words with spaces between them ."])',
    "spans": 'answer([("A question?", "The passage that may answer it.")])',
}
METRIC_TYPES = {
    **dict.fromkeys(("f1", "macro_f1", "micro_f1", "span_f1", "has_answer_f1", "no_answer_f1"), "f1"),
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
    "span_precision": "precision",
    "span_recall": "recall",
}


@dataclass(frozen=True)
class SeedResult:
    """What a seed came to."""

    seed: Seed
    step: NotNegative  # Of the weights.
    evaluations: NotNegative  # How often the held-out examples were looked at.
    scores: dict[str, Score]


@dataclass(frozen=True)
class Spread:
    """A metric over seeds. `deviation`: of the sample; None for one seed. `at_baseline`: runs that are not above it."""

    mean: float
    deviation: float | None
    median: float  # The lower one.
    lowest: float
    highest: float
    error: float | None  # The sampling error of the held-out examples: the median seed's.
    baseline: float | None  # The best trivial one.
    at_baseline: int


@dataclass(frozen=True)
class Results:
    """What results.json holds."""

    task: str
    kind: Kind
    model_type: str
    init_from: str | None  # Directory of the pretrained model; None: trained from scratch.
    train: str
    dev: str
    train_examples: Positive
    dev_examples: Positive
    labels: tuple[str, ...]
    metric: str  # The metric by which the median seed is chosen.
    baselines: dict[str, dict[str, float]]  # metric -> trivial baseline -> its value on the same examples
    seeds: tuple[SeedResult, ...]
    version: str = __version__

    def median_seed(self) -> SeedResult:
        """The seed of the lower median of the task's metric; of equal ones the smallest."""
        ordered = sorted(self.seeds, key=lambda each: (each.scores[self.metric].value, each.seed))
        median = ordered[(len(ordered) - 1) // 2].scores[self.metric].value
        return next(each for each in ordered if each.scores[self.metric].value == median)

    def of_seed(self, seed: int | None) -> SeedResult:
        """The result of a seed; None: of the median one. Raises InputError for a seed that was not trained."""
        if seed is None:
            return self.median_seed()
        found = [each for each in self.seeds if each.seed == seed]
        if not found:
            raise InputError(
                f"--seed {seed} was not trained: choose one of {', '.join(str(x.seed) for x in self.seeds)}"
            )
        return found[0]

    def spread(self, metric: str) -> Spread:
        """A metric over all seeds."""
        values = [each.scores[metric].value for each in self.seeds]
        baseline = max(self.baselines.get(metric, {}).values(), default=None)
        return Spread(
            mean=statistics.fmean(values),
            deviation=statistics.stdev(values) if len(values) > 1 else None,
            median=statistics.median_low(values),
            lowest=min(values),
            highest=max(values),
            error=self.median_seed().scores[metric].error,
            baseline=baseline,
            at_baseline=0 if baseline is None else sum(value <= baseline for value in values),
        )

    def metrics(self) -> list[str]:
        """The metrics, that of the task first."""
        return sorted(self.seeds[0].scores, key=lambda name: name != self.metric)


def write_results(directory: str | os.PathLike, results: Results) -> None:
    """Writes results.json; a file that is there is replaced."""
    content = json.dumps(dataclasses.asdict(results), indent=1, ensure_ascii=False) + "\n"
    write_file(reachable(directory) / RESULTS, content.encode())


def read_results(directory: str | os.PathLike) -> Results:
    """Raises InputError where there is no results.json, or one that is damaged."""
    path = reachable(directory) / RESULTS
    if not path.is_file():
        raise InputError(f"{directory} has no {RESULTS}: it is not the directory of a fine-tuning, or no seed is done")
    try:
        results = read(Results, read_json(path), path)
        names = [set(each.scores) for each in results.seeds]
        if not names or any(each != names[0] for each in names) or results.metric not in names[0]:
            raise InputError(f"{path}: all seeds must have the same metrics, and `{results.metric}` among them")
    except InputError as error:
        raise InputError(f"{error}; delete it, and the same prelm finetune writes it again") from None
    return results


def seed_directories(directory: str | os.PathLike) -> list[Path]:
    """The work directories of the seeds of a fine-tuning, by number; none for another directory."""
    parent = reachable(directory)
    found = {path.name.removeprefix("seed-"): path for path in parent.glob("seed-*") if (path / "run.json").is_file()}
    return [found[name] for name in sorted(filter(str.isdecimal, found), key=int)]


# ---- Predictions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """A line of predictions.jsonl.

    Labels are as in `Example.label`, but for `spans`: the texts of all accepted answers, and the predicted text, "" for
    no answer. `probabilities` by label; None where the head gives none.
    """

    id: str
    text: str  # The beginning of the example's text.
    gold: object
    prediction: object
    probabilities: dict[str, float] | None = None


def write_predictions(
    path: str | os.PathLike,
    kind: Kind,
    examples: Sequence[Example],
    predictions: Sequence[decoding.Prediction],
    labels: Sequence[str] = (),
) -> None:
    """Writes predictions.jsonl, in the order of the examples; a file that is there is replaced.

    labels: the names that the model knows, of the kinds that have names.
    """
    lines = []
    for example, found in zip(examples, predictions, strict=True):
        predicted = found.label
        parts = [part if isinstance(part, str) else " ".join(part) for parts in example.sequences for part in parts]
        gold = list(example.label.texts) if isinstance(example.label, Answers) else example.label
        if isinstance(predicted, Answers):
            predicted = predicted.texts[0] if predicted.texts else ""
        rounded = None
        if found.scores and kind != "tags":
            names = labels or map(str, range(len(found.scores)))
            rounded = {name: round(x, 6) for name, x in zip(names, found.scores, strict=True)}
        line = Prediction(example.id, " | ".join(dict.fromkeys(parts))[:SHOWN], gold, predicted, rounded)
        lines.append(json.dumps(dataclasses.asdict(line), ensure_ascii=False) + "\n")
    write_file(reachable(path), "".join(lines).encode())


def read_predictions(path: str | os.PathLike) -> list[Prediction]:
    """Raises InputError for a line that is no prediction."""
    predictions = []
    for number, line in enumerate(read_lines(path), start=1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}:{number} is not JSON: {error}") from None
        with prefix_errors(f"{path}:{number}"):
            predictions.append(read(Prediction, value, "prediction"))
    return predictions


# ---- What people read ------------------------------------------------------------------------------------------------


def points(value: float | None) -> str:
    """A fraction as papers print it: 0.8766 is 87.7."""
    return "–" if value is None else f"{100 * value:.1f}"


def spread_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of all metrics, in points."""
    several = len(results.seeds) > 1
    header = [
        "metric (× 100)",
        *(["mean ± std", "median", "range"] if several else ["value"]),
        "sampling error",
        "baseline",
    ]
    rows = []
    for name in results.metrics():
        x = results.spread(name)
        values = [
            f"{points(x.mean)} ± {points(x.deviation)}",
            points(x.median),
            f"{points(x.lowest)} to {points(x.highest)}",
        ]
        beside = _beside(results.baselines.get(name, {}))
        row = [words(name), *(values if several else [points(x.mean)]), points(x.error), beside]
        rows.append([*row, f"{x.at_baseline} of {len(results.seeds)}"])
    return [*header, "runs not above it"], rows


def _beside(baselines: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {points(value)}" for name, value in baselines.items())


def scores_table(title: str, scores: Mapping[str, Score], baselines: Mapping[str, Mapping[str, float]]) -> Table:
    """The metrics of one model, each with its sampling error and trivial baselines."""
    table = Table("metric (× 100)", "value", "sampling error", "baseline", title=title)
    for name, score in scores.items():
        table.add_row(words(name), points(score.value), points(score.error), _beside(baselines.get(name, {})))
    return table


def title(results: Results) -> str:
    """What was measured on what, in one line."""
    origin = f"from {results.init_from}" if results.init_from else "from scratch"
    return f"{results.task}: {results.model_type} {origin}, {results.dev_examples:,} examples of {results.dev}"


def results_table(results: Results) -> Table:
    """All metrics over the seeds, each with its sampling error and trivial baselines."""
    first, *others = (str(each.seed) for each in results.seeds)
    caption = f"seed {first}"
    if others:
        median = results.median_seed().seed
        caption = f"seeds {', '.join([first, *others])}; median by {words(results.metric)}: seed {median}"
    header, rows = spread_rows(results)
    table = Table(*header, title=title(results), caption=caption)
    for row in rows:
        table.add_row(*row)
    return table


def task_card(results: Results, seed: int, name: str, library: str, command: str) -> str:
    """README.md of an exported seed: usage, data, results of all seeds beside the baselines, and a model-index.

    name: of the model. library: that reads the directory. command: that trained it.
    """
    own, data = results.of_seed(seed), os.path.basename(FileSpec.parse(results.dev).location)
    several = len(results.seeds) > 1
    chosen = f"seed {seed}"
    if several:
        which = "the median" if own == results.median_seed() else "chosen by hand"
        chosen += f", {which} of {len(results.seeds)} seeds by {words(results.metric)}"
    looks = f"{own.evaluations} evaluation{'' if own.evaluations == 1 else 's'}"
    header, rows = spread_rows(results)
    table = "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])
    labels = ", ".join(f"`{label}`" for label in results.labels[:50])
    more = f" and {len(results.labels) - 50} more" if len(results.labels) > 50 else ""
    # Hubs take it for a name of theirs.
    hub = (
        results.init_from
        and not os.path.exists(results.init_from)
        and re.fullmatch(r"[\w.-]+/[\w.-]+", results.init_from)
    )
    base = f"\nbase_model: {results.init_from}" if hub else ""
    return f"""---
library_name: {library}
license: # the license of your data and weights, for example apache-2.0{base}
pipeline_tag: {PIPELINES[results.kind]}
tags:
- {results.model_type}
- prelm_jax
model-index:
- name: {_yaml(name)}
  results:
  - task:
      type: {PIPELINES[results.kind]}
      name: {_yaml(results.task)}
    dataset:
      type: {_yaml(data)}
      name: {_yaml(data)}
    metrics:
{_metric_entries(results, own)}
---

# {name}

{results.model_type}, {"fine-tuned from `" + results.init_from + "`" if results.init_from else "trained from scratch"} \
with prelm_jax for the task {results.task}.

```python
import prelm_jax

for prediction in prelm_jax.load({_yaml(name)}).{USES[results.kind]}:
    print(prediction.label)
```

- Weights: step {own.step:,} of {chosen}. {looks[0].upper() + looks[1:]} of this seed on the held-out examples.
- Training data: {results.train_examples:,} examples of `{results.train}`.
- Held-out data: {results.dev_examples:,} examples of `{results.dev}`.
{f"- Labels: {labels}{more}." if labels else ""}

{table}

The model-index has the values of this seed. The sampling error is the standard error that comes from the size of the \
held-out data; differences below three of them say little.

Command: `prelm {command}`
"""


def _metric_entries(results: Results, own: SeedResult) -> str:
    entries = []
    for name in results.metrics():
        value = round(own.scores[name].value, 6)
        entries.append(f"    - type: {METRIC_TYPES.get(name, name)}\n      name: {words(name)}\n      value: {value}")
    return "\n".join(entries)


def _yaml(text: str) -> str:
    """A string as YAML: quoted as in JSON, of which YAML is a superset."""
    return json.dumps(text, ensure_ascii=False)
