"""Files as bytes, lines, text, JSON and documents; plain, .gz, .xz or .zst. Complaints name the file and the place."""

import contextlib
import gzip
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import zstandard

from prelm_jax.errors import InputError

Advance = Callable[[float], None]  # told how many bytes of the source's files have been read since the last call

CHUNK_BYTES = 1 << 20
DECOMPRESSORS = {".gz": gzip.open, ".xz": lzma.open}


def read_text(path: str | os.PathLike) -> str:
    """The text of a UTF-8 file, as it is."""
    with opened(path) as file:
        return _utf8(path, 0, file.read())


def read_lines(path: str | os.PathLike) -> list[str]:
    r"""The lines of a UTF-8 file. Lines end at \n only; a \n at the end of the file ends the last line."""
    lines = read_text(path).split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def read_json(path: str | os.PathLike, kind: type = dict) -> Any:
    """The JSON object in a file, or with `kind=list` the array."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, kind):
        raise InputError(f"{path} is not a JSON {'object' if kind is dict else 'array'}")
    return value


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """What is wrong inside the block is wrong with the file: complaints name it."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def endings(path: str) -> tuple[str | None, str | None]:
    """The endings of a file's name that decide how it is read: ".jsonl" or None, and ".gz", ".xz", ".zst" or None."""
    return re.search(r"(\.jsonl)?(\.gz|\.xz|\.zst)?$", path).groups()


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[Any]:
    """A file to read bytes from; what goes wrong inside the block, damaged compression too, is an InputError."""
    try:
        with open(path, "rb") as file:
            yield file
    except (EOFError, lzma.LZMAError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is damaged ({error}): copy or download it again") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def _chunks(path: str, advance: Advance) -> Iterator[bytes]:
    """The content of a file, decompressed."""
    compression = endings(path)[1]
    with opened(path) as file:
        if compression == ".zst":
            chunks = _zstandard_chunks(file)
        else:
            content = DECOMPRESSORS[compression](file) if compression else file
            chunks = iter(lambda: content.read(CHUNK_BYTES), b"")
        position = 0
        for chunk in chunks:
            yield chunk
            advance(file.tell() - position)
            position = file.tell()


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


def _lines(path: str, advance: Advance) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, each with its byte offset in the decompressed file, without the "\\n" that ends it."""
    offset, parts = 0, []
    for chunk in _chunks(path, advance):
        *ended, rest = chunk.split(b"\n")
        for end in ended:
            line = b"".join([*parts, end])
            yield offset, line
            offset += len(line) + 1
            parts = []
        parts.append(rest)
    if line := b"".join(parts):
        yield offset, line


def _utf8(path: str | os.PathLike, offset: int, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 at byte {offset + error.start}: convert the file") from None


def _decode(path: str, offset: int, data: bytes) -> str:
    text = _utf8(path, offset, data)
    if offset == 0:
        text = text.removeprefix("\ufeff")
    return text.replace("\r\n", "\n").removesuffix("\r")


def plain_texts(path: str, documents: str, advance: Advance) -> Iterator[str]:
    """The documents of a file of plain text, which end at each "blank-line", at each "line", or with the "file"."""
    start, lines = 0, []
    for offset, line in _lines(path, advance):
        if not lines:
            start = offset
        lines.append(line)
        if documents == "line" or (documents == "blank-line" and not line.strip()):
            yield from nonblank(_decode(path, start, b"\n".join(lines)))
            lines = []
    yield from nonblank(_decode(path, start, b"\n".join(lines)))


def nonblank(text: str) -> list[str]:
    """The text without newlines around it, if there is more than white space in it."""
    return [text.strip("\n")] if text.strip() else []


def json_texts(path: str, advance: Advance) -> Iterator[str]:
    """The documents of a file of JSON objects, one a line, each with a `text`."""
    for number, (offset, line) in enumerate(_lines(path, advance), start=1):
        if not (decoded := _decode(path, offset, line)).strip():
            continue
        try:
            text = json.loads(decoded)["text"]
            text.encode()  # a lone surrogate can be written in JSON, but it is no text
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
            raise InputError(f"{path}:{number} is not a JSON object with a string `text`: correct the line") from None
        yield from nonblank(text.replace("\r\n", "\n"))
