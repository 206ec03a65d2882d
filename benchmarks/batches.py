"""Speed of building batches: tokens per second on one core, padding included; for ELMo, words per second.

    python benchmarks/batches.py [STORE]

Uses synthetic documents with the lengths of encyclopedia articles and synthetic words, or the token store (of tokens
or words) in the directory STORE. Measures processor time, which other programs disturb less, and reports the median
over all steps. A word counts once, although both directions read it.
"""

import sys
import time
from types import SimpleNamespace

import numpy as np

from prelm_jax.corpus.store import Store
from prelm_jax.data.masking import MaskingConfig
from prelm_jax.data.pairs import PairsConfig
from prelm_jax.data.streams import StreamsConfig
from prelm_jax.data.windows import WindowsConfig

VOCAB_SIZE = 30_522
TOKENIZER = SimpleNamespace(
    vocab_size=VOCAB_SIZE,
    pad_id=0,
    cls_id=101,
    sep_id=102,
    mask_id=103,
    continuation=np.arange(VOCAB_SIZE) % 4 == 0,
)
# As in ELMo's training on the One Billion Word Benchmark.
WORDS = SimpleNamespace(vocab_size=793_471, bos_id=0, eos_id=1, unknown_id=2)
NUM_TYPES = 2_000_000
BATCH_SIZE, STEPS = 256, 200


def articles(num_documents: int = 20_000) -> Store:
    """Documents of about 20 sentences of about 25 tokens, both log-normal."""
    rng = np.random.default_rng(0)
    num_sentences = np.maximum(1, rng.lognormal(2.5, 1.0, num_documents)).astype(int)
    lengths = np.clip(rng.lognormal(3.1, 0.55, num_sentences.sum()), 1, 300).astype(int)
    sentences = iter(np.split(rng.integers(1000, VOCAB_SIZE, lengths.sum()), np.cumsum(lengths)[:-1]))
    return Store.from_documents([[next(sentences) for _ in range(n)] for n in num_sentences])


def words() -> Store:
    """A million sentences of about 25 words that follow Zipf's law; a word has 8 letters."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(3.1, 0.5, 1_000_000), 1, 300).astype(int)
    ids = np.exp(rng.random(lengths.sum()) * np.log(NUM_TYPES - 3)).astype(np.uint32) + 2
    return Store(
        {
            "ids": ids,
            "sentence_offsets": np.append(0, np.cumsum(lengths)),
            "document_offsets": np.arange(len(lengths) + 1),
            "document_bytes": np.zeros(len(lengths), np.int64),
            "word_bytes": rng.integers(97, 123, 8 * NUM_TYPES, np.uint8),
            "word_offsets": np.arange(NUM_TYPES + 1) * 8,
        },
        {},
    )


def seconds(build) -> float:
    """The median time of a step."""
    times = []
    for step in range(STEPS):
        start = time.process_time()
        build(step)
        times.append(time.process_time() - start)
    return float(np.median(times))


def pairs(store: Store):
    for T, M in ((128, 20), (512, 76)):
        options = dict(max_length=T, max_predictions=M, short_sequence_probability=0.1)
        packed = PairsConfig(**options, packing=True).build(store, TOKENIZER, BATCH_SIZE, seed=0)
        speed = BATCH_SIZE * T / seconds(packed.__getitem__) / 1e6
        print(f"T={T} B={BATCH_SIZE}, packed: {speed:.1f} M tokens/s; {packed.describe()}")
        for name, whole_word in (("", False), (", whole words", True)):
            masking = MaskingConfig(whole_word=whole_word)
            batches = PairsConfig(**options, masking=masking).build(store, TOKENIZER, BATCH_SIZE, seed=0)
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


def windows(store: Store):
    for across in (False, True):
        batches = WindowsConfig(across_documents=across).build(store, TOKENIZER, BATCH_SIZE, seed=0)
        speed = BATCH_SIZE * 512 / seconds(batches.__getitem__) / 1e6
        print(f"T=512 B={BATCH_SIZE}{', across documents' * across}: windows {speed:.1f} M tokens/s")


def streams(store: Store):
    for independent in (False, True):
        for num_negatives in (0, 8192):
            options = dict(independent_directions=independent, num_negatives=num_negatives)
            batches = StreamsConfig(**options).build(store, WORDS, BATCH_SIZE, seed=0)
            batches[0]
            speed = BATCH_SIZE * 20 / seconds(batches.__getitem__) / 1e6
            print(
                f"T=20 B={BATCH_SIZE}{', independent directions' * independent}: streams with {num_negatives} "
                f"negatives {speed:.1f} M words/s, {len(batches[0]['characters'])} distinct words"
            )


def main():
    stores = [Store.open(sys.argv[1])] if len(sys.argv) > 1 else [articles(), words()]
    for store in stores:
        print(f"{store.num_documents:,} documents, {store.num_sentences:,} sentences, {store.num_tokens:,} tokens")
        for measure in (pairs, windows) if store.spellings is None else (streams,):
            measure(store)


if __name__ == "__main__":
    main()
