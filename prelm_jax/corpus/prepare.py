"""Preparation: a corpus to its token stores, on all cores, resumable after a kill.

The corpus is cut into shards, fixed ranges of the input (`Corpus.shards`). One process reads the documents. A worker
for each core splits and tokenizes one shard at a time, into a file of the directory `STORE.*.partial`; a file is
complete or absent, and a complete one is not rebuilt. In the end the files are appended to the arrays of the store,
in order, and deleted: in between, the disk holds the tokens twice. Memory depends on the size of a shard, not of the
corpus, except for an open vocabulary, whose distinct words are all in memory.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import os
import pickle
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import get_args

import numpy as np

from prelm_jax.cache import built, cache_directory, digest, is_intact, locked
from prelm_jax.corpus import documents, sources
from prelm_jax.corpus.documents import Corpus, Document, Shard, Side
from prelm_jax.corpus.sentences import split
from prelm_jax.corpus.store import COLUMNS, COUNTS, STORE_FORMAT, DamagedStore, Store, Writer, spelled
from prelm_jax.errors import InputError, first_line
from prelm_jax.progress import Advance, Progress
from prelm_jax.tokenizers.base import Tokenizer

BATCH_CHARACTERS = 1 << 22
SIDES: tuple[Side, ...] = get_args(Side)

# The blocks of CJK ideographs; planes 2 and 3 hold nothing else.
_IDEOGRAPH = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")

MakeShards = Callable[[Corpus, Tokenizer, Path], None]  # Writes the missing shards of a corpus to a directory.


def store_path(corpus: Corpus, tokenizer: Tokenizer, directory: str | os.PathLike | None = None) -> Path:
    """The directory of a corpus's stores, named by the fingerprints, in `directory` or else in the cache."""
    key = digest([STORE_FORMAT, corpus.fingerprint, tokenizer.fingerprint])
    return Path(directory or cache_directory()) / "stores" / key


def partial_path(target: Path) -> Path:
    """The directory of unfinished shards of the stores at `target`; shards of other sizes are elsewhere."""
    return target.with_name(f"{target.name}.{digest([sources.PART_BYTES, documents.SHARD_CHARACTERS])[:8]}.partial")


def prepare(
    corpus: Corpus,
    tokenizer: Tokenizer,
    directory: str | os.PathLike | None = None,
    make_shards: MakeShards | None = None,
) -> tuple[Store, Store]:
    """The training and held-out stores of a corpus. One process makes them if they are missing or damaged; others wait.

    `make_shards`: default `make_shards_locally`. Raises InputError if the corpus cannot be read or has no tokens.

        training, held_out = prepare(Corpus(("novels/*.txt",), held_out=0.01), tokenizer)
    """
    target = store_path(corpus, tokenizer, directory)
    partial = partial_path(target)
    if (stores := _open(target, corpus, tokenizer)) is None:
        with locked(target):
            if (stores := _open(target, corpus, tokenizer, "; making it again")) is None:
                partial.mkdir(exist_ok=True)
                (make_shards or make_shards_locally)(corpus, tokenizer, partial)
                made = _merge(corpus, tokenizer, partial)
                shutil.rmtree(target, ignore_errors=True)  # Damaged.
                made.rename(target)
                training, held_out = (Store.open(target / side) for side in SIDES)
                stores = training, held_out
    shutil.rmtree(partial, ignore_errors=True)
    return stores


def _open(target: Path, corpus: Corpus, tokenizer: Tokenizer, remedy: str | None = None) -> tuple[Store, Store] | None:
    """Both stores; None if one is missing or damaged. Damage is printed, followed by the `remedy`, if that is given."""
    if not target.exists():
        return None
    try:
        training, held_out = (Store.open(target / side) for side in SIDES)
        for side, store in zip(SIDES, (training, held_out), strict=True):
            if any(store.manifest[name] != value for name, value in _origin(corpus, tokenizer, side).items()):
                raise DamagedStore(f"{target / side} is the store of something else")
    except DamagedStore as damage:
        if remedy is not None:
            print(f"{damage}{remedy}", file=sys.stderr)
        return None
    return training, held_out


def _origin(corpus: Corpus, tokenizer: Tokenizer, side: Side) -> dict[str, str]:
    return {"corpus": corpus.fingerprint, "tokenizer": tokenizer.fingerprint, "side": side}


# ---- Shards ----------------------------------------------------------------------------------------------------------


def make_shard(shard: Shard, corpus: Corpus, tokenizer: Tokenizer, directory: Path) -> None:
    """Tokenizes a shard to a file in `directory`, which appears when it is complete."""
    arrays = _tokenize(shard, corpus, tokenizer)
    with built(_file(shard, directory)) as unfinished, open(unfinished, "wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _file(shard: Shard, directory: Path) -> Path:
    return directory / f"{shard.name}.npz"


def _tokenize(shard: Shard, corpus: Corpus, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """The documents of a shard: for each side the COLUMNS and COUNTS that `Writer.append` takes.

    With an open vocabulary, words outside of it are numbered from `vocab_size` on in order of appearance, and listed in
    `new_words`.
    """
    is_open, numbers = tokenizer.open_vocabulary, dict(tokenizer.ids)
    batches: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    for batch in _batches(shard, corpus):
        sentences = [split(document.text, document.sentences, document.language) for document in batch]
        texts = list(itertools.chain.from_iterable(sentences))
        ids, tokens_Y = tokenizer.number_flat(texts, numbers) if is_open else tokenizer.encode_flat(texts)
        ids = ids.astype(_id_dtype(tokenizer))
        unknown = ids >= tokenizer.vocab_size
        if tokenizer.unknown_id is not None:
            unknown |= ids == tokenizer.unknown_id
        document_Y = np.repeat(np.arange(len(batch)), list(map(len, sentences)))
        bytes_X, words_X, longest_X = np.array(list(map(_measure, batch)), np.int64).reshape(-1, 3).T
        for side in SIDES:
            # Sides t h t, sentences per document 2 1 1, tokens per sentence 3 0 2 1: the training side keeps tokens
            # 0 1 2 and 5, in sentences of 3 1 tokens, in documents of 1 1 sentences.
            on_side_X = np.array([document.side == side for document in batch], bool)
            on_side_Y = on_side_X[document_Y]
            on_side = np.repeat(on_side_Y, tokens_Y)
            kept_Y = on_side_Y & (tokens_Y > 0)
            sentences_X = np.bincount(document_Y[kept_Y], minlength=len(batch))
            kept_X = sentences_X > 0
            arrays = {
                "ids": ids[on_side],
                "sentence_lengths": tokens_Y[kept_Y],
                "document_lengths": sentences_X[kept_X],
                "document_bytes": bytes_X[kept_X],
                "words": words_X[kept_X].sum(keepdims=True),
                "unknown_tokens": unknown[on_side].sum(keepdims=True),
                "empty_documents": (on_side_X & ~kept_X).sum(keepdims=True),
                "longest_word": longest_X[on_side_X].max(initial=0, keepdims=True),
            }
            for name, array in arrays.items():
                batches[f"{side}/{name}"].append(array)
    joined = {name: np.concatenate(arrays) for name, arrays in batches.items()}
    if is_open:
        new_words = itertools.islice(numbers, tokenizer.vocab_size, None)
        joined["new_words"] = np.frombuffer("\n".join(new_words).encode(), np.uint8)
    return joined


def _batches(shard: Shard, corpus: Corpus) -> Iterator[list[Document]]:
    """The documents of a shard, BATCH_CHARACTERS at a time."""
    batch, characters = [], 0
    for text in shard.texts:
        if document := corpus.document(text, shard.spec, shard.repetition):
            batch.append(document)
            characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    yield batch


def _measure(document: Document) -> tuple[int, int, int]:
    """UTF-8 bytes and words of the original, and characters of the longest run without white space."""
    longest = max(map(len, document.text.split()), default=0)
    return len(document.original.encode()), count_words(document.original), longest


def count_words(text: str) -> int:
    """Number of words: runs without white space, where each CJK ideograph is a word of its own.

    Independent of tokenizers, so that "words seen" compares runs. Example: `count_words("It's 2024年 now") == 4`.
    """
    rest, ideographs = _IDEOGRAPH.subn(" ", text)
    return ideographs + len(rest.split())


def _id_dtype(tokenizer: Tokenizer) -> type[np.integer]:
    return np.uint16 if tokenizer.vocab_size <= 1 << 16 and not tokenizer.open_vocabulary else np.uint32


# ---- On this machine -------------------------------------------------------------------------------------------------


def make_shards_locally(corpus: Corpus, tokenizer: Tokenizer, directory: Path) -> None:
    """Makes the missing shards on all cores of this machine; a single one in this process."""
    # A copy without cached properties, which may be large: each worker gets one.
    make = functools.partial(make_shard, corpus=dataclasses.replace(corpus), tokenizer=tokenizer, directory=directory)
    with Progress("tokenize", corpus.bytes, "bytes") as progress:

        def missing() -> Iterator[Shard]:
            for number, part in enumerate(corpus.parts):
                for shard in corpus.shards(number, part):
                    if is_intact(_file(shard, directory)):
                        progress.advance(shard.bytes)
                    else:
                        yield shard

        shards = missing()
        first = list(itertools.islice(shards, 2))
        if len(first) == 2:
            _in_processes(make, itertools.chain(first, shards), progress.advance, directory)
        else:
            for shard in first:
                make(shard)
                progress.advance(shard.bytes)


def _in_processes(make: Callable[[Shard], None], shards: Iterable[Shard], advance: Advance, directory: Path) -> None:
    import cloudpickle  # Here: a small corpus needs no workers.
    import loky

    running: dict[futures.Future, float] = {}
    workers = loky.cpu_count()
    # The workers read `make` from a file: loky hands over what it is given through a pipe whose reading end it keeps
    # open, and would wait forever if a worker dies before it has read more than the pipe holds. The file is among the
    # shards, so that a kill leaves nothing elsewhere.
    file = directory / "make_shard.pickle"
    file.write_bytes(cloudpickle.dumps(make))
    with contextlib.ExitStack() as stack:
        executor = loky.ProcessPoolExecutor(workers, initializer=_initialize_worker, initargs=(file, os.getpid()))
        stack.callback(executor.shutdown, kill_workers=True)

        def wait(number: int) -> None:
            """Until at most `number` shards are being made."""
            while len(running) > number:
                for future in futures.wait(running, return_when=futures.FIRST_COMPLETED).done:
                    future.result()
                    advance(running.pop(future))

        try:
            for shard in shards:
                running[executor.submit(_make_in_worker, shard)] = shard.bytes
                wait(workers)
            wait(0)
        except BrokenProcessPool as error:
            reason = f"probably out of memory: {first_line(error)}"
            raise InputError(f"a tokenizer worker died ({reason}): the same command resumes") from None


_make_shard: Callable[[Shard], None]  # In a worker.


def _initialize_worker(file: Path, parent: int) -> None:
    global _make_shard
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # There is a worker for each core.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # The parent process stops the workers.
    _make_shard = pickle.loads(file.read_bytes())


def _end_with(parent: int) -> None:
    """Ends this process when its parent has ended, however that came."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _make_in_worker(shard: Shard) -> None:
    _make_shard(shard)


# ---- Merging ---------------------------------------------------------------------------------------------------------


def _merge(corpus: Corpus, tokenizer: Tokenizer, directory: Path) -> Path:
    """Appends the shards in `directory` to the stores of both sides, in order. Returns the stores' directory."""
    target = directory / "stores"
    shutil.rmtree(target, ignore_errors=True)  # Half a merge, of a process that was killed.
    writers = {side: Writer(target / side, _id_dtype(tokenizer), tokenizer.open_vocabulary) for side in SIDES}
    new_words: dict[str, int] = {}
    files = sorted(directory.glob("*.npz"))
    for file in files:
        shard = _read(file)
        if tokenizer.open_vocabulary:
            _renumber(shard, new_words, tokenizer.vocab_size)
        for side, writer in writers.items():
            writer.append({name: shard[f"{side}/{name}"] for name in (*COLUMNS, *COUNTS)})
    if not any(writer.counts["tokens"] for writer in writers.values()):
        shutil.rmtree(directory)
        nothing = "tokens: nothing in it is text to the tokenizer" if files else "text: give files with text in them"
        raise InputError(f"the corpus {' '.join(corpus.sources)} holds no {nothing}")
    for side, writer in writers.items():
        if tokenizer.open_vocabulary:
            writer.write(spelled(itertools.chain(tokenizer.tokens, new_words)))
        writer.finish(_origin(corpus, tokenizer, side))
    return target


def _read(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a shard."""
    if not is_intact(file):
        raise InputError(f"{file} is damaged: the same command makes it again, and resumes")
    with open(file, "rb") as content, np.load(content) as arrays:
        return dict(arrays)


def _renumber(shard: dict[str, np.ndarray], numbers: dict[str, int], first: int) -> None:
    """Replaces a shard's ids of new words by their ids in the store, from `first` on, which `numbers` collects.

    With first = 3, `numbers` {"bed": 3} and a shard whose new words are cab bed, its ids 0 3 4 become 0 4 3.
    """
    words = bytes(shard["new_words"]).decode().split()
    new_ids = [numbers.setdefault(word, first + len(numbers)) for word in words]
    id_of = np.append(np.arange(first, dtype=np.uint32), np.array(new_ids, np.uint32))
    for side in SIDES:
        shard[f"{side}/ids"] = id_of[shard[f"{side}/ids"]]
