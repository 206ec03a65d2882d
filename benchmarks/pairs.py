"""Statistics of next-sentence pairs: labels, accuracy from lengths alone, fill, sentences per epoch.

    python benchmarks/pairs.py STORE [STORE …]

Uses the token stores in these directories, and the first of them split into documents of three sentences. Compares our
examples of an epoch with those of one pass of google-research/bert (create_pretraining_data.py).
"""

import random
import sys
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
from rich.console import Console
from rich.table import Table

from prelm_jax.corpus.store import Store
from prelm_jax.data.baselines import length_only_accuracy, pairs_by_lengths
from prelm_jax.data.pairs import PairsConfig

ROLES = ("pad_id", "cls_id", "sep_id", "mask_id")
BATCH_SIZE = 16_384
SHORT = 0.1


def ours(store: Store, T: int) -> list[float]:
    """Fractions over an epoch: random pairs, accuracy from lengths alone, filled positions, sentences seen."""
    # The id of every token is its index in the store, so that a batch shows which sentences it has.
    n = store.num_tokens
    arrays = {name: getattr(store, name) for name in ("sentence_offsets", "document_offsets", "document_bytes")}
    positions = Store(arrays | {"ids": np.arange(n, dtype=np.uint32)}, {})
    special = {role: n + i for i, role in enumerate(ROLES)}
    tokenizer = SimpleNamespace(vocab_size=n + len(ROLES), tokens=[], **special)
    config = PairsConfig(max_length=T, max_predictions=1, short_sequence_probability=SHORT)
    batches = config.build(positions, tokenizer, BATCH_SIZE, seed=0)
    seen = np.zeros(n + len(ROLES), bool)
    steps = -(-batches.examples_per_epoch // BATCH_SIZE)
    labels, told, filled, before = [], [], [], batches[steps]
    for step in range(steps):
        batch = batches[step]
        labels.append(batch["next_sentence_labels"].mean())
        told.append(length_only_accuracy(*map(pairs_by_lengths, (before, batch))))
        filled.append(batch["segments"].mean())
        np.put_along_axis(batch["tokens"], batch["masked_positions"], batch["masked_targets"], axis=1)
        seen[batch["tokens"]] = True
        before = batch
    reached = np.logical_or.reduceat(seen[:n], store.sentence_offsets[:-1])
    return [np.mean(labels), np.mean(told), np.mean(filled), reached.mean()]


def originals(store: Store, T: int) -> list[float]:
    """The same for the original's examples, without the sentences."""
    pairs = np.array(list(original_pairs(store, T, random.Random(0))))
    labels, (first, second) = pairs[:, 2], pairs[:, :2].T
    column = np.arange(T)
    lengths = {
        "tokens": np.zeros((len(pairs), T), bool),
        "segments": column < (first + second + 3)[:, None],
        "token_types": (column >= (first + 2)[:, None]) & (column < (first + second + 3)[:, None]),
        "next_sentence_labels": labels[:, None],
    }
    halves = [{name: array[i::2] for name, array in lengths.items()} for i in (0, 1)]
    return [labels.mean(), length_only_accuracy(*map(pairs_by_lengths, halves)), lengths["segments"].mean()]


def original_pairs(store: Store, T: int, rng: random.Random) -> Iterator[tuple[int, int, int]]:
    """(tokens of A, tokens of B, 1 if random) by the original's rules for lengths."""
    sizes = np.diff(store.sentence_offsets).tolist()
    documents = [sizes[begin:end] for begin, end in pairwise(store.document_offsets.tolist())]
    room = T - 3
    for document in documents:
        # One target length per document, for all of its chunks of sentences.
        target = rng.randint(2, room) if rng.random() < SHORT else room
        i = 0
        while i < len(document):
            begin = i
            while i < len(document) and sum(document[begin:i]) < target:
                i += 1
            split = begin + (rng.randint(1, i - begin - 1) if i - begin > 1 else 1)
            first, second = sum(document[begin:split]), sum(document[split:i])
            label = int(i - begin == 1 or rng.random() < 0.5)
            if label:
                other = rng.choice(documents)
                second = 0
                for size in other[rng.randrange(len(other)) :]:
                    second += size
                    if second >= target - first:
                        break
                i = split  # The sentences that the random segment replaces are used again.
            # Truncates the longer segment, token by token, until both fit.
            while first + second > room:
                first, second = (first - 1, second) if first > second else (first, second - 1)
            yield first, second, label


def main():
    stores = {path: Store.open(path) for path in sys.argv[1:]}
    first = next(iter(stores.values()))
    arrays = {name: getattr(first, name) for name in ("ids", "sentence_offsets")}
    offsets = np.append(np.arange(0, first.num_sentences, 3), first.num_sentences)
    arrays |= {"document_offsets": offsets, "document_bytes": np.zeros(len(offsets) - 1, np.int64)}
    stores["the first, in documents of three sentences"] = Store(arrays, {})
    columns = ("T", "examples of", "random pairs", "accuracy from lengths", "filled", "sentences seen")
    for name, store in stores.items():
        table = Table(*columns, title=f"{name}: {store.num_documents:,} documents", title_justify="left")
        for T in (128, 512):
            for whose, figures in (("ours", ours(store, T)), ("the original", originals(store, T))):
                table.add_row(str(T), whose, *(f"{figure:.2%}" for figure in figures))
        Console(width=110).print(table)


if __name__ == "__main__":
    main()
