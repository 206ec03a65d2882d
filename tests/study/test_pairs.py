"""Minimal pairs: files, ties, unknown words, directions."""

import json
import lzma

import pytest
from study_subjects import WordSubject

from prelm_jax.errors import InputError
from prelm_jax.study import pairs, statistics
from prelm_jax.study.pairs import Pair, PairsTest


def jsonl(path, *sentences, **fields):
    """A file of pairs."""
    path.parent.mkdir(exist_ok=True)
    lines = [json.dumps({"sentence_good": good, "sentence_bad": bad, **fields}) + "\n" for good, bad in sentences]
    content = "".join(lines).encode()
    path.write_bytes(lzma.compress(content) if path.suffix == ".xz" else content)


def test_blimp_has_a_group_for_each_file(tmp_path):
    jsonl(tmp_path / "blimp" / "b.jsonl.xz", ("A cat.", "A cats."), ("The dog.", "The dogs."), UID="b")
    jsonl(tmp_path / "blimp" / "a.jsonl", ("One cat", "One cats"))
    (tmp_path / "blimp" / "README.md").write_text("no pairs")
    test = pairs.blimp(tmp_path, 1)
    assert test.pairs == [Pair("a_0", "a", "One cat", "One cats"), Pair("b_0", "b", "A cat.", "A cats.")]
    assert test.num_texts == 4 and test.settings == {"pairs": 1}
    every = pairs.blimp(tmp_path, 0)
    assert [pair.item for pair in every.pairs] == ["a_0", "b_0", "b_1"]
    assert every.fingerprint != test.fingerprint


def test_rows_are_right_wrong_or_ties():
    made = [Pair("1", "x", "good", "bad"), Pair("2", "x", "bad", "good"), Pair("3", "y", "good what", "good how")]
    subject = WordSubject(good=-1, bad=-2)
    rows = list(PairsTest("own", made).measure(subject))
    assert [(row.item, row.group, row.value, row.tie, row.unknown) for row in rows] == [
        ("1", "x", 1.0, False, 0),
        ("2", "x", 0.0, False, 0),
        ("3", "y", 0.5, True, 2),
    ]
    assert subject.asked == ["good", "bad", "bad", "good", "good what", "good how"]
    assert statistics.value(rows, "macro_accuracy") == 0.5 and statistics.ties(rows) == pytest.approx(1 / 3)


def test_directions_and_kinds_are_lines_of_their_own():
    made = [Pair("1", "x", "good", "bad", ("long",))]
    rows = list(PairsTest("own", made).measure(WordSubject(good=-1, bad=-2, directions=("forward", "backward"))))
    assert [(row.kind, row.value) for row in rows] == [("", 1), ("long", 1), ("forward", 1), ("backward", 0)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_no_numbers_are_not_ties(value):
    (row,) = PairsTest("own", [Pair("1", "x", "good", "good")]).measure(WordSubject(good=value))
    assert row.value != row.value


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"sentence_good": "A"}, "`sentence_bad`"),
        ({"sentence_good": "A", "sentence_bad": " "}, "`sentence_bad`"),
        ({"sentence_good": 3, "sentence_bad": "B"}, "`sentence_good`"),
    ],
)
def test_a_line_without_two_sentences_is_named(fields, complaint, tmp_path):
    jsonl(tmp_path / "blimp" / "a.jsonl", ("A", "B"))
    with (tmp_path / "blimp" / "a.jsonl").open("a") as file:
        file.write(json.dumps(fields))
    with pytest.raises(InputError) as error:
        pairs.blimp(tmp_path, 0)
    assert f"{tmp_path}/blimp/a.jsonl:2" in str(error.value) and complaint in str(error.value)


def test_missing_data_are_named(tmp_path):
    for _ in range(2):
        with pytest.raises(InputError) as error:
            pairs.blimp(tmp_path, 0)
        assert str(tmp_path / "blimp") in str(error.value) and "--data" in str(error.value)
        (tmp_path / "blimp").mkdir(exist_ok=True)
