"""Zero-width joiners (U+200C, U+200D): kept where the original keeps them, dropped where it drops them."""

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from prelm_jax.corpus.documents import Corpus
from prelm_jax.corpus.prepare import prepare
from prelm_jax.tokenizers.bpe import BPE
from prelm_jax.tokenizers.build import build
from prelm_jax.tokenizers.load import load
from prelm_jax.tokenizers.sentencepiece import SentencePiece, SentencePieceConfig
from prelm_jax.tokenizers.wordpiece import SPECIAL_TOKENS, WordPiece
from prelm_jax.tokenizers.words import WordVocabulary, WordVocabularyConfig

WORDS = ["ශ්\u200dරී", "ලංකාව", "می\u200cخواهم", "کتاب\u200cها", "क्\u200dष", "👩\u200d💻", "👨\u200d👩\u200d👧", "the"]
TEXT = st.lists(
    st.sampled_from(WORDS) | st.text(st.sampled_from("\u200c\u200dශ්රීمیکषක्a 👩💻é.،।"), min_size=1), max_size=8
).map(" ".join)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "joiners.txt"
    path.write_text("\n\n".join(" ".join(WORDS[i:] + WORDS[:i]) + " ." for i in range(8)) * 4)
    return Corpus((str(path),))


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def trained(request, corpus, tmp_path_factory):
    """A SentencePiece, the same in transformers, and in the package."""
    ours = build(SentencePieceConfig(120, request.param, lowercase=False), corpus)
    directory = tmp_path_factory.mktemp("sentencepiece")
    ours.save(directory)
    theirs = AutoTokenizer.from_pretrained(directory)
    package = sentencepiece.SentencePieceProcessor(model_file=str(directory / "spiece.model"))
    return ours, theirs, package


@settings(deadline=None, max_examples=40)
@given(text=TEXT)
def test_sentencepiece_keeps_joiners_as_the_package_does(trained, text):
    ours, theirs, _ = trained
    assert ours.encode_batch([text])[0] == theirs(text, add_special_tokens=False)["input_ids"]
    package = sentencepiece.SentencePieceNormalizer(rule_name="nfkc").normalize(text)
    assert ours._pipeline.normalizer.normalize_str(text) == package.replace("▁", " ").strip()


def test_sentencepiece_spells_words_with_joiners(trained):
    ours, _, package = trained
    for word in WORDS:
        ids = ours.encode_batch([word])[0]
        assert ours.decode(ids) == word and ours.unknown_id not in ids
        assert package.decode(ids) == word and package.encode(word) == ids


def test_a_sentencepiece_saved_without_joiners_goes_on_dropping_them(trained, tmp_path):
    """As versions before did: a model that was trained on such text."""
    ours = trained[0]
    old = SentencePiece(ours.model, ours.lowercase, ours.proto, joiners=False)
    old.save(tmp_path)
    again = load(tmp_path)
    assert again.fingerprint == old.fingerprint != ours.fingerprint
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert again.encode_batch(WORDS) == theirs(WORDS, add_special_tokens=False)["input_ids"]
    assert "\u200d" not in again._pipeline.normalizer.normalize_str(WORDS[0])


@settings(deadline=None, max_examples=40)
@given(text=TEXT)
def test_words_keep_joiners(text):
    """The original splits at white space alone. Split at punctuation in addition, the characters are the same."""
    tokens = ["<S>", "</S>", "<UNK>"]
    assert WordVocabulary(tokens).split_batch([text]) == [text.split()]
    assert "".join(WordVocabulary(tokens, tokenize=True).split_batch([text])[0]) == "".join(text.split())


def test_the_store_and_the_vocabulary_of_words_keep_joiners(corpus, tmp_path):
    tokenizer = build(WordVocabularyConfig(min_count=1), corpus)
    assert set(WORDS) < set(tokenizer.tokens)
    store, _ = prepare(corpus, WordVocabulary(tokenizer.tokens[:3], tokenize=True), tmp_path)
    spelled = store.spellings.bytes.tobytes().decode()
    assert all(word in spelled for word in WORDS)


@settings(deadline=None, max_examples=40)
@given(text=TEXT)
def test_wordpiece_and_bpe_drop_joiners(text):
    """As BERT and GPT-1 do: test_ids_match_transformers compares them with transformers."""
    plain = text.replace("\u200c", "").replace("\u200d", "")
    letters = sorted(set("".join(WORDS)))
    wordpiece = WordPiece([*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters)], lowercase=False)
    bpe = BPE(["<unk>", *letters, *(f"{letter}</w>" for letter in letters)], [])
    for tokenizer in (wordpiece, bpe):
        assert tokenizer.encode_batch([text]) == tokenizer.encode_batch([plain])
