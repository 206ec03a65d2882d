"""Work directories in a bucket: here a folder of this machine behind gs://. Checkpoints are not in it: TensorStore
has a client of its own for gs://."""

import contextlib
import dataclasses
import json

import fsspec
import pytest
import tiny
from etils import epath
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from prelm_jax import pretrain
from prelm_jax.corpus.documents import Corpus
from prelm_jax.errors import InputError
from prelm_jax.load import load, read_record, read_tokenizer
from prelm_jax.storage import copy_files, fetched, is_remote, reachable
from prelm_jax.tokenizers.build import build as build_tokenizer
from prelm_jax.training.checkpoint import Checkpoints
from prelm_jax.training.metrics import MetricsWriter


class Bucket(DirFileSystem):
    """A folder behind gs://. An object cannot be appended to."""

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
    """The folder that gs:// is."""
    folder = tmp_path / "buckets"
    (folder / "bucket").mkdir(parents=True)
    monkeypatch.setattr(epath.backend.fsspec_backend, "fs", lambda path: Bucket(str(folder)))
    monkeypatch.setattr(epath.gpath, "_is_tf_installed", lambda: False)
    return folder / "bucket"


def test_a_path_of_this_machine_stays_as_it_is(tmp_path):
    assert reachable(str(tmp_path)) == tmp_path and not is_remote(tmp_path)
    with fetched(tmp_path) as directory:
        assert directory == tmp_path


def test_files_go_up_and_come_back(bucket, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a.txt").write_bytes("€\r\n".encode())
    remote = reachable("gs://bucket/run") / "files"
    assert str(remote) == "gs://bucket/run/files" and is_remote(remote)
    copy_files(tmp_path / "there", remote)
    assert (bucket / "run" / "files" / "a.txt").is_file()
    with fetched(remote) as directory:
        assert (directory / "a.txt").read_bytes() == "€\r\n".encode()


def test_metrics(bucket):
    for resume_at, steps in [(0, [2, 4, 6]), (4, [6])]:
        writer = MetricsWriter(reachable("gs://bucket/run") / "metrics.jsonl", resume_at)
        for step in steps:
            writer.write(step, {"loss": step / 2})
        lines = (bucket / "run" / "metrics.jsonl").read_text().splitlines()  # Before it is closed.
        assert [json.loads(line) for line in lines] == [{"step": step, "loss": step / 2} for step in (2, 4, 6)]
        writer.close()


def test_a_work_directory_is_claimed_and_read(bucket, tmp_path):
    (tmp_path / "corpus.txt").write_text(tiny.text(seed=0))
    run = dataclasses.replace(tiny.bert(), corpus=(str(tmp_path / "corpus.txt"),))
    corpus = Corpus(run.corpus, run.held_out)
    tokenizer = build_tokenizer(run.tokenizer, corpus)
    workdir = reachable("gs://bucket/run")
    pretrain._claim(workdir, run, corpus, tokenizer)
    pretrain._claim(workdir, run, corpus, tokenizer)
    assert read_record(workdir)["batch_size"] == run.batch_size
    assert read_tokenizer(workdir).fingerprint == tokenizer.fingerprint
    with pytest.raises(InputError, match="gs://bucket/run holds another run, which differs in seed"):
        pretrain._claim(workdir, dataclasses.replace(run, seed=1), corpus, tokenizer)


def test_checkpoints_are_looked_for_in_the_bucket(bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Asked whether the bucket keeps folders; the answer is no.
    monkeypatch.setattr("orbax.checkpoint._src.path.gcs_utils.get_bucket", lambda name: None)
    with contextlib.closing(Checkpoints(reachable("gs://bucket/run") / "checkpoints", keep=2)) as checkpoints:
        assert checkpoints.restore({}) is None
    assert not (tmp_path / "gs:").exists()


def test_what_a_bucket_does_not_hold(bucket):
    with pytest.raises(InputError, match=r"gs://bucket/model: no work directory \(no run.json\)"):
        load("gs://bucket/model")
    with pytest.raises(InputError, match="--profile 3: traces are written to this machine only"):
        pretrain.pretrain(dataclasses.replace(tiny.bert(), loop=dataclasses.replace(tiny.bert().loop, profile=3)), "gs://bucket/run")


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (ImportError("Install gcsfs"), r'a bucket needs a package: pip install "prelm_jax\[gcs\]"'),
        (OSError("Anonymous caller has no access\nmore"), r"cannot be reached \(Anonymous caller has no access\): see"),
    ],
)
def test_a_bucket_that_cannot_be_used(monkeypatch, failure, message):
    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(fsspec, "filesystem", fail)
    epath.backend.fsspec_backend._get_filesystem.cache_clear()
    with pytest.raises(InputError, match=f"gs://bucket/run: {message}"):
        reachable("gs://bucket/run")
