"""GPT-1's cleaning: the original's rules one character at a time, and as an option of a corpus."""

import itertools
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prelm_jax.corpus.cleaning import clean, standardize
from prelm_jax.corpus.documents import Corpus
from prelm_jax.corpus.prepare import prepare
from prelm_jax.errors import InputError
from prelm_jax.tokenizers.wordpiece import SPECIAL_TOKENS, WordPiece

MOJIBAKE = "“Itâ€™s” naïve…"


def by_hand(text):
    """Splits into runs of a character; then white space, which is a newline if it holds one."""
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
def test_the_rules_one_character_at_a_time(text):
    assert standardize(text) == by_hand(text)


def test_the_rules_by_hand():
    text = ' "Well—so…", he said;\t\tit\'s (almost) over--\n \n\nC:\\x | a_b ~~ 1/2?! '
    assert standardize(text) == ('" Well - so... " , he said ; it\'s ( almost ) over -- \n C:\\x | a _ b ~~ 1 / 2 ? !')


def test_long_white_space_takes_no_time():
    start = time.monotonic()
    assert standardize("a" + " " * 200_000 + "b") == "a b"
    assert time.monotonic() - start < 5


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(f"{MOJIBAKE}\nTwo — lines.\n\n\x07\x08\n\nplain")
    return str(path)


def texts(*sources):
    return [document.text for document in Corpus(sources).documents()]


def test_documents_are_cleaned(corpus, tmp_path):
    pytest.importorskip("ftfy")
    assert clean(MOJIBAKE) == '" It\'s " naïve...'
    cleaned = ['" It\'s " naïve... \n Two - lines.', "", "plain"]
    assert texts(corpus, "cleaning=gpt") == cleaned
    assert texts(corpus, "cleaning=none") == texts(corpus) != cleaned
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "“a”"}')
    assert texts(str(lines), f"{corpus},cleaning=gpt") == ["“a”", *cleaned]
    assert texts(f"{lines},cleaning=gpt", corpus)[0] == '" a "'


def test_a_document_of_nothing_is_counted(corpus, tmp_path):
    pytest.importorskip("ftfy")
    tokenizer = WordPiece([*SPECIAL_TOKENS, "plain", "two"])
    store, _ = prepare(Corpus((corpus, "cleaning=gpt")), tokenizer, tmp_path)
    assert store.num_documents == 2 and store.manifest["empty_documents"] == 1


def test_fingerprints_tell_cleaned_text_apart(corpus, monkeypatch):
    ftfy = pytest.importorskip("ftfy")
    plain, cleaned = Corpus((corpus,)).fingerprint, Corpus((corpus, "cleaning=gpt")).fingerprint
    assert Corpus((corpus, "cleaning=none")).fingerprint == plain != cleaned
    monkeypatch.setattr(ftfy, "__version__", "another")  # it may clean otherwise
    assert Corpus((corpus, "cleaning=gpt")).fingerprint not in (plain, cleaned)


def test_ftfy_is_not_installed(corpus, monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    for use in (texts, lambda *sources: Corpus(sources).fingerprint):
        with pytest.raises(InputError) as error:
            use(corpus, "cleaning=gpt")
        assert str(error.value) == 'cleaning=gpt needs ftfy: pip install "prelm_jax[cleaning]"'
    assert texts(corpus)


def test_another_cleaning_is_refused(corpus):
    with pytest.raises(InputError, match=r"cleaning is one of none, gpt, not bert$"):
        Corpus((f"{corpus},cleaning=bert",))
