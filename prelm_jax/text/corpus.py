"""Documents from a SPEC, and which of them are held out.

A corpus is a list of sources. Each is `python-docs` (the prose inside every Python), a path or glob of text or
JSON-lines files (plain, .gz, .xz or .zst), or `tfds:name/config[:split]`, with options after commas:

    novels/*.txt.xz,documents=file,sentences=line

or, as on a command line, in the items that follow it.

`documents=blank-line|file|line` says where a document of a text file ends (the end of a file always ends one), and
`sentences=library|line` how its sentences are found (`prelm_jax.text.sentences`). With `cleaning=gpt` documents are
cleaned as for GPT-1 (`prelm_jax.text.cleaning`; extra `cleaning`). Files are read as streams: no more than one document
is held at a time.
"""

import contextlib
import dataclasses
import functools
import glob
import hashlib
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from prelm_jax.errors import InputError
from prelm_jax.text import cleaning, python_docs, tfds
from prelm_jax.text.cache import cached, digest
from prelm_jax.text.files import Advance, endings, json_texts, opened, plain_texts

Side = Literal["training", "held_out"]

OPTIONS = {
    "documents": ("blank-line", "file", "line"),
    "sentences": ("library", "line"),
    "cleaning": ("none", "gpt"),
}
READING_VERSION = 1  # raise it when the same files would give other documents


class Document(NamedTuple):
    """One document: `text` with lines joined by "\\n", how its sentences are found, and the side it is on.

    `bytes`: of the text in UTF-8 before any cleaning.
    """

    text: str
    sentences: str
    side: Side
    bytes: int


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The documents of `sources`, a fraction of them (`held_out`, 0 to 1) kept from training.

    The side of a document is decided by a hash of its text, so it depends neither on the order of the documents nor on
    what else is in the corpus, and equal documents are on one side.

    Raises InputError for a SPEC that is not understood, here; and for files that cannot be read, when they are read.
    """

    sources: tuple[str, ...]
    held_out: float = 0.0

    def __post_init__(self):
        if not 0 <= self.held_out <= 1:
            raise InputError(f"held_out is a fraction of the documents, from 0 to 1, not {self.held_out}")
        _parse(self.sources)

    def documents(self, side: Side | None = None, task: str | None = None) -> Iterator[Document]:
        """The documents of one side (both sides if None), in the order of the sources, sorted files and lines.

        With `task`, a few words that name the work, its progress is shown on the standard error.
        """
        sources = _parse(self.sources)
        threshold = int(self.held_out * 2**64)
        total = sum(os.path.getsize(path) for source in sources for path in source.paths())
        empty = True
        with _progress(task, total) as advance:
            for source in sources:
                for original in source.texts(advance):
                    empty = False
                    text = original if source.cleaning == "none" else cleaning.clean(original)
                    drawn = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
                    drawn_side = "held_out" if drawn < threshold else "training"
                    if side in (None, drawn_side):
                        yield Document(text, source.sentences, drawn_side, len(original.encode()))
        if empty:
            raise InputError(f"the corpus {' '.join(self.sources)} holds no text: give files with text in them")

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the content of the files, the options and the held-out fraction; not of the files' names.

        The content is read once: what was found is remembered in the cache directory by path, size and time of change.
        """
        files = [(source, path) for source in _parse(self.sources) for path in source.paths()]
        options = [READING_VERSION, self.held_out, [(source.options(), endings(path)) for source, path in files]]
        stats = [(os.path.abspath(path), os.stat(path)) for _, path in files]
        states = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]

        def hash_content():
            return digest([options, [_file_digest(path) for _, path in files]])

        return cached("corpora", digest([options, states]), hash_content)


def _file_digest(path: str) -> str:
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- SPECs -----------------------------------------------------------------------------------------------------------


class _Source(NamedTuple):
    spec: str
    documents: str | None = None
    sentences: str = "library"
    cleaning: str = "none"

    def options(self) -> list:
        """What decides the documents besides the files."""
        options = [self.documents, self.sentences, self.spec if self.spec.startswith("tfds:") else None]
        return options if self.cleaning == "none" else [*options, self.cleaning, cleaning.version()]

    def paths(self) -> list[str]:
        if self.spec == "python-docs":
            return python_docs.files()
        if self.spec.startswith("tfds:"):
            return tfds.split(self.spec)[1]
        return _matching_files(self.spec)

    def texts(self, advance: Advance) -> Iterator[str]:
        """The documents as they stand there, not cleaned."""
        if self.spec == "python-docs":
            documents = python_docs.documents()
            share = sum(map(os.path.getsize, self.paths())) / len(documents)
            for text in documents:
                yield text
                advance(share)
        elif self.spec.startswith("tfds:"):
            yield from tfds.texts(self.spec, advance)
        else:
            for path in self.paths():
                if endings(path)[0]:
                    yield from json_texts(path, advance)
                else:
                    yield from plain_texts(path, self.documents or "blank-line", advance)


def _parse(specs: Iterable[str]) -> list[_Source]:
    """The sources of a corpus.

    An item that holds only options belongs to the sources before it, back to the last options: a shell may have made
    many items of one glob.
    """
    option = r"[A-Za-z_-]+=[^,/]*"
    sources: list[_Source] = []
    first, options = 0, ""  # where the sources begin that the next options are for; the options of the item before
    for item in specs:
        if re.fullmatch(rf"{option}(,{option})*", item):
            if not sources:
                raise InputError(f"the option {item} stands before any source: write a source first, then its options")
            options = item
        else:
            after_options = options
            spec, options = re.fullmatch(rf"(.*?)((?:,{option})*)", item, re.DOTALL).groups()
            if options or after_options:
                first = len(sources)
            sources.append(_Source(spec))
        for name, _, value in (text.partition("=") for text in options.split(",") if text):
            if name not in OPTIONS:
                raise InputError(f"{item}: no option is called {name}: the options are {', '.join(OPTIONS)}")
            if value not in OPTIONS[name]:
                raise InputError(f"{item}: {name} is one of {', '.join(OPTIONS[name])}, not {value or 'nothing'}")
            sources[first:] = [source._replace(**{name: value}) for source in sources[first:]]
    if not sources:
        raise InputError("the corpus has no sources: give at least one file, python-docs or tfds:name")
    for source in sources:
        others = source.spec == "python-docs" or source.spec.startswith("tfds:") or endings(source.spec)[0]
        if others and source.documents:
            raise InputError(f"{source.spec} is made of documents already: documents= is for files of plain text")
    return sources


def _matching_files(spec: str) -> list[str]:
    path = os.path.expanduser(spec)
    if os.path.isdir(path):
        raise InputError(f"{spec} is a directory: give its files, for example {os.path.join(spec, '*.txt')}")
    if os.path.exists(path):
        return [path]
    if not glob.has_magic(path):
        raise InputError(f"there is no file {spec}: give a path, a glob, python-docs or tfds:name")
    if matches := sorted(filter(os.path.isfile, glob.glob(path, recursive=True))):
        return matches
    raise InputError(f"no file matches {spec}")


# ---- Progress --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _progress(task: str | None, total: int) -> Iterator[Advance]:
    """A bar where the standard error is a terminal, else a line every ten seconds."""
    if task is None:
        yield lambda size: None
    elif sys.stderr.isatty():
        words = TextColumn("{task.description}")
        columns = (words, BarColumn(), TaskProgressColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            identifier = bar.add_task(task, total=total)
            yield lambda size: bar.advance(identifier, size)
    else:
        started = reported = time.monotonic()
        read = 0.0

        def report():
            speed = read / 1e6 / max(time.monotonic() - started, 1e-9)
            print(f"{task}: {read / 1e6:.1f} of {total / 1e6:.1f} MB read, {speed:.1f} MB/s", file=sys.stderr)

        def advance(size: float):
            nonlocal read, reported
            read += size
            if time.monotonic() - reported >= 10:
                reported = time.monotonic()
                report()

        yield advance
        report()
