"""Metrics of labeled examples, each with its sampling error, and the trivial baselines to compare them with.

Every metric is a function of a sum over examples: of how often each label was right, predicted and gold, for example.
So its sampling error is the jackknife's, from the sums that leave one example out; an accuracy's is the textbook's
sqrt(p (1 - p) / (n - 1)).

label   accuracy, macro_f1, matthews, and f1 of the positive label
labels  micro_f1, macro_f1, exact_match
number  pearson, spearman
choice  accuracy
tags    accuracy of words; if the tags are BIO: span_f1, span_precision, span_recall (conlleval's rule)
spans   f1, exact_match (SQuAD's rules), and if some questions have no answer has_answer_f1, no_answer_f1

All are fractions: 0.5 is what papers print as 50.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np

from prelm_jax.data.examples import Answers, Example, Kind, Label
from prelm_jax.data.tags import is_bio, spans_of
from prelm_jax.errors import InputError

CONSTANT = "best constant"
LEXICON = "most frequent tag of the word"
BLOCK = 1 << 22  # Numbers of a jackknife in memory at a time.

# Arrays: N examples, K labels. Counts [N, 3, K] of a label in an example: right, predicted, gold.
RIGHT, PREDICTED, GOLD = range(3)


@dataclass(frozen=True)
class Score:
    """A metric, and the standard error that it has because the file is a sample (None: of one example)."""

    value: float
    error: float | None


class Metric(NamedTuple):
    """A function `value` of the sum of `statistics` over the examples.

    statistics: [N, *shape]. value: maps one or several such sums, [..., *shape], to their values, [...].
    """

    statistics: np.ndarray
    value: Callable[[np.ndarray], np.ndarray]

    def score(self) -> Score:
        """The value for all examples, and its jackknife error."""
        statistics, number = self.statistics, len(self.statistics)
        sums = statistics.sum(0)
        rows = max(1, BLOCK // max(1, sums.size))
        without = [self.value(sums - statistics[i : i + rows]) for i in range(0, number, rows)]
        error = float(np.sqrt((number - 1) * np.var(np.concatenate(without)))) if number > 1 else None
        return Score(float(self.value(sums)), error)


def scores(
    kind: Kind,
    examples: Sequence[Example],
    predictions: Sequence[Label],
    labels: Sequence[str] = (),
    positive: str | None = None,
) -> dict[str, Score]:
    """The metrics of a kind, the most common one first; a prediction has the form of `Example.label`.

    labels: names that the model knows, of the kinds that have names. positive: the label whose `f1` is asked for.

    Example: `scores("label", examples, ["yes", "no"], ("no", "yes"))["accuracy"].value`
    """
    metrics = _metrics(kind, examples, predictions, labels, positive)
    return {name: metric.score() for name, metric in metrics.items()}


def check_positive(kind: Kind, positive: str | None, labels: Sequence[str]) -> None:
    """Raises InputError for a positive label that is none of a task's."""
    if positive is not None and (kind != "label" or positive not in labels):
        known = ", ".join(labels) if kind == "label" else "not named one by one in this task"
        raise InputError(f"--positive {positive}: the labels are {known}")


def baselines(
    kind: Kind,
    examples: Sequence[Example],
    labels: Sequence[str] = (),
    positive: str | None = None,
    training: Sequence[Example] = (),
) -> dict[str, dict[str, float]]:
    """metric -> trivial baseline -> its value on the same examples.

    The best constant is the highest value of any one prediction for all examples: the majority class for an accuracy,
    always the positive label for its F1, no answer for a question. For tags there is also the most frequent tag of each
    word in the training examples.
    """
    candidates = {CONSTANT: _constants(kind, examples, positive), LEXICON: _lexicon(kind, examples, training)}
    found: dict[str, dict[str, float]] = {}
    for name, candidate in candidates.items():
        for predictions in candidate:
            for metric, (statistics, value) in _metrics(kind, examples, predictions, labels, positive).items():
                values = found.setdefault(metric, {})
                values[name] = max(float(value(statistics.sum(0))), values.get(name, -np.inf))
    return found


def _constants(kind: Kind, examples: Sequence[Example], positive: str | None) -> list[list[Label]]:
    """The constant predictions, one of which is the best for each metric."""
    gold = [cast(Label, example.label) for example in examples]
    if kind == "label":
        names = [Counter(gold).most_common(1)[0][0], *([] if positive is None else [positive])]
        return [[name] * len(gold) for name in names]
    if kind == "labels":  # The F1 of the number most frequent labels is 2 right / (predicted + gold).
        counts = Counter(name for names in gold for name in cast(tuple, names)).most_common()
        right = np.cumsum([count for _, count in counts])
        f1 = 2 * right / (np.arange(1, len(counts) + 1) * len(gold) + sum(count for _, count in counts))
        best = {int(f1.argmax()) + 1, len(counts)} if counts else set()
        constants = {tuple(name for name, _ in counts[:number]) for number in best}
        usual = Counter(tuple(sorted(cast(tuple, names))) for names in gold).most_common(1)[0][0]
        return [[names] * len(gold) for names in {*constants, usual}]
    if kind == "number":
        return [[0.0] * len(gold)]
    if kind == "choice":
        return [[Counter(gold).most_common(1)[0][0]] * len(gold)]
    if kind == "tags":
        usual = Counter(tag for tags in gold for tag in cast(tuple, tags)).most_common(1)[0][0]
        return [[(usual,) * len(cast(tuple, tags)) for tags in gold]]
    return [[Answers()] * len(gold)]


def _lexicon(kind: Kind, examples: Sequence[Example], training: Sequence[Example]) -> list[list[Label]]:
    """For each word its most frequent tag in the training examples; for unknown words, the most frequent tag of all."""
    if kind != "tags" or not training:
        return []
    tags: dict[str, Counter[str]] = {}
    for example in training:
        for word, tag in zip(example.sequences[0][0], cast(tuple, example.label), strict=True):
            tags.setdefault(word, Counter())[tag] += 1
    usual = sum(tags.values(), Counter()).most_common(1)[0][0]
    best = {word: each.most_common(1)[0][0] for word, each in tags.items()}
    return [[tuple(best.get(word, usual) for word in example.sequences[0][0]) for example in examples]]


# ---- Metrics by kind -------------------------------------------------------------------------------------------------


def _metrics(
    kind: Kind, examples: Sequence[Example], predictions: Sequence[Label], labels: Sequence[str], positive: str | None
) -> dict[str, Metric]:
    gold = [cast(Label, example.label) for example in examples]
    if len(predictions) != len(gold):
        raise ValueError(f"{len(predictions)} predictions for {len(gold)} examples")
    if kind == "number":
        x, y = (np.array(each, np.float64) for each in (predictions, gold))
        return {"pearson": _correlation(x, y), "spearman": _correlation(_ranks(x), _ranks(y))}
    if kind == "spans":
        return _answer_metrics(cast(list[Answers], predictions), cast(list[Answers], gold))
    if kind == "choice":
        return {"accuracy": _mean([p == g for p, g in zip(predictions, gold, strict=True)])}
    if kind == "tags":
        return _tag_metrics(cast(list[tuple], predictions), cast(list[tuple], gold), labels)
    names, counts = label_counts(kind, predictions, gold, labels)
    if kind == "labels":
        exact = _mean([set(cast(tuple, p)) == set(cast(tuple, g)) for p, g in zip(predictions, gold, strict=True)])
        return {"micro_f1": Metric(counts, micro_f1), "macro_f1": Metric(counts, _macro_f1), "exact_match": exact}
    named = {"accuracy": micro_recall, "macro_f1": _macro_f1, "matthews": _matthews}
    if positive is not None:
        index = names.index(positive)
        named["f1"] = lambda sums: micro_f1(sums[..., index : index + 1])
    return {name: Metric(counts, value) for name, value in named.items()}


def label_counts(
    kind: Kind, predictions: Sequence[Label], gold: Sequence[Label], labels: Sequence[str]
) -> tuple[list[str], np.ndarray]:
    """The K names that labels have, and their counts in each example: int64 [N, 3, K], right, predicted and gold.

    Tags in BIO are counted as spans, by type.
    """
    if kind == "tags" and is_bio(labels):
        sides = [[set(spans_of(cast(tuple, tags))) for tags in side] for side in (predictions, gold)]
        names = sorted({tag[2:] for tag in labels if tag != "O"})
    elif kind == "tags":
        sides = [
            [{(tag, i) for i, tag in enumerate(cast(tuple, tags))} for tags in side] for side in (predictions, gold)
        ]
        names = list(labels)
    else:
        several = kind == "labels"
        sides = [
            [{(name,) for name in (cast(tuple, each) if several else (each,))} for each in side]
            for side in (predictions, gold)
        ]
        names = list(labels)
    return names, _counts(sides, names)


def _counts(sides: Sequence[Sequence[set[tuple]]], names: Sequence[str]) -> np.ndarray:
    """int64 [N, 3, K] from the predicted and the gold items of each example; an item begins with its label."""
    indices = {name: index for index, name in enumerate(names)}
    flat = [
        (3 * number + row) * len(indices) + indices[item[0]]
        for number, (predicted, gold) in enumerate(zip(*sides, strict=True))
        for row, items in enumerate((predicted & gold, predicted, gold))
        for item in items
    ]
    size = 3 * len(sides[0]) * len(indices)
    return np.bincount(np.array(flat, np.int64), minlength=size).reshape(-1, 3, len(indices))


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(np.shape(a), np.shape(b))), where=b != 0)


def _mean(values: Sequence[float], weights: Sequence[float] | None = None) -> Metric:
    """The mean of a value over the examples, or over those of weight 1."""
    x, w = np.array(values, np.float64), np.ones(len(values)) if weights is None else np.array(weights, np.float64)
    return Metric(np.stack([x * w, w], -1), lambda sums: _ratio(sums[..., 0], sums[..., 1]))


def micro_recall(sums: np.ndarray) -> np.ndarray:
    """The recall over all labels together, from sums [..., 3, K] of counts; 0 without gold labels."""
    return _ratio(sums[..., RIGHT, :].sum(-1), sums[..., GOLD, :].sum(-1))


def micro_precision(sums: np.ndarray) -> np.ndarray:
    """The precision over all labels together; 0 without predicted labels."""
    return _ratio(sums[..., RIGHT, :].sum(-1), sums[..., PREDICTED, :].sum(-1))


def micro_f1(sums: np.ndarray) -> np.ndarray:
    """The F1 over all labels together; 0 without gold or predicted labels."""
    return _ratio(2 * sums[..., RIGHT, :].sum(-1), sums[..., PREDICTED:, :].sum((-2, -1)))


def _macro_f1(sums: np.ndarray) -> np.ndarray:
    """The mean F1 of the labels that are gold or predicted somewhere."""
    occurrences = sums[..., PREDICTED:, :].sum(-2)
    return _ratio(_ratio(2 * sums[..., RIGHT, :], occurrences).sum(-1), (occurrences > 0).sum(-1))


def _matthews(sums: np.ndarray) -> np.ndarray:
    """Matthews correlation of any number of classes (Gorodkin, 2004); 0 for a constant."""
    right, predicted, gold = (sums[..., row, :].astype(np.float64) for row in (RIGHT, PREDICTED, GOLD))
    total = gold.sum(-1)
    spread = (total**2 - (predicted**2).sum(-1)) * (total**2 - (gold**2).sum(-1))
    return _ratio(right.sum(-1) * total - (predicted * gold).sum(-1), np.sqrt(spread))


def _correlation(x: np.ndarray, y: np.ndarray) -> Metric:
    """Pearson's correlation; 0 where a side is constant."""
    x, y = (each - each.mean() if np.ptp(each) else np.zeros_like(each) for each in (x, y))
    statistics = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], -1)

    def value(sums: np.ndarray) -> np.ndarray:
        number, a, b, aa, bb, ab = np.moveaxis(sums, -1, 0)
        spread_a, spread_b = aa - _ratio(a * a, number), bb - _ratio(b * b, number)
        varies = (spread_a > 1e-12 * aa) & (spread_b > 1e-12 * bb)
        return _ratio(ab - _ratio(a * b, number), np.where(varies, np.sqrt(np.abs(spread_a * spread_b)), 0))

    return Metric(statistics, value)


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


# ---- Tags ------------------------------------------------------------------------------------------------------------


def _tag_metrics(predictions: list[tuple], gold: list[tuple], labels: Sequence[str]) -> dict[str, Metric]:
    for number, (p, g) in enumerate(zip(predictions, gold, strict=True)):
        if len(p) != len(g):
            raise ValueError(f"{len(p)} predicted tags for the {len(g)} words of example {number}")
    words = [[set(zip(tags, range(len(tags)), strict=True)) for tags in side] for side in (predictions, gold)]
    accuracy = {"accuracy": Metric(_counts(words, labels), micro_recall)}
    if not is_bio(labels):
        return accuracy
    _, counts = label_counts("tags", predictions, gold, labels)
    named = {"span_f1": micro_f1, "span_precision": micro_precision, "span_recall": micro_recall}
    return {name: Metric(counts, value) for name, value in named.items()} | accuracy


# ---- Answers ---------------------------------------------------------------------------------------------------------


def _answer_metrics(predictions: list[Answers], gold: list[Answers]) -> dict[str, Metric]:
    answerable = [bool(each.texts) for each in gold]
    pairs = [
        answer_scores(p.texts[0] if p.texts else "", g, all(answerable)) for p, g in zip(predictions, gold, strict=True)
    ]
    exact, f1 = ([pair[i] for pair in pairs] for i in (0, 1))
    metrics = {"f1": _mean(f1), "exact_match": _mean(exact)}
    if not all(answerable):
        metrics["has_answer_f1"] = _mean(f1, answerable)
        metrics["no_answer_f1"] = _mean(f1, [not each for each in answerable])
    return metrics


def null_threshold(examples: Sequence[Example]) -> float:
    """The `null_threshold` for the questions of a file: infinity where each has an answer, as in SQuAD 1.1, else 0."""
    return 0.0 if any(isinstance(each.label, Answers) and not each.label.texts for each in examples) else math.inf


def answer_scores(predicted: str, gold: Answers, always_answerable: bool) -> tuple[float, float]:
    """(exact match, F1 of the tokens) with the accepted answer that fits best, by SQuAD's official rules.

    always_answerable: by the rules of 1.1, where a predicted answer without tokens has an F1 of 0; by those of 2.0 it
    is right if the accepted answer has none either.
    """
    accepted = [text for text in gold.texts if always_answerable or _normalized(text)] or [""]
    tokens = _normalized(predicted).split()
    exact, f1 = 0.0, 0.0
    for text in accepted:
        others = _normalized(text).split()
        exact = max(exact, float(tokens == others))
        if tokens and others:
            common = sum((Counter(tokens) & Counter(others)).values())
            f1 = max(f1, 2 * common / (len(tokens) + len(others)))
        elif not always_answerable:
            f1 = max(f1, float(tokens == others))
    return exact, f1


def _normalized(text: str) -> str:
    """Lower-cased, without ASCII punctuation and the articles a, an and the; one space between tokens."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())
