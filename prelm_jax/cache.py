"""The cache directory: files that are built once and reused, under names made of digests.

A cached file has its checksum beside it. One that is damaged is built again.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from prelm_jax.storage import opened, output_file


def cache_directory() -> Path:
    """The directory of cached files: $PRELM_CACHE if not empty, else `prelm_jax` in the user's cache directory."""
    if directory := os.environ.get("PRELM_CACHE"):
        return Path(directory).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "prelm_jax"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock, so that one process builds `path` while others wait.

    The lock is on the file `.NAME.lock` in the same directory. The kernel releases it when the process ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def built(path: Path) -> Iterator[Path]:
    """A temporary file to write, which becomes `path` when the block ends, with its checksum in `path`.sha256."""
    with output_file(path) as unfinished:
        yield unfinished
        with output_file(_checksum_path(path)) as checksum:
            checksum.write_bytes(_checksum(unfinished, path.name))


def is_intact(path: Path) -> bool:
    """Whether the content of `path` matches its checksum. Raises InputError if the file cannot be read."""
    if not (path.exists() and _checksum_path(path).exists()):
        return False
    with opened(_checksum_path(path)) as recorded:
        return recorded.read() == _checksum(path, path.name)


def _checksum_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _checksum(path: Path, name: str) -> bytes:
    """The SHA-256 of a file, as `sha256sum -c` reads it."""
    with opened(path) as file:
        return f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n".encode()


def cached_file(kind: str, name: str, build: Callable[[Path], object]) -> Path:
    """The path of the file `name` in the cache's directory `kind`. If it is missing or damaged, `build` writes it.

    The file appears under its name when it is complete.
    """
    path = cache_directory() / kind / name
    if not is_intact(path):
        with locked(path):
            if not is_intact(path):
                with built(path) as unfinished:
                    build(unfinished)
    return path


def cached(kind: str, key: str, build: Callable[[], str]) -> str:
    """The text cached under `kind` and `key`; if it is missing, `build()`, which is then cached.

    Example: `cached("vocabularies", digest(settings), lambda: "\\n".join(train(corpus)))`
    """
    path = cached_file(kind, f"{key}.txt", lambda path: path.write_bytes(build().encode()))
    return path.read_bytes().decode()


def digest(value: object) -> str:
    """SHA-256 (hex) of a value that JSON can represent."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def cache_compiled_programs() -> None:
    """Makes JAX keep compiled programs in the cache directory, so that the second start of a program is quick."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
