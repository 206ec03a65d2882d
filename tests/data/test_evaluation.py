"""Layouts of a text that is evaluated: each target once, whatever the batch size."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prelm_jax.corpus.store import Store
from prelm_jax.data import baselines
from prelm_jax.data.evaluation import EvaluationBatches
from prelm_jax.data.masking import MaskingConfig
from prelm_jax.data.ngrams import trigram_nll
from prelm_jax.data.pairs import PairsConfig
from prelm_jax.data.streams import StreamsConfig
from prelm_jax.data.windows import WindowsConfig
from prelm_jax.errors import InputError

FIRST_ID = 5  # after the special tokens
PAD, CLS, SEP, MASK = range(4)
documents = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=5), min_size=1, max_size=8)


def store_of(sizes) -> Store:
    """Documents of sentences of these sizes; every token has its own id, counted up, and the spelling w<id>."""
    ids = iter(range(FIRST_ID, FIRST_ID + 10**6))
    corpus = [[[next(ids) for _ in range(size)] for size in sentences] for sentences in sizes]
    return Store.from_documents(corpus, [f"w{id}" for id in range(next(ids))])


def tokenizer_of(store):
    roles = {"pad_id": PAD, "cls_id": CLS, "sep_id": SEP, "mask_id": MASK, "bos_id": 0, "eos_id": 1, "unknown_id": 2}
    return SimpleNamespace(**roles, vocab_size=FIRST_ID + store.num_tokens, tokens=[])


def batches_of(config, store, batch_size, sample=1.0):
    return EvaluationBatches(config.evaluation(store, tokenizer_of(store)), batch_size, sample)


def read(batches) -> list[dict[str, np.ndarray]]:
    return [batches[i] for i in range(len(batches))]


def document_of(store):
    """For each token of the store the number of its document."""
    return np.repeat(np.arange(store.num_documents), np.diff(store.sentence_offsets[store.document_offsets]))


# Batches


class Numbers:
    """Rows that hold their number and their part."""

    layout = {"row": "rows", "weights": "rows", "all": "shared"}  # noqa: RUF012

    def __init__(self, num_rows, num_steps):
        self.num_rows, self.num_steps = num_rows, num_steps

    def rows(self, step, row_B):
        return {"row": row_B * 1, "weights": np.full(len(row_B), step + 1.0), "all": np.array([step])}


@given(rows=st.integers(1, 40), steps=st.integers(1, 4), batch_size=st.integers(1, 50), hosts=st.sampled_from([1, 2]))
def test_every_part_of_every_row_is_in_one_batch(rows, steps, batch_size, hosts):
    batches = EvaluationBatches(Numbers(rows, steps), batch_size * hosts)
    assert batches.share == 1 and batches.num_steps == steps
    found = Counter()
    for i in range(len(batches)):
        parts = [batches.rows(i, host * batch_size, (host + 1) * batch_size) for host in range(hosts)]
        whole = batches[i]
        assert whole["all"] == [i % steps]
        for name in ("row", "weights"):
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole[name])
            assert len(whole[name]) == batches.batch_size
        real = whole["weights"] > 0
        assert not whole["row"][~real].any()
        found.update(zip(whole["row"][real].tolist(), whole["weights"][real].tolist(), strict=True))
    assert found == Counter({(row, step + 1.0): 1 for row in range(rows) for step in range(steps)})


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_sample_is_spread_over_the_text(batch_size):
    batches = EvaluationBatches(Numbers(50, 1), batch_size, 0.1)
    rows = np.concatenate([batch["row"][batch["weights"] > 0] for batch in read(batches)])
    assert rows.tolist() == [0, 10, 20, 30, 40] and batches.share == 0.1
    batches = EvaluationBatches(Numbers(3, 20), batch_size, 0.1)  # The beginnings of all rows.
    found = [pair for batch in read(batches) for pair in zip(batch["row"], batch["weights"], strict=True) if pair[1]]
    assert sorted(found) == [(row, part) for row in range(3) for part in (1, 2)]
    assert batches.share == 0.1
    assert EvaluationBatches(Numbers(50, 1), batch_size, 1e-9).share == 1 / 50


# Windows


@settings(max_examples=30)
@given(sizes=documents, T=st.integers(2, 20), B=st.integers(1, 9), across=st.booleans())
def test_every_token_but_a_documents_first_is_a_target_once(sizes, T, B, across):
    store = store_of(sizes)
    firsts = set(store.ids[store.sentence_offsets[store.document_offsets[:-1]]].tolist())
    config = WindowsConfig(max_length=T, across_documents=across)
    expected = set(store.ids.tolist()) - firsts
    if not expected:
        with pytest.raises(InputError, match="two tokens"):
            batches_of(config, store, B)
        return
    found = read(batches_of(config, store, B))
    real = [batch["weights"] > 0 for batch in found]
    targets = np.concatenate([batch["targets"][x] for batch, x in zip(found, real, strict=True)])
    inputs = np.concatenate([batch["tokens"][x] for batch, x in zip(found, real, strict=True)])
    assert sorted(targets.tolist()) == sorted(expected)
    assert (inputs == targets - 1).all()
    assert all(not batch["segments"][~x].any() for batch, x in zip(found, real, strict=True))


# Streams


@settings(max_examples=30)
@given(sizes=documents, T=st.integers(1, 20), B=st.integers(1, 40), rows=st.integers(1, 5))
def test_every_word_is_predicted_once_in_either_direction(sizes, T, B, rows):
    """In the order of the text, each row from where the one before ends; of batches of any number of rows."""
    store = store_of(sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prelm_jax.data.streams.MOST_ROWS", rows)
        patch.setattr("prelm_jax.data.streams.FEWEST_WORDS_IN_ROW", 7)
        config = StreamsConfig(max_length=T, num_negatives=10**6, independent_directions=True)
        batches = batches_of(config, store, B)
        R = min(rows, max(1, store.num_tokens // 7))
    groups = -(-R // B)
    assert len(batches) == groups * batches.num_steps
    sentences = np.split(store.ids, store.sentence_offsets[1:-1])
    expected = {
        "forward": [x for sentence in sentences for x in [*sentence, 1]],
        "backward": [x for sentence in sentences for x in [*sentence[::-1], 0]],
    }
    for direction, line in expected.items():
        found = []
        for group in range(groups):
            steps = [batches[group * batches.num_steps + i] for i in range(batches.num_steps)]
            targets = np.concatenate([batch[f"{direction}_targets"] for batch in steps], axis=1)
            weights = np.concatenate([batch[f"{direction}_weights"] for batch in steps], axis=1)
            found += [row[weight > 0] for row, weight in zip(targets, weights, strict=True)]
        assert np.concatenate(found).tolist() == line
        assert [len(row) for row in found[:R]] == np.diff(np.arange(R + 1) * len(line) // R).tolist()
        assert not any(len(row) for row in found[R:])
    assert not any("negatives" in name for name in batches.layout)


@pytest.mark.parametrize(("words", "rows"), [(1, 1), (799, 1), (800, 2), (12_799, 31), (12_800, 32), (10**5, 32)])
def test_number_of_streams(words, rows):
    store = store_of([[words]])
    assert StreamsConfig(num_negatives=0).evaluation(store, tokenizer_of(store)).num_rows == rows


# Pairs


def segments_of(batch, row):
    """The ids of A and B of a row before masking; B may be empty."""
    tokens = batch["tokens"][row].copy()
    tokens[batch["masked_positions"][row]] = np.where(
        batch["masked_targets"][row] > 0, batch["masked_targets"][row], tokens[batch["masked_positions"][row]]
    )
    tokens = tokens[batch["segments"][row] > 0]
    assert tokens[0] == CLS and tokens[-1] == SEP
    ends = np.flatnonzero(tokens == SEP)
    assert len(ends) <= 2
    return tokens[1 : ends[0]], tokens[ends[0] + 1 : ends[-1]]


@settings(max_examples=30)
@given(sizes=documents, T=st.integers(8, 40), B=st.integers(1, 9), M=st.integers(1, 4), pairs=st.booleans())
def test_every_token_is_in_one_window_and_every_boundary_of_sentences_in_one_pair(sizes, T, B, M, pairs):
    store = store_of(sizes)
    document, offsets = document_of(store), store.sentence_offsets
    config = PairsConfig(max_length=T, max_predictions=M, next_sentence=pairs, short_sequence_probability=1.0)
    found = read(batches_of(config, store, B))
    inner = set(store.ids[np.setdiff1d(offsets[:-1], offsets[store.document_offsets])].tolist())
    expected_pairs = inner if pairs and store.num_documents > 1 else set()
    windows, boundaries, share = [], [], []
    for batch in found:
        assert ("next_sentence_labels" in batch) == bool(expected_pairs)
        is_pair = batch["next_sentence_weights"][:, 0] > 0 if expected_pairs else np.zeros(B, bool)
        is_window = (batch["segments"] != 0).any(axis=1) & ~is_pair
        assert not batch["masked_weights"][~is_window].any()
        for row in np.flatnonzero(is_window):
            first, second = segments_of(batch, row)
            text = np.concatenate([first, second])
            windows.append(text)
            assert len(set(document[text - FIRST_ID])) == 1 and (np.diff(text) == 1).all()
            inside = sorted(inner & set(text[1:].tolist())) if expected_pairs else []
            if inside:  # B begins with the sentence that begins nearest to the middle.
                middle = text[0] + len(text) // 2
                assert abs(second[0] - middle) <= min(abs(begin - middle) for begin in inside) + 1
                assert second[0] in inside
            else:
                assert not len(second)
            count = int(batch["masked_weights"][row].sum())
            special = 3 if len(second) else 2
            assert count == min(len(text), max(1, round(0.15 * (len(text) + special))))
            share.append((count, len(text)))
        for row in np.flatnonzero(is_pair):
            first, second = segments_of(batch, row)
            boundaries.append(first[-1] + 1)
            true = document[first[-1] + 1 - FIRST_ID]
            assert batch["next_sentence_labels"][row, 0] == (second[0] != first[-1] + 1)
            assert (document[second[0] - FIRST_ID] != true) == batch["next_sentence_labels"][row, 0]
            assert second[0] - FIRST_ID in offsets
    assert np.concatenate(windows).tolist() == store.ids.tolist()
    assert boundaries == sorted(expected_pairs)


def test_masks_score_a_seventh_of_every_kind_of_position_and_half_of_the_pairs_are_random():
    rng = np.random.default_rng(0)
    store = store_of([rng.integers(1, 20, rng.integers(1, 30)).tolist() for _ in range(300)])
    config = PairsConfig(max_length=32, max_predictions=1, masking=MaskingConfig(probability=0.4))
    scored, labels = np.zeros(32, int), []
    total = 0
    for batch in read(batches_of(config, store, 64)):
        used = batch["masked_weights"] > 0
        scored += np.bincount(batch["masked_positions"][used], minlength=32)
        total += used.sum()
        labels.append(batch["next_sentence_labels"][batch["next_sentence_weights"] > 0])
    assert (scored[1:-1] > 0.5 * scored[1:-1].mean()).all() and not scored[0] and not scored[-1]
    assert 0.15 < total / store.num_tokens < 0.18  # Special tokens count towards the length, too.
    assert abs(np.concatenate(labels).mean() - 0.5) < 0.03


def test_held_out_batches_of_a_run_mask_a_seventh_as_well():
    rng = np.random.default_rng(0)
    store = store_of([rng.integers(1, 20, rng.integers(1, 30)).tolist() for _ in range(300)])
    config = PairsConfig(max_length=32, max_predictions=12, masking=MaskingConfig(probability=0.4))
    batch = config.evaluated().build(store, tokenizer_of(store), 64, 0)[0]
    masked, real = batch["masked_weights"].sum(1), (batch["segments"] > 0).sum(1)
    np.testing.assert_array_equal(masked, np.maximum(1, np.rint(0.15 * real)))
    for same in (WindowsConfig(max_length=16), StreamsConfig(max_length=7, num_negatives=2)):
        assert same.evaluated() == same


@pytest.mark.parametrize(
    "config",
    [
        WindowsConfig(max_length=16),
        StreamsConfig(max_length=7, num_negatives=0),
        PairsConfig(max_length=24, masking=MaskingConfig(probability=0.3)),
    ],
    ids=["windows", "streams", "pairs"],
)
def test_rows_do_not_depend_on_the_batch_size(config):
    rng = np.random.default_rng(1)
    store = store_of([rng.integers(1, 20, rng.integers(1, 9)).tolist() for _ in range(60)])
    rows = config.evaluation(store, tokenizer_of(store))

    def by_row(batch_size) -> dict[tuple[int, int], bytes]:
        batches = EvaluationBatches(rows, batch_size)
        found = {}
        for i, batch in enumerate(read(batches)):
            group, part = divmod(i, rows.num_steps)
            for b in range(min(batch_size, rows.num_rows - group * batch_size)):
                arrays = [x[b] for name, x in batch.items() if rows.layout[name] == "rows"]
                arrays += [x for name, x in batch.items() if rows.layout[name] != "rows"]
                found[group * batch_size + b, part] = b"".join(x.tobytes() for x in arrays)
        return found

    one = by_row(1)
    assert len(one) == rows.num_rows * rows.num_steps
    assert by_row(8) == by_row(64) == one


# Baselines


@pytest.mark.parametrize("at_once", [1, 100])
def test_baselines_of_many_blocks_equal_those_of_one(monkeypatch, at_once):
    rng = np.random.default_rng(2)
    store = Store.from_documents([[rng.integers(5, 40, size).tolist()] for size in rng.integers(2, 60, 50)])
    tokenizer = SimpleNamespace(vocab_size=40)
    config = WindowsConfig(max_length=16)
    training = config.build(store, tokenizer, 4, 0)
    batches = EvaluationBatches(config.evaluation(store, tokenizer), 4)
    one = config.baselines(training, iter(read(batches)))
    monkeypatch.setattr(baselines, "TRIGRAMS_AT_ONCE", at_once)
    calls = []
    monkeypatch.setattr(baselines, "trigram_nll", lambda *given: (calls.append(given), trigram_nll(*given))[1])
    many = config.baselines(training, iter(read(batches)))
    assert max(queries.shape[1] for *_, queries in calls) <= at_once + 4 * 16 and len(calls) > 3
    for metric, values in one.items():
        assert many[metric] == pytest.approx(values, rel=1e-12)


def test_baselines_count_the_rows_with_weight_alone():
    store = store_of([[3, 4], [5, 2, 2], [6]])
    config = PairsConfig(max_length=16, max_predictions=2)
    training = config.build(store, tokenizer_of(store), 4, 0)
    found = [config.baselines(training, read(batches_of(config, store, size))) for size in (1, 3, 64)]
    assert found[0] == found[1] == found[2]
    assert 0.5 <= found[0]["next_sentence_accuracy"]["majority"] <= 1
    one_document = store_of([[3, 4]])
    batches = batches_of(config, one_document, 4)
    assert "next_sentence_accuracy" not in config.baselines(training, read(batches))
