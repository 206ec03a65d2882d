import hashlib
import math
import random
from collections import Counter
from itertools import chain, pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prelm_jax.corpus.store import Store
from prelm_jax.data.ngrams import trigram_nll
from prelm_jax.data.randomness import bits, key, permute, uniform
from prelm_jax.data.streams import StreamsConfig, bucket, log_uniform
from prelm_jax.errors import InputError
from prelm_jax.validation import check

VOCAB_SIZE = 20
TOKENIZER = SimpleNamespace(vocab_size=VOCAB_SIZE, bos_id=0, eos_id=1, unknown_id=2)
DIRECTIONS = ("forward", "backward")


def corpus(sizes):
    """Sentences of the given sizes, three to a document; every word has its own id, counted up from 3."""
    ids = iter(range(3, 3 + sum(sizes)))
    sentences = [[next(ids) for _ in range(size)] for size in sizes]
    return [sentences[i : i + 3] for i in range(0, len(sentences), 3)]


def spelling(id):
    return ["<S>", "</S>", "<UNK>"][id] if id < 3 else f"w{id}"


def batches_of(documents, batch_size, seed=0, tokenizer=TOKENIZER, **options):
    ids = max((id for document in documents for sentence in document for id in sentence), default=2)
    words = [spelling(id) for id in range(max(ids + 1, tokenizer.vocab_size))]
    options = {"num_negatives": 0, **options}
    return StreamsConfig(**options).build(Store.from_documents(documents, words), tokenizer, batch_size, seed)


def read(batch, direction):
    """The inputs, targets and weights of a direction: [[(input, target, weight), …] for each row]."""
    special = {(256,): 0, (257,): 1, tuple(b"<UNK>"): 2}
    used = batch["characters"][: batch[f"{direction}_words"].max() + 1].tolist()
    spelled = [tuple(row[1 : row.index(259)]) for row in used]
    ids = [special[word] if word in special else int(bytes(word[1:])) for word in spelled]
    keys = [f"{direction}_{name}" for name in ("words", "targets", "weights")]
    rows = zip(*(batch[key].tolist() for key in keys), strict=True)
    return [[(ids[word], target, weight) for word, target, weight in zip(*row, strict=True)] for row in rows]


def joined(parts):
    return list(chain.from_iterable(parts))


def expected_positions(sentence, direction):
    """(input, target) at each position of a sentence; a target outside of the vocabulary is <UNK>."""
    bounded = [0, *sentence, 1]
    ordered = bounded if direction == "forward" else bounded[::-1]
    return [(word, target if target < VOCAB_SIZE else 2) for word, target in pairwise(ordered)]


def expected_rows(documents, B, seed, independent, direction, length):
    """The first positions of every row, in plain Python."""
    sentences = [sentence for document in documents for sentence in document]
    n = len(sentences)
    N = sum(map(len, sentences)) + n
    stream = direction if independent else "forward"
    rows = [[] for _ in range(B)]
    epoch = 0
    while len(rows[0]) < length:
        order = permute(np.arange(n), n, bits(key(seed, f"streams: epoch {stream}"), epoch))
        line = [pair for i in order for pair in expected_positions(sentences[i], direction)]
        for b, row in enumerate(rows):
            begin, end = b * N // B, (b + 1) * N // B
            row += [(*pair, 1.0) for pair in line[begin:end]]
            row += [(*line[end], 0.0)] * (-(-N // B) - (end - begin)) if end < N else []
        epoch += 1
    return [row[:length] for row in rows]


sizes = st.lists(st.integers(1, 9), min_size=1, max_size=9)
options = {"sizes": sizes, "B": st.integers(1, 5), "T": st.integers(1, 12), "independent": st.booleans()}


@settings(deadline=None, max_examples=40)
@given(**options, seed=st.integers(0, 2**32))
def test_streams_match_the_reference(sizes, B, T, independent, seed):
    documents = corpus(sizes)
    batches = batches_of(documents, B, seed, max_length=T, independent_directions=independent)
    steps = range(-(-3 * (sum(sizes) + len(sizes)) // (B * T)) + 1)  # three epochs
    found = [batches[step] for step in steps]
    for direction in DIRECTIONS:
        expected = expected_rows(documents, B, seed, independent, direction, len(steps) * T)
        parts = zip(*(read(batch, direction) for batch in found), strict=True)
        assert [joined(row) for row in parts] == expected


@settings(deadline=None, max_examples=40)
@given(**options)
def test_an_epoch_has_every_word_once_in_either_direction(sizes, B, T, independent):
    """In whatever order: each word is read once, and predicted once from the word before it."""
    documents = corpus(sizes)
    batches = batches_of(documents, B, max_length=1, independent_directions=independent)
    length = -(-(sum(sizes) + len(sizes)) // B)
    for epoch in range(2):
        found = [batches[step] for step in range(epoch * length, (epoch + 1) * length)]
        for direction in DIRECTIONS:
            pairs = [pair for batch in found for row in read(batch, direction) for *pair, weight in row if weight]
            expected = [p for document in documents for s in document for p in expected_positions(s, direction)]
            assert Counter(map(tuple, pairs)) == Counter(expected)


def test_by_hand():
    """Two rows of one sentence each, cut every two positions: a sentence continues in the next step."""
    documents = [[[3, 4, 50]], [[3, 4, 50]]]
    batches = batches_of(documents, 2, max_length=2)
    assert [read(batches[step], "forward") for step in (0, 1, 2)] == [
        [[(0, 3, 1), (3, 4, 1)]] * 2,
        [[(4, 2, 1), (50, 1, 1)]] * 2,
        [[(0, 3, 1), (3, 4, 1)]] * 2,
    ]
    assert [read(batches[step], "backward") for step in (0, 1, 2)] == [
        [[(1, 2, 1), (50, 4, 1)]] * 2,
        [[(4, 3, 1), (3, 0, 1)]] * 2,
        [[(1, 2, 1), (50, 4, 1)]] * 2,
    ]


@pytest.mark.parametrize("independent", [False, True])
def test_a_row_resumes_where_it_stopped(independent):
    """A target is the next input, or after the end of a sentence the beginning of the next, across steps too."""
    sizes = random_sizes(100)
    tokenizer = SimpleNamespace(**{**vars(TOKENIZER), "vocab_size": 10**6})
    store = Store.from_documents(corpus(sizes), [spelling(id) for id in range(3 + sum(sizes))])
    config = StreamsConfig(max_length=7, num_negatives=0, independent_directions=independent)
    batches = config.build(store, tokenizer, 4, seed=0)
    epoch = -(-(sum(sizes) + len(sizes)) // 4)
    found = [batches[step] for step in range(3 * epoch // 7)]
    for direction, (begin, end) in zip(DIRECTIONS, ((0, 1), (1, 0)), strict=True):
        for row in zip(*(read(batch, direction) for batch in found), strict=True):
            for i, ((_, target, _), (following, *_)) in enumerate(pairwise(joined(row)), start=1):
                assert i % epoch == 0 or following == (begin if target == end else target)


def random_sizes(sentences, seed=0):
    return (np.random.default_rng(seed).lognormal(2.5, 0.7, sentences).astype(int) + 1).tolist()


def zipf(sentences, kinds, seed=0):
    """Sentences of words that follow Zipf's law, three a document."""
    rng = random.Random(seed)
    weights = [1 / (i + 1) for i in range(kinds)]
    drawn = [rng.choices(range(3, 3 + kinds), weights, k=size) for size in random_sizes(sentences, seed)]
    return [drawn[i : i + 3] for i in range(0, sentences, 3)]


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("independent", [False, True])
def test_hosts_build_the_rows_of_the_global_batch(hosts, independent):
    documents = corpus([30] * 16 + [2])  # 499 positions: no two hosts have the same slices
    options = dict(max_length=50, independent_directions=independent, num_negatives=5)
    expected = batches_of(documents, 16, **options)[1000]
    batches = batches_of(documents, 16, **options)
    batches[3]  # leaves no state
    parts = [batches.rows(1000, i, i + 16 // hosts) for i in range(0, 16, 16 // hosts)]
    assert set(expected) == set(batches.layout)
    assert batches.batch_size == 16
    assert 0 < (expected["forward_weights"] == 0).sum() < 50  # some slices end in it
    for name, array in expected.items():
        shape = {"characters": array.shape, "negatives": (5,), "tries": ()}.get(name.split("_")[-1], (16, 50))
        assert array.shape == shape and array.flags.c_contiguous
        assert array.dtype == (np.float32 if name.endswith("weights") else np.int32)
        layout = {"characters": "shared", "negatives": "replicated", "tries": "replicated"}
        assert batches.layout[name] == layout.get(name.split("_")[-1], "rows")
        if batches.layout[name] == "rows":
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)
        else:
            for part in parts:
                np.testing.assert_array_equal(part[name], array)


def test_steps_in_any_order_are_the_same():
    documents = corpus(random_sizes(50))
    batches = batches_of(documents, 4, max_length=9, num_negatives=3)
    steps = [5, 10**9, 77, 5, 0, 10**9, 77]
    digests = [hashlib.sha256(b"".join(array.tobytes() for array in batches[step].values())) for step in steps]
    digests = [digest.hexdigest() for digest in digests]
    assert digests[0] == digests[3] and digests[1:3] == digests[5:]
    assert len(set(digests)) == 4


def test_seeds_and_epochs_reshuffle():
    documents = corpus(random_sizes(60))
    epoch = -(-sum(len(s) + 1 for document in documents for s in document) // 2)
    options = dict(max_length=epoch, independent_directions=True)
    found = [batches_of(documents, 2, **options)[step] for step in range(3)]
    found.append(batches_of(documents, 2, seed=1, **options)[0])
    orders = [
        [target for row in read(batch, d) for _, target, weight in row[:: 1 if d == "forward" else -1] if weight]
        for batch in found
        for d in DIRECTIONS
    ]
    words = [tuple(read(batch, "forward")[0]) for batch in found]
    assert len(set(words)) == 4
    assert len({tuple(order) for order in orders}) == 8
    assert len({tuple(sorted(t for t in order if t > 1)) for order in orders}) == 1


def test_both_directions_share_their_words():
    """A step has far fewer distinct words than if the directions read different sentences."""
    documents = zipf(1000, 20_000)
    distinct = {
        independent: np.mean(
            [
                len({w for d in DIRECTIONS for row in read(batches[step], d) for w, *_ in row})
                for batches in [batches_of(documents, 16, max_length=20, independent_directions=independent)]
                for step in range(5)
            ]
        )
        for independent in (False, True)
    }
    assert distinct[False] < 0.8 * distinct[True]


# ---- Distinct words of a batch ---------------------------------------------------------------------------------------


def test_distinct_words_are_unique_and_padded():
    documents = zipf(500, 2000)
    batches = batches_of(documents, 16, max_length=20)
    sizes = set()
    for step in range(50):
        batch = batches[step]
        used = {word for direction in DIRECTIONS for row in batch[f"{direction}_words"].tolist() for word in row}
        assert used == set(range(len(used)))
        rows = batch["characters"].tolist()
        assert len({tuple(row) for row in rows[: len(used)]}) == len(used)
        assert rows[len(used) :] == [[258, *b"<UNK>", 259, *[260] * 17]] * (len(rows) - len(used))
        assert len(rows) == bucket(len(used))
        sizes.add(len(rows))
    assert sizes <= {256, 384}


@pytest.mark.parametrize(("letters", "columns"), [(1, 24), (22, 24), (23, 50), (48, 50), (300, 50)])
def test_width_of_characters_follows_the_longest_word(letters, columns):
    store = Store.from_documents([[[3, 4]]], ["<S>", "</S>", "<UNK>", "x", "a" * letters])
    characters = StreamsConfig(num_negatives=0).build(store, TOKENIZER, 1, 0)[0]["characters"]
    assert characters.shape == (128, columns)
    assert [258, *b"a" * min(letters, 48), 259] in [[id for id in row if id != 260] for row in characters.tolist()]


def test_buckets():
    sizes = [bucket(n) for n in range(1, 5000)]
    assert all(size >= n for n, size in enumerate(sizes, start=1))
    assert all(size == 128 or size < 1.5 * n for n, size in enumerate(sizes, start=1))
    assert sorted(set(sizes)) == [128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144]
    assert [bucket(n) for n in (128, 129, 192, 193, 256, 257)] == [128, 192, 192, 256, 256, 384]


def test_words_outside_the_vocabulary_keep_their_characters():
    documents = [[[3, 999, 4]]]
    batch = batches_of(documents, 1, max_length=4)[0]
    assert read(batch, "forward") == [[(0, 3, 1), (3, 2, 1), (999, 4, 1), (4, 1, 1)]]
    assert read(batch, "backward") == [[(1, 4, 1), (4, 2, 1), (999, 3, 1), (3, 0, 1)]]


# ---- Negatives -------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(seed=st.integers(0, 1000), vocab_size=st.integers(2, 60), fraction=st.floats(0, 1), at_once=st.integers(1, 500))
def test_negatives_are_drawn_until_there_are_enough(seed, vocab_size, fraction, at_once):
    n = 1 + int(fraction * (vocab_size - 2))
    stream = key(seed, "test")
    expected, tries = [], 0
    draws = uniform(stream, np.arange(20_000)).tolist()
    while len(expected) < n:
        word = int(math.exp(draws[tries] * math.log(vocab_size + 1))) - 1
        tries += 1
        if word not in expected:
            expected.append(word)
    negatives, found_tries = log_uniform(stream, n, vocab_size, at_once)
    assert negatives.tolist() == expected and found_tries == tries
    assert negatives.dtype == found_tries.dtype == np.int32


def test_the_first_draws_are_log_uniform():
    V, n = 30, 20_000
    counts = np.zeros(V)
    for first, *_ in (log_uniform(key(seed, "first"), 3, V, 8)[0] for seed in range(n)):
        counts[first] += 1
    k = np.arange(V)
    expected = n * np.log((k + 2) / (k + 1)) / np.log(V + 1)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 60  # 29 degrees of freedom: above 60 one time in a thousand


def test_tries_give_the_expected_counts():
    """TensorFlow's expected counts, -expm1(tries · log1p(-P)), match the frequencies over many steps."""
    batches = batches_of(corpus([5] * 10), 2, max_length=3, num_negatives=8)
    k = np.arange(VOCAB_SIZE)
    probability = np.log((k + 2) / (k + 1)) / np.log(VOCAB_SIZE + 1)
    counts, expected = np.zeros(VOCAB_SIZE), np.zeros(VOCAB_SIZE)
    seen = set()
    for step in range(1500):
        batch = batches[step]
        for direction in DIRECTIONS:
            negatives, tries = batch[f"{direction}_negatives"], batch[f"{direction}_tries"]
            assert len(set(negatives.tolist())) == 8 <= tries
            counts[negatives] += 1
            expected += -np.expm1(tries * np.log1p(-probability))
            seen.add(tuple(negatives.tolist()))
    assert len(seen) > 2900  # different in each step and direction
    np.testing.assert_allclose(counts, expected, rtol=0.15)


def test_negatives_do_not_depend_on_the_data():
    one = batches_of(corpus([5] * 10), 2, max_length=3, num_negatives=8)[7]
    other = batches_of(corpus([9] * 33), 4, max_length=5, num_negatives=8)[7]
    none = batches_of(corpus([5] * 10), 2, max_length=3)[7]
    for direction in DIRECTIONS:
        np.testing.assert_array_equal(one[f"{direction}_negatives"], other[f"{direction}_negatives"])
        assert not any(name.endswith(("negatives", "tries")) for name in none)


# ---- Baselines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("independent", [False, True])
def test_baselines(independent):
    rng = random.Random(0)
    V = 40
    tokenizer = SimpleNamespace(**{**vars(TOKENIZER), "vocab_size": V})
    # Each word is the one before it plus a little, so a trigram model predicts better than a unigram model; some are
    # unknown.
    documents = []
    for size in random_sizes(400):
        first = rng.randrange(3, 50)
        documents.append([[3 + (first + rng.choice([1, 2]) * i) % 47 for i in range(size)]])
    batches = batches_of(documents, 7, tokenizer=tokenizer, max_length=11, independent_directions=independent)
    # A whole epoch and the beginning of the next, so that there are positions without weight.
    found = [batches[step] for step in range((sum(random_sizes(400)) + 400) // 77 + 2)]
    assert any((batch["forward_weights"] == 0).any() for batch in found)
    result = StreamsConfig().baselines(batches, iter(found))
    for name, value in result.pop("loss").items():
        assert value == pytest.approx((result["forward_loss"][name] + result["backward_loss"][name]) / 2)
    assert list(result) == ["forward_loss", "backward_loss"]
    for direction, end in zip(DIRECTIONS, (1, 0), strict=True):
        known = [[id if id < V else 2 for id in sentence] for ((sentence),) in documents]
        reading = [[*(s if direction == "forward" else s[::-1]), end] for s in known]
        counts = Counter(id for sentence in reading for id in sentence)
        trigrams = []
        for row in zip(*(read(batch, direction) for batch in found), strict=True):
            before = [V, V]
            for _, target, weight in joined(row):
                if weight:
                    trigrams.append((*before, target))
                before = [V, V] if target == end else [before[1], target]
        total = counts.total() + V
        unigram = -np.mean([np.log((counts[target] + 1) / total) for *_, target in trigrams])
        store = Store.from_documents([sentence] for sentence in reading)
        assert result[f"{direction}_loss"]["unigram"] == pytest.approx(unigram)
        trigram = trigram_nll(store, V, np.array(trigrams).T).mean()
        assert result[f"{direction}_loss"]["trigram"] == pytest.approx(trigram, rel=1e-12)
        assert result[f"{direction}_loss"]["trigram"] < 0.7 * unigram


# ---- Edges -----------------------------------------------------------------------------------------------------------


def test_batches_stay_the_same_across_versions():
    """If this fails, the data of a run in progress changes when it resumes."""
    documents = corpus([(7 * d) % 23 + 1 for d in range(200)])
    digest = hashlib.sha256()
    for independent in (False, True):
        batch = batches_of(documents, 8, max_length=11, independent_directions=independent, num_negatives=7)[123]
        for name in sorted(batch):
            digest.update(batch[name].tobytes())
    assert digest.hexdigest() == "9f08810ca4603b9336f58b226073032b173852d0b8ea572d22ff7243c7de78f9"


def test_derived_metrics():
    store = Store.from_documents([[[3]]], [spelling(id) for id in range(4)])
    derived = {name: StreamsConfig().derived_metrics(name, 2.0, store) for name in ("loss", "forward_loss", "other")}
    assert derived == {
        "loss": {"perplexity": math.exp(2)},
        "forward_loss": {"forward_perplexity": math.exp(2)},
        "other": {},
    }


def test_shown_rows():
    """A target is shown if it is not the next input: at the end of a sentence, and before an unknown word."""
    tokenizer = SimpleNamespace(tokens=[spelling(id) for id in range(VOCAB_SIZE)])
    batches = batches_of([[[3, 4, 99]], [[3, 4, 99]]], 1, max_length=7)
    (row,) = StreamsConfig().show(batches[0], tokenizer)
    assert row == (
        "row 0\n"
        "  forward  <S> w3 ⟦w4 → <UNK>⟧ ⟦w99 → </S>⟧ <S> w3 ⟦w4 → <UNK>⟧\n"
        "  backward ⟦</S> → <UNK>⟧ w99 w4 ⟦w3 → <S>⟧ ⟦</S> → <UNK>⟧ w99 ⟦w4 → w3⟧"
    )
    batches = batches_of([[[3, 4]]], 2, max_length=2)
    rows = list(StreamsConfig().show(batches[0], tokenizer))
    assert [row.splitlines()[1] for row in rows] == ["  forward  <S> ⟦w3 → ⟧", "  forward  w3 ⟦w4 → </S>⟧"]


def test_a_sentence_of_ten_thousand_words_in_a_batch_of_one():
    batches = batches_of([[list(range(3, 10_003))]], 1, max_length=20)
    found = [batches[step] for step in range(501)]
    forward = joined(read(batch, "forward")[0] for batch in found)
    assert [word for word, *_ in forward[:10_002]] == [0, *range(3, 10_003), 0]
    backward = joined(read(batch, "backward")[0] for batch in found)
    assert [word for word, *_ in backward[:10_002]] == [1, *range(10_002, 2, -1), 1]


def test_more_rows_than_words():
    """Each position is in one row; the other rows have no weight."""
    batch = batches_of([[[3, 4]]], 8, max_length=1)[0]
    rows = [row[0] for row in read(batch, "forward")]
    assert sorted(row[:2] for row in rows if row[2]) == [(0, 3), (3, 4), (4, 1)]


def complaint(call, *arguments, **options) -> str:
    with pytest.raises(InputError) as error:
        call(*arguments, **options)
    return str(error.value)


def test_impossible_options():
    for length, bound in ((0, 1), (-3, 1), (2**16, 65535)):
        message = complaint(check, StreamsConfig(max_length=length))
        assert f"max_length is {length}:" in message and str(bound) in message
    assert "num_negatives is -1:" in complaint(check, StreamsConfig(num_negatives=-1))


@pytest.mark.parametrize("number", [20, 8192])
def test_as_many_negatives_as_words_are_refused(number):
    message = complaint(batches_of, corpus([5]), 1, num_negatives=number)
    assert f"data.num_negatives is {number}" in message and " 20 " in message


def test_an_empty_corpus_is_refused():
    assert "empty" in complaint(batches_of, [], 1)


def test_a_store_of_subwords_is_refused():
    store = Store.from_documents([[[3, 4]]])
    assert "WordVocabularyConfig" in complaint(StreamsConfig().build, store, TOKENIZER, 1, 0)
