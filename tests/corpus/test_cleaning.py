"""GPT-1's cleaning: the rules, applied one character at a time, and the option of a SPEC."""

import itertools
import time

import ftfy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prelm_jax.corpus.cleaning import clean, standardize
from prelm_jax.corpus.documents import Corpus
from prelm_jax.corpus.prepare import prepare
from prelm_jax.tokenizers.wordpiece import SPECIAL_TOKENS, WordPiece

MOJIBAKE = "“Itâ€™s” naïve…"


def by_hand(text):
    """Separates runs of a character; then normalizes white space, to a newline if it holds one."""
    text = text.replace("…", "...").replace("´", "'")
    text = "".join("-" if character in "—–―" else character for character in text)
    spaced = ""
    for character, run in itertools.groupby(text):
        run = "".join(run)
        spaced += f" {run} " if character in '-~!";?+,)(/*[]}{|_' else run
    parts = []
    for blank, run in itertools.groupby(spaced, str.isspace):
        run = "".join(run)
        parts.append((" \n " if "\n" in run else " ") if blank else run)
    return "".join(parts).strip()


@given(st.one_of(st.text(), st.text(st.sampled_from("ab—–―…´--~!\";?+,)(/*[]}{|_\\.' \n\n\t\r\x0b\x85\u00a0\u2028"))))
def test_standardize_matches_the_rules_one_character_at_a_time(text):
    assert standardize(text) == by_hand(text)


def test_standardize_a_sentence():
    text = ' "Well—so…", he said;\t\tit\'s (almost) over--\n \n\nC:\\x | a_b ~~ 1/2?! '
    assert standardize(text) == ('" Well - so... " , he said ; it\'s ( almost ) over -- \n C:\\x | a _ b ~~ 1 / 2 ? !')


def test_long_white_space_takes_linear_time():
    start = time.monotonic()
    assert standardize("a" + " " * 200_000 + "b") == "a b"
    assert time.monotonic() - start < 5


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(f"{MOJIBAKE}\nTwo — lines.\n\n\x07\x08\n\nplain")
    return str(path)


def test_documents_are_cleaned(corpus, texts, tmp_path):
    assert clean(MOJIBAKE) == '" It\'s " naïve...'
    cleaned = ['" It\'s " naïve... \n Two - lines.', "", "plain"]
    assert texts(f"{corpus},cleaning=gpt") == cleaned
    assert texts(f"{corpus},cleaning=none") == texts(corpus) != cleaned
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "“a”"}')
    assert texts(str(lines), f"{corpus},cleaning=gpt") == ["“a”", *cleaned]
    assert texts(f"{lines},cleaning=gpt", corpus)[0] == '" a "'


def test_empty_documents_and_original_words_are_counted(corpus, tmp_path):
    tokenizer = WordPiece([*SPECIAL_TOKENS, "plain", "two"])
    store, _ = prepare(Corpus((f"{corpus},cleaning=gpt",)), tokenizer, tmp_path)
    assert store.num_documents == 2 and store.manifest["empty_documents"] == 1
    assert store.num_words == len(f"{MOJIBAKE} Two — lines. plain".split())


def test_cleaning_is_part_of_the_fingerprint(corpus, monkeypatch):
    plain, cleaned = Corpus((corpus,)).fingerprint, Corpus((f"{corpus},cleaning=gpt",)).fingerprint
    assert Corpus((f"{corpus},cleaning=none",)).fingerprint == plain != cleaned
    monkeypatch.setattr(ftfy, "__version__", "another")  # Which may clean differently.
    assert Corpus((f"{corpus},cleaning=gpt",)).fingerprint not in (plain, cleaned)
