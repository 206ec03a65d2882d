"""What vocabularies are trained on: all words but long ones."""

import random
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prelm_jax.corpus.documents import Corpus
from prelm_jax.tokenizers import bpe, wordpiece
from prelm_jax.tokenizers.sentencepiece import SentencePieceConfig
from prelm_jax.tokenizers.training import MAX_WORD_CHARACTERS, training_texts, words_of
from prelm_jax.tokenizers.wordpiece import SPECIAL_TOKENS, WordPiece
from prelm_jax.tokenizers.words import Splitter, WordVocabularyConfig

TRAIN = {
    "wordpiece": lambda corpus: wordpiece.train(corpus, 300),
    "wordpiece-cased": lambda corpus: wordpiece.train(corpus, 300, lowercase=False),
    "bpe": lambda corpus: bpe.train(corpus, 200),
    "sentencepiece-unigram": lambda corpus: SentencePieceConfig(200)._train(corpus),
    "sentencepiece-bpe": lambda corpus: SentencePieceConfig(200, "bpe")._train(corpus),
    "words": lambda corpus: WordVocabularyConfig(min_count=1)._train(corpus),
    "words-untokenized": lambda corpus: WordVocabularyConfig(min_count=1, tokenize=False)._train(corpus),
}
WORDS = [
    "the",
    "quick",
    "brown",
    "foxes",
    "jumped",
    "over",
    "lazy",
    "dogs",
    "don't",
    "1,234.5",
    "Ébène",
    "漢字",
    "かな",
]


def write(path, middle):
    rng = random.Random(0)
    documents = [" ".join(rng.choices(WORDS, k=30)) + "." for _ in range(60)]
    path.write_text("\n\n".join([*documents[:30], *middle, *documents[30:]]))
    return Corpus((str(path),))


@pytest.mark.parametrize("kind", TRAIN)
@pytest.mark.parametrize("letters", ["ASCII", "other"])
def test_a_long_word_is_not_trained_on(tmp_path, kind, letters):
    """Neither its pieces nor its characters; quadratic time would be minutes."""
    alphabet = string.ascii_letters + string.digits if letters == "ASCII" else "wöαжक्\u200dष😀"
    word = "".join(random.Random(1).choices(alphabet, k=200_000))
    without = TRAIN[kind](write(tmp_path / "without.txt", []))
    assert TRAIN[kind](write(tmp_path / "with.txt", [word])) == without
    assert TRAIN[kind](write(tmp_path / "twice.txt", [f"{word}\n{word}\n"])) == without


def test_words_of_the_greatest_length_are_trained_on(tmp_path):
    word = "ab" * (MAX_WORD_CHARACTERS // 2)
    texts = [f"{word} {word}, {word}c. {word}漢{word}x"]
    corpus = write(tmp_path / "corpus.txt", texts)
    tokens = wordpiece.train(corpus, 2000)
    assert word in tokens and f"{word}c" not in tokens
    found, *_ = [text for text in training_texts(corpus, "", Splitter(tokenize=True)) if word in text]
    assert found == f"{word} {word},  . {word}漢 "


TEXT = st.text(st.sampled_from("aabbZé漢字 .,-\n\t\u3000"), max_size=60)


@settings(deadline=None, max_examples=60)
@given(text=TEXT, limit=st.integers(1, 6))
def test_the_words_left_are_those_within_the_limit(tmp_path_factory, text, limit):
    path = tmp_path_factory.mktemp("corpus") / "a.txt"
    path.write_text("x\n" + text)
    corpus = Corpus((f"{path},documents=file",))
    split = words_of(WordPiece(SPECIAL_TOKENS, lowercase=False)._pipeline)
    for words in (split, Splitter(tokenize=True), str.split):
        (found,) = training_texts(corpus, "", words, limit)
        assert words(found) == [word for word in words("x\n" + text) if len(word) <= limit]
