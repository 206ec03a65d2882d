"""Unigram and trigram against counts by hand."""

import math
from collections import Counter

import numpy as np
import pytest

from prelm_jax.corpus.store import Store
from prelm_jax.data.ngrams import trigram_nll
from prelm_jax.errors import InputError
from prelm_jax.study.ngrams import NgramSubject
from prelm_jax.tokenizers.words import WordVocabulary

WORDS = ["<S>", "</S>", "<UNK>", ".", "the", "cat", "dog", "sees", "a"]
TEXT = ["the cat sees a dog .", "the dog sees the zebra .", "a cat .", "the cat sees the dog ."]


@pytest.fixture(scope="module")
def tokenizer():
    return WordVocabulary(WORDS, tokenize=True)


@pytest.fixture(scope="module")
def text(tokenizer):
    """A store whose words outside of the vocabulary have ids of their own, as of a corpus."""
    numbers = dict(tokenizer.ids)
    documents = [[[numbers.setdefault(word, len(numbers)) for word in line.split()]] for line in TEXT]
    store = Store.from_documents(documents, numbers)
    store.manifest["words"] = 21
    return store


def test_unigram_counts_words(text, tokenizer):
    counts = Counter(word if word in WORDS else "<UNK>" for line in TEXT for word in line.split())
    total = sum(counts.values()) + len(WORDS)
    subject = NgramSubject("unigram:x", "unigram", text, tokenizer)
    texts = ["the dog sees.", "", "sees zebra the lion"]
    found = list(subject.score(texts))
    for score, words in zip(found, (["the", "dog", "sees", "."], [], ["sees", "<UNK>", "the", "<UNK>"]), strict=True):
        assert score.total == pytest.approx(sum(math.log((counts[word] + 1) / total) for word in words), abs=1e-12)
        assert score.tokens == len(words) and score.unknown == words.count("<UNK>")
    assert (subject.family, subject.num_layers, subject.origin.words_seen) == ("unigram", 0, 21)


def test_the_order_of_words_is_nothing_to_a_unigram(text, tokenizer):
    words = WORDS[3:] * 3
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.permutation(words)) for _ in range(20)]
    scores = {score.total for score in NgramSubject("u", "unigram", text, tokenizer).score(texts)}
    assert len(scores) == 1


def test_trigram_begins_after_a_sentence_end(text, tokenizer):
    subject = NgramSubject("trigram:x", "trigram", text, tokenizer)
    texts = ["the cat sees", "a", "", "zebra lion ."]
    found = list(subject.score(texts))
    missing, unknown = len(WORDS), 2
    for score, line in zip(found, texts, strict=True):
        ids = [missing, 3, *(tokenizer.ids.get(word, unknown) for word in line.split())]
        queries = np.array([ids[i : i + 3] for i in range(len(ids) - 2)]).reshape(-1, 3).T
        folded = Store.from_documents([[[min(tokenizer.ids.get(w, 2), 99) for w in line.split()]] for line in TEXT])
        expected = -trigram_nll(folded, missing, queries).sum() if line else 0
        assert score.total == pytest.approx(expected, abs=1e-12)
    seen, unseen = subject.score(["the cat sees the dog", "the sees cat the dog"])
    assert seen.total > unseen.total + 1


def test_texts_do_not_depend_on_each_other(text, tokenizer):
    for order in ("unigram", "trigram"):
        subject = NgramSubject("x", order, text, tokenizer)
        alone = [next(subject.score([line])) for line in TEXT]
        assert list(subject.score([*TEXT, "the the", *TEXT])) == [*alone, next(subject.score(["the the"])), *alone]


def test_fingerprints_and_refusals(text, tokenizer):
    other = WordVocabulary([*WORDS, "zebra"], tokenize=True)
    made = [("unigram", tokenizer), ("trigram", tokenizer), ("unigram", other)]
    assert len({NgramSubject("x", order, text, vocabulary).origin.model for order, vocabulary in made}) == 3
    with pytest.raises(InputError, match="unigram:x has no vectors"):
        NgramSubject("unigram:x", "unigram", text, tokenizer).embed([["a"]])
