"""Where documents come from: SPECs (see `prelm_jax.corpus.documents`), and the files or records that they name."""

import glob
import math
import os
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from prelm_jax.corpus import cleaning, python_docs, tfds
from prelm_jax.corpus.readers import Errors, File, endings, json_texts, parquet_texts, plain_texts
from prelm_jax.errors import InputError
from prelm_jax.progress import Advance

CHOICES = {
    "documents": ("blank-line", "file", "line"),
    "sentences": ("library", "line"),
    "cleaning": ("none", "gpt"),
}
OPTIONS = (*CHOICES, "field", "weight")

PART_BYTES = 1 << 26


class Source(NamedTuple):
    """A SPEC without its options, and the options."""

    spec: str
    documents: str | None = None
    sentences: str = "library"
    cleaning: str = "none"
    field: str = "text"
    weight: float = 1.0

    def options(self) -> list:
        """What decides the documents besides the files."""
        options = [self.documents, self.sentences, self.spec if self.spec.startswith("tfds:") else None]
        if self.cleaning != "none":
            options += [self.cleaning, cleaning.version()]
        return [*options, self.field, self.weight]

    def files(self) -> list[File]:
        if self.spec == "python-docs":
            paths = python_docs.files()
        elif self.spec.startswith("tfds:"):
            paths = tfds.split(self.spec, self.field)[1]
        else:
            paths = _matching_files(self.spec)
        return [File.at(path) for path in paths]

    def parts(self, files: list[File]) -> Iterator["Part"]:
        """All of the source, in one pass. A part depends on the files alone."""
        if self.spec == "python-docs":
            yield Part(self, files)
        elif self.spec.startswith("tfds:"):
            records = range(len(tfds.split(self.spec, self.field)[0]))
            number = max(1, math.ceil(sum(file.size for file in files) / PART_BYTES))
            for i in range(number):
                yield Part(self, files, records[len(records) * i // number : len(records) * (i + 1) // number])
        else:
            group: list[File] = []
            size = 0
            for file in files:
                if group and size + file.size > PART_BYTES:
                    yield Part(self, group)
                    group, size = [], 0
                group.append(file)
                size += file.size
            yield Part(self, group)


class Part(NamedTuple):
    """What is read as one stream: files of a source, or some records of a TFDS dataset, in one of the passes over it.

    `left_out` are the numbers, counted in the part, of the documents that are not read: duplicates.
    """

    source: Source
    files: list[File]
    records: range | None = None
    repetition: int = 0
    left_out: np.ndarray = np.array([], np.int64)

    def texts(self, errors: Errors, advance: Advance = lambda size: None) -> Iterator[str]:
        """The documents as they stand there, not cleaned."""
        left_out = set(self.left_out.tolist())
        return (text for number, text in enumerate(self._texts(errors, advance)) if number not in left_out)

    def _texts(self, errors: Errors, advance: Advance) -> Iterator[str]:
        source = self.source
        if source.spec == "python-docs":
            documents = python_docs.documents()
            share = sum(file.size for file in self.files) / len(documents)
            for text in documents:
                yield text
                advance(share)
        elif self.records is not None:
            yield from tfds.texts(source.spec, source.field, self.records, errors, advance)
            for file in self.files:
                file.check()
        else:
            for file in self.files:
                kind = endings(file.path)[0]
                if kind == ".jsonl":
                    yield from json_texts(file, source.field, errors, advance)
                elif kind == ".parquet":
                    yield from parquet_texts(file, source.field, errors, advance)
                else:
                    yield from plain_texts(file, source.documents or "blank-line", errors, advance)


def parse(specs: Iterable[str]) -> list[Source]:
    """The sources of a corpus.

    An item that holds only options belongs to the sources before it, back to the last options: a shell may have made
    many items of one glob.
    """
    option = r"[A-Za-z_-]+=[^,/]*"
    sources: list[Source] = []
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
            sources.append(Source(spec))
        for name, _, text in (text.partition("=") for text in options.split(",") if text):
            value = _option(item, name, text)
            sources[first:] = [source._replace(**{name: value}) for source in sources[first:]]
    if not sources:
        raise InputError("the corpus has no sources: give at least one file, python-docs or tfds:name")
    for source in sources:
        named = source.spec.startswith("tfds:") or endings(source.spec)[0]
        if source.documents and (named or source.spec == "python-docs"):
            raise InputError(f"{source.spec} is made of documents already: documents= is for files of plain text")
        if source.field != "text" and not named:
            raise InputError(f"{source.spec} has no fields: field= is for .jsonl, .parquet and tfds:")
        if endings(source.spec)[0] == ".parquet" and endings(source.spec)[1]:
            raise InputError(f"{source.spec}: Parquet is compressed inside: unpack the file")
    return sources


def _option(item: str, name: str, text: str) -> str | float:
    if name not in OPTIONS:
        raise InputError(f"{item}: no option is called {name}: the options are {', '.join(OPTIONS)}")
    if name in CHOICES and text not in CHOICES[name]:
        raise InputError(f"{item}: {name} is one of {', '.join(CHOICES[name])}, not {text or 'nothing'}")
    if name == "field" and not text:
        raise InputError(f"{item}: field is the name of a field, not nothing")
    if name != "weight":
        return text
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise InputError(f"{item}: weight is a number above 0, not {text or 'nothing'}")
    return weight


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
