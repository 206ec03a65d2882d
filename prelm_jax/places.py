"""Where files are: on this machine, or in a bucket (gs://…), through the path library of Orbax."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

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
