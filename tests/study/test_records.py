"""Records: what is written is read again, complete or not at all; foreign files are refused in one line."""

import dataclasses
import errno
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prelm_jax.errors import InputError
from prelm_jax.study import records
from prelm_jax.study.records import Header, Record, Row

HEADER = Header("blimp", "macro_accuracy", "runs/bert-mini@500", "bert", "ab", "cd", {"pairs": 100})
ROWS = [Row("a_0", "a", 1.0), Row("a_1", "a", 0.5, 3, "control", True, 2, 0.25), Row("猫\n", "", -2.5e-7)]

row = st.builds(
    Row,
    item=st.text(st.characters(codec="utf-8")),
    group=st.text(st.characters(codec="utf-8")),
    value=st.floats(allow_nan=False, allow_infinity=False),
    layer=st.none() | st.integers(0, 99),
    kind=st.sampled_from(["", "control"]),
    tie=st.booleans(),
    unknown=st.integers(0, 5),
    gold=st.none() | st.floats(allow_nan=False, allow_infinity=False),
)


@given(rows=st.lists(row, max_size=4))
def test_what_is_written_is_read(rows, tmp_path_factory):
    path = records.write(tmp_path_factory.mktemp("records"), HEADER, rows)
    assert records.read(path) == Record(dataclasses.replace(HEADER, rows=len(rows)), tuple(rows))


def test_a_record_is_a_file_by_test_and_subject(tmp_path):
    path = records.write(tmp_path, HEADER, ROWS)
    assert path == records.record_path(tmp_path, HEADER) and path.parent == tmp_path / "blimp"
    assert path.name.startswith("runs-bert-mini-500-")
    header, first, *_ = path.read_text().split("\n")
    assert json.loads(header)["rows"] == 3 and json.loads(first) == {"item": "a_0", "group": "a", "value": 1.0}
    assert records.find(tmp_path) == [path] and records.find(tmp_path / "nothing") == []


def test_other_fingerprints_are_other_files(tmp_path):
    changes = {"model": "x", "data": "x", "settings": {"pairs": 0}, "subject": "b", "test": "zorro"}
    headers = [HEADER, *(dataclasses.replace(HEADER, **{name: value}) for name, value in changes.items())]
    assert len({records.record_path(tmp_path, header) for header in headers}) == 6
    timed = dataclasses.replace(HEADER, seconds=9.0, version="9")
    assert records.record_path(tmp_path, timed) == records.record_path(tmp_path, HEADER)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("runs/bert-mini@500", "runs-bert-mini-500"),
        ("../a", "a"),
        ("///", "unnamed"),
        ("x" * 300, "x" * 80),
        ("é 猫", "é-猫"),
    ],
)
def test_slugs(name, expected):
    assert records.slug(name) == expected


def test_values_that_are_no_numbers_are_refused(tmp_path):
    with pytest.raises(InputError, match="bert-mini@500: blimp gives nan for a_7"):
        records.write(tmp_path, HEADER, [*ROWS, Row("a_7", "a", float("nan"))])
    assert records.find(tmp_path) == []


def test_a_full_disk_leaves_no_record(tmp_path, full_disk):
    rows = [Row(f"item {i}", "group", 1.0) for i in range(2000)]
    with full_disk(20_000), pytest.raises(OSError) as error:
        records.write(tmp_path, HEADER, rows)
    assert error.value.errno == errno.EFBIG and str(records.record_path(tmp_path, HEADER)) in str(error.value.filename)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda lines: lines[:-1], "has 2 rows, its header says 3"),
        (lambda lines: [*lines[:2], "{", *lines[2:]], ":3 is no JSON object"),
        (lambda lines: [lines[0], *lines[1].split(", ", 1), ", ".join(lines[2:])], ":2 is no JSON object"),
        (lambda lines: [lines[0], '{"item": "a"}', *lines[2:]], ":2: only item"),
        (lambda lines: [lines[0], '{"item": "a", "group": "b", "value": "1"}', *lines[2:]], ":2: value is '1'"),
        (lambda lines: [lines[0], '{"item": "a", "colour": 1}', *lines[2:]], ":2: colour is 1"),
        (lambda lines: [lines[0].replace('"family"', '"kind"'), *lines[1:]], ":1: kind"),
        (lambda lines: [lines[0].replace('"format": 1', '"format": 2'), *lines[1:]], "format 2"),
        (lambda lines: [], ":1 is no JSON object"),
    ],
)
def test_foreign_and_torn_files_are_refused(change, complaint, tmp_path):
    path = records.write(tmp_path, HEADER, ROWS)
    path.write_text("".join(f"{line}\n" for line in change(path.read_text().splitlines())))
    with pytest.raises(InputError) as error:
        records.read(path)
    assert str(path) in str(error.value) and complaint in str(error.value)


def test_rows_by_line():
    rows = [Row("a", "a", 1, 0), Row("a", "a", 0, 1), Row("b", "a", 1, 0), Row("b", "a", 1, 0, "control")]
    assert list(records.rows_by_line(rows).items()) == [
        (("", 0), [rows[0], rows[2]]),
        (("", 1), [rows[1]]),
        (("control", 0), [rows[3]]),
    ]
