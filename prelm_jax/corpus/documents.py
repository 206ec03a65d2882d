"""Documents from a SPEC, and which of them are held out.

A corpus is a list of sources. Each is `python-docs` (the prose inside every Python), a path or glob of files of text,
of JSON lines (.jsonl) or of Parquet (extra `parquet`), or `tfds:name/config[:split]`; text and JSON lines may be
compressed (.gz, .xz, .zst). Options follow after commas:

    novels/*.txt.xz,documents=file,sentences=line

or, as on a command line, in the items that follow it.

documents   blank-line, file or line: where a document of a text file ends (the end of a file always ends one)
field       where the text is in JSON lines, Parquet and TFDS; `text` unless said
sentences   library or line: how sentences are found (`prelm_jax.corpus.sentences`)
cleaning    gpt: documents are cleaned as for GPT-1 (`prelm_jax.corpus.cleaning`; extra `cleaning`)
weight      how often the documents of a source are trained on: 3 gives three passes over the source, one after the
            other, 2.5 two and a pass of half the documents, those of the lowest hashes; held out they are once

Files are read as streams: no more than one document is held at a time.
"""

import array
import dataclasses
import functools
import hashlib
import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from prelm_jax.cache import cached, cached_file, digest
from prelm_jax.corpus import cleaning
from prelm_jax.corpus.readers import Errors, File, endings
from prelm_jax.corpus.sources import PART_BYTES, Part, Source, parse
from prelm_jax.errors import InputError
from prelm_jax.progress import progress
from prelm_jax.storage import opened

Side = Literal["training", "held_out"]

READING_VERSION = 2  # raise it when the same files would give other documents
SHARD_CHARACTERS = 1 << 23


class Document(NamedTuple):
    """One document: `text` with lines joined by "\\n", how its sentences are found, and the side it is on.

    `bytes`: of the text in UTF-8 before any cleaning.
    """

    text: str
    sentences: str
    side: Side
    bytes: int


class Shard(NamedTuple):
    """Documents that stand one after the other, as they were read; `bytes` of the files, compressed, they took.

    Where a shard begins and ends depends on the files alone, and shards sort by `name` as they follow each other.
    """

    name: str
    source: Source
    repetition: int
    texts: list[str]
    bytes: float


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The documents of `sources`, a fraction of them (`held_out`, 0 to 1) kept from training.

    The side of a document is decided by a hash of its text, so it depends neither on the order of the documents nor on
    what else is in the corpus, and equal documents are on one side. With `deduplicate`, of documents with the same text
    only the first is read. `errors` says whether bytes that are not UTF-8 are refused or read as U+FFFD.

    Raises InputError for a SPEC that is not understood, here; and for files that cannot be read, or that change
    meanwhile, when they are read.
    """

    sources: tuple[str, ...]
    held_out: float = 0.0
    deduplicate: bool = False
    errors: Errors = "strict"

    def __post_init__(self):
        if not 0 <= self.held_out <= 1:
            raise InputError(f"held_out is a fraction of the documents, from 0 to 1, not {self.held_out}")
        parse(self.sources)

    def documents(self, side: Side | None = None, task: str | None = None) -> Iterator[Document]:
        """The documents of one side (both sides if None), in the order of the sources, sorted files and lines.

        With `task`, a few words that name the work, its progress is shown on the standard error.
        """
        empty = True
        with progress(task, self.bytes) as advance:
            for part in self.parts:
                for text in part.texts(self.errors, advance):
                    empty = False
                    document = self.document(text, part.source, part.repetition)
                    if document and side in (None, document.side):
                        yield document
        if empty:
            raise InputError(f"the corpus {' '.join(self.sources)} holds no text: give files with text in them")

    def document(self, original: str, source: Source, repetition: int) -> Document | None:
        """A document from its text in a source, or None if it is not read in this pass over the source."""
        text = original if source.cleaning == "none" else cleaning.clean(original)
        hash, threshold = _hash(text), int(self.held_out * 2**64)
        if hash < threshold:
            side, kept = "held_out", repetition == 0
        else:  # The hashes of this side lie evenly between the threshold and 2**64.
            side, kept = "training", hash - threshold < (source.weight - repetition) * (2**64 - threshold)
        return Document(text, source.sentences, side, len(original.encode())) if kept else None

    def shards(self, number: int, part: Part) -> Iterator[Shard]:
        """The documents of one of the parts, of that number, in shards of SHARD_CHARACTERS or little more."""
        texts: list[str] = []
        characters, read = 0, 0.0
        count = itertools.count()

        def advance(size: float):
            nonlocal read
            read += size

        def shard() -> Shard:
            return Shard(f"{number:06}-{next(count):06}", part.source, part.repetition, texts, read)

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
        """What is read, one after the other."""
        sources = [list(source.parts(files)) for source, files in self._files]
        if self.deduplicate:
            left_out = iter(self._duplicates([part for parts in sources for part in parts]))
            sources = [[part._replace(left_out=next(left_out)) for part in parts] for parts in sources]
        return [
            part._replace(repetition=repetition)
            for parts in sources
            for repetition in range(_passes(parts[0].source))
            for part in parts
        ]

    @functools.cached_property
    def duplicates(self) -> int:
        """How many documents are left out because their text was there before."""
        return sum(len(part.left_out) for part in self.parts if part.repetition == 0)

    @functools.cached_property
    def bytes(self) -> int:
        """Of all files, as often as they are read."""
        return sum(file.size * _passes(source) for source, files in self._files for file in files)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the content of the files, the options and the held-out fraction; not of the files' names.

        The content is read once: what was found is remembered in the cache directory by path, size and time of change.
        """
        files = [(source, file) for source, files in self._files for file in files]
        options = [READING_VERSION, self.held_out, [(source.options(), endings(file.path)) for source, file in files]]
        options += [self.deduplicate, self.errors]
        states = [(os.path.abspath(file.path), file.size, file.modified) for _, file in files]

        def hash_content():
            return digest([options, [_content_digest(file) for _, file in files]])

        return cached("corpora", digest([options, states]), hash_content)

    @functools.cached_property
    def _files(self) -> list[tuple[Source, list[File]]]:
        return [(source, source.files()) for source in parse(self.sources)]

    def _duplicates(self, parts: list[Part]) -> list[np.ndarray]:
        """For each part the numbers of its documents whose text the corpus has before. Found once, and remembered.

        While they are looked for, some 30 bytes are held for each document of the corpus.
        """

        def find(path: Path):
            hashes, ends = array.array("Q"), []
            with progress(
                "looking for duplicates", sum(file.size for _, files in self._files for file in files)
            ) as advance:
                for part in parts:
                    hashes.extend(map(_hash, part.texts(self.errors, advance)))
                    ends.append(len(hashes))
            hash_D = np.frombuffer(hashes, np.uint64)
            order_D = np.argsort(hash_D, kind="stable")
            again = hash_D[order_D[1:]] == hash_D[order_D[:-1]]
            with open(path, "wb") as file:
                np.savez(file, left_out=np.sort(order_D[1:][again]), ends=ends)

        key = digest([self.fingerprint, PART_BYTES])
        with np.load(cached_file("duplicates", f"{key}.npz", find)) as found:
            left_out, ends = found["left_out"], found["ends"]
        pieces = np.split(left_out, np.searchsorted(left_out, ends[:-1]))
        return [piece - begin for piece, begin in zip(pieces, [0, *ends[:-1]], strict=True)]


def _hash(text: str) -> int:
    """64 bits."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _passes(source: Source) -> int:
    return math.ceil(source.weight)


def _content_digest(file: File) -> str:
    with opened(file.path) as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    file.check()
    return found
