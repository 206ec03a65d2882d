"""What is made once and kept: the cache directory, and the digests that name what lies there."""

import hashlib
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path


def cache_directory() -> Path:
    """Where prepared data lies: $PRELM_CACHE, else `prelm_jax` in the user's cache directory."""
    if "PRELM_CACHE" in os.environ:
        return Path(os.environ["PRELM_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "prelm_jax"


def cached(kind: str, key: str, make: Callable[[], str]) -> str:
    """The text kept in the cache directory under `kind` and `key`; made, and kept, if it is not there yet."""
    path = cache_directory() / kind / f"{key}.txt"
    if not path.exists():
        text = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written whole or not at all, whatever else writes the same file at the same time.
        unfinished = path.with_name(f".unfinished-{uuid.uuid4().hex}")
        unfinished.write_bytes(text.encode())
        unfinished.replace(path)
    return path.read_bytes().decode()


def digest(value) -> str:
    """SHA-256 (hex) of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
