"""Minimal pairs: files, ties, unknown words, directions."""

import json
import lzma

import pytest
from study_subjects import WordSubject

from prelm_jax.errors import InputError
from prelm_jax.study import statistics
from prelm_jax.study.base import Settings
from prelm_jax.study.pairs import Pair, PairsTest
from prelm_jax.study.tests import make_test


def make(name, data, limit):
    return make_test(name, Settings(data, limit))


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
    test = make("blimp", tmp_path, 1)
    assert test.pairs == [Pair("a_0", "a", "One cat", "One cats"), Pair("b_0", "b", "A cat.", "A cats.")]
    assert test.settings == {"pairs": 1}
    every = make("blimp", tmp_path, 0)
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
        make("blimp", tmp_path, 0)
    assert f"{tmp_path}/blimp/a.jsonl:2" in str(error.value) and complaint in str(error.value)


def test_missing_data_are_named(tmp_path):
    for _ in range(2):
        with pytest.raises(InputError) as error:
            make("blimp", tmp_path, 0)
        assert str(tmp_path / "blimp") in str(error.value) and "--data" in str(error.value)
        (tmp_path / "blimp").mkdir(exist_ok=True)


def test_a_file_without_pairs_is_named(tmp_path):
    (tmp_path / "blimp").mkdir()
    (tmp_path / "blimp" / "a.jsonl").touch()
    with pytest.raises(InputError, match="blimp: there are no pairs"):
        make("blimp", tmp_path, 0)


@pytest.mark.parametrize(("name", "complaint"), [("blimp:runs/a", "nothing after a colon"), ("pairs", "pairs:FILES")])
def test_a_test_with_a_wrong_argument_is_named(name, complaint, tmp_path):
    with pytest.raises(InputError, match=complaint):
        make_test(name, Settings(tmp_path, 0))


def test_the_supplement_and_babylm_s_folders(tmp_path):
    jsonl(tmp_path / "supplement_filtered" / "turn.jsonl", ("A: Who?\nB: Me.", "A: Who?\nB: It."))
    jsonl(tmp_path / "blimp_filtered" / "a.jsonl", ("One cat", "One cats"))
    assert make("supplement", tmp_path, 0).pairs == [Pair("turn_0", "turn", "A: Who?\nB: Me.", "A: Who?\nB: It.")]
    assert make("blimp", tmp_path, 0).name == "blimp"


def test_zorro_has_the_bad_sentence_first(tmp_path):
    (tmp_path / "zorro").mkdir()
    file = tmp_path / "zorro" / "case-subjective.txt"
    file.write_text("the wolf brought i .\ni brought the wolf .\nhe sees they .\nthey see he .\n")
    assert [pair[:3] for pair in make("zorro", tmp_path, 0).pairs] == [
        ("case-subjective_0", "case-subjective", "i brought the wolf ."),
        ("case-subjective_1", "case-subjective", "they see he ."),
    ]
    for lines, where in (("a\nb\nc\n", str(file)), ("a\nb\nc\n\n", f"{file}:4")):
        file.write_text(lines)
        with pytest.raises(InputError, match=where):
            make("zorro", tmp_path, 0)


def test_agreement_replaces_the_verb(tmp_path):
    (tmp_path / "agreement").mkdir()
    file = tmp_path / "agreement" / "linzen.tsv"
    header = "position\tcorrect\twrong\tattractors\tsentence\n"
    rows = [
        "1\tis\tare\t0\tit is . <eos>",
        "4\tAre\tIs\t2\tkeys to the door are here <eos>",
        "0\tis\tare\t2\tIs it <eos>",
    ]
    file.write_text(header + "\n".join(rows))
    made = make("agreement", tmp_path, 1).pairs
    assert made == [
        Pair("linzen_0", "linzen_0", "it is .", "it are .", ("0 attractors",)),
        Pair("linzen_1", "linzen_1", "keys to the door are here", "keys to the door is here", ("2 attractors",)),
    ]
    assert len(make("agreement", tmp_path, 0).pairs) == 3
    for row in ("2\tis\tare\t0\tit is .", "9\tis\tare\t0\tit is .", "x\tis\tare\t0\tit is ."):
        file.write_text(header + row)
        with pytest.raises(InputError, match=rf"linzen\.tsv:2: word {row[0]} .*'is'"):
            make("agreement", tmp_path, 0)
    file.write_text("position\tcorrect\twrong\n1\tis\tare\n")
    with pytest.raises(InputError, match=r"linzen\.tsv has no column `attractors`"):
        make("agreement", tmp_path, 0)


def test_climp_has_the_sentences_of_a_pair_in_consecutive_rows(tmp_path):
    (tmp_path / "climp-zh").mkdir()
    file = tmp_path / "climp-zh" / "binding_1000.csv"
    file.write_text(",0,1,2,3\n0,b,binding,她自己,1\n1,b,binding,他自己,0\n")
    assert make("climp", tmp_path, 0).pairs == [Pair("binding_1000_0", "binding_1000", "她自己", "他自己")]
    file.write_text(",0,1,2,3\n0,b,binding,她自己,0\n1,b,binding,他自己,1\n")
    with pytest.raises(InputError, match=r"binding_1000\.csv:3"):
        make("climp", tmp_path, 0)


def test_pairs_of_one_s_own(tmp_path):
    jsonl(tmp_path / "a.jsonl", ("A cat.", "A cats."), ("A dog.", "A dogs."))
    (tmp_path / "b.tsv").write_text('id\tsentence_good\tsentence_bad\n1\tSo "quoted\tbad\n')
    (tmp_path / "c.csv").write_text('sentence_bad,sentence_good\n"bad, really",good\n')
    every = make(f"pairs:{tmp_path}/*", tmp_path, 0)
    assert [pair[:4] for pair in every.pairs] == [
        ("a_0", "a", "A cat.", "A cats."),
        ("a_1", "a", "A dog.", "A dogs."),
        ("b_0", "b", 'So "quoted', "bad"),
        ("c_0", "c", "good", "bad, really"),
    ]
    one = make(f"pairs:{tmp_path}/a.jsonl", tmp_path, 0)
    assert [pair.group for pair in one.pairs] == ["a_0", "a_1"] and one.name == f"pairs:{tmp_path}/a.jsonl"
    (tmp_path / "d.tsv").write_text("good\tbad\nA\tB\n")
    with pytest.raises(InputError, match=r"d\.tsv has no column `sentence_good`"):
        make(f"pairs:{tmp_path}/d.tsv", tmp_path, 0)
    (tmp_path / "e.jsonl").write_text("\n")
    with pytest.raises(InputError, match=r"e\.jsonl: there are no pairs"):
        make(f"pairs:{tmp_path}/e.jsonl", tmp_path, 0)


def test_the_real_test_sets(real_data):
    """As many paradigms as their READMEs say, and what is read of them."""
    data = real_data / "study"
    sizes = {"blimp": 44_000, "supplement": 4773, "zorro": 30_000, "agreement": 4993, "climp": 11_000}
    for name, size in sizes.items():
        assert len(make(name, data, 0).pairs) == size
    assert len(make("blimp", data, 100).pairs) == 4400 and len({p.group for p in make("blimp", data, 1).pairs}) == 44
    (first, *_) = make("blimp", data, 1).pairs
    assert first.item == "adjunct_island_0" and first.good == "Who should Derek hug after shocking Richard?"
    assert {pair.kinds[0] for pair in make("agreement", data, 1).pairs} == {f"{n} attractors" for n in range(5)}
