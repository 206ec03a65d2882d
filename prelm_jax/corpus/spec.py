"""SPECs: one source of documents and its options, as written on the command line.

    LOCATION[,OPTION=VALUE]...        novels/*.txt.xz,documents=file,sentences=line

LOCATION is a path or glob, `tfds:name/config[:version][:split]`, or `python-docs`. A path that itself begins with the
name of an option is written with its directory: `./field=notes.txt`. One that ends like an option is written as a glob:
`a[,]b=1.txt` is the file `a,b=1.txt`.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, get_args

from prelm_jax.corpus import cleaning
from prelm_jax.corpus.readers import JSON_LINES, PARQUET, endings
from prelm_jax.corpus.sentences import LANGUAGES
from prelm_jax.errors import InputError

Boundary = Literal["blank-line", "file", "line"]
Splitting = Literal["library", "line"]
Cleaning = Literal["none", "gpt"]
CHOICES = {
    "documents": get_args(Boundary),
    "sentences": get_args(Splitting),
    "language": tuple(LANGUAGES),
    "cleaning": get_args(Cleaning),
}

MAX_WEIGHT = 1000


@dataclasses.dataclass(frozen=True)
class Spec:
    """A parsed SPEC. Example: `parse(["a.jsonl,field=body"]) == [Spec("a.jsonl", field="body")]`."""

    location: str
    documents: Boundary = "blank-line"  # Where a document of a text file ends; the end of a file always ends one.
    sentences: Splitting = "library"  # How sentences are found, see `prelm_jax.corpus.sentences`.
    language: str = "en"  # Whose rules the library follows.
    cleaning: Cleaning = "none"  # gpt: clean documents as GPT-1 did, see `prelm_jax.corpus.cleaning`.
    field: str = "text"  # Name of the text field of JSON lines, Parquet and TFDS.
    weight: float = 1.0  # Passes over the training documents; 2.5: two passes, then half of the documents.

    @property
    def is_tfds(self) -> bool:
        return self.location.startswith("tfds:")

    @property
    def is_python_docs(self) -> bool:
        return self.location == "python-docs"

    @property
    def passes(self) -> int:
        """Number of times that the source is read; the last pass may leave documents out."""
        return math.ceil(self.weight)

    def identity(self) -> list[object]:
        """The options that decide the documents, and the records of a TFDS; not where the files are."""
        version = cleaning.version() if self.cleaning == "gpt" else None
        options = dataclasses.asdict(self) | {"location": self.location if self.is_tfds else None}
        if options["language"] == "en":
            del options["language"]  # So that corpora keep the fingerprints that they had before there was the option.
        return [*options.values(), version]


OPTIONS = tuple(field.name for field in dataclasses.fields(Spec))[1:]


def parse(items: Iterable[str]) -> list[Spec]:
    """The SPECs of a corpus. Raises InputError for an unknown option, a wrong value, or no SPEC at all."""
    specs = [_parse(item) for item in items]
    if not specs:
        raise InputError("the corpus has no sources: give at least one file, python-docs or tfds:name")
    return specs


def split_options(item: str, names: Sequence[str]) -> tuple[str, dict[str, str]]:
    """LOCATION and options of a SPEC. Raises InputError for an unknown option, and where the location is missing."""
    if item.partition("=")[0] in names and "=" in item:
        raise InputError(f"{item} has no source: options follow a source after commas: SOURCE,{item}")
    # The longest ending that is nothing but options: a path may hold commas too.
    suffix = re.findall(r"(?:,[A-Za-z_-]+=[^,/]*)*\Z", item)[0]
    location, options = item.removesuffix(suffix), dict(text.split("=", 1) for text in suffix.split(",")[1:])
    for name in options:
        if name not in names:
            raise InputError(
                f"{item}: no option is called {name}: the options are {', '.join(names)}; in the name of a file, "
                "write [,] for the comma"
            )
    return location, options


def _parse(item: str) -> Spec:
    location, options = split_options(item, OPTIONS)
    build: Callable[..., Spec] = Spec
    spec = build(location, **{name: _value(item, name, text) for name, text in options.items()})
    kind, compression = endings(location)
    if "documents" in options and (kind or spec.is_tfds or spec.is_python_docs):
        raise InputError(f"{item}: {location} consists of documents already: documents= is for plain text files")
    if "field" in options and not (kind or spec.is_tfds):
        raise InputError(f"{item}: {location} has no fields: field= is for {JSON_LINES}, {PARQUET} and tfds:")
    if "language" in options and spec.sentences == "line":
        raise InputError(f"{item}: language= is for sentences=library: each line is a sentence in any language")
    if not spec.field:
        raise InputError(f"{item}: field is the name of a field, not nothing")
    if kind == PARQUET and compression:
        raise InputError(f"{item}: Parquet is compressed inside: unpack the file")
    return spec


def _value(item: str, name: str, text: str) -> str | float:
    if name in CHOICES and text not in CHOICES[name]:
        hint = _nearest_language(text) if name == "language" else ""
        raise InputError(f"{item}: {name} is one of {', '.join(CHOICES[name])}, not {text or 'nothing'}{hint}")
    if name != "weight":
        return text
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight <= MAX_WEIGHT:
        raise InputError(f"{item}: weight is a number above 0, at most {MAX_WEIGHT}, not {text or 'nothing'}")
    return weight


def _nearest_language(text: str) -> str:
    """` (did you mean de?)` for `deu`, `de-AT`, `German`; for a language without rules, what to do."""
    names = {name.lower(): code for code, name in LANGUAGES.items()}
    words = [text.lower(), re.split("[-_]", text.lower())[0]]
    for word in words:
        if near := difflib.get_close_matches(word, [*LANGUAGES, *names], 1):
            return f" (did you mean {names.get(near[0], near[0])}?)"
    return "; leave it out for a language without rules of its own"
