"""Files as bytes, lines, text, JSON and documents; plain, .gz, .xz or .zst; Parquet. Complaints name file and place.

Lines of documents end at "\\n", "\\r\\n" or "\\r", and with "\\n" in what is read: a file may come from any system.
"""

import gzip
import json
import lzma
import os
import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

import zstandard

from prelm_jax.errors import InputError
from prelm_jax.progress import Advance
from prelm_jax.storage import decode_utf8, opened

Errors = Literal["strict", "replace"]  # refuse what is not UTF-8, or read it as U+FFFD

CHUNK_BYTES = 1 << 20
DECOMPRESSORS = {".gz": gzip.open, ".xz": lzma.open}


def endings(path: str) -> tuple[str | None, str | None]:
    """The endings of a name that decide how it is read: ".jsonl", ".parquet" or None; ".gz", ".xz", ".zst" or None."""
    return re.search(r"(\.jsonl|\.parquet)?(\.gz|\.xz|\.zst)?$", path).groups()


class File(NamedTuple):
    """A file as it was when it was first looked at; `modified` is in nanoseconds."""

    path: str
    size: int
    modified: int

    @classmethod
    def at(cls, path: str) -> "File":
        stat = os.stat(path)
        return cls(path, stat.st_size, stat.st_mtime_ns)

    def check(self) -> None:
        """InputError if it is not the same any more: what was read of it would not be what its fingerprint says."""
        if File.at(self.path) != self:
            raise InputError(f"{self.path} was changed while it was in use: run again when it is complete")


def _chunks(file: File, advance: Advance) -> Iterator[bytes]:
    """The content of a file, decompressed."""
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


def _zstandard_chunks(file) -> Iterator[bytes]:
    """The frames of a .zst file. The library's own reader takes a file that breaks off for one that ends."""
    frame = None
    while chunk := file.read(CHUNK_BYTES):
        while chunk:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(chunk)
            chunk = frame.unused_data
            if frame.eof:
                frame = None
    if frame:
        raise EOFError("the file breaks off")


def _lines(file: File, advance: Advance) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, with what ends them, each with its byte offset in the decompressed file."""
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
    """The text of bytes that stand in a file from `offset` on."""
    if errors == "replace":
        text = data.decode("utf-8", "replace")
    else:
        text = decode_utf8(path, offset, data, "convert the file, or read such bytes as U+FFFD with --errors replace")
    return text.removeprefix("\ufeff") if offset == 0 else text


def as_document(text: str) -> list[str]:
    """The text without line ends around it, if there is more than white space in it."""
    return [text.replace("\r\n", "\n").replace("\r", "\n").strip("\n")] if text.strip() else []


def plain_texts(file: File, documents: str, errors: Errors, advance: Advance) -> Iterator[str]:
    """The documents of a file of plain text, which end at each "blank-line", at each "line", or with the "file"."""
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
            text.encode()  # A lone surrogate can be written in JSON, but it is no text.
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
            raise InputError(
                f"{file.path}:{number} is not a JSON object with a string `{field}`: correct the line"
            ) from None
        yield from as_document(text)


def parquet_texts(file: File, field: str, errors: Errors, advance: Advance) -> Iterator[str]:
    """The documents of a Parquet file, a row each, in the column `field` of strings. A row group is held at a time."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f'{file.path} needs pyarrow: pip install "prelm_jax[parquet]"') from None
    with opened(file.path) as raw:
        try:
            table = pyarrow.parquet.ParquetFile(raw)
            columns = table.schema_arrow
            if field not in columns.names:
                raise InputError(f"{file.path} has no column `{field}`, only {', '.join(columns.names)}")
            row = 0
            for group in range(table.num_row_groups):
                texts = table.read_row_group(group, columns=[field], use_threads=False).column(0)
                file.check()
                # As bytes, for the library does not look whether its strings are UTF-8.
                for data in texts.cast(pyarrow.large_binary()):
                    row += 1
                    if not data.is_valid:
                        raise InputError(f"{file.path}: row {row} has no `{field}`: fill it or leave the row out")
                    yield from as_document(decode(f"{file.path}, row {row},", 0, data.as_py(), errors))
                advance(file.size / table.num_row_groups)
        except pyarrow.ArrowNotImplementedError:
            raise InputError(f"{file.path}: the column `{field}` holds {columns.field(field).type}, not text") from None
        except pyarrow.ArrowInvalid as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"{file.path} is damaged ({reason}): copy or download it again") from None
