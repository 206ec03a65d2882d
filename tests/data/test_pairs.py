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
    Corpus,
    article_sizes,
    batches_of,
    corpora,
    corpus,
    rows_of_hosts,
    tokenizer,
    unmasked,
)

from prelm_jax.corpus.store import Store
from prelm_jax.data.masking import MaskingConfig
from prelm_jax.data.pairs import PairsConfig
from prelm_jax.errors import InputError
from prelm_jax.validation import check


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


@pytest.mark.parametrize("role", ["pad", "cls", "sep", "mask"])
def test_a_vocabulary_without_a_special_token_is_refused(role):
    other = SimpleNamespace(**{**vars(tokenizer(20)), f"{role}_id": None})
    with pytest.raises(InputError, match=f" {role} "):
        PairsConfig().build(Store.from_documents(corpus([[1, 2], [3, 4]])), other, 4, 0)
