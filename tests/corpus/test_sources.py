"""Sources: paths and globs, TensorFlow Datasets, Python's documentation."""

import os
import socket
import sys
import tempfile

import pytest

from prelm_jax.corpus import python_docs
from prelm_jax.corpus.documents import Corpus


def test_names_with_special_characters(write, texts, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write("a, b [1].txt", "one")
    assert texts("~/a, b [1].txt") == texts("~/a*.txt") == ["one"]
    write("a=b.txt", "two")
    write("weight=2", "three")
    monkeypatch.chdir(tmp_path)
    assert texts("a=b.txt", "./weight=2") == ["two", "three"]


def test_missing_files_are_named(error_of, tmp_path):
    assert f"no file {tmp_path}/no.txt:" in error_of(f"{tmp_path}/no.txt")
    assert f" {tmp_path}/*.txt: " in error_of(f"{tmp_path}/*.txt")
    assert "gs://bucket/*.txt: " in error_of("gs://bucket/*.txt")
    message = error_of(str(tmp_path))
    assert message.startswith(f"{tmp_path} is a directory") and f"{tmp_path}/*.txt" in message


def test_what_is_no_file_is_named(write, error_of, texts, tmp_path):
    """Alone and among the files of a glob, whose directories are left out."""
    write("a.txt", "one")
    (tmp_path / "directory.txt").mkdir()
    assert texts(f"{tmp_path}/*.txt") == ["one"]
    pipe, link, device = tmp_path / "pipe.txt", tmp_path / "link.txt", tmp_path / "device.txt"
    os.mkfifo(pipe)
    for source in (pipe, tmp_path / "*.txt"):
        assert error_of(str(source)).startswith(f"{pipe} is a pipe, which can be read once")
    pipe.unlink()
    link.symlink_to(tmp_path / "gone")
    for source in (link, tmp_path / "*.txt"):
        assert error_of(str(source)).startswith(f"{link} is a link to a file that does not exist")
    link.unlink()
    device.symlink_to("/dev/null")
    assert error_of(str(device)).startswith(f"{device} is a device")
    device.unlink()
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as server:  # Its path must be short.
        server.bind(f"{short}/s")
        assert error_of(f"{short}/s").startswith(f"{short}/s is a socket")
    read, other = os.pipe()
    assert error_of(f"/dev/fd/{read}").startswith(f"/dev/fd/{read} is a pipe")  # <(command)
    os.close(read)
    os.close(other)


@pytest.mark.parametrize(
    "name", ["x=1.txt", "-dash.txt", "a,b=c.txt", "field=notes.txt", "a b.txt", "weight", "[1].txt"]
)
def test_every_name_can_be_written(write, texts, tmp_path, monkeypatch, name):
    write(name, "one")
    monkeypatch.chdir(tmp_path)
    spec = {"field=notes.txt": "./field=notes.txt", "a,b=c.txt": "a[,]b=c.txt"}.get(name, name)
    assert texts(spec) == texts(f"{spec},sentences=line,weight=1") == ["one"]


@pytest.mark.parametrize("content", ["", "\n \n\r\n"])
@pytest.mark.parametrize("side", [None, "training", "held_out"])
def test_a_corpus_without_text_is_named(write, error_of, content, side):
    path = write("a.txt", content)
    assert f"the corpus {path} holds no text" in error_of(path, side=side)


def test_python_docs(texts):
    documents = texts("python-docs")
    assert len(documents) > 400
    assert sum(len(text.encode()) for text in documents) > 1_500_000
    assert documents == texts("python-docs")
    assert not any("site-packages" in path or "/test/" in path for path in python_docs.files())
    module = next(text for text in documents if text.startswith("Command-line parsing library"))
    # A wrapped paragraph is one line; a class's docstring follows the module's.
    assert "\nThe following is a simple usage example that sums integers from the command-line" in module
    assert module.index("Object for parsing command line strings into Python objects.") > 1000
    assert "\n\n" not in module


# ---- TensorFlow Datasets ---------------------------------------------------------------------------------------------


@pytest.fixture
def write_tfds(tmp_path, monkeypatch):
    """Prepares the dataset `my_text` with the documents of a corpus: `write_tfds(corpus)` returns its directory."""
    import tensorflow_datasets as tfds

    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "tfds"))

    def write_tfds(corpus: Corpus):
        with tfds.core.registered.skip_registration():  # To be read from its files, not by this class.

            class MyText(tfds.core.GeneratorBasedBuilder):
                VERSION = tfds.core.Version("1.0.0")
                # No downloads. Looking for their checksums, TFDS 4.9.10 imports a package that it does not require.
                url_infos = None

                def _info(self):
                    features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
                    return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

                def _split_generators(self, dl_manager):
                    return {"train": self._generate_examples()}

                def _generate_examples(self):
                    for index, document in enumerate(corpus.documents()):
                        yield index, {"text": document.text}

        MyText(data_dir=tmp_path / "tfds", file_format="array_record").download_and_prepare()
        return tmp_path / "tfds/my_text/1.0.0"

    return write_tfds


def test_tfds_matches_the_files_it_was_made_from(write, texts, write_tfds, monkeypatch):
    source = write("a.txt", "one\ntwo\r\n\r\nthré\n\nfour\n\nfive\n\nsix")
    write_tfds(Corpus((source,)))
    for side in (None, "training", "held_out"):
        assert texts("tfds:my_text", side=side, held_out=0.5) == texts(source, side=side, held_out=0.5)
    assert "tensorflow" not in sys.modules
    assert texts("tfds:my_text:1.0.0:train[:2]") == ["one\ntwo", "thré"]
    assert texts("tfds:my_text:train[:2]") == texts("tfds:my_text")[:2]
    whole, part = Corpus(("tfds:my_text",)), Corpus(("tfds:my_text:train[:2]",))
    assert whole.fingerprint != part.fingerprint
    monkeypatch.setattr("prelm_jax.corpus.sources.PART_BYTES", 30_000)  # The format pads its files to 64 kB.
    assert 1 < len(Corpus(("tfds:my_text",)).parts) < 10
    assert texts("tfds:my_text") == texts(source)
    assert next(Corpus(("tfds:my_text,sentences=line",)).documents()).sentences == "line"


def test_tfds_errors_name_dataset_split_and_feature(write, error_of, write_tfds):
    directory = write_tfds(Corpus((write("a.txt", "one"),)))
    message = error_of("tfds:no_such/set")
    assert message.startswith("tfds:no_such/set: ") and f"{directory.parents[1]};" in message
    message = error_of("tfds:my_text:no")
    assert message.startswith("tfds:my_text:no: ") and "['train']" in message
    features = directory / "features.json"
    features.write_text(
        features.read_text().replace('"text": {\n                "python', '"words": {\n                "python')
    )
    message = error_of("tfds:my_text")
    assert message.startswith("tfds:my_text ") and "`text`" in message and message.endswith("words")
