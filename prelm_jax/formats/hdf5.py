"""HDF5 files: written so that a full disk is an error that names the file."""

import contextlib
import io
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import h5py

from prelm_jax.storage import writing

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


@contextlib.contextmanager
def hdf5_file(path: str | os.PathLike) -> Iterator[h5py.File]:
    """Creates an HDF5 file, to fill in the block. A full disk raises the OSError of the write, which names `path`."""
    with writing(path), _Hdf5Bytes(path, "wb+") as raw:
        try:
            with h5py.File(raw, "w") as file:
                yield file
        except Exception as error:
            raise raw.failure or error from None


class _Hdf5Bytes(io.FileIO):
    """The bytes of an HDF5 file. On a full disk HDF5's own files may crash, and h5py hides what Python's raise."""

    failure: OSError | None = None

    def write(self, data: "ReadableBuffer", /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise

    def truncate(self, size: int | None = None, /) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.failure = self.failure or error
            raise
