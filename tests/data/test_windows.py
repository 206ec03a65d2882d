import hashlib
import math
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prelm_jax.corpus.store import Store
from prelm_jax.data.ngrams import trigram_nll
from prelm_jax.data.windows import WindowsConfig
from prelm_jax.errors import InputError
from prelm_jax.validation import check

KEYS = ["tokens", "targets", "positions", "segments", "weights"]


def corpus(sizes):
    """Documents of the given sizes; every token has its own id, counted up from 1."""
    ids = iter(range(1, sum(sizes) + 1))
    return [[next(ids) for _ in range(size)] for size in sizes]


def batches_of(documents, batch_size, seed=0, vocab_size=10**6, **options):
    store = Store.from_documents([document[:3], document[3:]] for document in documents)
    return WindowsConfig(**options).build(store, SimpleNamespace(vocab_size=vocab_size), batch_size, seed)


def expected_windows(documents, T):
    """The windows of an epoch, one token at a time: each a list of segments, a segment a list of (token, target)."""
    windows, rest = [], []
    for ids in documents:
        pairs = list(pairwise(ids))
        while len(pairs) >= T:
            windows.append([pairs[:T]])
            pairs = pairs[T:]
        rest.append(pairs)
    window, used = [], 0
    for pairs in rest:
        segment = []
        for pair in pairs:
            if not segment:
                window.append(segment)
            segment.append(pair)
            used += 1
            if used == T:
                windows.append(window)
                window, segment, used = [], [], 0
    return windows + [window] * bool(used)


def expected_row(window, T, across_documents):
    columns = [
        (*pair, t, number, 1) for number, segment in enumerate(window, start=1) for t, pair in enumerate(segment)
    ]
    if across_documents:
        columns = [(token, target, t, 1, 1) for t, (token, target, *_) in enumerate(columns)]
    return (*columns, *[(0,) * 5] * (T - len(columns)))


def rows_by_key(batch):
    """int [B, keys, T]"""
    return np.stack([batch[key] for key in KEYS], axis=1).astype(int)


def rows_of(batch):
    return [tuple(map(tuple, row.T.tolist())) for row in rows_by_key(batch)]


sizes = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@given(
    sizes=sizes, T=st.integers(2, 20), across=st.booleans(), batch_size=st.integers(1, 9), seed=st.integers(0, 2**32)
)
def test_an_epoch_has_every_window_once(sizes, T, across, batch_size, seed):
    documents = corpus([*sizes, T + 1])
    batches = batches_of(documents, batch_size, seed, max_length=T, across_documents=across)
    expected = Counter(expected_row(window, T, across) for window in expected_windows(documents, T))
    assert batches.examples_per_epoch == expected.total()
    steps = range(-(-3 * expected.total() // batch_size))
    rows = [row for step in steps for row in rows_of(batches[step])]
    for epoch in range(3):
        assert Counter(rows[epoch * expected.total() : (epoch + 1) * expected.total()]) == expected


@given(sizes=sizes, T=st.integers(2, 20))
def test_every_token_but_the_first_of_a_document_is_a_target_once(sizes, T):
    documents = corpus([*sizes, T + 1])
    batch = batches_of(documents, 1, max_length=T).rows(0, 0, len(expected_windows(documents, T)))
    real = batch["weights"] == 1
    pairs = zip(batch["tokens"][real].tolist(), batch["targets"][real].tolist(), strict=True)
    assert Counter(pairs) == Counter(pair for document in documents for pair in pairwise(document))
    # Only one window has padding.
    assert (~real).sum() < T and (~real).any(axis=1).sum() <= 1


def test_a_short_corpus_by_hand():
    documents = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10], [11, 12, 13]]
    batch = batches_of(documents, 3, max_length=4)[0]
    order = np.argsort(batch["tokens"][:, 0])
    assert {key: value[order].tolist() for key, value in batch.items()} == {
        "tokens": [[1, 2, 3, 4], [5, 6, 9, 11], [12, 0, 0, 0]],
        "targets": [[2, 3, 4, 5], [6, 7, 10, 12], [13, 0, 0, 0]],
        "positions": [[0, 1, 2, 3], [0, 1, 0, 0], [0, 0, 0, 0]],
        "segments": [[1, 1, 1, 1], [1, 1, 2, 3], [1, 0, 0, 0]],
        "weights": [[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]],
    }
    across = batches_of(documents, 3, max_length=4, across_documents=True)[0]
    assert {key: value[order].tolist() for key, value in across.items() if key in ("positions", "segments")} == {
        "positions": [[0, 1, 2, 3], [0, 1, 2, 3], [0, 0, 0, 0]],
        "segments": [[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]],
    }
    for key in ("tokens", "targets", "weights"):
        np.testing.assert_array_equal(across[key], batch[key])


def random_sizes(documents, seed=0):
    return np.random.default_rng(seed).lognormal(3, 1.5, documents).astype(int) + 1


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_build_the_rows_of_the_global_batch(hosts):
    documents = corpus(random_sizes(200))
    expected = batches_of(documents, 16, max_length=32)[1000]
    batches = batches_of(documents, 16, max_length=32)
    batches[3]  # leaves no state
    rows = [batches.rows(1000, i, i + 16 // hosts) for i in range(0, 16, 16 // hosts)]
    assert list(expected) == list(batches.layout) == KEYS
    assert set(batches.layout.values()) == {"rows"}
    assert batches.batch_size == 16
    for name, array in expected.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in rows]), array)
        assert array.dtype == (np.float32 if name == "weights" else np.int32)
        assert array.shape == (16, 32) and array.flags.c_contiguous


def test_seeds_and_epochs_reshuffle():
    documents = corpus(random_sizes(200))
    batches = batches_of(documents, 1, max_length=32)
    n = batches.examples_per_epoch
    epochs = [batches.rows(epoch * n, 0, n)["tokens"] for epoch in range(3)]
    epochs.append(batches_of(documents, 1, seed=1, max_length=32).rows(0, 0, n)["tokens"])
    assert len({tokens.tobytes() for tokens in epochs}) == 4
    assert len({np.sort(tokens, axis=0).tobytes() for tokens in epochs}) == 1


def test_batches_stay_the_same_across_versions():
    """If this fails, the data of a run in progress changes when it resumes."""
    documents = corpus([(7 * d) % 23 + 1 for d in range(200)])
    digest = hashlib.sha256()
    for across in (False, True):
        batch = batches_of(documents, 16, max_length=16, across_documents=across)[123]
        for name in sorted(batch):
            digest.update(batch[name].tobytes())
    assert digest.hexdigest() == "60e124ce3fa1091db3ac13a2b7f56fd78fef97dde67512b66632dab1108e2ea8"


@pytest.mark.parametrize("across", [False, True])
def test_baselines(across):
    rng = np.random.default_rng(0)
    vocab_size = 60
    # Each token is the one before it plus 1 to 3, so a trigram model predicts better than a unigram model.
    documents = [(np.cumsum(rng.integers(1, 4, size)) % 50).tolist() for size in random_sizes(100)]
    batches = batches_of(documents, 8, vocab_size=vocab_size, max_length=32, across_documents=across)
    middle, end = batches.examples_per_epoch // 2, batches.examples_per_epoch
    evaluation = [batches.rows(0, 0, middle), batches.rows(0, middle, end)]  # one of them has padding
    result = WindowsConfig().baselines(batches, iter(evaluation))
    counts = Counter(id for document in documents for id in document)
    total = counts.total() + vocab_size
    trigrams = [
        (row[0][t - 1] if row[2][t] else vocab_size, row[0][t], row[1][t])
        for batch in evaluation
        for row in rows_by_key(batch)
        for t in range(32)
        if row[4][t]
    ]
    targets = [target for *_, target in trigrams]
    assert len(targets) == sum(map(len, documents)) - len(documents)
    unigram = -np.mean([np.log((counts[target] + 1) / total) for target in targets])
    assert set(result) == {"lm_loss", "lm_accuracy"} and set(result["lm_loss"]) == {"unigram", "trigram"}
    assert result["lm_loss"]["unigram"] == pytest.approx(unigram)
    assert 1 < result["lm_loss"]["trigram"] < 1.2 < unigram  # about ln 3, on the text to which it is fitted
    most_frequent = max(counts, key=lambda id: (counts[id], -id))
    assert result["lm_accuracy"] == {"most frequent token": targets.count(most_frequent) / len(targets)}
    store = Store.from_documents([document] for document in documents)
    assert result["lm_loss"]["trigram"] == trigram_nll(store, vocab_size, np.array(trigrams).T).mean()


def test_derived_metrics():
    store = Store.from_documents([[[1, 2, 3]], [[4]]])
    store.document_bytes = np.array([10, 6])
    derived = WindowsConfig().derived_metrics("lm_loss", 2.0, store)
    assert derived == {"perplexity": math.exp(2), "bits_per_byte": pytest.approx(2 / math.log(2) * 4 / 16)}
    assert WindowsConfig().derived_metrics("lm_accuracy", 0.5, store) == {}


def test_shown_rows():
    """Segments have their numbers, and a target is shown if it is not the next input."""
    documents = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10], [11, 12, 13]]
    tokenizer = SimpleNamespace(tokens=[f"t{i}" for i in range(20)])
    batches = batches_of(documents, 3, max_length=4)
    rows = sorted((row.partition(": ")[2] for row in WindowsConfig().show(batches[0], tokenizer)), reverse=True)
    assert rows == [
        "4 of 4 positions\n  1 t5 ⟦t6 → t7⟧\n  2 ⟦t9 → t10⟧\n  3 ⟦t11 → t12⟧",
        "4 of 4 positions\n  1 t1 t2 t3 ⟦t4 → t5⟧",
        "1 of 4 positions\n  1 ⟦t12 → t13⟧",
    ]
    across = batches_of(documents, 3, max_length=4, across_documents=True)
    batch = across[0]
    batch["weights"][:, 1] = 0
    shown = "\n".join(WindowsConfig().show(batch, tokenizer))
    assert "  1 t5 ⟦t6 → ⟧ ⟦t9 → t10⟧ ⟦t11 → t12⟧" in shown


@pytest.mark.parametrize(("max_length", "bound"), [(1, 2), (-3, 1), (10**6, 65535)])
def test_impossible_lengths(max_length, bound):
    with pytest.raises(InputError, match=f"max_length is {max_length}: .* {bound}"):
        check(WindowsConfig(max_length))


@pytest.mark.parametrize(("sizes", "inputs"), [([32], 31), ([16, 17, 1], 31), ([1] * 100, 0), ([], 0)])
def test_a_corpus_shorter_than_a_window_is_refused(sizes, inputs):
    with pytest.raises(InputError) as error:
        batches_of(corpus(sizes), 4, max_length=32)
    message = str(error.value)
    assert (
        message.startswith(f"{inputs} tokens to predict in {len(sizes)} documents") and "--data.max-length" in message
    )


@pytest.mark.parametrize("sizes", [[33], [17, 17], [2] * 32])
def test_a_corpus_of_one_window_is_enough(sizes):
    batches = batches_of(corpus(sizes), 4, max_length=32)
    assert batches.examples_per_epoch == 1
    assert (batches[0]["weights"] == 1).all()
