"""Packing: no example twice, none lost but those counted, the same rows on every host, the same text and masks."""

import hashlib
import re
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_pairs import (
    FIRST_ID,
    article_sizes,
    batches_of,
    corpora,
    corpus,
    random_sizes,
    rows_of_hosts,
    tokenizer,
    unmasked,
)

from prelm_jax.corpus.store import Store
from prelm_jax.data import pairs
from prelm_jax.data.masking import MaskingConfig
from prelm_jax.data.packing import pack
from prelm_jax.data.pairs import PairsConfig


def packed_by_hand(sizes, capacity, num_rows):
    """`pack` as a loop over rows: the sizes of each row, and those of dropped examples."""
    left = sorted(sizes, reverse=True)
    rows = [[left.pop(0)] if left else [] for _ in range(num_rows)]
    placed = True
    while placed:
        placed = False
        for row in sorted(rows, key=sum, reverse=True):
            size = max((size for size in left if size <= capacity - sum(row)), default=None)
            if size is not None:
                row.append(size)
                left.remove(size)
                placed = True
    return sorted(map(sorted, rows)), sorted(left)


@given(sizes=st.lists(st.integers(1, 12), max_size=40), capacity=st.integers(12, 20), num_rows=st.integers(1, 8))
def test_packing_is_that_of_a_loop(sizes, capacity, num_rows):
    size_N = np.array(sizes, np.int64)
    row_N = pack(size_N, capacity, num_rows)
    rows = [sorted(size_N[row_N == row].tolist()) for row in range(num_rows)]
    assert max(map(sum, rows)) <= capacity
    assert (sorted(rows), sorted(size_N[row_N < 0].tolist())) == packed_by_hand(sizes, capacity, num_rows)


def steps_of_a_group(batches, group):
    """The steps that are packed together: all of the examples [group * N, (group + 1) * N) but the dropped ones."""
    steps = -(-pairs._PACKED_TOGETHER // batches.batch_size)
    return range(group * steps, (group + 1) * steps)


def joined(batches, steps):
    """The rows of some steps in one batch."""
    each = [batches[step] for step in steps]
    return {name: np.concatenate([batch[name] for batch in each]) for name in each[0]}


def examples_of(batch):
    """Every example of a batch as a tuple of what the model reads and predicts, positions counted from its [CLS]."""
    found = []
    for row, segments in enumerate(batch["segments"]):
        filled = segments != 0
        assert sorted(segments[filled]) == segments[filled].tolist() and filled[: filled.sum()].all()
        used = batch["masked_weights"][row] > 0
        masked, targets = batch["masked_positions"][row, used], batch["masked_targets"][row, used]
        assert (np.diff(masked) > 0).all() and used[: used.sum()].all()
        assert not batch["masked_positions"][row, ~used].any() and not batch["masked_targets"][row, ~used].any()
        for number in range(1, segments.max() + 1):
            (here,) = np.nonzero(segments == number)
            inside = np.isin(masked, here)
            example = [batch[name][row, here].tolist() for name in ("tokens", "token_types", "positions")]
            example += [(masked[inside] - here[0]).tolist(), targets[inside].tolist()]
            if "next_sentence_labels" in batch:
                assert batch["next_sentence_positions"][row, number - 1] == here[0]
                assert batch["next_sentence_weights"][row, number - 1] == 1
                example.append(int(batch["next_sentence_labels"][row, number - 1]))
            found.append(tuple(map(str, example)))
        if "next_sentence_labels" in batch:
            rest = slice(segments.max(), None)
            assert not any(batch[f"next_sentence_{x}"][row, rest].any() for x in ("positions", "labels", "weights"))
    return found


@given(
    sizes=corpora,
    T=st.integers(8, 70),
    M=st.integers(1, 8),
    short=st.sampled_from([0.0, 0.5, 1.0]),
    whole_word=st.booleans(),
    next_sentence=st.booleans(),
    batch_size=st.integers(1, 6),
    seed=st.integers(0, 2**32),
)
def test_packed_rows_hold_the_examples_of_their_step(sizes, T, M, short, whole_word, next_sentence, batch_size, seed):
    documents = corpus([[1, 1], *sizes])
    masking = MaskingConfig(whole_word=whole_word)
    options = dict(max_length=T, max_predictions=M, short_sequence_probability=short, masking=masking)
    with mock.patch.object(pairs, "_PACKED_TOGETHER", 8):
        batches = batches_of(documents, batch_size, seed, packing=True, next_sentence=next_sentence, **options)
        packed, N = Counter(), batches.packing.num_examples
        for step in steps_of_a_group(batches, seed % 5):
            batch = batches[step]
            assert set(batch) == set(batches.layout) and set(batches.layout.values()) == {"rows"}
            assert batch["tokens"].shape == (batch_size, T) and batch["masked_positions"].shape == (batch_size, M)
            assert (batch["segments"][:, 0] == 1).all()
            packed.update(examples_of(batch))
    offered = Counter(examples_of(batches.unpacked(np.arange(N) + N * (seed % 5))))
    assert packed <= offered and packed.total() >= 8


@pytest.mark.parametrize("next_sentence", [True, False])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_build_the_rows_of_the_global_batch(hosts, next_sentence):
    options = dict(max_length=64, short_sequence_probability=0.5, next_sentence=next_sentence, packing=True)
    assert rows_of_hosts(hosts, **options)["segments"].max() > 1


def test_every_sentence_is_offered_once_an_epoch():
    """What is packed together is N examples of endless epochs, and what is not among them was dropped."""
    rng = np.random.default_rng(0)
    documents = corpus([[size] for size in rng.integers(1, 62, 500)])
    batches = batches_of(documents, 64, max_length=64, max_predictions=10, next_sentence=False, packing=True)
    N, times, offered, all_dropped = batches.packing.num_examples, Counter(), Counter(), 0
    number = {sentence[0]: i for i, (sentence,) in enumerate(documents)}
    for group in range(4):
        unpacked = unmasked(batches.unpacked(np.arange(group * N, (group + 1) * N)))
        offered.update(number[id] for id in unpacked[:, 1].tolist())
        batch = joined(batches, steps_of_a_group(batches, group))
        found = unmasked(batch)[(batch["positions"] == 1) & (batch["segments"] > 0)]
        times.update(number[id] for id in found.tolist())
        all_dropped += N - len(found)
        # Every sentence at once a whole epoch has passed, and none more than once an epoch.
        epochs, rest = divmod((group + 1) * N, 500)
        assert set(offered.values()) <= {epochs, epochs + 1} and len(offered) == 500
        assert sum(n == epochs + 1 for n in offered.values()) == rest
        assert times <= offered and (offered - times).total() == all_dropped
    assert N > 512 and 0 < all_dropped < 0.05 * 4 * N


@pytest.mark.parametrize(("T", "M"), [(64, 12), (512, 76)])
@pytest.mark.parametrize("kind", ["articles", "short documents"])
def test_few_examples_are_dropped_and_rows_are_full(kind, T, M):
    rng = np.random.default_rng(0)
    documents = corpus(article_sizes(rng, 1000) if kind == "articles" else random_sizes(rng, 1000, 3, median=8))
    options = dict(max_length=T, max_predictions=M, short_sequence_probability=0.1)
    batches = batches_of(documents, 512, packing=True, **options)
    N = batches.packing.num_examples
    kept = filled = 0
    for step in range(1000, 1020):
        batch = batches[step]
        kept, filled = kept + batch["next_sentence_weights"].sum(), filled + np.count_nonzero(batch["segments"])
    dropped, filled = 1 - kept / (20 * N), filled / (20 * 512 * T)
    unpacked = np.count_nonzero(batches.unpacked(np.arange(2000))["segments"]) / (2000 * T)
    assert 0 <= dropped <= 0.005
    assert filled > max(0.9, unpacked)
    described, percent = batches.describe(), r"([\d.]+)%"
    assert re.findall(r"\d[\d,]*", described)[:3] == [f"{n:,}" for n in (N, batches.examples_per_epoch, 512)]
    shares = [float(x) / 100 for x in re.findall(percent, described)]
    assert shares == pytest.approx([filled, unpacked, dropped], abs=0.02)
    plain = PairsConfig(**options).describe(batches_of(documents, 32, **options))
    assert re.findall(percent, plain) == re.findall(percent, described)[1:2]
    assert re.findall(r"\d[\d,]*", plain)[0] == "32"


def test_batches_stay_the_same_across_versions():
    """If this fails, the data of a run in progress changes when it resumes."""
    documents = corpus([[(7 * d + 3 * s) % 23 + 1 for s in range(d % 7 + 1)] for d in range(50)])
    digest = hashlib.sha256()
    for next_sentence in (False, True):
        options = dict(max_length=64, max_predictions=10, short_sequence_probability=0.3, packing=True)
        batch = batches_of(documents, 16, next_sentence=next_sentence, **options)[123]
        for name in sorted(batch):
            digest.update(batch[name].tobytes())
    assert digest.hexdigest() == "9e8199d49339f5bf6d0e5e64a51c8b450f95b562ab0e7fd266edea441b3cae4a"


@pytest.mark.parametrize("next_sentence", [True, False])
def test_baselines_are_those_of_the_same_examples_unpacked(next_sentence):
    documents = corpus(article_sizes(np.random.default_rng(0), 40))
    options = dict(max_length=64, short_sequence_probability=0.5, next_sentence=next_sentence)
    config, plain = PairsConfig(packing=True, **options), PairsConfig(**options)
    vocab_size = FIRST_ID + sum(len(sentence) for document in documents for sentence in document)
    store = Store.from_documents(documents)
    batches = config.build(store, tokenizer(vocab_size), 64, 0)
    N = batches.packing.num_examples
    packed = [joined(batches, steps_of_a_group(batches, group)) for group in range(20)]
    group, whole = next((i, batch) for i, batch in enumerate(packed) if len(examples_of(batch)) == N > 512)
    unpacked = batches.unpacked(np.arange(group * N, group * N + N))
    expected = plain.baselines(plain.build(store, tokenizer(vocab_size), 64, 0), [unpacked])
    assert config.baselines(batches, [whole]) == expected
    assert ("next_sentence_accuracy" in expected) == next_sentence


@pytest.mark.parametrize("next_sentence", [True, False])
def test_a_shown_row_lists_its_examples(next_sentence):
    documents = corpus([[3, 4, 2], [5, 5], [2, 1]])
    options = dict(max_length=32, max_predictions=6, next_sentence=next_sentence)
    batches = batches_of(documents, 8, packing=True, **options)
    names = SimpleNamespace(tokens=["[PAD]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(FIRST_ID, FIRST_ID + 30))])
    shown = list(PairsConfig().show(batches[0], names))
    assert len(shown) == 8
    seen = 0
    for row, text in enumerate(shown):
        count = int(batches[0]["segments"][row].max())
        blocks = re.split(r"\n \d: ", text)
        if count > 1:
            head = blocks.pop(0)
            filled, masks = np.count_nonzero(batches[0]["segments"][row]), int(batches[0]["masked_weights"][row].sum())
            assert head == f"row {row}: {filled} of 32 positions, {masks} to predict, {count} examples"
            seen += 1
        # An example is shown as in a row of its own.
        single = {name: values[row : row + 1].copy() for name, values in batches[0].items()}
        assert len(blocks) == count
        for number, block in enumerate(blocks, 1):
            (here,) = np.nonzero(single["segments"][0] == number)
            alone = {name: np.zeros_like(values) for name, values in single.items()}
            for name in ("tokens", "token_types"):
                alone[name][0, : len(here)] = single[name][0, here]
            alone["segments"][0, : len(here)] = 1
            inside = np.isin(single["masked_positions"], here) & (single["masked_weights"] > 0)
            for name in ("masked_positions", "masked_targets", "masked_weights"):
                alone[name][0, : inside.sum()] = single[name][inside]
            alone["masked_positions"][0, : inside.sum()] -= here[0]
            if next_sentence:
                alone["next_sentence_labels"][0, 0] = single["next_sentence_labels"][0, number - 1]
            (expected,) = PairsConfig().show(alone, names)
            assert block.removeprefix(f"row {row}: ") == expected.removeprefix("row 0: ")
    assert seen > 4
