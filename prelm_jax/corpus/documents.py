"""A corpus: documents from SPECs (`prelm_jax.corpus.spec`), each on the training or the held-out side.

Files are streamed, one document in memory at a time.
"""

import array
import dataclasses
import functools
import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from prelm_jax.bounds import Fraction
from prelm_jax.cache import cached, cached_file, digest
from prelm_jax.corpus import cleaning, sources
from prelm_jax.corpus.readers import Errors, File, endings
from prelm_jax.corpus.sources import Part, Source
from prelm_jax.corpus.spec import Spec, Splitting, parse
from prelm_jax.errors import InputError
from prelm_jax.progress import Progress
from prelm_jax.storage import opened
from prelm_jax.validation import check

Side = Literal["training", "held_out"]

VERSION = 2  # Raise it when the same files would give other documents.
SHARD_CHARACTERS = 1 << 23


class Document(NamedTuple):
    r"""One document. Lines of `text` end at \n; `original` is the text before cleaning; the rest says how to split."""

    text: str
    original: str
    sentences: Splitting
    language: str
    side: Side


class Shard(NamedTuple):
    """Consecutive original texts of a part, and the bytes (compressed) of the files that held them.

    The bounds of a shard depend on the files alone. Shards sorted by `name` are in the order of the corpus.
    """

    name: str
    spec: Spec
    repetition: int
    texts: list[str]
    bytes: float


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The documents of `sources` (SPECs), a fraction `held_out` (0 to 1) of them kept from training.

    The side of a document is decided by a hash of its text: it depends neither on the order of the documents nor on the
    rest of the corpus, and equal documents are on one side. `deduplicate` drops exact duplicates: the first document of
    each text is kept. `errors`: bytes that are not UTF-8 are an error ("strict") or read as U+FFFD ("replace").

    Raises InputError here for a SPEC that cannot be parsed; when reading for files that cannot be read or have changed.

        corpus = Corpus(("novels/*.txt", "web.jsonl,field=body"), held_out=0.01)
        for document in corpus.documents("training"): ...
    """

    sources: tuple[str, ...]
    held_out: Fraction = 0.0
    deduplicate: bool = False
    errors: Errors = "strict"

    def __post_init__(self):
        check(self)
        parse(self.sources)

    def documents(self, side: Side | None = None, description: str | None = None) -> Iterator[Document]:
        """The documents of one side (None: both), in the order of the sources, files and lines.

        With a `description` of the work, its progress is shown on the standard error.
        """
        empty = True
        with Progress(description, self.bytes, "bytes") as progress:
            for part in self.parts:
                for text in part.texts(self.errors, progress.advance):
                    empty = False
                    document = self.document(text, part.source.spec, part.repetition)
                    if document and side in (None, document.side):
                        yield document
        if empty:
            raise InputError(f"the corpus {' '.join(self.sources)} holds no text: give files with text in them")

    def document(self, original: str, spec: Spec, repetition: int) -> Document | None:
        """The document of an original text, or None if this pass over the source leaves it out."""
        text = cleaning.clean(original) if spec.cleaning == "gpt" else original
        hash, threshold = _hash(text), int(self.held_out * 2**64)
        if hash < threshold:
            side, kept = "held_out", repetition == 0
        else:
            # Hashes of the training side are uniform between the threshold and 2**64: the last pass keeps the lowest.
            side, kept = "training", hash - threshold < (spec.weight - repetition) * (2**64 - threshold)
        return Document(text, original, spec.sentences, spec.language, side) if kept else None

    def shards(self, number: int, part: Part) -> Iterator[Shard]:
        """The documents of part `number`, in shards that end with the document that reaches SHARD_CHARACTERS."""
        texts: list[str] = []
        characters, read = 0, 0.0
        count = itertools.count()

        def advance(size: float):
            nonlocal read
            read += size

        def shard() -> Shard:
            return Shard(f"{number:06}-{next(count):06}", part.source.spec, part.repetition, texts, read)

        for text in part.texts(self.errors, advance):
            texts.append(text)
            characters += len(text)
            if characters >= SHARD_CHARACTERS:
                yield shard()
                texts, characters, read = [], 0, 0.0
        if texts:
            yield shard()

    @functools.cached_property
    def parts(self) -> list[Part]:
        """The parts of all sources in reading order, once for each pass."""
        parts_of = [list(source.parts(files)) for source, files in self._files]
        if self.deduplicate:
            duplicates = iter(self._duplicates([part for parts in parts_of for part in parts]))
            parts_of = [[part._replace(duplicates=next(duplicates)) for part in parts] for parts in parts_of]
        return [
            part._replace(repetition=repetition)
            for (source, _), parts in zip(self._files, parts_of, strict=True)
            for repetition in range(source.spec.passes)
            for part in parts
        ]

    @functools.cached_property
    def duplicates(self) -> int:
        """Number of documents dropped because an earlier one has the same text."""
        return sum(len(part.duplicates) for part in self.parts if part.repetition == 0)

    @functools.cached_property
    def bytes(self) -> int:
        """Bytes of all files, each counted once for each pass."""
        return sum(file.size * source.spec.passes for source, files in self._files for file in files)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the contents of the files, the options and the held-out fraction; not of file names.

        Hashes of contents are memoized in the cache directory by path, size and times of change.
        """
        contents = [[source.spec.identity(), _contents_digest(files)] for source, files in self._files]
        return digest([VERSION, self.held_out, self.deduplicate, self.errors, contents])

    @functools.cached_property
    def _files(self) -> list[tuple[Source, list[File]]]:
        return [(source, source.files()) for source in map(sources.from_spec, parse(self.sources))]

    def _duplicates(self, parts: list[Part]) -> list[np.ndarray]:
        """For each part, the numbers of the documents whose text occurred before. Found once and cached.

        The search holds some 30 bytes in memory for each document of the corpus.
        """

        def find(path: Path):
            hashes, ends = array.array("Q"), []
            size = sum(file.size for _, files in self._files for file in files)
            with Progress("find duplicates", size, "bytes") as progress:
                for part in parts:
                    hashes.extend(map(_hash, part.texts(self.errors, progress.advance)))
                    ends.append(len(hashes))
            # Hashes [7, 5, 7, 7] sort to 5 7 7 7, of documents 1 0 2 3: repeated are 2 and 3.
            hash_X = np.frombuffer(hashes, np.uint64)
            order_X = np.argsort(hash_X, kind="stable")
            repeated = hash_X[order_X[1:]] == hash_X[order_X[:-1]]
            with open(path, "wb") as file:
                np.savez(file, duplicates=np.sort(order_X[1:][repeated]), ends=ends)

        key = digest([self.fingerprint, sources.PART_BYTES])
        with np.load(cached_file("duplicates", f"{key}.npz", find)) as found:
            duplicates, ends = found["duplicates"], found["ends"]
        by_part = np.split(duplicates, np.searchsorted(duplicates, ends[:-1]))
        return [numbers - begin for numbers, begin in zip(by_part, [0, *ends[:-1]], strict=True)]


def _hash(text: str) -> int:
    """64 bits."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _contents_digest(files: list[File]) -> str:
    """SHA-256 (hex) of the contents of files and of the endings that decide how they are read."""
    states = [(os.path.abspath(file.path), *file[1:]) for file in files]
    contents = cached("contents", digest(states), lambda: digest(list(map(_content_digest, files))))
    return digest([[endings(file.path) for file in files], contents])


def _content_digest(file: File) -> str:
    with opened(file.path) as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    file.check()
    return found
