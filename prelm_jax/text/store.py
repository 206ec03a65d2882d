"""The token store: a tokenised corpus as flat arrays on disk, memory-mapped.

A store is a directory with `manifest.json` and four little-endian arrays, each a bare file:

    ids               uint16, or uint32 where the vocabulary has more than 65,536 entries: token ids, end to end
    sentence_offsets  int64 [sentences + 1]: index of the first token of each sentence, and the number of tokens
    document_offsets  int64 [documents + 1]: index of the first sentence of each document, and the number of sentences
    document_bytes    int64 [documents]: UTF-8 bytes of each document's original text, before cleaning and lower-casing

The arrays are written from beginning to end while the corpus is read, so preparing holds a batch of documents in
memory, never the corpus.
"""

import functools
import hashlib
import itertools
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from prelm_jax.errors import InputError
from prelm_jax.text.cache import cache_directory, digest
from prelm_jax.text.corpus import Corpus, Document, Side
from prelm_jax.text.sentences import split
from prelm_jax.text.tokenizer import Tokenizer

FORMAT = 2  # raise it when the same corpus and tokenizer would give another store
BATCH_CHARACTERS = 4_000_000
COUNTED_AT_ONCE = 1 << 24
ARRAYS = ("ids", "sentence_offsets", "document_offsets", "document_bytes")


class Store:
    """Token ids with the offsets of their sentences and documents; no sentence and no document is empty.

    `manifest` holds the counts (`documents`, `sentences`, `tokens`, `bytes`, `unknown_tokens`, and `empty_documents`,
    which were left out), the fingerprints of corpus and tokenizer, and a checksum for each array.
    """

    def __init__(self, arrays: dict[str, np.ndarray], manifest: dict[str, Any]):
        self.ids = arrays["ids"]
        self.sentence_offsets = arrays["sentence_offsets"]
        self.document_offsets = arrays["document_offsets"]
        self.document_bytes = arrays["document_bytes"]
        self.manifest = manifest

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the manifest, and so of all that the store holds and where it comes from."""
        return digest(self.manifest)

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def num_sentences(self) -> int:
        return len(self.sentence_offsets) - 1

    @property
    def num_documents(self) -> int:
        return len(self.document_bytes)

    def gather(self, positions: np.ndarray) -> np.ndarray:
        """The ids (int32) at token indices of any shape."""
        return self.ids[positions].astype(np.int32)

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """int64 [vocab_size]: how often each id occurs."""
        counts = np.zeros(vocab_size, np.int64)
        for start in range(0, self.num_tokens, COUNTED_AT_ONCE):
            counts += np.bincount(self.ids[start : start + COUNTED_AT_ONCE], minlength=vocab_size)
        return counts

    @classmethod
    def from_documents(cls, documents: Iterable[Sequence[Sequence[int]]]) -> "Store":
        """A store in memory, of documents of sentences of ids. The sizes of the texts are not known: they are 0."""
        parts, empty = _flatten(((document, 0) for document in documents), np.uint32)
        arrays = {name: np.concatenate([[0], part]) if "offsets" in name else part for name, part in parts.items()}
        checksums = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}
        return cls(arrays, {"empty_documents": empty, "checksums": checksums})

    @classmethod
    def open(cls, directory: str | os.PathLike) -> "Store":
        """Maps a store that `prepare` wrote. Raises InputError if it is not complete."""
        directory = Path(directory)
        again = f"delete {directory.parent} and run again"
        try:
            manifest = json.loads((directory / "manifest.json").read_bytes())
            lengths, dtypes = manifest["lengths"], manifest["dtypes"]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{directory} is no complete token store ({error!r}): {again}") from None
        arrays = {}
        for name in ARRAYS:
            path, dtype = directory / name, np.dtype(dtypes[name])
            size = path.stat().st_size if path.exists() else 0
            if size != lengths[name] * dtype.itemsize:
                raise InputError(f"{path} has {size} bytes, not {lengths[name] * dtype.itemsize}: {again}")
            # An empty file cannot be mapped.
            arrays[name] = np.asarray(np.memmap(path, dtype, "r")) if size else np.empty(0, dtype)
        return cls(arrays, manifest)


def prepare(corpus: Corpus, tokenizer: Tokenizer, directory: str | os.PathLike | None = None) -> tuple[Store, Store]:
    """The stores of the corpus' training and held-out sides.

    They are made once and kept in `directory` (by default the cache directory), by the fingerprints of corpus and
    tokenizer. Raises InputError if the corpus cannot be read or has no tokens.
    """
    key = digest([FORMAT, corpus.fingerprint, tokenizer.fingerprint])
    target = Path(directory or cache_directory()) / "stores" / key
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".unfinished-{uuid.uuid4().hex}")
        unfinished.mkdir()
        try:
            _write(corpus, tokenizer, unfinished)
            unfinished.rename(target)
        except OSError:
            if not target.exists():  # else another process was faster, with the same store
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    training, held_out = (Store.open(target / side) for side in get_args(Side))
    return training, held_out


def _write(corpus: Corpus, tokenizer: Tokenizer, directory: Path) -> None:
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    writers = {side: _Writer(directory / side, dtype) for side in get_args(Side)}
    for batch in _batches(corpus.documents(task="tokenising")):
        sentences = [split(document.text, document.sentences) for document in batch]
        encoded = iter(tokenizer.encode_batch(list(itertools.chain.from_iterable(sentences))))
        documents: dict[Side, list] = {side: [] for side in writers}
        for document, parts in zip(batch, sentences, strict=True):
            ids = list(itertools.islice(encoded, len(parts)))
            documents[document.side].append((ids, document.bytes))
        for side, writer in writers.items():
            writer.append(documents[side], tokenizer.unknown_id)
    if not any(writer.counts["tokens"] for writer in writers.values()):
        raise InputError(f"the corpus {' '.join(corpus.sources)} has no tokens: nothing in it is text to the tokenizer")
    for side, writer in writers.items():
        writer.finish({"corpus": corpus.fingerprint, "tokenizer": tokenizer.fingerprint, "side": side})


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _flatten(documents: Iterable[tuple[Sequence[Sequence[int]], int]], dtype) -> tuple[dict[str, np.ndarray], int]:
    """The arrays of documents (sentences, bytes), offsets without the leading 0; and how many documents were empty."""
    kept, empty = [], 0
    for sentences, size in documents:
        if sentences := [sentence for sentence in sentences if len(sentence)]:
            kept.append((sentences, size))
        else:
            empty += 1
    sentences = [sentence for document, _ in kept for sentence in document]
    arrays = {
        "ids": np.fromiter(itertools.chain.from_iterable(sentences), dtype),
        "sentence_offsets": np.cumsum([len(sentence) for sentence in sentences], dtype=np.int64),
        "document_offsets": np.cumsum([len(document) for document, _ in kept], dtype=np.int64),
        "document_bytes": np.array([size for _, size in kept], np.int64),
    }
    return arrays, empty


class _Writer:
    """Appends documents to the arrays of one side."""

    def __init__(self, directory: Path, dtype):
        directory.mkdir()
        self.directory = directory
        self.dtypes = {name: np.dtype(dtype if name == "ids" else np.int64).newbyteorder("<") for name in ARRAYS}
        self.checksums = {name: hashlib.sha256() for name in ARRAYS}
        self.lengths = dict.fromkeys(ARRAYS, 0)
        names = ("documents", "sentences", "tokens", "bytes", "unknown_tokens", "empty_documents")
        self.counts = dict.fromkeys(names, 0)
        self._write({name: np.zeros(int("offsets" in name), np.int64) for name in ARRAYS})

    def append(self, documents: list[tuple[list[list[int]], int]], unknown_id: int | None) -> None:
        arrays, empty = _flatten(documents, self.dtypes["ids"])
        arrays["sentence_offsets"] += self.counts["tokens"]
        arrays["document_offsets"] += self.counts["sentences"]
        self._write(arrays)
        self.counts["documents"] += len(arrays["document_bytes"])
        self.counts["sentences"] += len(arrays["sentence_offsets"])
        self.counts["tokens"] += len(arrays["ids"])
        self.counts["bytes"] += int(arrays["document_bytes"].sum())
        self.counts["unknown_tokens"] += int((arrays["ids"] == unknown_id).sum()) if unknown_id is not None else 0
        self.counts["empty_documents"] += empty

    def _write(self, arrays: dict[str, np.ndarray]) -> None:
        for name, array in arrays.items():
            data = array.astype(self.dtypes[name]).tobytes()
            with open(self.directory / name, "ab") as file:
                file.write(data)
            self.checksums[name].update(data)
            self.lengths[name] += len(array)

    def finish(self, origin: dict[str, str]) -> None:
        checksums = {name: checksum.hexdigest() for name, checksum in self.checksums.items()}
        dtypes = {name: dtype.str for name, dtype in self.dtypes.items()}
        manifest = {**origin, **self.counts, "lengths": self.lengths, "dtypes": dtypes, "checksums": checksums}
        (self.directory / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
