"""The cache directory: files that are built once and reused, under names made of digests."""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path


def cache_directory() -> Path:
    """The directory of cached files: $PRELM_CACHE, else `prelm_jax` in the user's cache directory."""
    if "PRELM_CACHE" in os.environ:
        return Path(os.environ["PRELM_CACHE"]).expanduser()
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


def cached_file(kind: str, name: str, build: Callable[[Path], object]) -> Path:
    """The path of the file `name` in the cache's directory `kind`. If it is missing, `build` writes it.

    The file appears under its name when it is complete.
    """
    path = cache_directory() / kind / name
    if not path.exists():
        with locked(path):
            if not path.exists():
                unfinished = path.with_name(f".{name}.unfinished")
                build(unfinished)
                unfinished.replace(path)
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
