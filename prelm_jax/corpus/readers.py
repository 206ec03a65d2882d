r"""Files to documents: plain text, JSON lines and Parquet; text may be compressed (.gz, .bz2, .xz, .zst).

The name of a file says how it is read. Names that promise another format are refused, and so is content that is not
text. Files are streamed, one document in memory at a time. Lines end at \n, \r\n or \r (a file may come from any
system) and at \n in the documents. Errors name the file and the byte, line or row.
"""

import bz2
import codecs
import contextlib
import gzip
import json
import lzma
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Literal, NamedTuple

import zstandard

from prelm_jax.errors import InputError, first_line
from prelm_jax.progress import Advance
from prelm_jax.storage import decode_utf8, opened

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

Errors = Literal["strict", "replace"]  # Bytes that are not UTF-8: an error, or U+FFFD.

CHUNK_BYTES = 1 << 20

# ---- Formats by name -------------------------------------------------------------------------------------------------

JSON_LINES, PARQUET = ".jsonl", ".parquet"
KINDS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonlines", ".jl", ".json"), JSON_LINES),
    **dict.fromkeys((".parquet", ".pq"), PARQUET),
}
_TABLE = "write its texts as JSON lines"
_DOCUMENT = "save it as plain text"
_ARCHIVE = "unpack it"
# What to do about formats that are not read. Names that are not here are those of plain text.
FOREIGN = {
    **dict.fromkeys((".csv", ".tsv", ".xls", ".xlsx", ".ods", ".arrow", ".feather", ".orc", ".avro"), _TABLE),
    **dict.fromkeys((".tfrecord", ".tfrecords", ".db", ".sqlite", ".sqlite3", ".h5", ".hdf5"), _TABLE),
    **dict.fromkeys((".npy", ".npz", ".pkl", ".pickle", ".pt", ".bin", ".safetensors", ".msgpack"), _TABLE),
    **dict.fromkeys((".html", ".htm", ".xhtml", ".xml", ".pdf", ".ps", ".rtf", ".epub", ".djvu"), _DOCUMENT),
    **dict.fromkeys((".doc", ".docx", ".odt", ".ppt", ".pptx", ".odp", ".ipynb"), _DOCUMENT),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar", ".lzma", ".lz4", ".z", ".br"), _ARCHIVE),
}


def endings(path: str) -> tuple[str | None, str | None]:
    """How the name of a file says that it is read: the kind (None: plain text) and the compression.

    Example: `endings("a.ndjson.gz") == (".jsonl", ".gz")`, `endings("a.parquet") == (".parquet", None)`.
    """
    return KINDS.get(extension(path)), _without_compression(path)[1]


def extension(path: str) -> str:
    """The ending of a name without that of a compression: `extension("a.CSV.gz") == ".csv"`."""
    return os.path.splitext(_without_compression(path)[0])[1].lower()


def check_name(path: str) -> None:
    """Raises InputError for a name that promises a format that is not read."""
    if (ending := extension(path)) in FOREIGN:
        raise InputError(
            f"{path}: {ending} files are not read: {FOREIGN[ending]} (docs/corpora.md), or name it .txt if it is text"
        )


def _without_compression(path: str) -> tuple[str, str | None]:
    stem, ending = os.path.splitext(path)
    return (stem, ending.lower()) if ending.lower() in DECOMPRESSORS else (path, None)


class File(NamedTuple):
    """A file as it was when the corpus was opened.

    Times are in nanoseconds: of the last change of the content, which programs can set, and of the file's entry, which
    they cannot.
    """

    path: str
    size: int
    modified: int
    changed: int

    @classmethod
    def at(cls, path: str) -> "File":
        try:
            stat = os.stat(path)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from None
        return cls(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)

    def check(self) -> None:
        """Raises InputError if the file has changed: its content would no longer match the corpus fingerprint."""
        now = File.at(self.path)
        if (now.size, now.modified) != (self.size, self.modified):
            raise InputError(f"{self.path} was changed while it was in use: run again when it is complete")


# ---- Bytes and lines -------------------------------------------------------------------------------------------------


def _chunks(file: File, advance: Advance) -> Iterator[bytes]:
    """The decompressed content of a text file. Raises InputError for content that is not text."""
    compression = endings(file.path)[1]
    with opened(file.path) as raw:
        if compression and file.size == 0:
            raise EOFError("it is empty")
        position = offset = 0
        for chunk in filter(None, DECOMPRESSORS[compression](raw)):
            file.check()
            if offset == 0:
                _check_beginning(file.path, chunk, compression is not None)
            if (null := chunk.find(0)) >= 0:
                raise InputError(
                    f"{file.path} has a NUL at byte {offset + null}, so it is not text in UTF-8: convert it from its "
                    "format (UTF-16: iconv -f UTF-16 -t UTF-8), or delete stray NULs (tr -d '\\000')"
                )
            yield chunk
            offset += len(chunk)
            advance(raw.tell() - position)
            position = raw.tell()
        file.check()


def _read(file: IO[bytes] | gzip.GzipFile) -> Iterator[bytes]:
    return iter(lambda: file.read(CHUNK_BYTES), b"")


def _gzip_chunks(file: IO[bytes]) -> Iterator[bytes]:
    return _read(gzip.GzipFile(fileobj=file))  # Unlike Python's readers of the other formats, it checks all streams.


def _bzip2_chunks(file: IO[bytes]) -> Iterator[bytes]:
    return _streams(file, bz2.BZ2Decompressor, padding=1)


def _xz_chunks(file: IO[bytes]) -> Iterator[bytes]:
    return _streams(file, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), padding=4)


def _streams(
    file: IO[bytes], new: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor], padding: int
) -> Iterator[bytes]:
    """The content of all streams of a file, each of which may be followed by NULs, a multiple of `padding`.

    Python's own readers ignore a damaged stream after the first.
    """
    stream, nulls = new(), 0
    for chunk in _read(file):
        while chunk:
            if stream is None:
                rest = chunk.lstrip(b"\0")
                nulls, chunk = nulls + len(chunk) - len(rest), rest
                if not chunk:
                    break
                if nulls % padding:
                    raise EOFError(f"{nulls} NULs between its streams")
                stream, nulls = new(), 0
            try:
                yield stream.decompress(chunk, CHUNK_BYTES)
                while not (stream.eof or stream.needs_input):
                    yield stream.decompress(b"", CHUNK_BYTES)
            except OSError as error:  # bz2's error for damage; `opened` would take it for one of the disk.
                raise EOFError(error) from None
            chunk = stream.unused_data
            if stream.eof:
                stream = None
    if stream or nulls % padding:
        raise EOFError("it is truncated")


def _zstandard_chunks(file: IO[bytes]) -> Iterator[bytes]:
    """The frames of a .zst file. The library's own reader takes a truncated file for a complete one."""
    frame = None
    for chunk in _read(file):
        while chunk:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                content = frame.decompress(chunk)
            except zstandard.ZstdError as error:
                raise EOFError(error) from None  # `opened` does not know ZstdError: zstandard is not always installed.
            yield content
            chunk = frame.unused_data
            if frame.eof:
                frame = None
    if frame:
        raise EOFError("it is truncated")


DECOMPRESSORS: dict[str | None, Callable[[IO[bytes]], Iterator[bytes]]] = {
    None: _read,
    ".gz": _gzip_chunks,
    ".bz2": _bzip2_chunks,
    ".xz": _xz_chunks,
    ".zst": _zstandard_chunks,
}

# What begins with these bytes, and what to do about it.
_UNPACK, _UTF8 = "unpack it", "convert it: iconv -t UTF-8 -f"
SIGNATURES = {
    rb"\x1f\x8b": ("compressed", "end its name with .gz"),
    rb"BZh[1-9]1AY&SY": ("compressed", "end its name with .bz2"),
    rb"\xfd7zXZ\0": ("compressed", "end its name with .xz"),
    rb"\x28\xb5\x2f\xfd": ("compressed", "end its name with .zst"),
    rb"\x04\x22\x4d\x18": ("compressed (lz4)", _UNPACK),
    rb"PK\x03\x04": ("a zip archive or an office document", f"{_UNPACK}, or save it as plain text"),
    rb"7z\xbc\xaf|Rar!|.{257}ustar": ("an archive", _UNPACK),
    rb"PAR1": ("a Parquet file", "end its name with .parquet"),
    rb"%PDF-|%!PS|\{\\rtf|\xd0\xcf\x11\xe0": ("a formatted document", _DOCUMENT),
    rb"\xff\xfe\0\0|\0\0\xfe\xff": ("in UTF-32", f"{_UTF8} UTF-32"),
    rb"\xff\xfe|\xfe\xff": ("in UTF-16", f"{_UTF8} UTF-16"),
}


def _check_beginning(path: str, head: bytes, unpacked: bool) -> None:
    """Raises InputError for a known signature, and where a tenth of the characters are not UTF-8."""
    for signature, (what, remedy) in SIGNATURES.items():
        if re.match(signature, head, re.DOTALL):
            if unpacked and remedy.startswith("end its name"):
                remedy = _UNPACK
            raise InputError(f"{path} is {what}, not plain text: {remedy}")
    # The last character may be cut.
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(head)
    replaced = text.count("\ufffd") - head.count("\ufffd".encode())
    if replaced > max(4, len(text) / 10):  # A few bytes of a short file may be mistakes.
        raise InputError(
            f"{path} is binary, or text in another encoding: unpack it, or convert it (iconv -f ENCODING -t UTF-8)"
        )


def lines(file: File, advance: Advance) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, each with its line end and its byte offset in the decompressed file."""
    offset, parts, held = 0, [], b""
    for chunk in _chunks(file, advance):
        chunk = held + chunk
        held = b"\r" if chunk.endswith(b"\r") else b""  # The next chunk may begin with its "\n".
        for part in chunk[: len(chunk) - len(held)].splitlines(keepends=True):
            parts.append(part)
            if part.endswith((b"\n", b"\r")):
                line = b"".join(parts)
                yield offset, line
                offset += len(line)
                parts = []
    if line := b"".join([*parts, held]):
        yield offset, line


def decode(path: str, offset: int, data: bytes, errors: Errors) -> str:
    """The text of bytes found at `offset` of a file; a byte order mark at the beginning of the file is dropped."""
    if errors == "replace":
        text = data.decode("utf-8", "replace")
    else:
        text = decode_utf8(path, offset, data, "convert the file, or read such bytes as U+FFFD with --errors replace")
    return text.removeprefix("\ufeff") if offset == 0 else text


# ---- Documents -------------------------------------------------------------------------------------------------------


def as_document(text: str) -> list[str]:
    r"""The text as a document: lines end at \n, no blank lines around it. Nothing for a text of white space."""
    return [text.replace("\r\n", "\n").replace("\r", "\n").strip("\n")] if text.strip() else []


def plain_texts(file: File, documents: str, errors: Errors, advance: Advance) -> Iterator[str]:
    """The documents of a plain text file, which end at each "blank-line", at each "line", or with the "file"."""
    start, document = 0, []
    for offset, line in lines(file, advance):
        if not document:
            start = offset
        document.append(line)
        if documents == "line" or (documents == "blank-line" and not line.strip()):
            yield from as_document(decode(file.path, start, b"".join(document), errors))
            document = []
    yield from as_document(decode(file.path, start, b"".join(document), errors))


def json_texts(file: File, field: str, errors: Errors, advance: Advance) -> Iterator[str]:
    """The documents of a file of JSON objects, one a line, each with a string `field`."""
    for number, (offset, line) in enumerate(lines(file, advance), start=1):
        if not (decoded := decode(file.path, offset, line, errors)).strip():
            continue
        try:
            text = json.loads(decoded)[field]
            if errors == "replace":
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            text.encode()  # JSON can spell a lone surrogate, UTF-8 cannot.
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
            begins = decoded.strip()
            if offset == 0 and (begins[0] == "[" or (begins[0] == "{" and begins[-1] != "}")):
                raise InputError(
                    f"{file.path}:{number} begins one JSON value, instead of an object a line: write its texts as JSON "
                    "lines (docs/corpora.md)"
                ) from None
            raise InputError(
                f"{file.path}:{number} is no JSON object with a string `{field}`: correct it, or name another field "
                "with field="
            ) from None
        yield from as_document(text)


def parquet_texts(file: File, field: str, errors: Errors, advance: Advance) -> Iterator[str]:
    """The documents of a Parquet file, one a row, in the string column `field`; one row group in memory at a time."""
    import pyarrow

    with _parquet(file, [field]) as table:
        row = 0
        for group in range(table.num_row_groups):
            column = table.read_row_group(group, columns=[field], use_threads=False).column(0)
            file.check()
            try:
                # As bytes: pyarrow does not check that its strings are UTF-8.
                texts = column.cast(pyarrow.large_binary())
            except pyarrow.ArrowNotImplementedError:
                raise InputError(f"{file.path}: the column `{field}` holds {column.type}, not text") from None
            for data in texts:
                row += 1
                if not data.is_valid:
                    raise InputError(f"{file.path}: row {row} has no `{field}`: fill it or leave the row out")
                yield from as_document(decode(f"{file.path}, row {row},", 0, data.as_py(), errors))
            advance(file.size / table.num_row_groups)


def parquet_rows(file: File, fields: Sequence[str]) -> Iterator[dict[str, object]]:
    """The rows of a Parquet file with these columns; classes of Hugging Face's datasets are names."""
    with _parquet(file, fields) as table:
        metadata = json.loads((table.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
        features = metadata.get("info", {}).get("features", {})
        classes = {name: names for name in fields if (names := _class_names(features.get(name, {})))}
        for group in range(table.num_row_groups):
            rows = table.read_row_group(group, columns=list(fields), use_threads=False)
            file.check()
            for batch in rows.to_batches(1024):
                for row in batch.to_pylist():
                    yield row | {name: class_name(row[name], names) for name, names in classes.items()}


def _class_names(feature: object) -> list[str]:
    """The names of the classes of a column, or of the lists in it, as `datasets` describes them; none for others."""
    if isinstance(feature, list):  # How some of its versions write a list.
        return _class_names(feature[0]) if len(feature) == 1 else []
    if not isinstance(feature, dict):
        return []
    names = feature.get("names")
    return names if isinstance(names, list) else _class_names(feature.get("feature"))


def class_name(value: object, names: Sequence[str]) -> object:
    """The name of a class given by its number, or the names of several; None for -1, which stands for no label."""
    if isinstance(value, list):
        return [class_name(each, names) for each in value]
    if isinstance(value, int) and not 0 <= value < len(names):
        return None
    return names[value] if isinstance(value, int) else value


@contextlib.contextmanager
def _parquet(file: File, fields: Sequence[str]) -> Iterator["ParquetFile"]:
    """Opens a Parquet file that has these columns; damage that is found in the block becomes an InputError."""
    import pyarrow
    import pyarrow.parquet

    with opened(file.path) as raw:
        try:
            table = pyarrow.parquet.ParquetFile(raw, page_checksum_verification=True)
            names = table.schema_arrow.names
            if missing := [field for field in fields if field not in names]:
                raise InputError(f"{file.path} has no column `{missing[0]}`, only {', '.join(names)}")
            yield table
        except UnicodeDecodeError as error:
            raise InputError(f"{file.path} has text that is not UTF-8 ({error}): convert it") from None
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno:  # Of the disk; pyarrow's own are about the content.
                raise
            raise InputError(f"{file.path} is damaged ({first_line(error)}): copy or download it again") from None
