"""Results of a fine-tuning with one or several seeds, in results.json above their work directories, and as tables."""

import dataclasses
import json
import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from prelm_jax import __version__
from prelm_jax.bounds import NotNegative, Positive, Seed
from prelm_jax.data.examples import Kind
from prelm_jax.errors import InputError
from prelm_jax.finetuning.metrics import Score
from prelm_jax.report.summary import words
from prelm_jax.storage import reachable, read_json, write_file
from prelm_jax.validation import read

RESULTS = "results.json"


@dataclass(frozen=True)
class SeedResult:
    """The metrics of a seed."""

    seed: Seed
    step: NotNegative  # Of the weights.
    evaluations: NotNegative  # How often the held-out examples were looked at.
    scores: dict[str, Score]


@dataclass(frozen=True)
class Spread:
    """A metric over seeds."""

    mean: float
    deviation: float | None  # The standard deviation of the sample; None for one seed.
    median: float  # The lower one of an even number of seeds.
    lowest: float
    highest: float
    error: float | None  # The sampling error of the held-out examples: the median seed's.
    baseline: float | None  # The best trivial baseline.
    at_baseline: int  # Number of seeds that are not above the baseline.


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
    positive: str | None = None  # The label whose F1 is among the metrics.
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
        """The names of the metrics, first the one by which the median seed is chosen."""
        return sorted(self.seeds[0].scores, key=lambda name: name != self.metric)


def write_results(directory: str | os.PathLike, results: Results) -> None:
    """Writes results.json in a directory; replaces one that is there."""
    content = json.dumps(dataclasses.asdict(results), indent=1, ensure_ascii=False) + "\n"
    write_file(reachable(directory) / RESULTS, content.encode())


def read_results(directory: str | os.PathLike) -> Results:
    """What results.json in a directory holds. Raises InputError where there is none, or it is damaged."""
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


def points(value: float | None) -> str:
    """A fraction as papers print it: 0.8766 is 87.7."""
    return "–" if value is None else f"{100 * value:.1f}"


def spread_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of all metrics, in points."""
    several = len(results.seeds) > 1
    columns = ["mean ± std", "median", "range"] if several else ["value"]
    header = ["metric (× 100)", *columns, "sampling error", "baseline", "runs not above it"]
    rows = []
    for name in results.metrics():
        x = results.spread(name)
        values = [points(x.mean)]
        if several:
            lowest_to_highest = f"{points(x.lowest)} to {points(x.highest)}"
            values = [f"{points(x.mean)} ± {points(x.deviation)}", points(x.median), lowest_to_highest]
        baselines = _in_points(results.baselines.get(name, {}))
        not_above = f"{x.at_baseline} of {len(results.seeds)}"
        rows.append([words(name), *values, points(x.error), baselines, not_above])
    return header, rows


def _in_points(baselines: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {points(value)}" for name, value in baselines.items())


def scores_table(title: str, scores: Mapping[str, Score], baselines: Mapping[str, Mapping[str, float]]) -> Table:
    """The metrics of one model, each with its sampling error and trivial baselines."""
    table = Table("metric (× 100)", "value", "sampling error", "baseline", title=title)
    for name, score in scores.items():
        table.add_row(words(name), points(score.value), points(score.error), _in_points(baselines.get(name, {})))
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
