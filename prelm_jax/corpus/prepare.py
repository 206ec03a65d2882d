"""A corpus to its token store, in shards: all cores work, and what was killed goes on where it was.

The corpus is cut into shards, each a fixed range of the input, whatever makes them (`Corpus.shards`). One process reads
the documents; others, one for each core, split and tokenise a shard each and leave it as a file in the directory
`STORE.partial`. A file that is there is whole and is not made again. When all are there they are appended to the arrays
of the store, in order, and deleted after it: in between the disk holds the tokens twice. Memory depends on the size of
a shard, not of the corpus. (ELMo's words that are outside of the vocabulary are the exception: each is held once.)
"""

import collections
import dataclasses
import functools
import itertools
import os
import shutil
import signal
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import get_args

import numpy as np

from prelm_jax.cache import cache_directory, digest, locked
from prelm_jax.corpus.documents import SHARD_CHARACTERS, Corpus, Document, Shard, Side
from prelm_jax.corpus.sentences import split
from prelm_jax.corpus.sources import PART_BYTES
from prelm_jax.corpus.store import FORMAT, PIECES, Store, Writer, spelled
from prelm_jax.errors import InputError
from prelm_jax.progress import Advance, progress
from prelm_jax.storage import writing
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.tokenizers.words import WordVocabulary

BATCH_CHARACTERS = 1 << 22
SIDES: tuple[Side, ...] = get_args(Side)

# Makes all shards of a corpus that are not in the directory yet.
MakeShards = Callable[[Corpus, Tokenizer, Path], None]


def location(corpus: Corpus, tokenizer: Tokenizer, directory: str | os.PathLike | None = None) -> Path:
    """Where the stores of a corpus lie: under the fingerprints of corpus and tokenizer, in the cache unless said."""
    key = digest([FORMAT, corpus.fingerprint, tokenizer.fingerprint])
    return Path(directory or cache_directory()) / "stores" / key


def partial_directory(target: Path) -> Path:
    """Where the shards of the stores lie while they are made; those that are cut in another way lie elsewhere."""
    return target.with_name(f"{target.name}.{digest([PART_BYTES, SHARD_CHARACTERS])[:8]}.partial")


def prepare(
    corpus: Corpus,
    tokenizer: Tokenizer,
    directory: str | os.PathLike | None = None,
    make_shards: MakeShards | None = None,
    verify: bool = False,
) -> tuple[Store, Store]:
    """The stores of the corpus' training and held-out sides; made once, by one process while others wait for it.

    `make_shards`: how, by default on all cores of this machine. `verify`: compare the checksums of a store that is
    there. Raises InputError if the corpus cannot be read or has no tokens.
    """
    target = location(corpus, tokenizer, directory)
    partial = partial_directory(target)
    if not target.exists():
        with locked(target):
            if not target.exists():
                partial.mkdir(exist_ok=True)
                (make_shards or make_shards_here)(corpus, tokenizer, partial)
                _merge(corpus, tokenizer, partial).rename(target)
                verify = False
    shutil.rmtree(partial, ignore_errors=True)
    training, held_out = (Store.open(target / side, verify) for side in SIDES)
    return training, held_out


# ---- Shards ----------------------------------------------------------------------------------------------------------


def make_shard(shard: Shard, corpus: Corpus, tokenizer: Tokenizer, directory: Path) -> None:
    """Tokenises a shard to a file in `directory`, which is there whole or not at all."""
    target, unfinished = _file(shard, directory), directory / f".{shard.name}-{uuid.uuid4().hex}"
    arrays = _tokenised(shard, corpus, tokenizer)
    with writing(target):
        try:
            with open(unfinished, "wb") as file:
                np.savez(file, **arrays)
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)


def _file(shard: Shard, directory: Path) -> Path:
    return directory / f"{shard.name}.npz"


def _tokenised(shard: Shard, corpus: Corpus, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """The documents of a shard: for each side what `Writer.append` takes.

    Ids of words are those of the vocabulary; other words are numbered from there on as they are met, and are `words`.
    """
    numbers = (
        {word: number for number, word in enumerate(tokenizer.tokens)}
        if isinstance(tokenizer, WordVocabulary)
        else None
    )
    pieces: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    for batch in _batches(shard, corpus):
        sentences = [split(document.text, document.sentences) for document in batch]
        texts = list(itertools.chain.from_iterable(sentences))
        ids, length_S = tokenizer.encode_flat(texts) if numbers is None else tokenizer.number_flat(texts, numbers)
        ids = ids.astype(_dtype(tokenizer))
        unknown = ids >= tokenizer.vocab_size
        if tokenizer.unknown_id is not None:
            unknown |= ids == tokenizer.unknown_id
        document_S = np.repeat(np.arange(len(batch)), [len(of_document) for of_document in sentences])
        bytes_D = np.array([document.bytes for document in batch], np.int64)
        longest_D = np.array([max(map(len, document.text.split()), default=0) for document in batch], np.int64)
        for side in SIDES:
            chosen_D = np.array([document.side == side for document in batch], bool)
            chosen_S = chosen_D[document_S]
            chosen = np.repeat(chosen_S, length_S)
            chosen_S &= length_S > 0
            sentences_D = np.bincount(document_S[chosen_S], minlength=len(batch))
            kept_D = sentences_D > 0
            arrays = {
                "ids": ids[chosen],
                "sentence_lengths": length_S[chosen_S],
                "document_lengths": sentences_D[kept_D],
                "document_bytes": bytes_D[kept_D],
                "unknown_tokens": unknown[chosen].sum(keepdims=True),
                "empty_documents": (chosen_D & ~kept_D).sum(keepdims=True),
                "longest_word": longest_D[chosen_D].max(initial=0, keepdims=True),
            }
            for name, array in arrays.items():
                pieces[f"{side}/{name}"].append(array)
    joined = {name: np.concatenate(arrays) for name, arrays in pieces.items()}
    if numbers is not None:
        new = itertools.islice(numbers, tokenizer.vocab_size, None)
        joined["words"] = np.frombuffer("\n".join(new).encode(), np.uint8)
    return joined


def _batches(shard: Shard, corpus: Corpus) -> Iterator[list[Document]]:
    """The documents of a shard, not all at once."""
    batch, characters = [], 0
    for text in shard.texts:
        if document := corpus.document(text, shard.source, shard.repetition):
            batch.append(document)
            characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    yield batch


def _dtype(tokenizer: Tokenizer) -> type[np.integer]:
    return np.uint16 if tokenizer.vocab_size <= 1 << 16 and not isinstance(tokenizer, WordVocabulary) else np.uint32


# ---- On this machine -------------------------------------------------------------------------------------------------


def make_shards_here(corpus: Corpus, tokenizer: Tokenizer, directory: Path) -> None:
    """Makes the shards that are missing, on all cores; a single one in this process."""
    # A copy, without what the corpus has found out about its files: that may be large.
    make = functools.partial(make_shard, corpus=dataclasses.replace(corpus), tokenizer=tokenizer, directory=directory)
    with progress("tokenising", corpus.bytes) as advance:

        def missing() -> Iterator[Shard]:
            for number, part in enumerate(corpus.parts):
                for shard in corpus.shards(number, part):
                    if _file(shard, directory).exists():
                        advance(shard.bytes)
                    else:
                        yield shard

        shards = missing()
        first = list(itertools.islice(shards, 2))
        if len(first) == 2:
            _in_processes(make, itertools.chain(first, shards), advance)
        else:
            for shard in first:
                make(shard)
                advance(shard.bytes)


def _in_processes(make: Callable[[Shard], None], shards: Iterable[Shard], advance: Advance) -> None:
    import loky  # Here, for a small corpus does without.

    workers = loky.cpu_count()
    # Processes without work end after the timeout: none stays for long when this one is killed.
    executor = loky.ProcessPoolExecutor(workers, timeout=60, initializer=_begin, initargs=(make,))
    running: dict[futures.Future, float] = {}

    def wait(number: int) -> None:
        """Until no more than this number of shards is on the way."""
        while len(running) > number:
            for future in futures.wait(running, return_when=futures.FIRST_COMPLETED).done:
                future.result()
                advance(running.pop(future))

    try:
        for shard in shards:
            running[executor.submit(_make, shard)] = shard.bytes
            wait(workers)
        wait(0)
    except BrokenProcessPool as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"a process that tokenises came to its end, perhaps for lack of memory ({reason}): the same command goes on"
        ) from None
    finally:
        executor.shutdown(kill_workers=True)


def _begin(make: Callable[[Shard], None]) -> None:
    """In each process, first."""
    global _make_shard
    _make_shard = make
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # There is a process for each core.
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The process that handed out the work stops the others.


def _make(shard: Shard) -> None:
    _make_shard(shard)


# ---- One store of them -----------------------------------------------------------------------------------------------


def _merge(corpus: Corpus, tokenizer: Tokenizer, directory: Path) -> Path:
    """Appends the shards in a directory to each other, in order; where the stores of both sides are."""
    target = directory / "stores"
    shutil.rmtree(target, ignore_errors=True)  # Half of them, of a process that was killed.
    writers = {side: Writer(target / side, _dtype(tokenizer), isinstance(tokenizer, WordVocabulary)) for side in SIDES}
    new_words: dict[str, int] = {}
    files = sorted(directory.glob("*.npz"))
    for file in files:
        shard = _read(file)
        if "words" in shard:
            _number(shard, new_words, tokenizer.vocab_size)
        for side, writer in writers.items():
            writer.append({name: shard[f"{side}/{name}"] for name in PIECES})
    if not any(writer.counts["tokens"] for writer in writers.values()):
        shutil.rmtree(directory)
        nothing = (
            "no tokens: nothing in it is text to the tokenizer" if files else "no text: give files with text in them"
        )
        raise InputError(f"the corpus {' '.join(corpus.sources)} holds {nothing}")
    for side, writer in writers.items():
        if isinstance(tokenizer, WordVocabulary):
            writer.write(spelled(itertools.chain(tokenizer.tokens, new_words)))
        writer.finish({"corpus": corpus.fingerprint, "tokenizer": tokenizer.fingerprint, "side": side})
    return target


def _read(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a shard, whose checksums the format has."""
    try:
        with open(file, "rb") as content, np.load(content) as arrays:
            return dict(arrays)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{file} is damaged ({error}): delete it, and the same command goes on") from None


def _number(shard: dict[str, np.ndarray], numbers: dict[str, int], first: int) -> None:
    """Gives the words of a shard that are outside of the vocabulary their ids in the store, from `first` on."""
    words = bytes(shard["words"]).decode().split()
    new_ids = [numbers.setdefault(word, first + len(numbers)) for word in words]
    id_of = np.append(np.arange(first, dtype=np.uint32), np.array(new_ids, np.uint32))
    for side in SIDES:
        shard[f"{side}/ids"] = id_of[shard[f"{side}/ids"]]
