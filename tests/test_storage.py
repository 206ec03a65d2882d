"""Reading files, and work directories in a bucket: a local folder behind gs://.

Checkpoints are not covered: TensorStore has its own client for gs://.
"""

import contextlib
import dataclasses
import json
import os
from pathlib import Path

import fsspec
import pytest
import tiny
from etils import epath
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from prelm_jax.errors import InputError
from prelm_jax.loading import load
from prelm_jax.pretraining import pretrain
from prelm_jax.run import RunRecord
from prelm_jax.storage import (
    check_apart,
    copy_files,
    fetched,
    is_remote,
    output_directory,
    output_file,
    reachable,
    read_json,
    read_lines,
    stream_lines,
    writing,
)
from prelm_jax.tokenizers.wordpiece import SPECIAL_TOKENS, WordPiece
from prelm_jax.training.checkpoint import Checkpoints
from prelm_jax.training.metrics import MetricsWriter
from prelm_jax.workdir import WorkDir

# ---- Reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"", []),
        ("\ufeff".encode(), []),
        (b"a", ["a"]),
        (b"a\n", ["a"]),
        (b"a\n\nb\n\n", ["a", "", "b", ""]),
        ("a\r\nb\x0bc\x85\u2028d".encode(), ["a\r", "b\x0bc\x85\u2028d"]),
        ("\ufeffa\n\ufeffb".encode(), ["a", "\ufeffb"]),  # The mark at the beginning is none of the text.
    ],
)
def test_lines_end_at_line_feeds_only(tmp_path, content, lines):
    file = tmp_path / "input.txt"
    file.write_bytes(content)
    assert read_lines(file) == lines
    streamed = stream_lines(file)
    assert list(streamed) == list(streamed) == lines
    assert len(streamed) == len(lines)


@pytest.mark.parametrize("read", [read_lines, stream_lines])
def test_unreadable_input_is_named(tmp_path, read):
    file = tmp_path / "input.txt"
    with pytest.raises(InputError, match=r"cannot read .*input\.txt: No such file"):
        read(file)
    file.write_bytes("é\n".encode() + b"a\xff")
    with pytest.raises(InputError, match=r"input\.txt is not UTF-8 at byte 4: "):
        read(file)


def test_the_lines_of_a_pipe_can_be_read_again():
    reading, writing = os.pipe()
    os.write(writing, b"a\nb\n")
    os.close(writing)
    lines = stream_lines(f"/dev/fd/{reading}")
    os.close(reading)
    assert list(lines) == list(lines) == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b"{", dict, "is not JSON: Expecting property name"),
        (b"[" * 100_000, dict, "is not JSON: "),
        (b"[1]", dict, "is not a JSON object"),
        (rb'{"a": ["\ud800"]}', dict, "is not JSON: 'utf-8' codec can't encode"),
        (rb'{"\udc00": 1}', dict, "is not JSON: 'utf-8' codec can't encode"),
        (b"{}", list, "is not a JSON array"),
        (b'{"a": "\xff"}', dict, "is not UTF-8 at byte 7: "),
    ],
)
def test_unusable_json_is_named(tmp_path, content, kind, message):
    file = tmp_path / "settings.json"
    file.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_json(file, kind)
    assert str(error.value).startswith(f"{file} {message}")


def test_json_objects_and_arrays(tmp_path):
    (tmp_path / "object.json").write_text('{"a": 1}')
    (tmp_path / "array.json").write_text("[1]")
    assert read_json(tmp_path / "object.json") == {"a": 1}
    assert read_json(tmp_path / "array.json", list) == [1]


def test_write_errors_name_the_file(tmp_path):
    with pytest.raises(OSError, match="No space") as error, writing(tmp_path / "ids"):
        raise OSError(28, "No space left on device")
    assert error.value.filename == str(tmp_path / "ids")


# ---- Writing ---------------------------------------------------------------------------------------------------------


def test_an_output_file_appears_when_it_is_complete(tmp_path):
    output = tmp_path / "output"
    for failure in (None, KeyboardInterrupt, ValueError):
        with contextlib.suppress(KeyboardInterrupt, ValueError), output_file(output) as unfinished:
            unfinished.write_text(f"{failure}")
            assert unfinished.parent == tmp_path and unfinished != output
            if failure is not None:
                raise failure
    assert output.read_text() == "None"
    link = tmp_path / "link"
    link.symlink_to(output)
    with output_file(link) as unfinished:
        unfinished.write_text("by the link")
    assert link.is_symlink() and output.read_text() == "by the link"
    assert {path.name for path in tmp_path.iterdir()} == {"output", "link"}


def test_errors_of_an_output_file_name_it(tmp_path):
    output = tmp_path / "output"
    with pytest.raises(OSError, match="No space") as error, output_file(output) as unfinished:
        raise OSError(28, "No space left on device", str(unfinished))
    assert error.value.filename == str(output)
    with pytest.raises(OSError, match="No space") as error, output_file(output):
        raise OSError(28, "No space left on device", "another file")
    assert error.value.filename == "another file"
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    for path, names in {
        tmp_path: "directory",
        "/dev/null": "device",
        tmp_path / "none" / "file": f"no directory {tmp_path}/none",
    }.items():
        with pytest.raises(InputError, match=f"^{path}.*{names}"), output_file(path):
            pytest.fail("opened")


def test_an_output_directory_is_new_or_empty(tmp_path):
    output = tmp_path / "a" / "b"
    with pytest.raises(KeyboardInterrupt), output_directory(output) as unfinished:
        (unfinished / "file").write_text("half")
        raise KeyboardInterrupt
    for _ in range(2):
        with output_directory(output) as unfinished:
            (unfinished / "file").write_text("whole")
        assert [path.name for path in output.parent.iterdir()] == ["b"]
        assert (output / "file").read_text() == "whole"
        (output / "file").unlink()
    for path, problem in {tmp_path: "is not empty", "/dev/null": "is a device"}.items():
        with pytest.raises(InputError, match=f"^{path} {problem}"), output_directory(path):
            pytest.fail("opened")


def test_outputs_are_apart_from_inputs(tmp_path):
    directory, file = tmp_path / "directory", tmp_path / "file"
    (directory / "inner").mkdir(parents=True)
    (directory / "inner/file").write_text("a")
    file.write_text("b")
    (tmp_path / "hard").hardlink_to(directory / "inner/file")
    (tmp_path / "soft").symlink_to(directory)
    inputs = [directory, file, tmp_path / "missing", "gs://bucket/run"]
    for output in [
        "directory",
        "directory/new/er",
        "directory/inner/file",
        "file",
        "hard",
        "soft",
        "soft/new",
        "missing",
    ]:
        with pytest.raises(InputError, match=f"^{tmp_path / output} "):
            check_apart(tmp_path / output, *inputs)
    for output in ["new", "directory2", "directory/../new", "gs://bucket/other"]:
        check_apart(tmp_path / output, *inputs)


# ---- Buckets ---------------------------------------------------------------------------------------------------------


class Bucket(DirFileSystem):
    """A folder behind gs://, where nothing can be appended to."""

    cachable = False

    def __init__(self, folder: str):
        super().__init__(folder, LocalFileSystem(auto_mkdir=True))

    def open(self, path: str, mode: str = "rb", **options):
        assert "a" not in mode
        return super().open(path.removeprefix("gs://"), mode, **options)

    def _join(self, path):
        return super()._join(path.removeprefix("gs://") if isinstance(path, str) else path)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The folder behind gs://bucket."""
    folder = tmp_path / "buckets"
    (folder / "bucket").mkdir(parents=True)
    monkeypatch.setattr(epath.backend.fsspec_backend, "fs", lambda path: Bucket(str(folder)))
    monkeypatch.setattr(epath.gpath, "_is_tf_installed", lambda: False)
    return folder / "bucket"


def test_a_local_path_is_returned_unchanged(tmp_path):
    assert reachable(str(tmp_path)) == tmp_path and not is_remote(tmp_path)
    with fetched(tmp_path) as directory:
        assert directory == tmp_path


def test_files_are_copied_to_a_bucket_and_back(bucket, tmp_path):
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "a.txt").write_bytes("€\r\n".encode())
    remote = reachable("gs://bucket/run") / "files"
    assert str(remote) == "gs://bucket/run/files" and is_remote(remote)
    copy_files(tmp_path / "local", remote)
    assert (bucket / "run" / "files" / "a.txt").is_file()
    with fetched(remote) as directory:
        assert (directory / "a.txt").read_bytes() == "€\r\n".encode()
    assert read_lines(remote / "a.txt") == read_lines("gs://bucket/run/files/a.txt") == ["€\r"]
    with pytest.raises(InputError, match=r"cannot read gs://bucket/run/files/b\.txt: "):
        read_lines(remote / "b.txt")


def test_metrics(bucket):
    for resume_at, steps in [(0, [2, 4, 6]), (4, [6])]:
        writer = MetricsWriter(reachable("gs://bucket/run") / "metrics.jsonl", resume_at)
        for step in steps:
            writer.write(step, {"loss": step / 2})
        lines = (bucket / "run" / "metrics.jsonl").read_text().splitlines()  # Before the file is closed.
        assert [json.loads(line) for line in lines] == [{"step": step, "loss": step / 2} for step in (2, 4, 6)]
        writer.close()


def test_a_work_directory_is_claimed_and_read(bucket):
    workdir = WorkDir("gs://bucket/run")
    assert not workdir.exists()
    tokenizer = WordPiece([*SPECIAL_TOKENS, "a"])
    run, other = tiny.bert(), dataclasses.replace(tiny.bert(), seed=1)
    record = RunRecord.from_run(run, "corpus", tokenizer.fingerprint)
    workdir.claim(record, tokenizer)
    workdir.claim(record, tokenizer)
    assert workdir.read_record() == record
    assert workdir.read_tokenizer().fingerprint == tokenizer.fingerprint
    workdir.check(record, run)
    with pytest.raises(InputError, match=r"gs://bucket/run .* seed"):
        workdir.check(RunRecord.from_run(other, "corpus", tokenizer.fingerprint), other)


def test_checkpoints_are_listed_in_the_bucket(bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Orbax asks whether the bucket has folders: no.
    monkeypatch.setattr("orbax.checkpoint._src.path.gcs_utils.get_bucket", lambda name: None)
    with contextlib.closing(Checkpoints(reachable("gs://bucket/run") / "checkpoints", keep=2)) as checkpoints:
        assert checkpoints.restore({}) is None
    assert not (tmp_path / "gs:").exists()


def test_a_missing_model_in_a_bucket_is_named(bucket):
    with pytest.raises(InputError, match=r"gs://bucket/model: .*run\.json"):
        load("gs://bucket/model")


def test_profiles_are_not_written_to_a_bucket(bucket):
    run = tiny.bert()
    run = dataclasses.replace(run, loop=dataclasses.replace(run.loop, profile=3))
    with pytest.raises(InputError, match="--profile 3"):
        pretrain(run, "gs://bucket/run")


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (ImportError("Install gcsfs"), r'.*pip install "prelm_jax\[gcs\]"'),
        (OSError("Anonymous caller has no access\nmore"), r".*\(Anonymous caller has no access\)"),
    ],
)
def test_an_unreachable_bucket_is_named(monkeypatch, failure, message):
    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(fsspec, "filesystem", fail)
    epath.backend.fsspec_backend._get_filesystem.cache_clear()
    with pytest.raises(InputError, match=f"gs://bucket/run: {message}"):
        reachable("gs://bucket/run")


def test_who_reads_while_files_are_copied_sees_whole_ones(tmp_path, monkeypatch):
    for name, content in (("source", "new"), ("target", "old")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(content * 1000)
    seen, write_bytes = [], Path.write_bytes

    def write_half_and_read(path, content):
        write_bytes(path, content[: len(content) // 2])
        seen.append((tmp_path / "target" / "file").read_text())
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", write_half_and_read)
    copy_files(tmp_path / "source", tmp_path / "target")
    assert seen == ["old" * 1000] and (tmp_path / "target" / "file").read_text() == "new" * 1000
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["file"]
