r"""Files to documents: plain text, JSON lines and Parquet; text may be compressed (.gz, .xz, .zst).

Files are streamed, one document in memory at a time. Lines end at \n, \r\n or \r (a file may come from any system) and
at \n in the documents. Errors name the file and the byte, line or row.
"""

import gzip
import json
import lzma
import os
import re
from collections.abc import Iterator
from typing import IO, Literal, NamedTuple

import zstandard

from prelm_jax.errors import InputError, first_line
from prelm_jax.progress import Advance
from prelm_jax.storage import decode_utf8, opened

Errors = Literal["strict", "replace"]  # Bytes that are not UTF-8: an error, or U+FFFD.

CHUNK_BYTES = 1 << 20
DECOMPRESSORS = {".gz": gzip.open, ".xz": lzma.open}


def endings(path: str) -> tuple[str | None, str | None]:
    """The endings of a name that decide how it is read.

    Example: `endings("a.jsonl.gz") == (".jsonl", ".gz")`, `endings("a.parquet") == (".parquet", None)`.
    """
    kind, compression = re.findall(r"(\.jsonl|\.parquet)?(\.gz|\.xz|\.zst)?\Z", path)[0]
    return kind or None, compression or None


class File(NamedTuple):
    """A file as it was when the corpus was opened; `modified` in nanoseconds."""

    path: str
    size: int
    modified: int

    @classmethod
    def at(cls, path: str) -> "File":
        stat = os.stat(path)
        return cls(path, stat.st_size, stat.st_mtime_ns)

    def check(self) -> None:
        """Raises InputError if the file has changed: its content would no longer match the corpus fingerprint."""
        if File.at(self.path) != self:
            raise InputError(f"{self.path} was changed while it was in use: run again when it is complete")


# ---- Bytes and lines -------------------------------------------------------------------------------------------------


def _chunks(file: File, advance: Advance) -> Iterator[bytes]:
    """The decompressed content of a file."""
    compression = endings(file.path)[1]
    with opened(file.path) as raw:
        if compression == ".zst":
            chunks = _zstandard_chunks(raw)
        else:
            content = DECOMPRESSORS[compression](raw) if compression else raw
            chunks = iter(lambda: content.read(CHUNK_BYTES), b"")
        position = 0
        for chunk in chunks:
            file.check()
            yield chunk
            advance(raw.tell() - position)
            position = raw.tell()
        file.check()


def _zstandard_chunks(file: IO[bytes]) -> Iterator[bytes]:
    """The frames of a .zst file. The library's own reader takes a truncated file for a complete one."""
    frame = None
    while chunk := file.read(CHUNK_BYTES):
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
        raise EOFError("the file is truncated")


def _lines(file: File, advance: Advance) -> Iterator[tuple[int, bytes]]:
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
    start, lines = 0, []
    for offset, line in _lines(file, advance):
        if not lines:
            start = offset
        lines.append(line)
        if documents == "line" or (documents == "blank-line" and not line.strip()):
            yield from as_document(decode(file.path, start, b"".join(lines), errors))
            lines = []
    yield from as_document(decode(file.path, start, b"".join(lines), errors))


def json_texts(file: File, field: str, errors: Errors, advance: Advance) -> Iterator[str]:
    """The documents of a file of JSON objects, one a line, each with a string `field`."""
    for number, (offset, line) in enumerate(_lines(file, advance), start=1):
        if not (decoded := decode(file.path, offset, line, errors)).strip():
            continue
        try:
            text = json.loads(decoded)[field]
            if errors == "replace":
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            text.encode()  # JSON can spell a lone surrogate, UTF-8 cannot.
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
            raise InputError(f"{file.path}:{number} is no JSON object with a string `{field}`: correct it") from None
        yield from as_document(text)


def parquet_texts(file: File, field: str, errors: Errors, advance: Advance) -> Iterator[str]:
    """The documents of a Parquet file, one a row, in the string column `field`; one row group in memory at a time."""
    import pyarrow
    import pyarrow.parquet

    with opened(file.path) as raw:
        try:
            table = pyarrow.parquet.ParquetFile(raw)
            schema = table.schema_arrow
            if field not in schema.names:
                raise InputError(f"{file.path} has no column `{field}`, only {', '.join(schema.names)}")
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
        except pyarrow.ArrowInvalid as error:
            raise InputError(f"{file.path} is damaged ({first_line(error)}): copy or download it again") from None
