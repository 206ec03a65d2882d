"""Words: vocabularies by count, files, the spellings in the token store, and every error."""

import json
import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prelm_jax.corpus.documents import Corpus
from prelm_jax.corpus.prepare import prepare
from prelm_jax.corpus.sentences import split
from prelm_jax.corpus.store import ARRAYS, WORD_ARRAYS, Store
from prelm_jax.errors import InputError
from prelm_jax.tokenizers.bpe import BPEConfig
from prelm_jax.tokenizers.build import build
from prelm_jax.tokenizers.load import load
from prelm_jax.tokenizers.sentencepiece import SentencePieceConfig
from prelm_jax.tokenizers.wordpiece import SPECIAL_TOKENS, WordPiece, WordPieceConfig
from prelm_jax.tokenizers.words import WordVocabulary, WordVocabularyConfig
from prelm_jax.validation import check

TOKENS = ["<S>", "</S>", "<UNK>", "the", "The", ".", "é"]
TEXT = """the cat, the dog. The cat's
é é the-dog

a b the

zebra É the cat?
漢字 the!"""


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    return Corpus((str(path),))


def error_of(call, *arguments, **options) -> str:
    with pytest.raises(InputError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- Words of a text ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't stop.", ["Don", "'", "t", "stop", "."]),
        ("… U.S. (3.14)", ["…", "U", ".", "S", ".", "(", "3", ".", "14", ")"]),
        ("Ébène naïve e\u0301", ["Ébène", "naïve", "e\u0301"]),
        ("漢字kana", ["漢", "字", "kana"]),
        ("🙂 x\u200by\x00z\ufffd", ["🙂", "xyz"]),
        ("a\u00a0b\u3000c\x85d\x1ce\r\nf\tg", ["a", "b", "c", "d", "e", "f", "g"]),
        ("<S> </S>", ["<", "S", ">", "<", "/", "S", ">"]),
        (" \x07 ", []),
        ("", []),
    ],
)
def test_words_of_a_text(text, words):
    assert WordVocabulary(TOKENS, tokenize=True).split_batch([text, text]) == [words, words]
    assert WordVocabulary(TOKENS).split_batch([text]) == [text.split()]


@settings(deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=4), tokenize=st.booleans())
def test_any_text(texts, tokenize):
    words = WordVocabulary(TOKENS, tokenize)
    parts = words.split_batch(texts)
    assert parts == [WordVocabulary(TOKENS, tokenize).split_batch([text])[0] for text in texts]
    for text, found in zip(texts, parts, strict=True):
        assert all(word and word.split() == [word] for word in found)
        if not tokenize or text.isalnum():
            assert "".join(found) == "".join(text.split())
    ids = {token: index for index, token in enumerate(TOKENS)}
    assert words.encode_batch(texts) == [[ids.get(word, 2) for word in found] for found in parts]
    numbers, lengths = words.number_flat(texts, ids)
    assert numbers.tolist() == [ids[word] for found in parts for word in found]
    assert lengths.tolist() == [len(found) for found in parts]
    known, lengths = words.encode_flat(texts)
    assert known.tolist() == [index for text in words.encode_batch(texts) for index in text]
    assert lengths.tolist() == [len(found) for found in parts]
    assert list(ids.values()) == list(range(len(ids)))


@pytest.mark.parametrize("tokenize", [False, True])
def test_lower_cased(tokenize, tmp_path):
    """Text and vocabulary, through files too; the special tokens stay themselves between white space."""
    words = WordVocabulary(TOKENS, tokenize, lowercase=True)
    assert words.split_batch(["THE É. Don't"])[0] == (
        ["the", "é", ".", "don", "'", "t"] if tokenize else ["the", "é.", "don't"]
    )
    assert words.fingerprint != WordVocabulary(TOKENS, tokenize).fingerprint
    words.save(tmp_path / "one")
    again = load(tmp_path / "one")
    assert again.fingerprint == words.fingerprint and again.encode_batch(["The THE"]) == [[3, 3]]
    assert WordVocabulary(TOKENS, lowercase=True).encode_batch(["<S> The"]) == [[0, 3]]
    (tmp_path / "corpus.txt").write_text("The the THE\n\nA cat A\n\n" * 3)
    built = build(
        WordVocabularyConfig(min_count=1, tokenize=tokenize, lowercase=True), Corpus((str(tmp_path / "corpus.txt"),))
    )
    assert built.lowercase and sorted(built.tokens[3:]) == ["a", "cat", "the"]


def test_ids():
    words = WordVocabulary(TOKENS)
    assert words.vocab_size == 7
    assert words.special_ids == {"<S>": 0, "</S>": 1, "<UNK>": 2} and words.unknown_id == 2
    assert words.encode_batch(["the The THE é", "", "<S> </S> <UNK>"]) == [[3, 4, 2, 6], [], [0, 1, 2]]
    assert words.decode(np.array([3, 2, 5])) == "the <UNK> ."


# ---- Files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenize", [False, True])
def test_saved_files_load(tmp_path, tokenize):
    words = WordVocabulary(TOKENS, tokenize)
    words.save(tmp_path / "one")
    assert (tmp_path / "one/vocab.txt").read_bytes() == b"<S>\n</S>\n<UNK>\nthe\nThe\n.\n\xc3\xa9\n"
    again = load(tmp_path / "one")
    assert (again.tokens, again.tokenize, again.fingerprint) == (TOKENS, tokenize, words.fingerprint)
    again.save(tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_a_published_vocabulary_loads(tmp_path):
    """A lone vocab.txt, its special tokens in the order of bilm-tf's tests, lines ending as on Windows."""
    path = tmp_path / "vocab.txt"
    path.write_bytes(b"</S>\r\n<S>\r\n<UNK>\r\nthe\r\n\xc3\xa9\r\n")
    for words in (load(tmp_path), load(path)):
        assert words.tokens == ["</S>", "<S>", "<UNK>", "the", "é"]
        assert words.special_ids == {"<S>": 1, "</S>": 0, "<UNK>": 2}
        assert words.encode_batch(["the é."]) == [[3, 2]]


def test_a_wordpiece_vocabulary_may_hold_the_special_tokens(tmp_path):
    tokens = [*SPECIAL_TOKENS, "<S>", "</S>", "<UNK>"]
    WordPiece(tokens).save(tmp_path)
    assert isinstance(load(tmp_path), WordPiece)
    (tmp_path / "tokenizer.json").unlink()
    assert isinstance(load(tmp_path), WordPiece) and isinstance(load(tmp_path / "vocab.txt"), WordPiece)


def test_fingerprints_distinguish_vocabularies():
    different = [
        WordVocabulary(TOKENS),
        WordVocabulary(TOKENS, tokenize=True),
        WordVocabulary([*TOKENS, "x"]),
        WordVocabulary([*TOKENS[:-2], "é", "."]),
    ]
    assert len({words.fingerprint for words in different}) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<S>\n</S>\n<UNK>\na\n\nb\n", "{path}:5 is blank"),
        ("<S>\n</S>\n<UNK>\na\nb\na\n", "{path}:4 holds 'a', as line 6 does"),
        ("a\n<S>\n</S>\n<UNK>\n", "{path}: the vocabulary begins with a <S> </S>, "),
        ("", "{path}: the vocabulary begins with , "),
    ],
)
def test_a_wrong_vocabulary_is_refused(corpus, tmp_path, content, message):
    path = tmp_path / "vocab.txt"
    path.write_text(content)
    assert error_of(build, WordVocabularyConfig(path=str(path)), corpus).startswith(message.format(path=path))


# ---- Training --------------------------------------------------------------------------------------------------------


def test_a_trained_vocabulary(corpus):
    words = build(WordVocabularyConfig(min_count=1), corpus)
    counts = {"the": 6, "cat": 3, "dog": 2, "é": 2}
    once = sorted([*",.-?!'sab", "The", "zebra", "É", "漢", "字"])
    assert words.tokens == ["<S>", "</S>", "<UNK>", *counts, *once]
    assert words.tokenize
    assert build(WordVocabularyConfig(min_count=2), corpus).tokens == ["<S>", "</S>", "<UNK>", *counts]
    assert build(WordVocabularyConfig(vocab_size=5, min_count=1), corpus).tokens[3:] == ["the", "cat"]
    chunks = build(WordVocabularyConfig(min_count=2, tokenize=False), corpus)
    assert chunks.tokens == ["<S>", "</S>", "<UNK>", "the", "é"]
    assert not chunks.tokenize


def test_special_words_of_a_text_are_not_counted_again(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("<UNK> <S> </S> a <UNK>")
    words = build(WordVocabularyConfig(min_count=1, tokenize=False), Corpus((str(path),)))
    assert words.tokens == ["<S>", "</S>", "<UNK>", "a"]


def zipf_corpus(tmp_path):
    """A corpus of a thousand documents whose words follow Zipf's law."""
    rng = random.Random(0)
    kinds = [f"w{i}" for i in range(300)]
    rng.shuffle(kinds)
    weights = [1 / (i + 1) for i in range(300)]
    path = tmp_path / "lines.txt"
    path.write_text("".join(" ".join(rng.choices(kinds, weights, k=10)) + "\n" for _ in range(1000)))
    return Corpus((f"{path},documents=line,sentences=line",), held_out=0.3)


def test_only_the_training_side_counts(tmp_path, monkeypatch):
    corpus = zipf_corpus(tmp_path)
    words = build(WordVocabularyConfig(min_count=1), corpus)
    counts = Counter(" ".join(document.text for document in corpus.documents("training")).split())
    assert words.tokens[3:] == sorted(counts, key=lambda word: (-counts[word], word))
    monkeypatch.setattr(Corpus, "documents", lambda *_: pytest.fail("the corpus was read again"))
    assert build(WordVocabularyConfig(min_count=1), corpus).tokens == words.tokens


def test_a_corpus_of_rare_words_is_refused(corpus):
    message = error_of(build, WordVocabularyConfig(min_count=7), corpus)
    assert " 7 times " in message and "--tokenizer.min-count" in message


@pytest.mark.parametrize("size", [0, 3])
def test_a_size_without_words_is_refused(size):
    assert error_of(check, WordVocabularyConfig(size)).startswith(f"vocab_size is {size}")


def test_a_given_vocabulary_must_be_sorted_by_count(tmp_path):
    corpus = zipf_corpus(tmp_path)
    trained = build(WordVocabularyConfig(min_count=1), corpus).tokens
    rng = random.Random(1)
    shuffled = trained[:3] + rng.sample(trained[3:], len(trained) - 3)
    reverse = trained[:3] + trained[:2:-1]
    alphabetical = trained[:3] + sorted(trained[3:])
    # The order of another corpus: each word somewhat higher or lower.
    near = trained[:3] + sorted(trained[3:], key=lambda word: trained.index(word) * rng.uniform(0.5, 2))
    path = tmp_path / "vocab.txt"
    for tokens in (shuffled, reverse, alphabetical):
        WordVocabulary(tokens).save(tmp_path)
        message = error_of(build, WordVocabularyConfig(path=str(path)), corpus)
        assert message.startswith(f"{path} is not sorted by falling count") and "--tokenizer.path" in message
    for tokens in (trained, near, trained[:3]):
        WordVocabulary(tokens, tokenize=True).save(tmp_path)
        for given_path in (path, tmp_path):
            assert build(WordVocabularyConfig(path=str(given_path)), corpus).tokens == tokens


def test_a_vocabulary_of_the_other_sort_is_refused(corpus, tmp_path):
    """Words where a model needs subwords, and subwords where it needs words."""
    WordVocabulary(TOKENS).save(tmp_path / "words")
    WordPiece(SPECIAL_TOKENS).save(tmp_path / "subwords")
    for config in (WordPieceConfig, BPEConfig, SentencePieceConfig):
        message = error_of(build, config(path=str(tmp_path / "words")), corpus)
        assert message.startswith(f"{tmp_path}/words ") and "--tokenizer.path" in message
    message = error_of(build, WordVocabularyConfig(path=str(tmp_path / "subwords")), corpus)
    assert message.startswith(f"{tmp_path}/subwords/vocab.txt: ") and "<S>" in message


def test_settings_of_a_directory_override_the_configuration(corpus, tmp_path):
    for tokenize in (False, True):
        WordVocabulary(TOKENS, tokenize).save(tmp_path / "given")
        directory = WordVocabularyConfig(path=str(tmp_path / "given"), tokenize=not tokenize)
        assert build(directory, corpus).tokenize == tokenize
        file = WordVocabularyConfig(path=str(tmp_path / "given/vocab.txt"), tokenize=not tokenize)
        assert build(file, corpus).tokenize != tokenize


# ---- The token store -------------------------------------------------------------------------------------------------


def spelled(store: Store) -> list[str]:
    return [bytes(store.spellings.bytes[a:b]).decode() for a, b in pairwise(store.spellings.offsets)]


@pytest.mark.parametrize("tokenize", [False, True])
def test_the_store_spells_every_word(tmp_path, tokenize):
    corpus = zipf_corpus(tmp_path)
    words = build(WordVocabularyConfig(vocab_size=50, tokenize=tokenize), corpus)
    stores = prepare(corpus, words, tmp_path)
    for side, store in zip(("training", "held_out"), stores, strict=True):
        kinds = spelled(store)
        assert kinds[:50] == words.tokens
        assert len(set(kinds)) == len(kinds) == len(store.spellings)
        text = [word for d in corpus.documents(side) for s in split(d.text, d.sentences) for word in s.split()]
        assert [kinds[id] for id in store.ids] == text
        assert store.ids.dtype == np.uint32
        assert store.manifest["unknown_tokens"] == sum(word not in words.tokens for word in text) > 0
        assert [kinds[i] for i in range(50, len(kinds))] == list(
            dict.fromkeys(word for d in corpus.documents() for word in d.text.split() if word not in words.tokens)
        )
    words.save(tmp_path / "tokenizer")
    again = prepare(corpus, load(tmp_path / "tokenizer"), tmp_path)
    assert [store.fingerprint for store in again] == [store.fingerprint for store in stores]
    assert len(list((tmp_path / "stores").glob("[!.]*"))) == 1


def test_stores_of_subwords_have_no_spellings(corpus, tmp_path):
    store, _ = prepare(corpus, WordPiece([*SPECIAL_TOKENS, *"abcdeghorst"]), tmp_path)
    assert store.spellings is None
    assert tuple(store.manifest["lengths"]) == tuple(store.manifest["checksums"]) == ARRAYS


def test_spellings_in_memory():
    store = Store.from_documents([[[0, 3]]], words=["<S>", "</S>", "<UNK>", "é"])
    assert spelled(store) == ["<S>", "</S>", "<UNK>", "é"]
    other = Store.from_documents([[[0, 3]]], words=["<S>", "</S>", "<UNK>", "è"])
    assert len({store.fingerprint, other.fingerprint, Store.from_documents([[[0, 3]]]).fingerprint}) == 3


@pytest.mark.parametrize("name", WORD_ARRAYS)
def test_damaged_spellings_are_named_and_made_again(corpus, tmp_path, name, capsys):
    words = build(WordVocabularyConfig(min_count=1), corpus)
    prepare(corpus, words, tmp_path)
    (directory,) = (tmp_path / "stores").glob("[!.]*")
    path = directory / "training" / name
    content = path.read_bytes()
    manifest = json.loads((directory / "training/manifest.json").read_text())
    assert len(content) == manifest["lengths"][name] * np.dtype(manifest["dtypes"][name]).itemsize
    path.write_bytes(content[:-1])
    prepare(corpus, words, tmp_path)
    assert f"{path} has {len(content) - 1} bytes, not {len(content)}" in capsys.readouterr().err
    assert path.read_bytes() == content
