"""Sources of documents: text files, TensorFlow Datasets, and Python's own documentation."""

import abc
import dataclasses
import glob
import math
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from prelm_jax.corpus import python_docs, readers, tfds
from prelm_jax.corpus.readers import Errors, File
from prelm_jax.corpus.spec import Spec
from prelm_jax.errors import InputError
from prelm_jax.progress import Advance
from prelm_jax.storage import is_remote, kind_of_file

PART_BYTES = 1 << 26


class Part(NamedTuple):
    """A stretch of a source that is read as one stream: some of its files, or some records of a TFDS dataset.

    A part depends on the files alone. `repetition` is the number of the pass over the source; `duplicates` numbers the
    documents of the part that are skipped.
    """

    source: "Source"
    files: list[File]
    records: range = range(0)
    repetition: int = 0
    duplicates: np.ndarray = np.array([], np.int64)

    def texts(self, errors: Errors, advance: Advance) -> Iterator[str]:
        """The original texts of the part's documents, without duplicates."""
        skipped = set(self.duplicates.tolist())
        texts = self.source.texts(self, errors, advance)
        return (text for number, text in enumerate(texts) if number not in skipped)


@dataclasses.dataclass(frozen=True)
class Source(abc.ABC):
    """Files that hold documents, and how to read them."""

    spec: Spec

    def files(self) -> list[File]:
        """The files, in the order in which they are read. Raises InputError if there are none."""
        return [File.at(path) for path in self.paths()]

    @abc.abstractmethod
    def paths(self) -> list[str]:
        """The paths of the files."""

    def parts(self, files: list[File]) -> Iterator[Part]:
        """One pass over the source, cut into parts of some 64 MB; a file is in one part."""
        yield Part(self, files)

    @abc.abstractmethod
    def texts(self, part: Part, errors: Errors, advance: Advance) -> Iterator[str]:
        """The texts of the documents of a part; `advance` is called with the bytes of the files that were read."""


def from_spec(spec: Spec) -> Source:
    """The source that a SPEC describes."""
    if spec.is_python_docs:
        return PythonDocs(spec)
    return TFDS(spec) if spec.is_tfds else TextFiles(spec)


class TextFiles(Source):
    """The files of a path or glob, sorted: plain text, JSON lines or Parquet, by the ending of each name."""

    def paths(self) -> list[str]:
        paths = matching_files(self.spec.location)
        for path in paths:
            readers.check_name(path)
        return paths

    def parts(self, files: list[File]) -> Iterator[Part]:
        group: list[File] = []
        size = 0
        for file in files:
            if group and size + file.size > PART_BYTES:
                yield Part(self, group)
                group, size = [], 0
            group.append(file)
            size += file.size
        yield Part(self, group)

    def texts(self, part: Part, errors: Errors, advance: Advance) -> Iterator[str]:
        for file in part.files:
            kind = readers.endings(file.path)[0]
            if kind == readers.JSON_LINES:
                yield from readers.json_texts(file, self.spec.field, errors, advance)
            elif kind == readers.PARQUET:
                yield from readers.parquet_texts(file, self.spec.field, errors, advance)
            else:
                yield from readers.plain_texts(file, self.spec.documents, errors, advance)


class TFDS(Source):
    """A split of a TensorFlow dataset, a document a record."""

    def paths(self) -> list[str]:
        return tfds.open_split(self.spec.location, self.spec.field)[1]

    def parts(self, files: list[File]) -> Iterator[Part]:
        number = len(tfds.open_split(self.spec.location, self.spec.field)[0])
        parts = max(1, math.ceil(sum(file.size for file in files) / PART_BYTES))
        for i in range(parts):
            yield Part(self, files, range(number * i // parts, number * (i + 1) // parts))

    def texts(self, part: Part, errors: Errors, advance: Advance) -> Iterator[str]:
        yield from tfds.texts(self.spec.location, self.spec.field, part.records, errors, advance)
        for file in part.files:
            file.check()


class PythonDocs(Source):
    """The documentation of the running Python, one part (`prelm_jax.corpus.python_docs`)."""

    def paths(self) -> list[str]:
        return python_docs.files()

    def texts(self, part: Part, errors: Errors, advance: Advance) -> Iterator[str]:
        documents = python_docs.documents()
        document_bytes = sum(file.size for file in part.files) / len(documents)
        for text in documents:
            yield text
            advance(document_bytes)


def matching_files(location: str) -> list[str]:
    """The files of a path or glob, sorted. Raises InputError where there is none, and for what cannot be read twice."""
    if is_remote(location):
        raise InputError(f"{location}: only local files are read: copy it, or mount the bucket")
    path = os.path.expanduser(location)
    if os.path.isdir(path):
        raise InputError(f"{location} is a directory: give its files, for example {os.path.join(location, '*.txt')}")
    if os.path.lexists(path):
        matches = [path]
    elif not glob.has_magic(path):
        raise InputError(f"there is no file {location}: give a path, a glob or tfds:name")
    else:
        matches = sorted(match for match in glob.glob(path, recursive=True) if not os.path.isdir(match))
    if not matches:
        raise InputError(f"no file matches {location}: correct the glob")
    for match in matches:
        kind = kind_of_file(match)
        if kind == "pipe":
            raise InputError(f"{match} is a pipe, which can be read once, and files are read again: write it to a file")
        if not kind:
            raise InputError(f"{match} is a link to a file that does not exist: mend it or leave it out")
        if kind != "file":
            raise InputError(f"{match} is a {kind}: give a file")
    return matches
