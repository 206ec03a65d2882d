"""The token store: a tokenised corpus as flat arrays on disk, memory-mapped.

A store is a directory with `manifest.json` and little-endian arrays, each a bare file:

    ids               uint16, or uint32 where the vocabulary has more than 65,536 entries: token ids, end to end
    sentence_offsets  int64 [sentences + 1]: index of the first token of each sentence, and the number of tokens
    document_offsets  int64 [documents + 1]: index of the first sentence of each document, and the number of sentences
    document_bytes    int64 [documents]: UTF-8 bytes of each document's original text, before cleaning and lower-casing

Ids of words (ELMo's, `prelm_jax.tokenizers.words`) number every word of the corpus: first the vocabulary, then
those outside of it as they were met, on either side. Two more arrays spell them:

    word_bytes        uint8: the UTF-8 bytes of the words, end to end
    word_offsets      int64 [words + 1]: index of the first byte of each word, and the number of bytes

`prelm_jax.corpus.prepare` makes a store.
"""

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from prelm_jax.cache import digest
from prelm_jax.errors import InputError
from prelm_jax.storage import writing
from prelm_jax.tokenizers.characters import Spellings

FORMAT = 3  # raise it when the same corpus and tokenizer would give another store
COUNTED_AT_ONCE = 1 << 24
ARRAYS = ("ids", "sentence_offsets", "document_offsets", "document_bytes")
WORD_ARRAYS = ("word_bytes", "word_offsets")
PIECES = (
    "ids",
    "sentence_lengths",
    "document_lengths",
    "document_bytes",
    "unknown_tokens",
    "empty_documents",
    "longest_word",
)
QUANTILES = (0.5, 0.9, 0.99, 1.0)


class Store:
    """Token ids with the offsets of their sentences and documents; no sentence and no document is empty.

    `manifest` holds the counts (`documents`, `sentences`, `tokens`, `bytes`, `unknown_tokens`, and `empty_documents`,
    which were left out), the characters of the `longest_word` between white space, the fingerprints of corpus and
    tokenizer, and a checksum for each array. `words` spells each id where ids are words, else it is None.
    """

    def __init__(self, arrays: dict[str, np.ndarray], manifest: dict[str, Any]):
        self.ids = arrays["ids"]
        self.sentence_offsets = arrays["sentence_offsets"]
        self.document_offsets = arrays["document_offsets"]
        self.document_bytes = arrays["document_bytes"]
        self.words = Spellings(arrays["word_bytes"], arrays["word_offsets"]) if "word_bytes" in arrays else None
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

    def length_quantiles(self, unit: Literal["documents", "sentences"]) -> list[int]:
        """How many tokens at most have half of the documents or sentences, 90 %, 99 %, and all."""
        number = self.num_documents if unit == "documents" else self.num_sentences
        counts = np.zeros(1, np.int64)
        for start in range(0, number, COUNTED_AT_ONCE):
            piece = slice(start, start + COUNTED_AT_ONCE + 1)
            bounds = self.sentence_offsets[self.document_offsets[piece] if unit == "documents" else piece]
            found = np.bincount(np.diff(bounds), minlength=len(counts))
            found[: len(counts)] += counts
            counts = found
        return np.searchsorted(np.cumsum(counts), np.ceil(np.array(QUANTILES) * number)).tolist()

    @classmethod
    def from_documents(
        cls, documents: Iterable[Sequence[Sequence[int]]], words: Iterable[str] | None = None
    ) -> "Store":
        """A store in memory, of documents of sentences of ids, which are those of `words` if these are given.

        The sizes of the texts are not known: they are 0.
        """
        documents = [[sentence for sentence in document if len(sentence)] for document in documents]
        kept = [document for document in documents if document]
        sentences = list(itertools.chain.from_iterable(kept))
        arrays = {
            "ids": np.fromiter(itertools.chain.from_iterable(sentences), np.uint32),
            "sentence_offsets": np.cumsum([0, *map(len, sentences)], dtype=np.int64),
            "document_offsets": np.cumsum([0, *map(len, kept)], dtype=np.int64),
            "document_bytes": np.zeros(len(kept), np.int64),
        }
        if words is not None:
            arrays |= spelled(words)
        checksums = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}
        return cls(arrays, {"empty_documents": len(documents) - len(kept), "checksums": checksums})

    @classmethod
    def open(cls, directory: str | os.PathLike, verify: bool = False) -> "Store":
        """Maps a store that was prepared. Raises InputError if it is not whole.

        Its sizes are looked at; with `verify` all of it is read, to compare the checksums.
        """
        directory = Path(directory)
        again = f"delete {directory.parent} and run again"
        try:
            manifest = json.loads((directory / "manifest.json").read_bytes())
            lengths, dtypes, checksums = manifest["lengths"], manifest["dtypes"], manifest["checksums"]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{directory} is no complete token store ({error!r}): {again}") from None
        if manifest.get("format") != FORMAT:
            raise InputError(f"{directory} is a token store of another version of prelm_jax: {again}")
        arrays = {}
        for name in (*ARRAYS, *(name for name in WORD_ARRAYS if name in lengths)):
            path, dtype = directory / name, np.dtype(dtypes[name])
            size = path.stat().st_size if path.exists() else 0
            if size != lengths[name] * dtype.itemsize:
                raise InputError(f"{path} has {size} bytes, not {lengths[name] * dtype.itemsize}: {again}")
            if verify:
                with open(path, "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != checksums[name]:
                        raise InputError(f"{path} is damaged, its checksum is another: {again}")
            # An empty file cannot be mapped.
            arrays[name] = np.asarray(np.memmap(path, dtype, "r")) if size else np.empty(0, dtype)
        return cls(arrays, manifest)


def spelled(words: Iterable[str]) -> dict[str, np.ndarray]:
    """The arrays that spell words."""
    spellings = Spellings.of(words)
    return {"word_bytes": spellings.bytes, "word_offsets": spellings.offsets}


class Writer:
    """Writes a store from beginning to end, in pieces, with the counts and checksums of what was written."""

    def __init__(self, directory: Path, ids: Any, words: bool):
        directory.mkdir(parents=True)
        self.directory = directory
        dtypes = dict.fromkeys(ARRAYS, np.int64) | {"ids": ids}
        if words:
            dtypes |= {"word_bytes": np.uint8, "word_offsets": np.int64}
        self.dtypes = {name: np.dtype(dtype).newbyteorder("<") for name, dtype in dtypes.items()}
        self.checksums = {name: hashlib.sha256() for name in dtypes}
        self.lengths = dict.fromkeys(dtypes, 0)
        counted = ("documents", "sentences", "tokens", "bytes", "unknown_tokens", "empty_documents", "longest_word")
        self.counts = dict.fromkeys(counted, 0)
        self.write({name: np.zeros(int("offsets" in name), np.int64) for name in ARRAYS})

    def append(self, pieces: dict[str, np.ndarray]) -> None:
        """Appends documents. `pieces` are PIECES: the ids of all sentences end to end, the tokens of each sentence, the
        sentences of each document, its bytes; and counts, of which there may be several, for parts of the documents."""
        self.write(
            {
                "ids": pieces["ids"],
                "sentence_offsets": self.counts["tokens"] + np.cumsum(pieces["sentence_lengths"]),
                "document_offsets": self.counts["sentences"] + np.cumsum(pieces["document_lengths"]),
                "document_bytes": pieces["document_bytes"],
            }
        )
        self.counts["documents"] += len(pieces["document_lengths"])
        self.counts["sentences"] += len(pieces["sentence_lengths"])
        self.counts["tokens"] += len(pieces["ids"])
        self.counts["bytes"] += int(pieces["document_bytes"].sum())
        self.counts["unknown_tokens"] += int(pieces["unknown_tokens"].sum())
        self.counts["empty_documents"] += int(pieces["empty_documents"].sum())
        self.counts["longest_word"] = int(max(self.counts["longest_word"], *pieces["longest_word"]))

    def write(self, arrays: dict[str, np.ndarray]) -> None:
        """Appends to the arrays."""
        for name, array in arrays.items():
            data = array.astype(self.dtypes[name]).tobytes()
            with writing(self.directory / name), open(self.directory / name, "ab") as file:
                file.write(data)
            self.checksums[name].update(data)
            self.lengths[name] += len(array)

    def finish(self, origin: dict[str, str]) -> None:
        """Writes the manifest; `origin` says of what the store was made."""
        checksums = {name: checksum.hexdigest() for name, checksum in self.checksums.items()}
        dtypes = {name: dtype.str for name, dtype in self.dtypes.items()}
        arrays = {"lengths": self.lengths, "dtypes": dtypes, "checksums": checksums}
        path = self.directory / "manifest.json"
        with writing(path):
            path.write_text(json.dumps({"format": FORMAT, **origin, **self.counts, **arrays}, indent=2) + "\n")
