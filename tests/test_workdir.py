"""A work directory: claimed by one run, read by everybody, refused when it is another's or of another version."""

import dataclasses
import json

import pytest
import tiny

from prelm_jax.errors import InputError
from prelm_jax.run import RunRecord
from prelm_jax.tokenizers.wordpiece import SPECIAL_TOKENS, WordPiece
from prelm_jax.workdir import WorkDir, baseline_metrics

TOKENIZER = WordPiece([*SPECIAL_TOKENS, "a"])


def record(**changes: object) -> RunRecord:
    return RunRecord.from_run(dataclasses.replace(tiny.bert(), **changes), "corpus", TOKENIZER.fingerprint)


@pytest.fixture
def workdir(tmp_path) -> WorkDir:
    claimed = WorkDir(tmp_path / "run")
    claimed.claim(record(), TOKENIZER)
    return claimed


def test_what_was_claimed_is_read(workdir):
    assert workdir.exists()
    assert workdir.read_record() == record()
    assert workdir.read_tokenizer().fingerprint == TOKENIZER.fingerprint


def test_a_tokenizer_that_was_changed_is_refused(workdir):
    path = workdir.path / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace('"a"', '"b"'))
    with pytest.raises(InputError, match=rf"{path.parent} is .*not the tokenizer of this run"):
        workdir.read_tokenizer()


def test_nothing_is_claimed_by_checking(tmp_path):
    workdir = WorkDir(tmp_path / "run")
    workdir.check(record(), tiny.bert())
    assert not workdir.path.exists() and not workdir.exists()


def test_another_run_is_refused_and_the_same_one_is_not(workdir):
    workdir.check(record(), tiny.bert())
    with pytest.raises(InputError, match=rf"{workdir.path} holds another run.*seed \(0 there, 3 here\).*--workdir"):
        workdir.check(record(seed=3), tiny.bert())


def test_a_directory_without_a_run(tmp_path):
    with pytest.raises(InputError, match=rf"{tmp_path} is not the work directory of a run: it has no run\.json"):
        WorkDir(tmp_path).read_record()


@pytest.mark.parametrize(("format", "writer"), [(1, "an earlier"), (99, "a newer")])
def test_a_run_of_another_version(workdir, format, writer):
    path = workdir.path / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": format}))
    with pytest.raises(InputError, match=rf"{path} was written by {writer} version"):
        workdir.read_record()


def test_fields_that_no_record_has(workdir):
    path = workdir.path / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"surprise": 1}))
    with pytest.raises(InputError, match=rf"{path}: surprise"):
        workdir.read_record()


def test_baselines_are_read_back(workdir):
    assert workdir.read_baselines() is None
    baselines = {"loss": {"unigram": 6.5, "most frequent token": 7.0}, "perplexity": {"unigram": 665.0}}
    writer = workdir.write_metrics(0)
    writer.write(0, baseline_metrics(baselines))
    writer.write(1, {"train/loss": 6.0})
    writer.close()
    assert workdir.read_baselines() == baselines
    assert [line["step"] for line in workdir.read_metrics()] == [0, 1]


def test_the_median_speed(workdir):
    assert workdir.tokens_per_second() != workdir.tokens_per_second()  # NaN: nothing measured yet
    writer = workdir.write_metrics(0)
    for step, speed in enumerate([100.0, 900.0, 200.0]):
        writer.write(step, {"perf/tokens_per_second": speed})
    writer.close()
    assert workdir.tokens_per_second() == 200.0


def test_torn_and_foreign_lines_are_left_out(workdir):
    path = workdir.path / "metrics.jsonl"
    lines = [
        b'{"step": 1, "train/loss": 2.0}',
        b"[]",
        b"7",
        b'{"loss": 1}',
        b'{"step": "one"}',
        b"\xff\xfe",
        b'{"step": 2, "tr',
    ]
    path.write_bytes(b"\n".join(lines))
    assert workdir.read_metrics() == [{"step": 1, "train/loss": 2.0}]
    assert workdir.read_baselines() is None


def test_checkpoints_that_no_record_explains(workdir):
    (workdir.path / "run.json").unlink()
    (workdir.path / "checkpoints").mkdir()
    workdir.check(record(), tiny.bert())
    (workdir.path / "checkpoints" / "10").mkdir()
    with pytest.raises(InputError, match=rf"{workdir.path} has checkpoints but no run\.json"):
        workdir.check(record(), tiny.bert())
