"""The token store: a tokenized corpus as flat arrays on disk, memory-mapped.

A store is a directory with `manifest.json` and little-endian arrays, each a bare file:

    ids               uint16, or uint32 where the vocabulary has more than 65,536 entries: token ids, end to end
    sentence_offsets  int64 [sentences + 1]: index of the first token of each sentence, and the number of tokens
    document_offsets  int64 [documents + 1]: index of the first sentence of each document, and the number of sentences
    document_bytes    int64 [documents]: UTF-8 bytes of each document's original text, before cleaning and lower-casing

With an open vocabulary (ELMo's, `prelm_jax.tokenizers.words`) every distinct word of the corpus has an id: first the
vocabulary, then other words in order of appearance on either side. Two more arrays spell them:

    word_bytes        uint8: the UTF-8 bytes of the words, end to end
    word_offsets      int64 [words + 1]: index of the first byte of each word, and the number of bytes

The documents [[5, 6] [7]] [[8]] of ids are `ids` 5 6 7 8, `sentence_offsets` 0 2 3 4, `document_offsets` 0 2 3.

`prelm_jax.corpus.prepare` makes stores. Letters at the end of a name in `corpus` are the axes of an array: X documents,
Y sentences, W distinct words. Flat arrays of tokens have none.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, Self

import numpy as np

from prelm_jax.cache import digest
from prelm_jax.errors import InputError
from prelm_jax.storage import opened, writing
from prelm_jax.tokenizers.characters import Spellings

STORE_FORMAT = 5  # Raise it when the arrays or the manifest change.
CHUNK_ITEMS = 1 << 24  # Counted in memory at once.
ARRAYS = ("ids", "sentence_offsets", "document_offsets", "document_bytes")
WORD_ARRAYS = ("word_bytes", "word_offsets")
# The arguments of `Writer.append`: arrays of consecutive documents, and arrays of counts to sum up.
COLUMNS = ("ids", "sentence_lengths", "document_lengths", "document_bytes")
COUNTS = ("words", "unknown_tokens", "empty_documents", "longest_word")
QUANTILES = (0.5, 0.9, 0.99, 1.0)


class DamagedStore(InputError):
    """A token store that is not whole; one that this user may not read is another InputError."""


class Store:
    """Token ids with the offsets of their sentences and documents; no sentence and no document is empty.

    `spellings` spells each id of an open vocabulary, else it is None. `manifest` holds

        documents, sentences, tokens      counts
        bytes, words                      UTF-8 bytes and words (`prepare.count_words`) of the original documents
        unknown_tokens                    tokens that are unknown to the vocabulary
        empty_documents                   documents left out because they have no tokens
        longest_word                      characters of the longest run without white space
        corpus, tokenizer, side           fingerprints, and "training" or "held_out"
        format                            STORE_FORMAT
        lengths, dtypes, checksums        of each array; checksums are SHA-256 (hex)

    and in the file `checksum`, of all the rest.
    """

    def __init__(self, arrays: dict[str, np.ndarray], manifest: dict):
        self.ids = arrays["ids"]
        self.sentence_offsets = arrays["sentence_offsets"]
        self.document_offsets = arrays["document_offsets"]
        self.document_bytes = arrays["document_bytes"]
        self.spellings = Spellings(arrays["word_bytes"], arrays["word_offsets"]) if "word_bytes" in arrays else None
        self.manifest = manifest

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the manifest, whose checksums and fingerprints cover content and origin."""
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

    @property
    def num_words(self) -> int:
        """Words of the original documents, by which runs with different tokenizers compare; 0 in memory."""
        return self.manifest["words"]

    @property
    def unknown_rate(self) -> float:
        """The fraction of tokens that the vocabulary cannot spell."""
        return self.manifest["unknown_tokens"] / max(self.num_tokens, 1)

    @property
    def tokens_per_word(self) -> float:
        return self.num_tokens / max(self.num_words, 1)

    def gather(self, positions: np.ndarray) -> np.ndarray:
        """The ids (int32) at token indices of any shape."""
        return self.ids[positions].astype(np.int32)

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """int64 [vocab_size]: how often each id occurs."""
        counts = np.zeros(vocab_size, np.int64)
        for start in range(0, self.num_tokens, CHUNK_ITEMS):
            counts += np.bincount(self.ids[start : start + CHUNK_ITEMS], minlength=vocab_size)
        return counts

    def length_quantiles(self, unit: Literal["documents", "sentences"]) -> list[int]:
        """The lengths in tokens that half, 90 %, 99 % and all of the documents or sentences do not exceed."""
        number = self.num_documents if unit == "documents" else self.num_sentences
        counts = np.zeros(1, np.int64)
        for start in range(0, number, CHUNK_ITEMS):
            chunk = slice(start, start + CHUNK_ITEMS + 1)
            bounds = self.sentence_offsets[self.document_offsets[chunk] if unit == "documents" else chunk]
            found = np.bincount(np.diff(bounds), minlength=len(counts))
            found[: len(counts)] += counts
            counts = found
        return np.searchsorted(np.cumsum(counts), np.ceil(np.array(QUANTILES) * number)).tolist()

    def count_of_length_one(self, unit: Literal["documents", "sentences"]) -> int:
        """How many documents have one sentence, or sentences one token."""
        offsets = self.document_offsets if unit == "documents" else self.sentence_offsets
        starts = range(0, len(offsets) - 1, CHUNK_ITEMS)
        return sum(int((np.diff(offsets[start : start + CHUNK_ITEMS + 1]) == 1).sum()) for start in starts)

    @classmethod
    def from_documents(cls, documents: Iterable[Sequence[Sequence[int]]], words: Iterable[str] | None = None) -> Self:
        """A store in memory, from documents of sentences of ids; `words` spells the ids of an open vocabulary.

        Bytes and words of the original texts are unknown, and 0.

            Store.from_documents([[[5, 6], [7]], [[8]]])
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
        return cls(arrays, {"words": 0, "empty_documents": len(documents) - len(kept), "checksums": checksums})

    @classmethod
    def open(cls, directory: str | os.PathLike) -> Self:
        """Memory-maps a store after its checksums were verified, a second or less for each GB.

        Raises DamagedStore if something is missing or differs.
        """
        directory = Path(directory)
        manifest = _read_manifest(directory / "manifest.json")
        arrays = {}
        for name, length in manifest["lengths"].items():
            path, dtype = directory / name, np.dtype(manifest["dtypes"][name])
            size = path.stat().st_size if path.is_file() else 0
            if size != length * dtype.itemsize:
                raise DamagedStore(f"{path} has {size} bytes, not {length * dtype.itemsize}")
            if size == 0:  # An empty file cannot be mapped.
                arrays[name] = np.empty(0, dtype)
                continue
            with opened(path) as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != manifest["checksums"][name]:
                    raise DamagedStore(f"{path} is damaged (its checksum differs)")
            arrays[name] = np.asarray(np.memmap(path, dtype, "r"))
        return cls(arrays, manifest)


def _read_manifest(path: Path) -> dict:
    """The manifest as it was written, without its checksum."""
    if not path.is_file():
        raise DamagedStore(f"{path} is missing")
    with opened(path) as file:
        content = file.read()
    with contextlib.suppress(ValueError, RecursionError, TypeError, KeyError, AttributeError):
        manifest = json.loads(content)
        if manifest.pop("checksum") == digest(manifest) and manifest["format"] == STORE_FORMAT:
            return manifest
    raise DamagedStore(f"{path} is damaged, or of another version of prelm_jax")


def spelled(words: Iterable[str]) -> dict[str, np.ndarray]:
    """The arrays that spell words."""
    spellings = Spellings.of(words)
    return {"word_bytes": spellings.bytes, "word_offsets": spellings.offsets}


class Writer:
    """Writes a store sequentially, and counts and checksums its content."""

    def __init__(self, directory: Path, id_dtype: type[np.integer], words: bool):
        directory.mkdir(parents=True)
        self.directory = directory
        dtypes = dict.fromkeys(ARRAYS, np.int64) | {"ids": id_dtype}
        if words:
            dtypes |= dict(zip(WORD_ARRAYS, (np.uint8, np.int64), strict=True))
        self.dtypes = {name: np.dtype(dtype).newbyteorder("<") for name, dtype in dtypes.items()}
        self.checksums = {name: hashlib.sha256() for name in dtypes}
        self.lengths = dict.fromkeys(dtypes, 0)
        self.counts = dict.fromkeys(("documents", "sentences", "tokens", "bytes", *COUNTS), 0)
        self.write({name: np.zeros(int("offsets" in name), np.int64) for name in ARRAYS})

    def append(self, documents: dict[str, np.ndarray]) -> None:
        """Appends documents given as COLUMNS and COUNTS.

        COLUMNS are the ids of all sentences end to end, the tokens of each sentence, the sentences and the bytes of
        each document.
        """
        self.write(
            {
                "ids": documents["ids"],
                "sentence_offsets": self.counts["tokens"] + np.cumsum(documents["sentence_lengths"]),
                "document_offsets": self.counts["sentences"] + np.cumsum(documents["document_lengths"]),
                "document_bytes": documents["document_bytes"],
            }
        )
        self.counts["documents"] += len(documents["document_lengths"])
        self.counts["sentences"] += len(documents["sentence_lengths"])
        self.counts["tokens"] += len(documents["ids"])
        self.counts["bytes"] += int(documents["document_bytes"].sum())
        for name in ("words", "unknown_tokens", "empty_documents"):
            self.counts[name] += int(documents[name].sum())
        self.counts["longest_word"] = int(max(self.counts["longest_word"], *documents["longest_word"]))

    def write(self, arrays: dict[str, np.ndarray]) -> None:
        """Appends to the arrays."""
        for name, array in arrays.items():
            data = array.astype(self.dtypes[name]).tobytes()
            with writing(self.directory / name), open(self.directory / name, "ab") as file:
                file.write(data)
            self.checksums[name].update(data)
            self.lengths[name] += len(array)

    def finish(self, origin: dict[str, str]) -> None:
        """Writes the manifest. `origin`: fingerprints of corpus and tokenizer, and the side."""
        checksums = {name: checksum.hexdigest() for name, checksum in self.checksums.items()}
        dtypes = {name: dtype.str for name, dtype in self.dtypes.items()}
        arrays = {"lengths": self.lengths, "dtypes": dtypes, "checksums": checksums}
        manifest = {"format": STORE_FORMAT, **origin, **self.counts, **arrays}
        path = self.directory / "manifest.json"
        with writing(path):
            path.write_text(json.dumps({**manifest, "checksum": digest(manifest)}, indent=2) + "\n")
