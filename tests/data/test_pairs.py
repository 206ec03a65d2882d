import hashlib
import math
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny_pairs import (
    CLS,
    FIRST_ID,
    PAD,
    SEP,
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
from prelm_jax.data.baselines import length_only_accuracy, pairs_by_lengths
from prelm_jax.data.masking import MaskingConfig
from prelm_jax.data.pairs import PairsConfig
from prelm_jax.errors import InputError
from prelm_jax.validation import check


class Corpus:
    """Where each token id of `corpus` is, in plain Python, to check batches with."""

    def __init__(self, documents):
        self.documents = documents
        self.location = {
            id: (d, s, t)
            for d, document in enumerate(documents)
            for s, sentence in enumerate(document)
            for t, id in enumerate(sentence)
        }

    def document(self, id):
        return self.location[id][0]

    def is_end_of_sentence(self, id):
        d, s, t = self.location[id]
        return t == len(self.documents[d][s]) - 1

    def is_end_of_document(self, id):
        d, s, _ = self.location[id]
        return self.is_end_of_sentence(id) and s == len(self.documents[d]) - 1

    def is_beginning_of_sentence(self, id):
        return self.location[id][2] == 0

    def tokens(self, d):
        return sum(map(len, self.documents[d]))

    def segment(self, ids):
        """The document of a segment; checks that the segment is contiguous text."""
        assert ids == list(range(ids[0], ids[0] + len(ids)))
        assert self.document(ids[0]) == self.document(ids[-1])
        return self.document(ids[0])


def segments_of(tokens, token_types, segments):
    """The ids of A and B of one row (None where there is one segment); checks the special tokens."""
    length = int(segments.sum())
    assert segments.tolist() == [1] * length + [0] * (len(tokens) - length)
    assert tokens[length:].tolist() == [PAD] * (len(tokens) - length)
    ids = tokens[:length].tolist()
    assert ids[0] == CLS and ids[-1] == SEP
    separators = [i for i, id in enumerate(ids) if id == SEP]
    assert all(id >= FIRST_ID for i, id in enumerate(ids) if i and i not in separators)
    if len(separators) == 1:
        assert not token_types.any()
        return ids[1:-1], None
    middle, end = separators
    assert token_types.tolist() == [0] * (middle + 1) + [1] * (end - middle) + [0] * (len(tokens) - length)
    return ids[1:middle], ids[middle + 1 : end]


@given(
    sizes=corpora,
    T=st.integers(8, 70),
    M=st.integers(1, 8),
    short=st.sampled_from([0.0, 0.5, 1.0]),
    whole_word=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_pairs_of_any_corpus(sizes, T, M, short, whole_word, seed):
    assume(any(len(document) > 1 for document in sizes))
    text = Corpus(corpus(sizes))
    batches = batches_of(
        text.documents,
        16,
        seed,
        max_length=T,
        max_predictions=M,
        short_sequence_probability=short,
        masking=MaskingConfig(whole_word=whole_word),
    )
    batch = batches[seed % 5]
    assert set(batch) == set(batches.layout) and set(batches.layout.values()) == {"rows"}
    assert batch["positions"].tolist() == [list(range(T))] * 16
    assert not batch["next_sentence_positions"].any() and (batch["next_sentence_weights"] == 1).all()
    assert (batch["masked_targets"][batch["masked_weights"] == 1] >= FIRST_ID).all()
    tokens = unmasked(batch)
    for row in range(16):
        first, second = segments_of(tokens[row], batch["token_types"][row], batch["segments"][row])
        document, other = text.segment(first), text.segment(second)
        # The first segment is followed by the beginning of a sentence of its document.
        assert text.is_end_of_sentence(first[-1]) and not text.is_end_of_document(first[-1])
        assert text.is_beginning_of_sentence(second[0])
        label = batch["next_sentence_labels"][row, 0]
        if label == 0:
            assert second[0] == first[-1] + 1
        else:
            assert label == 1
            assert document != other
        if label == 0 and short == 0:
            # As full as the document allows.
            assert len(first) + len(second) == min(T - 3, text.tokens(document))


@given(sizes=corpora, T=st.integers(8, 70), short=st.sampled_from([0.0, 0.5]), seed=st.integers(0, 2**32))
def test_single_segments_of_any_corpus(sizes, T, short, seed):
    text = Corpus(corpus(sizes))
    batches = batches_of(
        text.documents, 16, seed, max_length=T, short_sequence_probability=short, max_predictions=5, next_sentence=False
    )
    batch = batches[0]
    assert set(batch) == set(batches.layout) and not any("next_sentence" in name for name in batch)
    tokens = unmasked(batch)
    for row in range(16):
        first, second = segments_of(tokens[row], batch["token_types"][row], batch["segments"][row])
        document = text.segment(first)
        assert second is None
        assert text.is_beginning_of_sentence(first[0])
        if short == 0:
            assert len(first) == min(T - 2, text.tokens(document))


@pytest.mark.parametrize("next_sentence", [True, False])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_build_the_rows_of_the_global_batch(hosts, next_sentence):
    rows_of_hosts(hosts, max_length=64, short_sequence_probability=0.1, next_sentence=next_sentence)


def test_seeds_and_steps_differ():
    documents = corpus(article_sizes(np.random.default_rng(0), 50))
    batches = batches_of(documents, 32)
    others = [batches[0], batches[1], batches_of(documents, 32, seed=1)[0]]
    assert len({batch["tokens"].tobytes() for batch in others}) == 3


def test_batches_stay_the_same_across_versions():
    """If this fails, the data of a run in progress changes when it resumes."""
    documents = corpus([[(7 * d + 3 * s) % 23 + 1 for s in range(d % 7 + 1)] for d in range(50)])
    digest = hashlib.sha256()
    for whole_word in (False, True):
        options = dict(max_length=64, max_predictions=10, short_sequence_probability=0.1)
        batch = batches_of(documents, 16, masking=MaskingConfig(whole_word=whole_word), **options)[123]
        for name in sorted(batch):
            digest.update(batch[name].tobytes())
    assert digest.hexdigest() == "c8527f8794f6580d183868bc3b1de5c06225f5baba850c60f92efd84a53d3363"


def test_every_sentence_is_the_anchor_once_an_epoch():
    """A document that fits is drawn once per sentence; one of a single sentence is only a random segment."""
    sizes = [[3], [2, 3], [4, 1, 2], [5], [1] * 9, [2, 2]]
    text = Corpus(corpus(sizes))
    batches = batches_of(text.documents, 16, max_length=32)
    assert batches.examples_per_epoch == 16
    orders = set()
    for epoch in range(20):
        firsts = [text.document(id) for id in unmasked(batches[epoch])[:, 1].tolist()]
        assert Counter(firsts) == {1: 2, 2: 3, 4: 9, 5: 2}
        orders.add(tuple(firsts))
    assert len(orders) == 20


def test_every_sentence_is_reached():
    """In long documents too, a few epochs of windows cover every sentence."""
    sizes = random_sizes(np.random.default_rng(0), 5, 100)
    text = Corpus(corpus(sizes))
    batches = batches_of(text.documents, 500, max_length=64)
    times = Counter()
    for epoch in range(10):
        batch = batches[epoch]
        next_B1 = batch["next_sentence_labels"] == 0
        mine = unmasked(batch)[(batch["segments"] == 1) & (next_B1 | (batch["token_types"] == 0))]
        times.update({text.location[id][:2] for id in mine.tolist() if id >= FIRST_ID})
    assert len(times) == 500


def test_labels_are_a_coin_and_random_sentences_uniform():
    # Equal documents: every sentence of another document with the same number of tokens left is equally likely.
    text = Corpus(corpus([[5] * 4] * 100))
    batch = batches_of(text.documents, 40_000, max_length=64)[0]
    labels = batch["next_sentence_labels"][:, 0]
    assert abs(labels.mean() - 0.5) < 0.005
    second = unmasked(batch)[
        np.arange(len(labels)), batch["segments"].sum(axis=1) - batch["token_types"].sum(axis=1) + 1
    ]
    documents = np.bincount([text.document(id) for id in second[labels == 1].tolist()], minlength=100)
    assert abs(((documents - documents.mean()) ** 2 / documents.mean()).sum() - 99) < 4 * np.sqrt(2 * 99)


@pytest.mark.parametrize("sizes", [[[3], [2] * 300], [[2] * 300, [3]]])
def test_a_random_sentence_is_found_if_nearly_all_are_in_one_document(sizes):
    text = Corpus(corpus(sizes))
    batch = batches_of(text.documents, 100, max_length=16, max_predictions=5)[0]
    rows = np.flatnonzero(batch["next_sentence_labels"])
    tokens = unmasked(batch)[rows]
    assert len(rows) > 20
    assert all(text.documents[sizes.index([3])][0] == row[row.index(SEP) + 1 :][:3] for row in tokens.tolist())


def halves(batch):
    middle = len(batch["tokens"]) // 2
    return {n: a[:middle] for n, a in batch.items()}, {n: a[middle:] for n, a in batch.items()}


@pytest.mark.parametrize("T", [64, 128])
@pytest.mark.parametrize("kind", ["three sentences", "articles", "few articles"])
def test_lengths_do_not_give_the_label_away(kind, T):
    rng = np.random.default_rng(0)
    sizes = {
        "three sentences": random_sizes(rng, 3000, 3),
        "articles": article_sizes(rng, 1000),
        "few articles": article_sizes(rng, 60),
    }[kind]
    batch = batches_of(corpus(sizes), 40_000, max_length=T, short_sequence_probability=0.1)[0]
    assert length_only_accuracy(*map(pairs_by_lengths, halves(batch))) < 0.52


def test_length_only_accuracy_detects_lengths_that_give_the_label_away():
    B, T = 4000, 64
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (B, 1))
    first, second = rng.integers(5, 25, (B, 1)), rng.integers(5, 25, (B, 1)) + 6 * labels
    column = np.arange(T)
    batch = {
        "tokens": np.zeros((B, T), np.int32),
        "segments": (column < first + second + 3).astype(np.int32),
        "token_types": ((column >= first + 2) & (column < first + second + 3)).astype(np.int32),
        "next_sentence_labels": labels,
        "next_sentence_weights": np.ones_like(labels),
    }
    # 6 of the 20 lengths of a label tell it; for the others one can only guess.
    assert abs(length_only_accuracy(*map(pairs_by_lengths, halves(batch))) - (6 + 14 / 2) / 20) < 0.04


def test_baselines():
    documents = corpus(article_sizes(np.random.default_rng(0), 40))
    # Ids that repeat: the smaller, the more often.
    documents = [[[FIRST_ID + int(id**0.5) for id in sentence] for sentence in document] for document in documents]
    counts = Counter(id for document in documents for sentence in document for id in sentence)
    vocab_size = 200
    config = PairsConfig(max_length=64)
    batches = config.build(Store.from_documents(documents), tokenizer(vocab_size), 32, 0)
    evaluation = [batches[1000], batches[1001]]
    result = config.baselines(batches, iter(evaluation))

    total = sum(counts.values()) + vocab_size
    targets = [
        target
        for batch in evaluation
        for target, weight in zip(batch["masked_targets"].flat, batch["masked_weights"].flat, strict=True)
        if weight
    ]
    labels = np.concatenate([batch["next_sentence_labels"][:, 0] for batch in evaluation])
    assert result["masked_lm_loss"] == {
        "unigram": pytest.approx(-np.mean([np.log((counts[target] + 1) / total) for target in targets]))
    }
    most_frequent = counts.most_common(1)[0][0]
    assert result["masked_lm_accuracy"] == {
        "most frequent token": pytest.approx(targets.count(most_frequent) / len(targets))
    }
    assert labels.mean() != 0.5
    accuracy = result["next_sentence_accuracy"]
    assert accuracy["majority"] == pytest.approx(max(labels.mean(), 1 - labels.mean()))
    opposite = [{**batch, "next_sentence_labels": 1 - batch["next_sentence_labels"]} for batch in evaluation]
    assert config.baselines(batches, opposite)["next_sentence_accuracy"]["majority"] == accuracy["majority"]
    assert 0.3 < accuracy["lengths only"] < 0.7
    config = PairsConfig(max_length=64, next_sentence=False)
    batches = config.build(Store.from_documents(documents), tokenizer(vocab_size), 32, 0)
    assert set(config.baselines(batches, [batches[0]])) == {"masked_lm_loss", "masked_lm_accuracy"}


def test_derived_metrics():
    store = Store.from_documents([[[1, 2]]])
    assert PairsConfig().derived_metrics("masked_lm_loss", 2.0, store) == {"masked_lm_perplexity": math.exp(2)}
    assert PairsConfig().derived_metrics("next_sentence_loss", 2.0, store) == {}


@pytest.mark.parametrize("next_sentence", [True, False])
def test_shown_rows_hold_all_of_the_batch(next_sentence):
    """Without its markers a shown row is the tokens, and its markers are the masked positions and targets."""
    documents = corpus([[3, 4, 2], [5, 5]])
    batches = batches_of(documents, 40, max_length=16, max_predictions=5, next_sentence=next_sentence)
    batch = batches[0]
    tokens = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(FIRST_ID, FIRST_ID + 30))]
    shown = list(PairsConfig().show(batch, SimpleNamespace(tokens=tokens)))
    assert len(shown) == 40
    for row, text in enumerate(shown):
        length, masked = int(batch["segments"][row].sum()), batch["masked_weights"][row] > 0
        head, *segments = text.splitlines()
        label = [", B follows A", ", B is random"][batch["next_sentence_labels"][row, 0]] if next_sentence else ""
        assert head == f"row {row}: {length} of 16 positions, {masked.sum()} to predict{label}"
        assert [segment[:4] for segment in segments] == ["  A ", "  B "][: 1 + next_sentence]
        found = re.findall(r"⟦(\S+) → (\S+)⟧|(\S+)", " ".join(segment[4:] for segment in segments))
        assert [masked or token for masked, _, token in found] == [tokens[id] for id in batch["tokens"][row, :length]]
        shown_targets = {i: target for i, (_, target, _) in enumerate(found) if target}
        assert list(shown_targets) == batch["masked_positions"][row, masked].tolist()
        assert list(shown_targets.values()) == [tokens[id] for id in batch["masked_targets"][row, masked]]
        assert segments[0].endswith("[SEP]") and segments[-1].endswith("[SEP]")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 7}, "max_length is 7: .* 8"),
        ({"max_length": 10**6}, "max_length is 1000000: .* 65535"),
        ({"max_predictions": 0}, "max_predictions is 0"),
        ({"max_predictions": 200}, "max_predictions is 200: .*128"),
        ({"short_sequence_probability": 1.1}, "short_sequence_probability is 1.1"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(InputError, match=message):
        check(PairsConfig(**options))


@pytest.mark.parametrize("sizes", [[[3, 4, 5]], [[3], [4], [5]], []])
def test_a_corpus_without_pairs_is_refused(sizes):
    with pytest.raises(InputError, match=r"--data\.no-next-sentence$") as error:
        batches_of(corpus(sizes), 4)
    assert "\n" not in str(error.value)


def test_a_corpus_without_pairs_has_single_segments():
    batches = batches_of(corpus([[3, 4, 5]]), 4, max_length=16, max_predictions=5, next_sentence=False)
    assert unmasked(batches[0]).tolist() == [[CLS, *range(FIRST_ID, FIRST_ID + 12), SEP, PAD, PAD]] * 4


def test_an_empty_corpus_is_refused():
    with pytest.raises(InputError, match="the corpus is empty"):
        batches_of([], 4, next_sentence=False)


@pytest.mark.parametrize("role", ["pad", "cls", "sep", "mask"])
def test_a_vocabulary_without_a_special_token_is_refused(role):
    other = SimpleNamespace(**{**vars(tokenizer(20)), f"{role}_id": None})
    with pytest.raises(InputError, match=f" {role} "):
        PairsConfig().build(Store.from_documents(corpus([[1, 2], [3, 4]])), other, 4, 0)
