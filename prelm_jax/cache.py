"""What is made once and kept: the cache directory, and the digests that name what lies there."""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path


def cache_directory() -> Path:
    """Where prepared data lies: $PRELM_CACHE, else `prelm_jax` in the user's cache directory."""
    if "PRELM_CACHE" in os.environ:
        return Path(os.environ["PRELM_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "prelm_jax"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Of the processes that are about to make what `path` names, one is in the block and the others wait.

    The lock is on a file beside it. It ends with the process, however that ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cached_file(kind: str, name: str, make: Callable[[Path], None]) -> Path:
    """The file kept in the cache directory under `kind` and `name`; `make` writes it if it is not there yet."""
    path = cache_directory() / kind / name
    if not path.exists():
        with locked(path):
            if not path.exists():
                # Whole or not at all.
                unfinished = path.with_name(f".{name}.unfinished")
                make(unfinished)
                unfinished.replace(path)
    return path


def cached(kind: str, key: str, make: Callable[[], str]) -> str:
    """The text kept in the cache directory under `kind` and `key`; made, and kept, if it is not there yet."""
    path = cached_file(kind, f"{key}.txt", lambda path: path.write_bytes(make().encode()))
    return path.read_bytes().decode()


def digest(value) -> str:
    """SHA-256 (hex) of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
