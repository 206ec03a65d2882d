"""Documents from SPECs: every kind of source, every option, every complaint, and the held-out split."""

import gzip
import io
import json
import lzma
import os
import random
import re
import sys
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from prelm_jax.corpus import documents as corpus_module
from prelm_jax.corpus import python_docs, tfds
from prelm_jax.corpus import readers as files
from prelm_jax.corpus.documents import Corpus
from prelm_jax.errors import InputError

COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}


def texts(*sources, side=None, held_out=0.0):
    return [document.text for document in Corpus(sources, held_out).documents(side)]


def complaint(*sources, **options) -> str:
    with pytest.raises(InputError) as error:
        texts(*sources, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


# ---- Documents -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("", ["one\ntwo", "three", "four"]),
        (",documents=blank-line", ["one\ntwo", "three", "four"]),
        (",documents=line", ["one", "two", "three", "four"]),
        (",documents=file", ["one\ntwo\n\n \n\nthree\n\nfour"]),
    ],
)
def test_documents_of_a_file(write, suffix, option, expected):
    path = write(f"a.txt{suffix}", COMPRESS[suffix](b"\n\none\ntwo\n\n \n\nthree\n\nfour"))
    assert texts(path + option) == expected


def test_the_end_of_a_file_ends_a_document(write, tmp_path):
    write("b.txt", "three\n")
    write("a.txt", "one\n\ntwo")
    assert texts(str(tmp_path / "*.txt")) == ["one", "two", "three"]


def test_byte_order_mark_and_carriage_returns(write):
    path = write("a.txt", b"\xef\xbb\xbfone\r\ntwo\r\n\r\nthree\r\n")
    assert texts(path) == ["one\ntwo", "three"]
    assert texts(path, "documents=line") == ["one", "two", "three"]


def test_only_newlines_end_lines(write):
    assert texts(write("a.txt", "a\x0bb\x0cc\x1cd\x85e\u2028f"), "documents=line") == ["a\x0bb\x0cc\x1cd\x85e\u2028f"]


@settings(deadline=None, max_examples=30)
@given(st.text("a \n\r"), st.integers(1, 5))
def test_lines_end_as_on_any_system(tmp_path_factory, text, chunk):
    r"""With \n, \r\n or a lone \r, wherever a piece of the file ends; as Python's own universal newlines."""
    path = tmp_path_factory.mktemp("lines") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHUNK_BYTES", chunk)
        lines = [text for _, text in files._lines(files.File.at(str(path)), lambda size: None)]
        expected = io.StringIO(text, newline="").readlines()
        assert [line.decode() for line in lines] == expected
        normal = io.StringIO(text, newline=None).read()
        for option, end in [("line", "\n"), ("blank-line", r"\n *\n"), ("file", r"\Z")]:
            documents = [document.strip("\n") for document in re.split(end, normal) if document.strip()]
            corpus = Corpus((f"{path},documents={option}",))
            found = [document.text for document in corpus.documents()] if documents else []
            assert [document.strip() for document in found] == [document.strip() for document in documents]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_json_lines(write, suffix):
    lines = [
        json.dumps({"id": 1, "text": "one\r\ntwo\n\nthree"}),
        "",
        json.dumps({"text": "é\u2028"}, ensure_ascii=False),
    ]
    path = write(f"a.jsonl{suffix}", COMPRESS[suffix]("\n".join(lines).encode()))
    assert texts(path) == ["one\ntwo\n\nthree", "é\u2028"]


def test_many_frames_and_chunks(write, monkeypatch):
    monkeypatch.setattr(files, "CHUNK_BYTES", 7)
    content = b"".join(b"line %d\n\n" % number for number in range(50))
    expected = [f"line {number}" for number in range(50)]
    for suffix, compress in COMPRESS.items():
        assert texts(write("a.txt" + suffix, compress(content[:100]) + compress(content[100:]))) == expected


def test_options_belong_to_the_sources_before_them(write):
    one, two, three, four = (write(name, "a\nb\n\nc") for name in ("1", "2", "3", "4"))
    found = Corpus((one, f"{two},sentences=line", "documents=file", three, four, "documents=line")).documents()
    assert [(document.text, document.sentences) for document in found] == [
        *[("a\nb", "library"), ("c", "library")],  # blank-line: the options of the second file are not for the first
        ("a\nb\n\nc", "line"),
        *[("a", "library"), ("b", "library"), ("c", "library")] * 2,  # as if the shell had expanded a glob
    ]


def test_names_with_odd_characters(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write("a, b [1].txt", "one")
    assert texts("~/a, b [1].txt") == texts("~/a*.txt") == ["one"]
    write("a=b.txt", "two")
    monkeypatch.chdir(tmp_path)
    assert texts("./a=b.txt") == ["two"]


def test_documents_are_streamed(write, monkeypatch):
    """Of a corpus whose end is damaged the first documents come out before the complaint."""
    monkeypatch.setattr(files, "CHUNK_BYTES", 1000)
    content = lzma.compress("".join(f"{random.Random(number).random()}\n\n" for number in range(2000)).encode())
    documents = Corpus((write("a.xz", content[:-100]),)).documents()
    assert next(documents).text == str(random.Random(0).random())
    with pytest.raises(InputError, match="damaged"):
        list(documents)


def test_python_docs():
    documents = [document.text for document in Corpus(("python-docs",)).documents()]
    assert len(documents) > 400
    assert sum(len(text.encode()) for text in documents) > 1_500_000
    assert documents == texts("python-docs")
    assert not any("site-packages" in path or "/test/" in path for path in python_docs.files())
    module = next(text for text in documents if text.startswith("Command-line parsing library"))
    # A wrapped paragraph is one line; a class's docstring follows the module's.
    assert "\nThe following is a simple usage example that sums integers from the command-line" in module
    assert module.index("Object for parsing command line strings into Python objects.") > 1000
    assert "\n\n" not in module


def test_fields_of_json_lines(write):
    path = write("a.jsonl", json.dumps({"text": 1, "body": "one"}) + "\n" + json.dumps({"body": "two\rthree"}))
    assert texts(path, "field=body") == ["one", "two\nthree"]
    assert complaint(path) == f"{path}:1 is not a JSON object with a string `text`: correct the line"


def test_lone_surrogates_in_json(write):
    path = write("a.jsonl", '{"text": "a\\ud800b \\ud83d\\ude00"}')
    assert [document.text for document in Corpus((path,), errors="replace").documents()] == ["a\ufffdb \U0001f600"]


# ---- Parquet ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def parquet(tmp_path):
    """Writes a Parquet file with two rows in each row group."""
    pytest.importorskip("pyarrow")
    from pyarrow import table
    from pyarrow.parquet import write_table

    def parquet(columns: dict) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.parquet"
        write_table(table(columns), path, row_group_size=2)
        return str(path)

    return parquet


def test_parquet(parquet, write):
    rows = ["one\r\ntwo\n\nthree", " ", "é\u2028", "four", "five"]
    path = parquet({"id": range(5), "text": rows, "body": ["b"] * 5})
    expected = ["one\ntwo\n\nthree", "é\u2028", "four", "five"]
    lines = write("a.jsonl", "\n".join(json.dumps({"text": row}) for row in rows))
    assert texts(path) == texts(lines) == expected
    assert texts(path, "field=body") == ["b"] * 5
    assert Corpus((path,)).fingerprint != Corpus((path, "field=body")).fingerprint


def test_parquet_complaints(parquet, write, monkeypatch):
    import pyarrow

    path = parquet({"id": [1, 2], "text": ["a", None]})
    assert complaint(path) == f"{path}: row 2 has no `text`: fill it or leave the row out"
    assert complaint(path, "field=body") == f"{path} has no column `body`, only id, text"
    assert complaint(path, "field=id") == f"{path}: the column `id` holds int64, not text"
    data = pyarrow.array([b"a", b"b", b"c\xff"], pyarrow.binary())
    path = parquet({"text": data})
    message = (
        f"{path}, row 3, is not UTF-8 at byte 1: convert the file, or read such bytes as U+FFFD with --errors replace"
    )
    for column in (data, data.view(pyarrow.string())):  # The second says that it is text, and is not.
        path = parquet({"text": column})
        assert complaint(path) == f"{path}{message[message.index(', row') :]}"
        assert [document.text for document in Corpus((path,), errors="replace").documents()] == ["a", "b", "c\ufffd"]
    whole = Path(path).read_bytes()
    for content in (b"", b"PAR1 is how it begins", whole[:-9]):
        damaged = write("damaged.parquet", content)
        message = complaint(damaged)
        assert message.startswith(f"{damaged} is damaged (") and message.endswith("): copy or download it again")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert complaint(path) == f'{path} needs pyarrow: pip install "prelm_jax[parquet]"'


# ---- Files that change -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["grows", "is touched", "is replaced"])
@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_file_that_changes_is_refused(write, monkeypatch, suffix, change):
    """Between the look at the corpus and its end; what was read before is no part of it."""
    monkeypatch.setattr(files, "CHUNK_BYTES", 100)
    content = COMPRESS[suffix]("".join(f"{random.Random(number).random()}\n\n" for number in range(500)).encode())
    path = write(f"a.txt{suffix}", content)
    documents = Corpus((path,)).documents()
    next(documents)
    if change == "grows":
        with open(path, "ab") as file:
            file.write(content)
    elif change == "is touched":
        os.utime(path, ns=(1, 1))
    else:
        os.replace(write("other", bytes(len(content))), path)
    with pytest.raises(InputError) as error:
        list(documents)
    assert str(error.value) == f"{path} was changed while it was in use: run again when it is complete"


def test_a_file_that_changes_after_its_fingerprint_is_refused(write):
    path = write("a.txt", "one")
    corpus = Corpus((path,))
    corpus.fingerprint  # noqa: B018
    write("a.txt", "two and more")
    with pytest.raises(InputError, match="was changed while it was in use"):
        list(corpus.documents())
    assert texts(path) == ["two and more"]


# ---- Weights and duplicates ------------------------------------------------------------------------------------------


def test_passes_of_a_source(write):
    one, other = write("1", "a\n\nb"), write("2", "c\n\nd")
    assert texts(one, "weight=3", other, "weight=1.0") == ["a", "b"] * 3 + ["c", "d"]


def test_weights_are_of_the_training_side(write):
    lines = [f"document {number}" for number in range(1000)]
    path = write("a.txt", "\n".join(lines))

    def side(name, weight):
        return texts(path, "documents=line", f"weight={weight}", side=name, held_out=0.3)

    training, held_out = side("training", 1), side("held_out", 1)
    for weight in (0.25, 1.25, 2.25):
        passes, found = int(weight), side("training", weight)
        assert side("held_out", weight) == held_out
        assert found[: passes * len(training)] == training * passes
        part = found[passes * len(training) :]
        assert 0.2 < len(part) / len(training) < 0.3
        assert part == [text for text in training if text in set(part)], "in the same order"
        assert part == side("training", 0.25), "those of the lowest hashes"
    assert set(side("training", 0.25)) < set(side("training", 0.5)) < set(training)


TEXTS = st.lists(st.sampled_from(["a", "b", "c", "d", "e\n\nf"]), max_size=6)


@settings(deadline=None, max_examples=30)
@given(one=TEXTS, other=TEXTS, weight=st.sampled_from([1, 2]), part_bytes=st.sampled_from([1, 30, 1 << 20]))
def test_of_duplicates_the_first_is_read(tmp_path_factory, one, other, weight, part_bytes):
    directory = tmp_path_factory.mktemp("duplicates")
    for name, documents in {"1": one, "2": [*other, "a"], "3": ["b"]}.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    sources = (f"{directory}/[12].jsonl,weight={weight}", f"{directory}/[23].jsonl")
    first = list(dict.fromkeys([*one, *other, "a"]))
    rest = [] if "b" in first else ["b"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prelm_jax.corpus.sources.PART_BYTES", part_bytes)
        patch.setattr(corpus_module, "PART_BYTES", part_bytes)
        corpus = Corpus(sources, deduplicate=True)
        assert [document.text for document in corpus.documents()] == first * weight + rest
    assert corpus.duplicates == len([*one, *other, "a", *other, "a", "b"]) - len(first + rest)
    assert corpus.fingerprint != Corpus(sources).fingerprint


def test_duplicates_are_looked_for_once(write, monkeypatch):
    path = write("a.txt", "one\n\ntwo\n\none")
    assert [document.text for document in Corpus((path,), deduplicate=True).documents()] == ["one", "two"]
    monkeypatch.setattr(corpus_module.np, "argsort", lambda *_, **__: pytest.fail("looked for again"))
    assert [document.text for document in Corpus((path,), deduplicate=True).documents()] == ["one", "two"]


# ---- Shards ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=20), part=st.integers(1, 60), shard=st.integers(1, 60))
def test_shards_are_the_documents(tmp_path_factory, sizes, part, shard):
    """In their order, each file in a part with its neighbours as long as there is room."""
    directory = tmp_path_factory.mktemp("parts")
    for number, size in enumerate(sizes):
        (directory / f"{number:02}").write_text("\n\n".join(["a" * size, "b"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prelm_jax.corpus.sources.PART_BYTES", part)
        patch.setattr(corpus_module, "SHARD_CHARACTERS", shard)
        corpus = Corpus((f"{directory}/*",))
        shards = [shard for number, part in enumerate(corpus.parts) for shard in corpus.shards(number, part)]
    assert all(
        sum(file.size for file in part.files) <= part_bytes or len(part.files) == 1
        for part_bytes, part in ((part, found) for found in corpus.parts)
    )
    assert [shard.name for shard in shards] == sorted({shard.name for shard in shards})
    assert [text for shard in shards for text in shard.texts] == [document.text for document in corpus.documents()]
    assert all(sum(map(len, found.texts[:-1])) < shard for found in shards)
    assert sum(found.bytes for found in shards) <= corpus.bytes


# ---- Complaints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ((), "the corpus has no sources: give at least one file, python-docs or tfds:name"),
        (
            ("documents=file",),
            "the option documents=file stands before any source: write a source first, then its options",
        ),
        (
            ("a.txt,document=file",),
            "no option is called document: the options are documents, sentences, cleaning, field, weight",
        ),
        (("a.txt", "documents=page"), "documents=page: documents is one of blank-line, file, line, not page"),
        (("a.txt,sentences=",), "a.txt,sentences=: sentences is one of library, line, not nothing"),
        (
            ("python-docs,documents=line",),
            "python-docs is made of documents already: documents= is for files of plain text",
        ),
        (("a.jsonl.gz,documents=line",), "a.jsonl.gz is made of documents already"),
        (("tfds:a,documents=line",), "tfds:a is made of documents already"),
        (("a.parquet,documents=line",), "a.parquet is made of documents already"),
        (("a.txt,field=body",), "a.txt has no fields: field= is for .jsonl, .parquet and tfds:"),
        (("a.jsonl,field=",), "a.jsonl,field=: field is the name of a field, not nothing"),
        (("a.parquet.gz",), "a.parquet.gz: Parquet is compressed inside: unpack the file"),
        *(
            (
                (f"a.txt,weight={weight}",),
                f"a.txt,weight={weight}: weight is a number above 0, not {weight or 'nothing'}",
            )
            for weight in ("0", "-1", "nan", "inf", "two", "")
        ),
    ],
)
def test_a_wrong_spec_is_refused_at_once(sources, message):
    with pytest.raises(InputError) as error:
        Corpus(sources)
    assert message in str(error.value)


@pytest.mark.parametrize("held_out", [-0.1, 1.5, float("nan")])
def test_held_out_is_a_fraction(held_out):
    with pytest.raises(InputError, match="held_out is a fraction of the documents, from 0 to 1, not"):
        Corpus(("python-docs",), held_out)


def test_missing_files(tmp_path):
    assert complaint(f"{tmp_path}/no.txt").startswith(f"there is no file {tmp_path}/no.txt: give a path")
    assert complaint(f"{tmp_path}/*.txt") == f"no file matches {tmp_path}/*.txt"
    assert complaint(str(tmp_path)) == f"{tmp_path} is a directory: give its files, for example {tmp_path}/*.txt"


def test_a_file_that_may_not_be_read(write, monkeypatch):
    path = write("a.txt", "one")

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    assert complaint(path) == f"cannot read {path}: Permission denied"


@pytest.mark.parametrize("content", ["", "\n \n\r\n"])
@pytest.mark.parametrize("side", [None, "training", "held_out"])
def test_an_empty_corpus(write, content, side):
    path = write("a.txt", content)
    assert complaint(path, side=side) == f"the corpus {path} holds no text: give files with text in them"


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("option", ["", ",documents=line", ",documents=file"])
def test_invalid_utf8_names_the_byte(write, suffix, option):
    content = b"\xef\xbb\xbfone\r\n\r\ntwo\nthr\xffee"
    path = write(f"a.txt{suffix}", COMPRESS[suffix](content))
    remedy = "convert the file, or read such bytes as U+FFFD with --errors replace"
    assert complaint(path + option) == f"{path} is not UTF-8 at byte {content.index(0xFF)}: {remedy}"
    corpus = Corpus((path + option,), errors="replace")
    assert "\n".join(document.text for document in corpus.documents()).endswith("two\nthr\ufffdee")
    assert corpus.fingerprint != Corpus((path + option,)).fingerprint


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "flip", "nonsense"])
def test_a_damaged_file(write, suffix, damage):
    content = COMPRESS[suffix](random.Random(0).randbytes(3000).hex().encode())
    middle = len(content) // 2
    damaged = {
        "cut": content[:middle],
        "flip": content[:6] + bytes(16) + content[22:],
        "nonsense": b"This is plain text.",
    }[damage]
    path = write(f"a.txt{suffix}", damaged)
    message = complaint(path)
    assert message.startswith(f"{path} is damaged (")
    assert message.endswith("): copy or download it again")


@pytest.mark.parametrize(
    "line", ["[1]", '"text"', "{}", '{"text": 1}', '{"text": null}', "{", '{"text": "\\ud800"}', "[" * 100_000, "null"]
)
def test_a_wrong_json_line_is_named(write, line):
    path = write("a.jsonl", '{"text": "one"}\n\n' + line)
    assert complaint(path) == f"{path}:3 is not a JSON object with a string `text`: correct the line"


# ---- Held out --------------------------------------------------------------------------------------------------------


def test_the_side_depends_on_the_text_alone(write):
    lines = [f"document {number}" for number in range(500)]
    shuffled = random.Random(1).sample(lines, len(lines))
    one = write("one.txt", "\n".join(lines))
    other = write("other.txt", "\n".join(shuffled[:200]))
    another = write("another.jsonl", "\n".join(json.dumps({"text": text}) for text in shuffled[200:]))
    held_out = texts(one, "documents=line", side="held_out", held_out=0.3)
    assert sorted(held_out) == sorted(texts(f"{other},documents=line", another, side="held_out", held_out=0.3))
    assert 100 < len(held_out) < 200
    training = texts(one, "documents=line", side="training", held_out=0.3)
    assert sorted(training + held_out) == sorted(lines)
    # More held out: the same documents, and others.
    assert set(held_out) < set(texts(one, "documents=line", side="held_out", held_out=0.6))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=5))
def test_all_or_nothing(tmp_path_factory, documents):
    path = tmp_path_factory.mktemp("json") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*documents, "never empty"]))
    everything = texts(str(path))
    assert texts(str(path), side="held_out", held_out=1.0) == texts(str(path), side="training") == everything
    assert texts(str(path), side="held_out") == texts(str(path), side="training", held_out=1.0) == []


# ---- Fingerprints ----------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_content_options_and_fraction(write):
    one, same, other = write("a.txt", "one"), write("b.txt", "one"), write("c.txt", "two")
    assert Corpus((one,)).fingerprint == Corpus((same,)).fingerprint == Corpus((one,)).fingerprint
    different = [
        (one,),
        (other,),
        (one, one),
        (one, other),
        (other, one),
        (one, "sentences=line"),
        (one, "documents=file"),
    ]
    fingerprints = [Corpus(sources).fingerprint for sources in different] + [Corpus((one,), 0.1).fingerprint]
    assert len(set(fingerprints)) == len(fingerprints)
    assert all(len(fingerprint) == 64 for fingerprint in fingerprints)


def test_content_is_hashed_once(write, monkeypatch):
    path = write("a.txt", "one")
    first = Corpus((path,)).fingerprint
    with monkeypatch.context() as patch:
        patch.setattr(corpus_module, "_content_digest", lambda file: pytest.fail("read again"))
        assert Corpus((path,)).fingerprint == first
    write("a.txt", "two")
    os.utime(path, ns=(1, 1))
    assert Corpus((path,)).fingerprint != first


# ---- TensorFlow Datasets ---------------------------------------------------------------------------------------------


@pytest.fixture
def tfds_directory(tmp_path, monkeypatch):
    library = pytest.importorskip("tensorflow_datasets")
    monkeypatch.setattr(library.core.constants, "DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "tfds"


def test_tfds_round_trip(write, tfds_directory, monkeypatch):
    source = write("a.txt", "one\ntwo\r\n\r\nthré\n\nfour\n\nfive\n\nsix")
    tfds.builder(Corpus((source,), 0.5), "my_text", tfds_directory).download_and_prepare()
    assert "tensorflow" not in sys.modules
    for side in (None, "training", "held_out"):
        assert texts("tfds:my_text", side=side, held_out=0.5) == texts(source, side=side, held_out=0.5)
    assert texts("tfds:my_text:1.0.0:train[:2]") == ["one\ntwo", "thré"]
    whole, part = Corpus(("tfds:my_text",)), Corpus(("tfds:my_text:train[:2]",))
    assert whole.fingerprint != part.fingerprint
    monkeypatch.setattr("prelm_jax.corpus.sources.PART_BYTES", 30_000)  # The format pads its files to 64 kB.
    assert 1 < len(Corpus(("tfds:my_text",)).parts) < 10
    assert texts("tfds:my_text") == texts(source)
    assert next(Corpus(("tfds:my_text", "sentences=line")).documents()).sentences == "line"


def test_tfds_complaints(write, tfds_directory):
    tfds.builder(Corpus((write("a.txt", "one"),)), "my_text", tfds_directory).download_and_prepare()
    assert complaint("tfds:no_such/set").startswith("tfds:no_such/set: Dataset no_such not found. (looked in ")
    assert "Unknown split 'no'. Should be one of ['train']." in complaint("tfds:my_text:no")
    features = tfds_directory / "my_text/1.0.0/features.json"
    features.write_text(
        features.read_text().replace('"text": {\n                "python', '"words": {\n                "python')
    )
    assert complaint("tfds:my_text") == "tfds:my_text has no feature `text`, only words"


def test_tfds_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    assert complaint("tfds:my_text") == 'tfds: needs TensorFlow Datasets: pip install "prelm_jax[tfds]"'


# ---- Progress --------------------------------------------------------------------------------------------------------


def test_progress_is_a_calm_line_without_a_terminal(write, capsys):
    path = write("a.txt", "one\n\n" * 100_000)
    assert len(list(Corpus((path,)).documents(task="reading"))) == 100_000
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("reading: 0.5 of 0.5 MB read, ")
    assert captured.err.count("\n") == 1


def test_progress_is_a_bar_on_a_terminal(write, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    path = write("a.txt.gz", gzip.compress(b"one"))
    assert texts(path) == [document.text for document in Corpus((path,)).documents(task="reading")]
    assert "reading" in (bar := capsys.readouterr().err)
    assert "100%" in bar
