"""Scores to predictions, beside brute force."""

import itertools
import math

import numpy as np
import pytest

from prelm_jax.data.examples import Answers, Example
from prelm_jax.data.frames import BertFrame
from prelm_jax.data.framing import frame_examples
from prelm_jax.inference.decoding import decode
from prelm_jax.tokenizers.wordpiece import SPECIAL_TOKENS, WordPiece

WORDS = [f"w{i}" for i in range(600)]


@pytest.fixture(scope="module")
def tokenizer():
    return WordPiece([*SPECIAL_TOKENS, *WORDS, *"qrs?"])


def frame_of(tokenizer, kind, examples, length, **options):
    return frame_examples(BertFrame(tokenizer, length), examples, kind, **options)[0]


def test_labels_numbers_and_choices(tokenizer):
    texts = [Example(str(i), (("w1",),)) for i in range(2)]
    rows = frame_of(tokenizer, "label", texts, 16)
    outputs = [{"scores": np.array(x, np.float32)} for x in ([0.3, 2, 1], [3, 0, -1])]
    found = decode("label", texts, rows, outputs, ("a", "b", "c"))
    assert [each.label for each in found] == ["b", "a"]
    exponentials = np.exp([0.3, 2.0, 1.0])
    np.testing.assert_allclose(found[0].probabilities, exponentials / exponentials.sum(), rtol=1e-6)
    found = decode("labels", texts, rows, outputs, ("a", "b", "c"))
    assert [each.label for each in found] == [("a", "b", "c"), ("a",)]
    np.testing.assert_allclose(found[1].probabilities, 1 / (1 + np.exp([-3.0, 0, 1])), rtol=1e-6)
    assert [x.label for x in decode("number", texts, rows, [{"scores": np.array([x])} for x in (1.5, -2)])] == [1.5, -2]
    choices = [Example("0", (("w1", "w2"), ("w1", "w3")))]
    rows = frame_of(tokenizer, "choice", choices, 16)
    (found,) = decode("choice", choices, rows, [{"scores": np.array([0.0, 1.0, 9.0])}])  # The third is padding.
    assert found.label == 1 and len(found.probabilities) == 2 and sum(found.probabilities) == pytest.approx(1)


def test_scores_of_any_size_are_probabilities(tokenizer):
    texts = [Example("0", (("w1",),))]
    rows = frame_of(tokenizer, "label", texts, 16)
    for kind in ("label", "labels"):
        (found,) = decode(kind, texts, rows, [{"scores": np.array([-2000.0, 3000.0], np.float32)}], ("a", "b"))
        assert found.probabilities == (0.0, 1.0)


def test_tags_of_a_long_sentence_come_from_the_window_with_most_context(tokenizer):
    examples = [Example("0", ((tuple(WORDS[:23]),),)), Example("1", ((("w5",),),))]
    rows = frame_of(tokenizer, "tags", examples, 12)
    assert len(rows) > 3
    tags = np.array([i % 3 for i in range(23)])
    outputs = []
    for i, row in enumerate(rows):
        words = np.arange(row.first, row.first + len(row.most_context))
        right = tags[words] if row.example == 0 else np.array([2])
        found = np.where(row.most_context, right, (right + 1) % 3)  # Wrong where another window shows more.
        padded = np.pad(found, (0, 12 - len(found)))
        outputs.append({"scores": np.eye(3)[padded] * (i + 1), "tags": padded})
    found = decode("tags", examples, rows, outputs, ("x", "y", "z"))
    assert found[0].label == tuple("xyz"[i] for i in tags)
    assert found[1].label == ("z",)
    assert all(1 / 3 < p < 1 for p in found[0].probabilities) and len(found[0].probabilities) == 23


def test_tags_of_another_scheme_are_written_in_bio(tokenizer):
    """As a published tagger may have them."""
    examples = [Example("0", ((tuple(WORDS[:4]),),))]
    rows = frame_of(tokenizer, "tags", examples, 12)
    outputs = [{"scores": np.zeros((12, 4)), "tags": np.arange(12) % 4}]
    (found,) = decode("tags", examples, rows, outputs, ("S-LOC", "B-PER", "E-PER", "O"))
    assert found.label == ("B-LOC", "B-PER", "I-PER", "O")
    (found,) = decode("tags", examples, rows, outputs, ("I-LOC", "B-PER", "I-PER", "O"))
    assert found.label == ("I-LOC", "B-PER", "I-PER", "O"), "BIO of a model is not repaired"


def test_the_windows_of_a_passage_of_600_tokens_are_the_reference_s(tokenizer):
    """run_squad.py: windows of 384 - 12 - 3 tokens begin every 128 tokens."""
    examples = [Example("0", ((" ".join(["q"] * 12), " ".join(WORDS)),))]
    rows = frame_of(tokenizer, "spans", examples, 384)
    assert [(row.first, len(row.characters)) for row in rows] == [(0, 369), (128, 369), (256, 344)]
    assert [row.begin for row in rows] == [14, 14, 14]
    covered = np.concatenate([np.arange(row.first, row.first + len(row.characters))[row.most_context] for row in rows])
    assert sorted(covered) == list(range(600))
    scores = {
        (i, token): min(token - row.first, row.first + len(row.characters) - 1 - token) + 0.01 * len(row.characters)
        for i, row in enumerate(rows)
        for token in range(row.first, row.first + len(row.characters))
    }
    for token in range(600):
        owner = max((i for i in range(3) if (i, token) in scores), key=lambda i: (scores[i, token], -i))
        assert [bool(row.most_context[token - row.first]) for i, row in enumerate(rows) if (i, token) in scores] == [
            i == owner for i in range(3) if (i, token) in scores
        ]


@pytest.mark.parametrize("seed", range(4))
def test_answers_are_those_of_brute_force(seed, tokenizer):
    """run_squad.py's rules, over all windows, starts and ends."""
    rng = np.random.default_rng(seed)
    passage = " ".join(WORDS[:40])
    examples = [Example("0", (("q r", passage),))]
    rows = frame_of(tokenizer, "spans", examples, 30, stride=7)
    outputs = [{"scores": rng.normal(size=(30, 2)).astype(np.float32) * 3} for _ in rows]
    for output, row in zip(outputs, rows, strict=True):
        output["scores"][row.length :] = -1e9
    best, spans = {}, []
    for row, output in zip(rows, outputs, strict=True):
        start_scores, end_scores = output["scores"].T
        tops = [set(np.argsort(-x, kind="stable")[:20]) for x in (start_scores, end_scores)]
        for start, end in itertools.product(range(row.length), repeat=2):
            inside = [row.begin <= i < row.begin + len(row.characters) for i in (start, end)]
            if not all(inside) or start not in tops[0] or end not in tops[1]:
                continue
            if not row.most_context[start - row.begin] or not start <= end < start + 30:
                continue
            words = WORDS[row.first + start - row.begin : row.first + end - row.begin + 1]
            spans.append((float(start_scores[start]) + float(end_scores[end]), " ".join(words)))
    for score, text in sorted(spans, reverse=True):
        best.setdefault(text, score)
    null = min(float(output["scores"][0].sum()) for output in outputs)
    text, score = next(iter(best.items()))
    (found,) = decode("spans", examples, rows, outputs, null_threshold=math.inf)
    assert found.label == Answers((text,), (passage.index(text),))
    assert found.null_difference == pytest.approx(null - score, abs=1e-5)
    ranked = {each.text: each.score for each in found.candidates if each.text}
    assert list(ranked) == list(best)[:20]
    assert sum(each.probability for each in found.candidates) == pytest.approx(1)
    (below,) = decode("spans", examples, rows, outputs, null_threshold=null - score + 0.01)
    (above,) = decode("spans", examples, rows, outputs, null_threshold=null - score - 0.01)
    assert (below.label, above.label) == (found.label, Answers())


def test_a_question_without_any_candidate_is_answered_by_nothing(tokenizer):
    """Where all of the best starts or ends are outside of the passage, or there is no passage."""
    for passage in ("w1 w2", ""):
        examples = [Example("0", ((" ".join("qrs" * 9), passage),))]
        rows = frame_of(tokenizer, "spans", examples, 40)
        scores = np.zeros((40, 2), np.float32)
        scores[29:] = -1e9
        (found,) = decode("spans", examples, rows, [{"scores": scores}], null_threshold=math.inf)
        assert (found.label, found.null_difference) == (Answers(), math.inf)
        assert [(each.text, each.probability) for each in found.candidates] == [("", 1.0)]
