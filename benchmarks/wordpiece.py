"""Speed of WordPiece on one core against the `tokenizers` library; --check compares the ids instead.

    python benchmarks/wordpiece.py VOCAB.txt SPEC [--megabytes 20] [--cased] [--check]

All tokenizers take turns on each block of sentences, so that disturbances hit them alike. The first pass starts with
empty caches, as when a corpus is prepared; the second reads the same text again. Measures the processor time of one
thread. `encode_batch_fast` is the library's method without offsets. A ratio is over a whole pass, its quartiles over
the blocks. `--check` times nothing and compares the ids of the whole corpus.
"""

import itertools
import math
import operator
import os
import time
from collections.abc import Iterator
from pathlib import Path

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tyro.conf import Positional

from prelm_jax.corpus.documents import Corpus
from prelm_jax.corpus.sentences import split
from prelm_jax.tokenizers.wordpiece import WordPiece

BLOCK_BYTES = 1_000_000


def blocks(spec: str) -> Iterator[tuple[list[str], int]]:
    """The sentences of a corpus in blocks of about BLOCK_BYTES, and the bytes of each block."""
    texts, size = [], 0
    for document in Corpus((spec,)).documents():
        sentences = split(document.text, document.sentences, document.language)
        texts += sentences
        size += sum(len(sentence.encode()) for sentence in sentences)
        if size >= BLOCK_BYTES:
            yield texts, size
            texts, size = [], 0
    if texts:
        yield texts, size


def library(vocab: Path, lowercase: bool) -> Tokenizer:
    """The library's BERT tokenizer, which encodes the names of special tokens as text."""
    tokenizer = Tokenizer(models.WordPiece.from_file(str(vocab), unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def compare(spec: str, ours: WordPiece, peer: Tokenizer) -> None:
    """Counts the sentences with different ids."""
    differing = total = 0
    for texts, _ in blocks(spec):
        expected = [encoding.ids for encoding in peer.encode_batch_fast(texts)]
        differing += sum(map(operator.ne, ours.encode_batch(texts), expected))
        total += len(texts)
    print(f"{spec}: the ids of {differing:,} of {total:,} sentences differ")


def main(
    vocab: Positional[Path], spec: Positional[str], megabytes: float = 20.0, cased: bool = False, check: bool = False
) -> None:
    lists, flat = (WordPiece.from_vocab(vocab, lowercase=not cased) for _ in range(2))
    peer = library(vocab, lowercase=not cased)
    if check:
        return compare(spec, lists, peer)
    ours = {"encode_batch": lists.encode_batch, "encode_flat": flat.encode_flat}
    peers = {
        "library, encode_batch": lambda texts: [encoding.ids for encoding in peer.encode_batch(texts)],
        "library, encode_batch_fast": lambda texts: [encoding.ids for encoding in peer.encode_batch_fast(texts)],
    }
    timed = list(itertools.islice(blocks(spec), math.ceil(1e6 * megabytes / BLOCK_BYTES)))
    bytes_B = np.array([size for _, size in timed])
    for title in ("first pass", "second pass"):
        seconds = {name: np.zeros(len(timed)) for name in ours | peers}
        tokens = 0
        for i, (texts, _) in enumerate(timed):
            for name, encode in (ours | peers).items():
                start = time.process_time()
                encoded = encode(texts)
                seconds[name][i] = time.process_time() - start
            tokens += sum(map(len, encoded))
        title = f"{title} over {bytes_B.sum() / 1e6:.1f} MB, {tokens:,} tokens"
        table = Table("", "MB/s", "tokens/s", *(f"× {name}" for name in peers), title=title, title_justify="left")
        for name, seconds_B in seconds.items():
            ratios = []
            for other in peers:
                low, high = np.percentile(seconds[other] / seconds_B, (25, 75))
                ratios.append(f"{seconds[other].sum() / seconds_B.sum():.2f} ({low:.2f} to {high:.2f})")
            total = seconds_B.sum()
            table.add_row(name, f"{bytes_B.sum() / total / 1e6:.1f}", f"{tokens / total:,.0f}", *ratios)
        Console(width=130).print(table)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
