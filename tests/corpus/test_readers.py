"""Files to documents: every format, compression and damage."""

import bz2
import gzip
import io
import json
import lzma
import os
import random
import re
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from prelm_jax.corpus import readers
from prelm_jax.corpus.documents import Corpus
from prelm_jax.errors import InputError

COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


# ---- Plain text ------------------------------------------------------------------------------------------------------


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
def test_documents_of_a_text_file(write, texts, suffix, option, expected):
    path = write(f"a.txt{suffix}", COMPRESS[suffix](b"\n\none\ntwo\n\n \n\nthree\n\nfour"))
    assert texts(path + option) == expected


def test_the_end_of_a_file_ends_a_document(write, texts, tmp_path):
    write("b.txt", "three\n")
    write("a.txt", "one\n\ntwo")
    assert texts(str(tmp_path / "*.txt")) == ["one", "two", "three"]


def test_byte_order_mark_and_carriage_returns(write, texts):
    path = write("a.txt", b"\xef\xbb\xbfone\r\ntwo\r\n\r\nthree\r\n")
    assert texts(path) == ["one\ntwo", "three"]
    assert texts(f"{path},documents=line") == ["one", "two", "three"]


def test_other_separators_do_not_end_lines(write, texts):
    text = "a\x0bb\x0cc\x1cd\x85e\u2028f"
    assert texts(write("a.txt", text) + ",documents=line") == [text]


@settings(deadline=None, max_examples=30)
@given(st.text("a \n\r"), st.integers(1, 5))
def test_lines_match_universal_newlines(tmp_path_factory, text, chunk):
    r"""Python's own reading of \n, \r\n and a lone \r, wherever a chunk of the file ends."""
    path = tmp_path_factory.mktemp("lines") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "CHUNK_BYTES", chunk)
        lines = [text for _, text in readers.lines(readers.File.at(str(path)), lambda size: None)]
        expected = io.StringIO(text, newline="").readlines()
        assert [line.decode() for line in lines] == expected
        normal = io.StringIO(text, newline=None).read()
        for option, end in [("line", "\n"), ("blank-line", r"\n *\n"), ("file", r"\Z")]:
            documents = [document.strip("\n") for document in re.split(end, normal) if document.strip()]
            corpus = Corpus((f"{path},documents={option}",))
            found = [document.text for document in corpus.documents()] if documents else []
            assert [document.strip() for document in found] == [document.strip() for document in documents]


def test_many_frames_and_chunks(write, texts, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 7)
    content = b"".join(b"line %d\n\n" % number for number in range(50))
    expected = [f"line {number}" for number in range(50)]
    for suffix, compress in COMPRESS.items():
        assert texts(write("a.txt" + suffix, compress(content[:100]) + compress(content[100:]))) == expected


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("option", ["", ",documents=line", ",documents=file"])
def test_invalid_utf8_is_named_or_replaced(write, error_of, suffix, option):
    content = b"\xef\xbb\xbfone\r\n\r\ntwo\nthr\xffee"
    path = write(f"a.txt{suffix}", COMPRESS[suffix](content))
    message = error_of(path + option)
    assert message.startswith(f"{path} ") and "--errors replace" in message
    assert f" byte {content.index(0xFF)}:" in message
    corpus = Corpus((path + option,), errors="replace")
    assert "\n".join(document.text for document in corpus.documents()).endswith("two\nthr\ufffdee")
    assert corpus.fingerprint != Corpus((path + option,)).fingerprint


# ---- JSON lines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", COMPRESS)
def test_json_lines(write, texts, suffix):
    lines = [
        json.dumps({"id": 1, "text": "one\r\ntwo\n\nthree"}),
        "",
        json.dumps({"text": "é\u2028"}, ensure_ascii=False),
    ]
    path = write(f"a.jsonl{suffix}", COMPRESS[suffix]("\n".join(lines).encode()))
    assert texts(path) == ["one\ntwo\n\nthree", "é\u2028"]


@pytest.mark.parametrize(
    "name",
    ["a.json", "a.json.gz", "a.ndjson", "a.jsonlines.xz", "a.jl.bz2", "A.JSONL.GZ", "c4.00001-of-00002.json.zst"],
)
def test_names_of_json_lines(write, texts, name):
    compress = COMPRESS.get(os.path.splitext(name)[1].lower(), bytes)
    path = write(name, compress(b'{"url": "u", "text": "one\\n\\ntwo"}\n{"text": "three"}\n'))
    assert texts(path) == texts(f"{path},field=text") == ["one\n\ntwo", "three"]
    same = write("a.jsonl", b'{"text": "one"}')
    assert Corpus((same,)).fingerprint == Corpus((write("b.json", b'{"text": "one"}'),)).fingerprint


@pytest.mark.parametrize(
    "content", ['[{"text": "one"}]', '[\n{"text": "one"}\n]', '{\n  "text": "one"\n}', '{"data": [\n']
)
def test_one_json_value_is_not_json_lines(write, error_of, content):
    path = write("a.json", content)
    message = error_of(path)
    assert message.startswith(f"{path}:1 ") and "JSON lines" in message


def test_fields_of_json_lines(write, texts, error_of):
    path = write("a.jsonl", json.dumps({"text": 1, "body": "one"}) + "\n" + json.dumps({"body": "two\rthree"}))
    assert texts(f"{path},field=body") == ["one", "two\nthree"]
    assert f"{path}:1 " in error_of(path) and "`text`" in error_of(path)


def test_lone_surrogates_in_json_are_replaced(write, texts):
    path = write("a.jsonl", '{"text": "a\\ud800b \\ud83d\\ude00"}')
    assert texts(path, errors="replace") == ["a\ufffdb \U0001f600"]


@pytest.mark.parametrize(
    "line", ["[1]", '"text"', "{}", '{"text": 1}', '{"text": null}', "{", '{"text": "\\ud800"}', "[" * 100_000, "null"]
)
def test_a_wrong_json_line_is_named(write, error_of, line):
    path = write("a.jsonl", '{"text": "one"}\n\n' + line)
    assert error_of(path).startswith(f"{path}:3 ") and "`text`" in error_of(path)


# ---- Parquet ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def parquet(tmp_path):
    """Writes a Parquet file with two rows in each row group: `parquet(columns)`."""
    from pyarrow import table
    from pyarrow.parquet import write_table

    def parquet(columns: dict) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.parquet"
        write_table(table(columns), path, row_group_size=2)
        return str(path)

    return parquet


def test_parquet(parquet, write, texts):
    rows = ["one\r\ntwo\n\nthree", " ", "é\u2028", "four", "five"]
    path = parquet({"id": range(5), "text": rows, "body": ["b"] * 5})
    expected = ["one\ntwo\n\nthree", "é\u2028", "four", "five"]
    lines = write("a.jsonl", "\n".join(json.dumps({"text": row}) for row in rows))
    assert texts(path) == texts(lines) == expected
    assert texts(f"{path},field=body") == ["b"] * 5
    assert Corpus((path,)).fingerprint != Corpus((f"{path},field=body",)).fingerprint


def test_parquet_errors_name_row_and_column(parquet, error_of):
    path = parquet({"id": [1, 2], "text": ["a", None]})
    assert error_of(path).startswith(f"{path}: row 2 ") and "`text`" in error_of(path)
    message = error_of(f"{path},field=body")
    assert message.startswith(f"{path} ") and "`body`" in message and "id, text" in message
    message = error_of(f"{path},field=id")
    assert message.startswith(f"{path}: ") and "`id`" in message and "int64" in message


def test_invalid_utf8_in_parquet(parquet, texts, error_of):
    import pyarrow

    data = pyarrow.array([b"a", b"b", b"c\xff"], pyarrow.binary())
    for column in (data, data.view(pyarrow.string())):  # The second claims to be text.
        path = parquet({"text": column})
        message = error_of(path)
        assert message.startswith(f"{path}, row 3,") and "byte 1:" in message and "--errors replace" in message
        assert texts(path, errors="replace") == ["a", "b", "c\ufffd"]


def test_damaged_parquet(parquet, write, error_of):
    whole = Path(parquet({"text": ["a", "b"]})).read_bytes()
    for content in (b"", b"PAR1 is how it begins", whole[:-9]):
        path = write("damaged.parquet", content)
        assert error_of(path).startswith(f"{path} is damaged (")


# ---- Other formats ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a.csv", "A.TSV", "a.csv.gz", "wiki.xml.bz2", "a.html", "a.tar.xz", "a.tgz", "a.zip", "a.pdf"]
)
def test_names_of_other_formats_are_refused(write, error_of, name, tmp_path):
    path = write(name, "some text")
    write("b.txt", "one")
    for source in (path, f"{tmp_path}/*"):
        message = error_of(source, errors="replace")
        assert message.startswith(f"{path}: .") and ".txt" in message


def archive(kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as zipped:
            zipped.writestr("a.txt", "text " * 100)
    else:
        with tarfile.open(fileobj=file, mode="w") as tar:
            tar.add(__file__)
    return file.getvalue()


TEXT = b"Some text, of some length. " * 40
NOT_TEXT = {
    "gzip": gzip.compress(TEXT),
    "bzip2": bz2.compress(TEXT),
    "xz": lzma.compress(TEXT),
    "zst": zstandard.ZstdCompressor().compress(TEXT),
    "zip": archive("zip"),
    "tar": archive("tar"),
    "Parquet": b"PAR1\x15\x04PAR1",
    "PDF": b"%PDF-1.5\n1 0 obj\n",
    "RTF": b"{\\rtf1 text}",
    "UTF-16": TEXT.decode().encode("utf-16"),
    "UTF-16 without its mark": TEXT.decode().encode("utf-16-be"),
    "Chinese UTF-16": ("中文" * 100).encode("utf-16"),
    "Chinese UTF-16 without its mark": ("中文" * 100).encode("utf-16-le"),
    "UTF-32": TEXT.decode().encode("utf-32"),
    "Cyrillic": ("текст на русском " * 40).encode("cp1251"),
    "random bytes": bytes(random.Random(0).choices(range(1, 256), k=5000)),
    "a NUL": b"one\n\ntwo\0three",
}


@pytest.mark.parametrize("content", NOT_TEXT)
@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_content_that_is_not_text_is_refused(write, error_of, content, suffix, kind):
    """Also with --errors replace, which is not offered."""
    path = write(f"a{kind}{suffix}", COMPRESS[suffix](NOT_TEXT[content]))
    for errors in ("strict", "replace"):
        message = error_of(path, errors=errors)
        assert message.startswith(f"{path} ") and "--errors" not in message
        if content == "a NUL":
            assert " byte 8" in message


def test_a_nul_is_found_behind_the_first_chunk(write, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 100)
    documents = Corpus((write("a.txt", b"text\n\n" * 100 + b"\0"),)).documents()
    assert next(documents).text == "text"
    with pytest.raises(InputError, match=" NUL at byte 600,"):
        list(documents)


@pytest.mark.parametrize("text", ["BZh91", "PK", "Rar", "{", "é", "\ufffd", "ÿþ", "%!", "7z and more"])
def test_text_that_begins_strangely_is_text(write, texts, text):
    assert texts(write("a.txt", text)) == [text]


# ---- Damage and changes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "flip", "nonsense", "zeros", "empty"])
def test_a_damaged_file_is_named(write, error_of, suffix, damage):
    content = COMPRESS[suffix](random.Random(0).randbytes(3000).hex().encode())
    middle = len(content) // 2
    damaged = {
        "cut": content[:middle],
        "flip": content[:6] + bytes(16) + content[22:],
        "nonsense": b"This is plain text.",
        "zeros": bytes(len(content)),
        "empty": b"",
    }[damage]
    path = write(f"a.txt{suffix}", damaged)
    assert error_of(path).startswith(f"{path} is damaged (")


def mutations(content: bytes) -> st.SearchStrategy[bytes]:
    """The content cut, with a flipped bit, with more behind it, or with some bytes overwritten."""
    positions, more = st.integers(0, len(content) - 1), st.binary(min_size=1, max_size=20)

    def flipped(bit: int) -> bytes:
        return bytes(byte ^ ((i == bit // 8) << bit % 8) for i, byte in enumerate(content))

    return st.one_of(
        positions.map(lambda end: content[:end]),
        st.integers(0, 8 * len(content) - 1).map(flipped),
        more.map(lambda extra: content + extra),
        st.tuples(positions, more).map(
            lambda change: (
                content[: change[0]] + change[1] + content[sum(map(len, [content[: change[0]], change[1]])) :]
            )
        ),
    )


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_no_damage_goes_unnoticed(tmp_path_factory, suffix, data):
    """A file of two streams is refused, or nothing that was damaged in it is text or changes the text."""
    lines = [b"line %d, %s\n\n" % (number, random.Random(number).randbytes(5).hex().encode()) for number in range(40)]
    content = COMPRESS[suffix](b"".join(lines[:20])) + COMPRESS[suffix](b"".join(lines[20:]))
    path = tmp_path_factory.mktemp("damaged") / f"a.txt{suffix}"
    path.write_bytes(data.draw(mutations(content)))
    try:
        found = [document.text for document in Corpus((str(path),)).documents()]
    except InputError as error:
        assert str(error).startswith((f"{path} is damaged (", f"{path} is not ")) and "\n" not in str(error)
    else:
        assert found == [line.decode().strip() for line in lines] or found == [
            line.decode().strip() for line in lines[:20]
        ]


def test_padding_between_and_after_streams(write, texts, error_of):
    one, two = lzma.compress(b"one\n\n"), lzma.compress(b"two")
    for padding in (b"", bytes(4), bytes(512)):
        assert texts(write("a.xz", one + padding + two + padding)) == ["one", "two"]
    for content in (
        one + bytes(3) + two,
        one + two + bytes(5),
        bytes(4) + one,
        one + bytes(4) + two[:-1],
        one + b"garbage",
    ):
        path = write("a.xz", content)
        assert error_of(path).startswith(f"{path} is damaged (")
    skippable = struct.pack("<II", 0x184D2A53, 3) + b"abc"
    parts = [COMPRESS[".zst"](b"one\n\n"), COMPRESS[".zst"](b"two")]
    assert texts(write("a.zst", skippable.join([b"", *parts, b""]))) == ["one", "two"]


def test_a_highly_compressed_file_is_read_in_chunks(write, monkeypatch):
    """Megabytes of one letter take a few bytes: never are they all in memory."""
    monkeypatch.setattr(readers, "CHUNK_BYTES", 1000)
    for suffix in (".gz", ".bz2", ".xz"):
        file = readers.File.at(write(f"a{suffix}", COMPRESS[suffix](b"a" * 100_000)))
        chunks = list(readers._chunks(file, lambda size: None))
        assert b"".join(chunks) == b"a" * 100_000 and max(map(len, chunks)) <= 1000


def test_documents_are_streamed(write, monkeypatch):
    """The first documents of a corpus come before the error about its damaged end."""
    monkeypatch.setattr(readers, "CHUNK_BYTES", 1000)
    content = lzma.compress("".join(f"{random.Random(number).random()}\n\n" for number in range(2000)).encode())
    documents = Corpus((write("a.xz", content[:-100]),)).documents()
    assert next(documents).text == str(random.Random(0).random())
    with pytest.raises(InputError, match="damaged"):
        list(documents)


@pytest.mark.parametrize("change", ["grows", "is touched", "is replaced"])
@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_file_that_changes_while_it_is_read_is_refused(write, monkeypatch, suffix, change):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 100)
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
    with pytest.raises(InputError, match=f"^{re.escape(path)} was changed"):
        list(documents)


def test_a_file_that_changes_after_its_fingerprint_is_refused(write, texts):
    path = write("a.txt", "one")
    corpus = Corpus((path,))
    corpus.fingerprint  # noqa: B018
    write("a.txt", "two and more")
    with pytest.raises(InputError, match=f"^{re.escape(path)} was changed"):
        list(corpus.documents())
    assert texts(path) == ["two and more"]


def test_a_file_without_permission_is_named(write, error_of, monkeypatch):
    path = write("a.txt", "one")

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("io.open", refuse)
    assert error_of(path) == f"cannot read {path}: Permission denied"


@pytest.mark.parametrize("when", ["listed", "read"])
def test_a_file_that_vanishes_is_named(write, when):
    path = write("a.txt", "one\n\ntwo")
    corpus = Corpus((path,))
    if when == "listed":
        corpus.parts  # noqa: B018
    else:
        documents = corpus.documents()
        next(documents)
    os.unlink(path)
    with pytest.raises(InputError, match=f"^cannot read {re.escape(path)}: No such file"):
        list(corpus.documents() if when == "listed" else documents)
