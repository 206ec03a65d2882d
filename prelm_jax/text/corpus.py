"""Documents from a SPEC, and which of them are held out.

A corpus is a list of sources. Each is `python-docs` (the prose inside every Python), a path or glob of text or
JSON-lines files (plain, .gz, .xz or .zst), or `tfds:name/config[:split]`, with options after commas:

    novels/*.txt.xz,documents=file,sentences=line

or, as on a command line, in the items that follow it.

`documents=blank-line|file|line` says where a document of a text file ends (the end of a file always ends one), and
`sentences=library|line` how its sentences are found (`prelm_jax.text.sentences`). Files are read as streams: no more
than one document is held at a time.
"""

import ast
import contextlib
import dataclasses
import functools
import glob
import gzip
import hashlib
import json
import lzma
import os
import re
import sys
import sysconfig
import time
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import zstandard
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from prelm_jax.errors import InputError

Side = Literal["training", "held_out"]
Advance = Callable[[float], None]  # told how many bytes of the source's files have been read since the last call

OPTIONS = {"documents": ("blank-line", "file", "line"), "sentences": ("library", "line")}
READING_VERSION = 1  # raise it when the same files would give other documents
CHUNK_BYTES = 1 << 20
DECOMPRESSORS = {".gz": gzip.open, ".xz": lzma.open}


class Document(NamedTuple):
    """One document: `text` with lines joined by "\\n", how its sentences are found, and the side it is on."""

    text: str
    sentences: str
    side: Side


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
                for text in source.texts(advance):
                    empty = False
                    drawn = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
                    document = Document(text, source.sentences, "held_out" if drawn < threshold else "training")
                    if side in (None, document.side):
                        yield document
        if empty:
            raise InputError(f"the corpus {' '.join(self.sources)} holds no text: give files with text in them")

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the content of the files, the options and the held-out fraction; not of the files' names.

        The content is read once: what was found is remembered in the cache directory by path, size and time of change.
        """
        files = [(source, path) for source in _parse(self.sources) for path in source.paths()]
        options = [READING_VERSION, self.held_out, [(source.options(), _endings(path)) for source, path in files]]
        stats = [(os.path.abspath(path), os.stat(path)) for _, path in files]
        states = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]

        def hash_content():
            return digest([options, [_file_digest(path) for _, path in files]])

        return cached("corpora", digest([options, states]), hash_content)


# ---- The cache directory ---------------------------------------------------------------------------------------------


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


def _file_digest(path: str) -> str:
    with _opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- SPECs -----------------------------------------------------------------------------------------------------------


class _Source(NamedTuple):
    spec: str
    documents: str | None = None
    sentences: str = "library"

    def options(self) -> list:
        """What decides the documents besides the files."""
        return [self.documents, self.sentences, self.spec if self.spec.startswith("tfds:") else None]

    def paths(self) -> list[str]:
        if self.spec == "python-docs":
            return _python_files()
        if self.spec.startswith("tfds:"):
            return _tfds_split(self.spec)[1]
        return _matching_files(self.spec)

    def texts(self, advance: Advance) -> Iterator[str]:
        if self.spec == "python-docs":
            documents = _python_docs()
            share = sum(map(os.path.getsize, self.paths())) / len(documents)
            for text in documents:
                yield text
                advance(share)
        elif self.spec.startswith("tfds:"):
            yield from _tfds_texts(self.spec, advance)
        else:
            yield from self._file_texts(advance)

    def _file_texts(self, advance: Advance) -> Iterator[str]:
        for path in self.paths():
            if _endings(path)[0]:
                yield from _json_texts(path, advance)
            else:
                yield from _plain_texts(path, self.documents or "blank-line", advance)


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
                raise InputError(f"{item}: no option is called {name}: the options are {' and '.join(OPTIONS)}")
            if value not in OPTIONS[name]:
                raise InputError(f"{item}: {name} is one of {', '.join(OPTIONS[name])}, not {value or 'nothing'}")
            sources[first:] = [source._replace(**{name: value}) for source in sources[first:]]
    if not sources:
        raise InputError("the corpus has no sources: give at least one file, python-docs or tfds:name")
    for source in sources:
        others = source.spec == "python-docs" or source.spec.startswith("tfds:") or _endings(source.spec)[0]
        if others and source.documents:
            raise InputError(f"{source.spec} is made of documents already: documents= is for files of plain text")
    return sources


def _endings(path: str) -> tuple[str | None, str | None]:
    """The endings of a file's name that decide how it is read: ".jsonl" or None, and ".gz", ".xz", ".zst" or None."""
    return re.search(r"(\.jsonl)?(\.gz|\.xz|\.zst)?$", path).groups()


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


# ---- Files -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    try:
        with open(path, "rb") as file:
            yield file
    except (EOFError, lzma.LZMAError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is damaged ({error}): copy or download it again") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def _chunks(path: str, advance: Advance) -> Iterator[bytes]:
    """The content of a file, decompressed."""
    compression = _endings(path)[1]
    with _opened(path) as file:
        if compression == ".zst":
            chunks = _zstandard_chunks(file)
        else:
            content = DECOMPRESSORS[compression](file) if compression else file
            chunks = iter(lambda: content.read(CHUNK_BYTES), b"")
        position = 0
        for chunk in chunks:
            yield chunk
            advance(file.tell() - position)
            position = file.tell()


def _zstandard_chunks(file) -> Iterator[bytes]:
    """The frames of a .zst file. The library's own reader takes a file that breaks off for one that ends."""
    frame = None
    while chunk := file.read(CHUNK_BYTES):
        while chunk:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(chunk)
            chunk = frame.unused_data
            if frame.eof:
                frame = None
    if frame:
        raise EOFError("the file breaks off")


def _lines(path: str, advance: Advance) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, each with its byte offset in the decompressed file, without the "\\n" that ends it."""
    offset, parts = 0, []
    for chunk in _chunks(path, advance):
        *ended, rest = chunk.split(b"\n")
        for end in ended:
            line = b"".join([*parts, end])
            yield offset, line
            offset += len(line) + 1
            parts = []
        parts.append(rest)
    if line := b"".join(parts):
        yield offset, line


def _decode(path: str, offset: int, data: bytes) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 at byte {offset + error.start}: convert the file") from None
    if offset == 0:
        text = text.removeprefix("\ufeff")
    return text.replace("\r\n", "\n").removesuffix("\r")


def _plain_texts(path: str, documents: str, advance: Advance) -> Iterator[str]:
    start, lines = 0, []
    for offset, line in _lines(path, advance):
        if not lines:
            start = offset
        lines.append(line)
        if documents == "line" or (documents == "blank-line" and not line.strip()):
            yield from _nonblank(_decode(path, start, b"\n".join(lines)))
            lines = []
    yield from _nonblank(_decode(path, start, b"\n".join(lines)))


def _nonblank(text: str) -> list[str]:
    return [text.strip("\n")] if text.strip() else []


def _json_texts(path: str, advance: Advance) -> Iterator[str]:
    for number, (offset, line) in enumerate(_lines(path, advance), start=1):
        if not (decoded := _decode(path, offset, line)).strip():
            continue
        try:
            text = json.loads(decoded)["text"]
            text.encode()  # a lone surrogate can be written in JSON, but it is no text
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
            raise InputError(f"{path}:{number} is not a JSON object with a string `text`: correct the line") from None
        yield from _nonblank(text.replace("\r\n", "\n"))


# ---- The prose inside every Python -----------------------------------------------------------------------------------


def _python_files() -> list[str]:
    """The source files of the standard library, without tests, installed packages and old tools."""
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo"}
    paths = []
    for folder, folders, files in os.walk(sysconfig.get_paths()["stdlib"]):
        folders[:] = sorted(set(folders) - left_out)
        paths += [os.path.join(folder, file) for file in sorted(files) if file.endswith(".py")]
    return paths


@functools.cache  # preparing reads a corpus several times, and to parse the library takes seconds
def _python_docs() -> list[str]:
    """A document for each topic of the language reference, then one for each module: its docstrings."""
    from pydoc_data.topics import topics

    texts = [_unwrap(topic) for _, topic in sorted(topics.items())]
    for path in _python_files():
        with _opened(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes in the file
            try:
                tree = ast.parse(file.read())
            except (SyntaxError, ValueError):
                continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = sorted((node for node in ast.walk(tree) if isinstance(node, documented)), key=_line_number)
        texts.append("\n".join(filter(None, (_unwrap(ast.get_docstring(node) or "") for node in nodes))))
    return [text for text in texts if text]


def _line_number(node: ast.AST) -> int:
    return getattr(node, "lineno", 0)  # a module has none


def _unwrap(text: str) -> str:
    """A paragraph on each line: lines of 50 characters or more were wrapped, so the next line continues them."""
    lines = [""]
    for line in map(str.strip, text.split("\n")):
        if len(lines[-1]) >= 50 and re.match(r"[\w\"'(`*]", line) and not line.startswith("* "):
            lines[-1] += " " + line
        elif re.search(r"\w", line):  # no underlines of headings
            lines.append(line)
        else:
            lines.append("")
    return "\n".join(filter(None, lines))


# ---- TensorFlow Datasets, without TensorFlow -------------------------------------------------------------------------


def _import_tfds():
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise InputError('tfds: needs TensorFlow Datasets: pip install "prelm_jax[tfds]"') from None
    return tfds


def _tfds_split(spec: str) -> tuple[Any, list[str]]:
    """The records of `tfds:name/config[:version][:split]` and the paths of the files that hold them."""
    name, split = re.fullmatch(r"tfds:([^:]*(?::\d+\.\d+\.\d+)?)(?::(.*))?", spec).groups()
    tfds = _import_tfds()
    try:
        builder = tfds.builder(name)
        records = builder.as_data_source(split=split or "train")
        paths = [os.fspath(path) for path in builder.info.splits[split or "train"].filepaths]
    except (ValueError, RuntimeError, AssertionError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{spec}: {reason} (looked in {tfds.core.constants.DATA_DIR}; set TFDS_DATA_DIR)") from error
    if "text" not in builder.info.features:
        raise InputError(f"{spec} has no feature `text`, only {', '.join(builder.info.features)}")
    return records, paths


def _tfds_texts(spec: str, advance: Advance) -> Iterator[str]:
    records, paths = _tfds_split(spec)
    record_bytes = sum(map(os.path.getsize, paths)) / max(len(records), 1)
    for index in range(len(records)):
        try:
            text = records[index]["text"].decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{spec}: record {index} is not UTF-8 at byte {error.start}") from None
        yield from _nonblank(text.replace("\r\n", "\n"))
        advance(record_bytes)


def tfds_builder(corpus: Corpus, name: str, data_dir: str | os.PathLike | None = None):
    """A TFDS builder whose `download_and_prepare()` writes the corpus as the dataset `name` (ArrayRecord, `train`).

    Both sides are written, in order; whoever reads `tfds:name` with the same held-out fraction finds the same documents
    on the same sides, because their text decides. TensorFlow is not needed, neither to write nor to read.
    """
    tfds = _import_tfds()
    with tfds.core.registered.skip_registration():  # a dataset that is read from its files, not from this class

        class Text(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            # No downloads; to look for their checksums, TFDS 4.9.10 would import a package that it does not require.
            url_infos = None

            def _info(self):
                features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
                return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                for index, document in enumerate(corpus.documents()):
                    yield index, {"text": document.text}

    Text.name = name
    return Text(data_dir=data_dir, file_format="array_record")


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
