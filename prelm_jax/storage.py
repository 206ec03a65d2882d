"""Where files are: on this machine, or in a bucket (gs://…), through the path library of Orbax."""

import contextlib
import gzip
import json
import lzma
import os
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard

from prelm_jax.errors import InputError


def is_remote(path: str | os.PathLike) -> bool:
    """Whether it is in a bucket (gs://…), where nothing is mapped into memory and nothing is appended to."""
    return "://" in str(path)


def reachable(path: str | os.PathLike) -> Path:
    """A path of this machine, or one in a bucket, which is used in the same way.

    Raises InputError for a bucket that cannot be reached, or not by this user.
    """
    if not is_remote(path):
        return Path(path)
    try:
        from etils import epath

        remote = epath.Path(path)
        with contextlib.suppress(FileNotFoundError):
            remote.stat()
    except ImportError:
        raise InputError(f'{path}: a bucket needs a package: pip install "prelm_jax[gcs]"') from None
    except Exception as error:  # Whatever the bucket's client makes of it.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{path}: cannot be reached ({reason}): see that the bucket is there and that you may use it, after "
            "gcloud auth application-default login"
        ) from None
    return remote


def copy_files(source: Path, target: Path) -> None:
    """The files of a directory into another, which is made if need be; either may be in a bucket."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())


@contextlib.contextmanager
def fetched(directory: Path) -> Iterator[Path]:
    """A directory of this machine with the files of one that may be in a bucket."""
    if not is_remote(directory):
        yield directory
        return
    with tempfile.TemporaryDirectory() as copy:
        copy_files(directory, Path(copy))
        yield Path(copy)


def decode_utf8(path: str | os.PathLike, offset: int, data: bytes, remedy: str = "convert the file") -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 at byte {offset + error.start}: {remedy}") from None


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


def read_text(path: str | os.PathLike) -> str:
    """The text of a UTF-8 file, as it is."""
    with opened(path) as file:
        return decode_utf8(path, 0, file.read())


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
def prefix_errors(path: str | os.PathLike) -> Iterator[None]:
    """What is wrong inside the block is wrong with the file: complaints name it."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """What the system says inside the block, of a full disk for example, comes with the name of the file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None
