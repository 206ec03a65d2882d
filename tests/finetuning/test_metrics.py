"""Metrics against SciPy, brute force and cases worked by hand; their errors against the bootstrap."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given, settings

from prelm_jax.data.examples import Answers, Example, Kind, Label
from prelm_jax.data.tags import spans_of
from prelm_jax.finetuning import metrics
from prelm_jax.finetuning.metrics import CONSTANT, LEXICON, Metric, Score, answer_scores, baselines, scores


def examples_of(labels: list[Label], sequences=(("a",),)) -> list[Example]:
    return [Example(str(i), sequences, label) for i, label in enumerate(labels)]


def values(kind: Kind, gold: list, predicted: list, labels=(), positive=None) -> dict[str, float]:
    return {name: x.value for name, x in scores(kind, examples_of(gold), predicted, labels, positive).items()}


def f1_of(right: int, predicted: int, gold: int) -> float:
    precision, recall = right / predicted if predicted else 0, right / gold if gold else 0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0


# ---- Labels ----------------------------------------------------------------------------------------------------------

label_pairs = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=2, max_size=30)


@given(label_pairs)
def test_labels_by_brute_force(pairs):
    gold, predicted = map(list, zip(*pairs, strict=True))
    found = values("label", gold, predicted, "abc", "b")
    assert found["accuracy"] == pytest.approx(np.mean([g == p for g, p in pairs]))
    f1 = {x: f1_of(pairs.count((x, x)), predicted.count(x), gold.count(x)) for x in "abc"}
    assert found["f1"] == pytest.approx(f1["b"])
    assert found["macro_f1"] == pytest.approx(np.mean([f1[x] for x in {*gold, *predicted}]))
    x, y = (np.array([[each == name for name in "abc"] for each in side], float) for side in (gold, predicted))
    x, y = x - x.mean(0), y - y.mean(0)
    spread = math.sqrt((x * x).sum() * (y * y).sum())
    assert found["matthews"] == pytest.approx((x * y).sum() / spread if spread else 0, abs=1e-12)
    assert list(found) == ["accuracy", "macro_f1", "matthews", "f1"]


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=30))
def test_matthews_of_two_labels_is_pearsons_correlation(pairs):
    gold, predicted = map(list, zip(*pairs, strict=True))
    assume(len(set(gold)) == len(set(predicted)) == 2)
    found = values("label", list(map(str, gold)), list(map(str, predicted)), "01")["matthews"]
    assert found == pytest.approx(scipy.stats.pearsonr(gold, predicted).statistic)


def test_several_labels():
    gold, predicted = [("x", "y"), (), ("z",)], [("y",), (), ("z", "x")]
    found = values("labels", gold, predicted, "xyz")
    # x: 0 right, 1 predicted, 1 gold; y: 1, 1, 1; z: 1, 1, 1
    assert found == pytest.approx({"micro_f1": 4 / 6, "macro_f1": 2 / 3, "exact_match": 1 / 3})
    assert values("labels", [()], [()], "xyz") == {"micro_f1": 0, "macro_f1": 0, "exact_match": 1}


def test_choices():
    assert values("choice", [1, 0, 2, 1], [1, 1, 2, 0]) == {"accuracy": 0.5}


# ---- Numbers ---------------------------------------------------------------------------------------------------------

numbers = st.lists(st.tuples(st.integers(-9, 9), st.floats(-1e3, 1e3, width=16)), min_size=3, max_size=20)


@settings(max_examples=40)
@given(numbers)
def test_correlations_are_scipys(pairs):
    gold, predicted = map(list, zip(*pairs, strict=True))
    found = values("number", gold, predicted)
    if len(set(gold)) == 1 or len(set(predicted)) == 1:
        assert found == {"pearson": 0, "spearman": 0}
        return
    assume(np.ptp(predicted) > 1e-3)
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(gold, predicted).statistic, abs=1e-9)
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(gold, predicted).statistic, abs=1e-9)


def test_a_constant_prediction_correlates_with_nothing():
    """Neither NaN nor an error: a model may start there."""
    assert scores("number", examples_of([1.0, 2.0, 3.0]), [0.1] * 3)["pearson"] == Score(0, 0)
    # All are equal but one. Without it the correlation is 0, not the quotient of two rounding errors.
    found = scores("number", examples_of([0.1, 0.3, 0.2, 0.9, 0.1]), [0.1, 0.1, 0.1, 0.7, 0.1])["pearson"]
    without = [
        scipy.stats.pearsonr(*(np.delete(x, i) for x in ([0.1, 0.3, 0.2, 0.9, 0.1], [0.1] * 3 + [0.7, 0.1])))
        for i in (0, 1, 2, 4)
    ]
    values = [0.0, *(each.statistic for each in without)]
    assert found.error == pytest.approx(math.sqrt(4 * np.var(values)))


# ---- Tags ------------------------------------------------------------------------------------------------------------


def conlleval_spans(tags):
    """Begin and end of spans by conlleval's two conditions on neighboring tags, applied one by one."""
    spans, start = set(), None
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        before, _, name_before = (tags[i - 1] if i else "O").partition("-")
        if before != "O" and (prefix in "BO" or name != name_before):
            spans.add((name_before, start, i))
        if prefix == "B" or (prefix == "I" and (before == "O" or name != name_before)):
            start = i
    return spans


@given(st.lists(st.sampled_from(["O", "B-A", "I-A", "B-B", "I-B"]), max_size=12))
def test_spans_are_conllevals(sequence):
    found = spans_of(sequence)
    assert set(found) == conlleval_spans(sequence) and len(found) == len(set(found))


def test_spans_of_ill_formed_tags():
    assert spans_of(["I-P", "I-P", "B-P", "I-L", "O", "I-L"]) == [("P", 0, 2), ("P", 2, 3), ("L", 3, 4), ("L", 5, 6)]


def test_tags_with_spans():
    labels = ("B-A", "B-B", "I-A", "I-B", "O")
    gold = [("B-A", "I-A", "O", "B-B"), ("O", "B-B")]
    predicted = [("B-A", "I-A", "O", "B-A"), ("B-B", "I-B")]
    assert values("tags", gold, predicted, labels) == pytest.approx(
        {"span_f1": 2 / 6, "span_precision": 1 / 3, "span_recall": 1 / 3, "accuracy": 3 / 6}
    )
    assert next(iter(values("tags", gold, predicted, labels))) == "span_f1"
    nothing = values("tags", [("O",)], [("O",)], labels)
    assert nothing == {"span_f1": 0, "span_precision": 0, "span_recall": 0, "accuracy": 1}


def test_tags_without_spans_have_no_span_f1():
    assert values("tags", [("NOUN", "VERB")], [("NOUN", "NOUN")], ("NOUN", "VERB")) == {"accuracy": 0.5}
    with pytest.raises(ValueError, match="example 0"):
        values("tags", [("NOUN", "VERB")], [("NOUN",)], ("NOUN", "VERB"))
    with pytest.raises(ValueError, match="1 predictions"):
        values("choice", [1, 0], [1])


# ---- Answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("predicted", "accepted", "version_1", "version_2"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], (1, 1), (1, 1)),
        ("in the tower", ["Eiffel tower", "tower"], (0, 2 / 3), (0, 2 / 3)),
        ("a b b c", ["b b b d"], (0, 4 / 7), (0, 4 / 7)),  # "a" is an article: 2 in common of 3 and 4
        ("an-other", ["another"], (1, 1), (1, 1)),  # punctuation goes first, so no article remains
        ("in 1912 .", ["1912"], (0, 2 / 3), (0, 2 / 3)),
        ("“in”", ["in"], (0, 0), (0, 0)),  # only ASCII punctuation is removed
        ("The", ["a"], (1, 0), (1, 1)),  # nothing is left of both
        ("an apple", ["apple"], (1, 1), (1, 1)),
        ("", ["one"], (0, 0), (0, 0)),
        ("one", ["the", "one"], (1, 1), (1, 1)),
        ("", ["the", "one"], (1, 0), (0, 0)),  # 2.0 leaves empty ones out while others are there
        ("", [], (1, 0), (1, 1)),
        ("one", [], (0, 0), (0, 0)),
    ],
)
def test_answers_by_hand(predicted, accepted, version_1, version_2):
    """evaluate-v1.1.py and evaluate-v2.0.py, worked by hand."""
    gold = Answers(tuple(accepted), (0,) * len(accepted))
    assert answer_scores(predicted, gold, True) == pytest.approx(version_1)
    assert answer_scores(predicted, gold, False) == pytest.approx(version_2)


def test_answers_with_and_without_questions_that_have_none():
    gold = [Answers(("one two",), (0,)), Answers(), Answers()]
    predicted = [Answers(("two",), (4,)), Answers(), Answers(("one",), (0,))]
    expected = {"f1": (2 / 3 + 1) / 3, "exact_match": 1 / 3, "has_answer_f1": 2 / 3, "no_answer_f1": 1 / 2}
    assert values("spans", gold, predicted) == pytest.approx(expected)
    assert values("spans", gold[:1], predicted[:1]) == pytest.approx({"f1": 2 / 3, "exact_match": 0})
    assert baselines("spans", examples_of(gold))["f1"] == {CONSTANT: pytest.approx(2 / 3)}


# ---- Baselines -------------------------------------------------------------------------------------------------------


def test_best_constants():
    found = baselines("label", examples_of(["no", "no", "no", "yes"]), ("no", "yes"), "yes")
    assert {name: value[CONSTANT] for name, value in found.items()} == pytest.approx(
        {"accuracy": 3 / 4, "macro_f1": 3 / 7, "matthews": 0, "f1": 2 / 5}
    )
    assert baselines("choice", examples_of([1, 1, 0, 2]))["accuracy"] == {CONSTANT: 0.5}
    assert baselines("number", examples_of([1.0, 2.0])) == {"pearson": {CONSTANT: 0}, "spearman": {CONSTANT: 0}}


@settings(max_examples=40)
@given(st.lists(st.lists(st.sampled_from("wxyz"), unique=True, max_size=4).map(tuple), min_size=1, max_size=8))
def test_best_constants_of_several_labels_by_brute_force(gold):
    subsets = [tuple(x for i, x in enumerate("wxyz") if bits >> i & 1) for bits in range(16)]
    found = baselines("labels", examples_of(gold), "wxyz")
    for name, value in found.items():
        best = max(values("labels", gold, [subset] * len(gold), "wxyz")[name] for subset in subsets)
        assert value[CONSTANT] == pytest.approx(best), name


def test_baselines_of_tags():
    training = [Example("0", ((("saw", "dog"),),), ("NOUN", "NOUN")), Example("1", ((("saw", "saw"),),), ("VERB",) * 2)]
    held_out = [Example("0", ((("the", "dog", "saw", "it"),),), ("DET", "NOUN", "VERB", "NOUN"))]
    found = baselines("tags", held_out, ("DET", "NOUN", "VERB"), training=training)
    # "saw" is a verb twice, "dog" a noun; of all tags NOUN and VERB are equally frequent, NOUN comes first.
    assert found == {"accuracy": {CONSTANT: 2 / 4, LEXICON: 3 / 4}}
    assert baselines("tags", held_out, ("DET", "NOUN", "VERB")) == {"accuracy": {CONSTANT: 2 / 4}}


# ---- Sampling errors -------------------------------------------------------------------------------------------------


def test_the_error_of_an_accuracy_is_the_textbooks():
    gold = ["a"] * 30 + ["b"] * 70
    found = scores("label", examples_of(gold), ["a"] * 100, "ab")["accuracy"]
    assert (found.value, found.error) == pytest.approx((0.3, math.sqrt(0.3 * 0.7 / 99)))


def bootstrap(metric: Metric, rng) -> float:
    number = len(metric.statistics)
    weights = rng.multinomial(number, np.full(number, 1 / number), 2000)
    return float(np.std(metric.value(np.tensordot(weights, metric.statistics, 1))))


@pytest.mark.parametrize("block", [None, 100])
def test_errors_are_the_bootstraps(block, monkeypatch):
    """Of all metrics that are no means, in one block or several."""
    if block:
        monkeypatch.setattr(metrics, "BLOCK", block)
    rng = np.random.default_rng(0)
    x = rng.normal(size=300)
    y = x + rng.normal(size=300)
    gold, predicted = (["abc"[int(each > 0) + int(each > 1)] for each in side] for side in (x, y))
    tried = {**metrics._metrics("label", examples_of(gold), predicted, "abc", "b")}
    tried |= metrics._metrics("number", examples_of(list(x)), list(y), (), None)
    tags = [np.where(side < 0, "O", np.where(side < 0.3, "I-A", "B-A")).reshape(60, 5).tolist() for side in (x, y)]
    tags = [list(map(tuple, side)) for side in tags]
    tried |= metrics._metrics("tags", examples_of(tags[0]), tags[1], ("B-A", "I-A", "O"), None)
    assert len(tried) == 9
    for name, metric in tried.items():
        assert metric.score().error == pytest.approx(bootstrap(metric, rng), rel=0.12), name


def test_one_example_has_no_error():
    assert scores("choice", examples_of([1]), [1])["accuracy"] == Score(1, None)
