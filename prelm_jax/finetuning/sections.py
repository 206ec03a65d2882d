"""The section of the report page about a fine-tuning: seeds, baselines, and mistakes of the median seed."""

import os
from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import cast

from prelm_jax.data.examples import Answers, Label
from prelm_jax.finetuning.metrics import answer_scores
from prelm_jax.finetuning.mistakes import by_label, calibration, confusion
from prelm_jax.finetuning.predictions import PREDICTIONS, PredictionLine, read_predictions
from prelm_jax.finetuning.results import (
    RESULTS,
    Results,
    points,
    read_results,
    seed_directories,
    spread_rows,
    title,
)
from prelm_jax.report.page import table, text_table
from prelm_jax.report.summary import words
from prelm_jax.storage import reachable

MATRIX = 20  # Labels that a confusion matrix shows at most; of more, the most frequent confusions are listed.
ROWS = 20  # of a list of errors


def section(directory: str | os.PathLike) -> str:
    """The section of a fine-tuning, as HTML; empty before a seed is done."""
    if not (reachable(directory) / RESULTS).is_file():
        return ""
    results = read_results(directory)
    median = results.median_seed().seed
    parts = [f"<h2>{escape(title(results))}</h2>", text_table(*spread_rows(results)), _seeds(results)]
    path = next((x for x in seed_directories(directory) if x.name == f"seed-{median}"), None)
    if path is not None and (path / PREDICTIONS).is_file():
        predictions = read_predictions(path / PREDICTIONS)
        parts.append(f"<h3>Seed {median}, the median by {escape(words(results.metric))}</h3>")
        parts += [_labels(results, predictions), _confusions(results, predictions)]
        parts += [_calibration(predictions), _errors(results, predictions)]
    return "\n".join(filter(None, parts))


def _seeds(results: Results) -> str:
    names = results.metrics()
    rows = [
        [str(each.seed), f"{each.step:,}", *(points(each.scores[name].value) for name in names)]
        for each in results.seeds
    ]
    return text_table(["seed", "step", *map(words, names)], rows) if len(rows) > 1 else ""


def _sides(predictions: Sequence[PredictionLine]) -> tuple[list[Label], list[Label]]:
    """(gold, predicted) labels as in examples; JSON has lists for tuples."""
    sides = [[each.gold, each.prediction] for each in predictions]
    gold, predicted = ([tuple(x) if isinstance(x, list) else x for x in side] for side in zip(*sides, strict=True))
    return cast(list[Label], gold), cast(list[Label], predicted)


def _labels(results: Results, predictions: Sequence[PredictionLine]) -> str:
    if results.kind not in ("label", "labels", "tags"):
        return ""
    gold, predicted = _sides(predictions)
    found = by_label(results.kind, predicted, gold, results.labels)
    rows = [[name, f"{number:,}", *map(points, values)] for name, (number, *values) in found.items()]
    return text_table(["label", "examples", "precision", "recall", "F1"], rows)


def _confusions(results: Results, predictions: Sequence[PredictionLine]) -> str:
    """The confusion matrix, or the most frequent confusions."""
    if results.kind not in ("label", "tags"):
        return ""
    gold, predicted = _sides(predictions)
    if results.kind == "tags":
        gold, predicted = ([tag for tags in side for tag in cast(tuple, tags)] for side in (gold, predicted))
    names, others = cast(list[str], gold), cast(list[str], predicted)
    if len(results.labels) > MATRIX:
        counts = Counter(pair for pair in zip(names, others, strict=True) if pair[0] != pair[1])
        return text_table(
            ["gold", "predicted", "examples"], [[*pair, f"{n:,}"] for pair, n in counts.most_common(ROWS)]
        )
    rows = []
    for name, row in zip(results.labels, confusion(names, others, results.labels), strict=True):
        cells = [f'<span style="opacity: {max(0.25, x / max(1, row.sum())):.2f}">{x:,}</span>' for x in row]
        rows.append([escape(name), *cells])
    return table(["gold \\ predicted", *map(escape, results.labels)], rows)


def _calibration(predictions: Sequence[PredictionLine]) -> str:
    known = [each for each in predictions if each.probabilities and isinstance(each.prediction, str | int)]
    if not known:
        return ""
    found = calibration(
        [(each.probabilities or {}).get(str(each.prediction), 0.0) for each in known],
        [each.gold == each.prediction for each in known],
    )
    rows = [[f"{number:,}", points(confidence), points(accuracy)] for number, confidence, accuracy in found.bins]
    return f"<p>Expected calibration error: {points(found.error)}</p>" + text_table(
        ["examples", "mean confidence", "accuracy"], rows
    )


def _errors(results: Results, predictions: Sequence[PredictionLine]) -> str:
    """The worst predictions: those that are wrong at the highest confidence, or furthest from the gold label."""
    wrong = [(badness, each) for each in predictions if (badness := _badness(results, each)) > 0]
    wrong.sort(key=lambda pair: -pair[0])
    rows = [
        [each.id, each.text, _shown(each.gold), _shown(each.prediction), f"{badness:.3g}"]
        for badness, each in wrong[:ROWS]
    ]
    if not rows:
        return ""
    measure = {"label": "confidence", "choice": "confidence", "number": "difference", "spans": "1 - F1"}
    header = ["id", "text", "gold", "predicted", measure.get(results.kind, "wrong")]
    count = "" if results.kind == "number" else f"<p>{len(wrong):,} of {len(predictions):,} are not exactly right.</p>"
    return count + text_table(header, rows)


def _badness(results: Results, each: PredictionLine) -> float:
    gold, predicted = each.gold, each.prediction
    if results.kind == "number":
        return abs(cast(float, gold) - cast(float, predicted))
    if results.kind == "spans":
        texts = tuple(cast(list, gold))
        answerable = "no_answer_f1" not in results.baselines
        return 1 - answer_scores(cast(str, predicted), Answers(texts, (0,) * len(texts)), answerable)[1]
    if results.kind == "tags":
        return sum(a != b for a, b in zip(cast(list, gold), cast(list, predicted), strict=True))
    if results.kind == "labels":
        return len(set(cast(list, gold)) ^ set(cast(list, predicted)))
    return 0.0 if gold == predicted else (each.probabilities or {}).get(str(predicted), 1.0)


def _shown(value: object) -> str:
    if isinstance(value, list):
        text = " ".join(map(str, value))
    else:
        text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
