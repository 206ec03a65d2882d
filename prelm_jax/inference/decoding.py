"""Scores of a head to predictions: names, numbers, choices, tags and answers.

References: google-research/bert, run_squad.py (`write_predictions`), for answers. Divergences: the text of an answer is
cut from the passage by characters, where the reference aligns tokens again; and a question for which no window has a
candidate is answered by no text, with a difference of infinity, where the reference fails.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np

from prelm_jax.data.examples import Answers, Example, Kind, Label
from prelm_jax.data.rows import Row
from prelm_jax.data.tags import bio_names, bio_tags

BEST = 20  # Candidates of an answer that are kept, and tokens of a window that an answer may begin or end with.
ANSWER_LENGTH = 30  # Tokens of an answer at most.

Outputs = Mapping[str, np.ndarray]  # What `TaskModel.predict` gives for a row.


class Candidate(NamedTuple):
    """A possible answer: its text, the character of the passage at which it begins, the scores of its two ends."""

    text: str
    start: int
    start_score: float
    end_score: float
    probability: float  # Among the candidates of the question.

    @property
    def score(self) -> float:
        """The sum of both scores."""
        return self.start_score + self.end_score


class Prediction(NamedTuple):
    """What a model predicts for an example.

    `label` has the form of `Example.label`. `probabilities`: one for each label that the model knows,
    for each choice, or for the tag of each word (with a CRF, by the scores of the word alone); none for numbers and
    answers.
    """

    label: Label
    probabilities: tuple[float, ...] = ()
    candidates: tuple[Candidate, ...] = ()  # Of an answer, the best first; the one without text is that there is none.
    null_difference: float = 0.0  # The score of no answer minus that of the best answer.


def decode(
    kind: Kind,
    examples: Sequence[Example],
    rows: Sequence[Row],
    outputs: Sequence[Outputs],
    names: Sequence[str] = (),
    null_threshold: float = 0.0,
) -> list[Prediction]:
    """The prediction for each example from the outputs of its rows, one for each row.

    names: of labels and tags, by number. null_threshold: a question has no answer if the score of none exceeds the best
    answer's by more; with infinity, as in SQuAD 1.1, it has one.

        decode("label", [Example("0", (("Good.",),))], rows, [{"scores": np.array([0.5, 2.0])}], ("no", "yes"))
    """
    if kind == "tags":
        return _tags(examples, rows, outputs, names)
    if kind == "spans":
        windows: list[list[tuple[Row, np.ndarray]]] = [[] for _ in examples]
        for row, output in zip(rows, outputs, strict=True):
            windows[row.example].append((row, output["scores"]))
        passages = [cast(str, example.sequences[0][1]) for example in examples]
        return [_answer(*each, null_threshold) for each in zip(passages, windows, strict=True)]
    by_example = sorted(zip(rows, outputs, strict=True), key=lambda pair: pair[0].example)
    return [_text(kind, each["scores"].astype(np.float64), len(row.texts), names) for row, each in by_example]


def _text(kind: Kind, scores: np.ndarray, num_texts: int, names: Sequence[str]) -> Prediction:
    """The label, labels, number or choice of an example with the scores of its one row."""
    if kind == "number":
        return Prediction(float(scores[0]))
    if kind == "labels":
        probabilities = np.exp(-np.logaddexp(0, -scores))
        found = tuple(name for name, score in zip(names, scores, strict=True) if score > 0)
        return Prediction(found, tuple(probabilities.tolist()))
    if kind == "choice":
        scores = scores[:num_texts]
    best = int(scores.argmax())
    return Prediction(best if kind == "choice" else names[best], tuple(_softmax(scores).tolist()))


def _tags(
    examples: Sequence[Example], rows: Sequence[Row], outputs: Sequence[Outputs], names: Sequence[str]
) -> list[Prediction]:
    """The tags of all words, each from the window that shows most of its context; BIOES, BILOU and BMES as BIO."""
    tags = [[""] * len(example.sequences[0][0]) for example in examples]
    scores = [[0.0] * len(each) for each in tags]
    for row, output in zip(rows, outputs, strict=True):
        probability_KN = _softmax(output["scores"].astype(np.float64))
        for i in np.flatnonzero(cast(np.ndarray, row.most_context)).tolist():
            tag = int(output["tags"][i])
            tags[row.example][row.first + i] = names[tag]
            scores[row.example][row.first + i] = float(probability_KN[i, tag])
    if bio_names(names) is not names:
        tags = [list(bio_tags(each)) for each in tags]
    return [Prediction(tuple(found), tuple(each)) for found, each in zip(tags, scores, strict=True)]


def _answer(passage: str, windows: Sequence[tuple[Row, np.ndarray]], null_threshold: float) -> Prediction:
    """The answer to a question from the scores [T, 2] of the windows of its passage."""
    null = min((scores_T2[0] for _, scores_T2 in windows), key=lambda score_2: float(score_2.sum()))
    spans = [span for row, scores_T2 in windows for span in _spans(row, scores_T2)]
    spans.sort(key=lambda span: span[0] + span[1], reverse=True)
    candidates: dict[str, Candidate] = {}
    for start_score, end_score, begin, end in spans:
        if len(candidates) < BEST and passage[begin:end].strip():
            candidates.setdefault(passage[begin:end], Candidate(passage[begin:end], begin, start_score, end_score, 0.0))
    nothing = Candidate("", 0, float(null[0]), float(null[1]), 0.0)
    best = next(iter(candidates.values()), None)
    difference = math.inf if best is None else nothing.score - best.score
    found = sorted([*candidates.values(), nothing], key=lambda each: each.score, reverse=True)
    probabilities = _softmax(np.array([each.score for each in found])).tolist()
    ranked = tuple(each._replace(probability=p) for each, p in zip(found, probabilities, strict=True))
    if best is None or difference > null_threshold:
        return Prediction(Answers(), (), ranked, difference)
    return Prediction(Answers((best.text,), (best.start,)), (), ranked, difference)


def _spans(row: Row, scores_T2: np.ndarray) -> list[tuple[float, float, int, int]]:
    """(score of the start, of the end, first character, one after the last) of the best spans of a window."""
    characters, most_context = cast(np.ndarray, row.characters), cast(np.ndarray, row.most_context)
    tops = (np.argsort(-scores_T2[:, side], kind="stable")[:BEST] - row.begin for side in range(2))
    starts, ends = ([int(i) for i in top if 0 <= i < len(characters)] for top in tops)
    return [
        (
            float(scores_T2[row.begin + start, 0]),
            float(scores_T2[row.begin + end, 1]),
            int(characters[start, 0]),
            int(characters[end, 1]),
        )
        for start in starts
        if most_context[start]
        for end in ends
        if start <= end < start + ANSWER_LENGTH
    ]


def _softmax(scores: np.ndarray) -> np.ndarray:
    """Probabilities along the last axis."""
    exponentials = np.exp(scores - scores.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)
