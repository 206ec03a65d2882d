"""Files and directories, local or in a bucket (gs://…): reading and writing with one-line errors, and copying."""

import contextlib
import gzip
import io
import json
import lzma
import os
import re
import shutil
import stat
import tempfile
import uuid
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import cast, overload

from prelm_jax.errors import InputError, first_line

# ---- Paths -----------------------------------------------------------------------------------------------------------


def is_remote(path: str | os.PathLike) -> bool:
    """Whether the path is in a bucket, where files can be neither memory-mapped nor appended to."""
    return "://" in str(path)


NETWORK_FILE_SYSTEMS = {
    *("9p", "afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "smb3", "smbfs"),
}


def is_shared(path: Path) -> bool:
    """Whether other machines may write there: a bucket or a network disk."""
    if is_remote(path):
        return True
    kind = _file_system(path, _read_mounts())
    return kind in NETWORK_FILE_SYSTEMS or kind.startswith("fuse.")  # Such as sshfs and gcsfuse.


def _file_system(path: Path, mounts: str) -> str:
    """The type of the file system that holds a path, as /proc/mounts has it; "" if it does not say."""
    found, length, path = "", -1, path.resolve()
    for _, point, kind, *_ in map(str.split, mounts.splitlines()):
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), point)  # A space is \040.
        if path.is_relative_to(point) and len(point) >= length:
            found, length = kind, len(point)
    return found


def _read_mounts() -> str:
    try:
        return Path("/proc/self/mounts").read_text(errors="replace")
    except OSError:  # Not Linux.
        return ""


def reachable(path: str | os.PathLike) -> Path:
    """A local path as it is, or a bucket's as an object with the same methods.

    Raises InputError if the bucket is unreachable, or closed to this user.
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
    except Exception as error:  # Each bucket client raises its own types.
        raise InputError(
            f"{path}: cannot be reached ({first_line(error)}): check its name and your access, then run "
            "gcloud auth application-default login"
        ) from None
    return cast(Path, remote)


def kind_of_file(path: str | os.PathLike) -> str:
    """The kind of file at a path, links followed: "file", "directory", "pipe", "socket" or "device"; "" for none.

    Raises InputError if permission is denied.
    """
    try:
        mode = os.stat(path).st_mode
    except PermissionError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (OSError, ValueError):
        return ""
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")


def copy_files(source: Path, target: Path) -> None:
    """Copies the files of a directory into another, which is created if need be. Either may be in a bucket."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        write_file(target / file.name, file.read_bytes())


@contextlib.contextmanager
def fetched(directory: Path) -> Iterator[Path]:
    """The directory itself if local, else a temporary local copy of its files."""
    if not is_remote(directory):
        yield directory
        return
    with tempfile.TemporaryDirectory() as copy:
        copy_files(directory, Path(copy))
        yield Path(copy)


# ---- Reading ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[io.BufferedReader]:
    """Opens a file to read bytes. Read errors inside the block, and damaged compression, become InputErrors."""
    try:
        with reachable(path).open("rb") as file:
            yield file
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is damaged ({error}): copy or download it again") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


CONVERT = "convert the file (iconv -f WINDOWS-1252 -t UTF-8, for example)"


def decode_utf8(path: str | os.PathLike, offset: int, data: bytes, remedy: str = CONVERT) -> str:
    """Decodes bytes found at `offset` of a file. Raises InputError with the position of the first invalid byte."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 at byte {offset + error.start}: {remedy}") from None


def read_text(path: str | os.PathLike) -> str:
    """The text of a UTF-8 file without its byte order mark, line ends unchanged."""
    with opened(path) as file:
        return decode_utf8(path, 0, file.read()).removeprefix("\ufeff")


def read_lines(path: str | os.PathLike) -> list[str]:
    r"""The lines of a UTF-8 file, split at \n only and without it; a \n at the end adds no empty line."""
    lines = read_text(path).split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def stream_lines(path: str | os.PathLike) -> Collection[str]:
    """The same lines, to loop over; each loop reads the file again, so that it need not fit into memory.

    A file that can be read only once, such as a pipe, is read into memory.
    """
    return _Lines(path) if kind_of_file(path) == "file" else read_lines(path)


class _Lines(Collection[str]):
    """The lines of a file, which is read once to count them: an unreadable one raises InputError at once."""

    def __init__(self, path: str | os.PathLike):
        self._path = path
        self._count = sum(1 for _ in self)

    def __iter__(self) -> Iterator[str]:
        offset = 0
        with opened(self._path) as file:
            for line in file:
                text = decode_utf8(self._path, offset, line)
                text = text if offset else text.removeprefix("\ufeff")
                offset += len(line)
                if text:
                    yield text.removesuffix("\n")

    def __len__(self) -> int:
        return self._count

    def __contains__(self, line: object) -> bool:
        return any(each == line for each in self)


@overload
def read_json(path: str | os.PathLike) -> dict: ...
@overload
def read_json(path: str | os.PathLike, kind: type[list]) -> list: ...
def read_json(path: str | os.PathLike, kind: type[dict] | type[list] = dict) -> dict | list:
    """The JSON object in a file, or the array with `kind=list`. Raises InputError if the file holds neither."""
    text = read_text(path)
    try:
        value = json.loads(text)
        if "\\u" in text:  # An escape may be half of a surrogate pair, which no other file can hold.
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, kind):
        raise InputError(f"{path} is not a JSON {'object' if kind is dict else 'array'}")
    return value


# ---- Writing ---------------------------------------------------------------------------------------------------------


def check_apart(output: str | os.PathLike, *inputs: str | os.PathLike) -> None:
    """Raises InputError if an output is one of the inputs, or in a directory that is one; links are followed."""
    real = _real(output)
    for source in (Path(path) for path in inputs if not is_remote(path)):
        files = source.rglob("*") if source.is_dir() else [source]
        same = real.exists() and any(file.exists() and file.samefile(real) for file in files)
        if same or real.is_relative_to(_real(source)):
            raise InputError(f"{output} would be written over the input {source}, or into it: give another output")


def write_file(path: Path, content: bytes) -> None:
    """Creates or replaces a file, local or in a bucket. Readers see the old content or the new, never a part."""
    if is_remote(path):
        path.write_bytes(content)
        return
    with output_file(path) as unfinished:
        unfinished.write_bytes(content)


@contextlib.contextmanager
def output_file(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary file to write, which replaces `path` when the block ends; an error leaves `path` as it was.

    A link is followed. Raises InputError if `path` is a directory, a device or a pipe, or is in no directory. OSErrors
    in the block name `path`.
    """
    target = _real(path)
    if (kind := kind_of_file(path)) not in ("file", ""):
        raise InputError(f"{path} is a {kind}: give the name of a file to write")
    if not target.parent.is_dir():
        raise InputError(f"{path}: there is no directory {target.parent}")
    temporary = _beside(target)
    try:
        with writing(path, temporary):
            yield temporary
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def output_directory(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary directory to fill with files, which move to `path` when the block ends.

    Raises InputError at once if `path` exists and is not an empty directory.
    """
    target = _real(path)
    if (kind := kind_of_file(path)) not in ("directory", ""):
        raise InputError(f"{path} is a {kind}: give the name of a directory to write")
    if kind and any(target.iterdir()):
        raise InputError(f"{path} is not empty: give another directory")
    temporary = _beside(target)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot create {path}: {error.strerror}") from None
    try:
        yield temporary
        target.mkdir(exist_ok=True)
        for file in sorted(temporary.iterdir()):
            file.replace(target / file.name)
    finally:
        shutil.rmtree(temporary)


def _real(path: str | os.PathLike) -> Path:
    """The absolute path, links followed. (`Path.resolve` raises for links in a circle.)"""
    return Path(os.path.realpath(path))


def _beside(path: Path) -> Path:
    """A unique name in the same directory."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")


# ---- Errors that name the file ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def prefix_errors(path: str | os.PathLike) -> Iterator[None]:
    """Prefixes InputErrors raised in the block with the file name."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


@contextlib.contextmanager
def writing(path: str | os.PathLike, temporary: str | os.PathLike | None = None) -> Iterator[None]:
    """Names `path` in OSErrors raised in the block that name no file (such as of a full disk), or `temporary`."""
    try:
        yield
    except OSError as error:
        named = None if temporary is not None and error.filename == os.fspath(temporary) else error.filename
        raise OSError(error.errno, error.strerror, named or os.fspath(path)) from None
