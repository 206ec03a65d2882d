"""Sentences: nothing but white space is lost, and a line's end is a sentence's end."""

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prelm_jax.text import sentences
from prelm_jax.text.sentences import split

PROSE = st.text(st.sampled_from("ab A.!?\"'()[]“”’…。！？-:;,\n\t\r\x0b\x85\u2028\u3000\x00é1"), max_size=80)


def without_space(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("how", ["library", "line"])
@settings(deadline=None)
@given(text=st.one_of(st.text(), PROSE))
@example(text=" Dr. Who said: “Go.”  Then left.\n\n  He went.\r\n")
def test_no_character_is_lost(how, text):
    found = split(text, how)
    assert without_space("".join(found)) == without_space(text)
    assert all(sentence == sentence.strip() != "" for sentence in found)
    assert not any("\n" in sentence for sentence in found)


@settings(deadline=None)
@given(text=PROSE)
def test_long_lines_lose_nothing(text):
    # Pieces of eight characters, so that every short text is cut many times.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sentences, "PIECE_CHARACTERS", 8)
        found = split(text, "library")
    assert without_space("".join(found)) == without_space(text)


def test_the_library_splits_within_lines():
    text = "Mr. Smith went home. He slept.\n\nIt was late"
    assert split(text, "library") == ["Mr. Smith went home.", "He slept.", "It was late"]
    assert split(text, "line") == ["Mr. Smith went home. He slept.", "It was late"]


def test_the_language_reaches_the_library():
    assert split("Das ist z.B. Obst. Gut.", "library", language="de") == ["Das ist z.B. Obst.", "Gut."]
    assert split("今天天气很好。我们去公园吧！", "library", language="zh") == ["今天天气很好。", "我们去公园吧！"]


def test_a_long_line_is_split_as_its_sentences_would_be(monkeypatch):
    expected = [f"This is sentence {number} of a very long line." for number in range(200)]
    monkeypatch.setattr(sentences, "PIECE_CHARACTERS", 500)
    assert split(" ".join(expected), "library") == expected


def test_quotation_marks_do_not_take_quadratic_time():
    started = time.process_time()
    split("( \" ' " * 50_000, "library")
    assert time.process_time() - started < 20  # in one piece it takes many minutes
