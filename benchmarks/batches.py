"""How fast batches are built: tokens per second of one core, padding included.

    python benchmarks/batches.py [STORE]

on synthetic documents of the lengths of encyclopedia articles, or on the token store in the directory STORE. What is
measured is processor time, so that other programs on the machine disturb less; the median of all steps counts.
"""

import sys
import time
from types import SimpleNamespace

import numpy as np

from prelm_jax.data.masking import MaskingConfig
from prelm_jax.data.pairs import PairsConfig
from prelm_jax.text.store import Store

VOCAB_SIZE = 30_522
TOKENIZER = SimpleNamespace(
    vocab_size=VOCAB_SIZE,
    special_ids={"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103},
    tokens=["##" * (i % 4 == 0) + str(i) for i in range(VOCAB_SIZE)],
)
BATCH_SIZE, STEPS = 256, 200


def articles(num_documents: int = 20_000) -> Store:
    """Documents of some 20 sentences of some 25 tokens, both log-normal."""
    rng = np.random.default_rng(0)
    num_sentences = np.maximum(1, rng.lognormal(2.5, 1.0, num_documents)).astype(int)
    lengths = np.clip(rng.lognormal(3.1, 0.55, num_sentences.sum()), 1, 300).astype(int)
    sentences = iter(np.split(rng.integers(1000, VOCAB_SIZE, lengths.sum()), np.cumsum(lengths)[:-1]))
    return Store.from_documents([[next(sentences) for _ in range(n)] for n in num_sentences])


def seconds(build) -> float:
    """The median time of a step."""
    times = []
    for step in range(STEPS):
        start = time.process_time()
        build(step)
        times.append(time.process_time() - start)
    return float(np.median(times))


def main():
    store = Store.open(sys.argv[1]) if len(sys.argv) > 1 else articles()
    print(f"{store.num_documents:,} documents, {store.num_sentences:,} sentences, {store.num_tokens:,} tokens")
    for T, M in ((128, 20), (512, 76)):
        for name, whole_word in (("", False), (", whole words", True)):
            masking = MaskingConfig(whole_word=whole_word)
            options = dict(max_length=T, max_predictions=M, masking=masking, short_sequence_probability=0.1)
            batches = PairsConfig(**options).build(store, TOKENIZER, BATCH_SIZE, seed=0)
            batch, mask = batches[0], masking.build(TOKENIZER, M, seed=0)
            length_B = batch["segments"].sum(axis=1)
            candidates_BT = batch["segments"].astype(bool) & (np.arange(T) > 0) & (np.arange(T) < length_B[:, None] - 1)
            example_B = np.arange(BATCH_SIZE)
            both = seconds(batches.__getitem__)
            alone = seconds(lambda step: mask(batch["tokens"], candidates_BT, length_B, example_B + step))  # noqa: B023
            print(
                f"T={T} B={BATCH_SIZE}{name}: pairs with masking {BATCH_SIZE * T / both / 1e6:.1f} M tokens/s, "
                f"masking alone {BATCH_SIZE * T / alone / 1e6:.1f} M tokens/s, filled {batch['segments'].mean():.1%}"
            )


if __name__ == "__main__":
    main()
