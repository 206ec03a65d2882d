"""Character ids of words: the published format by hand, and one byte at a time."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prelm_jax.tokenizers.characters import MAX_CHARACTERS, NUM_CHARACTERS, PAD, Spellings, characters, spelled

BEGIN, END = 258, 259

TABLE = {
    "a": [258, 97, 259],
    "The": [258, 84, 104, 101, 259],
    "<S>": [258, 256, 259],
    "</S>": [258, 257, 259],
    "<UNK>": [258, 60, 85, 78, 75, 62, 259],
    "<s>": [258, 60, 115, 62, 259],
    "<S>.": [258, 60, 83, 62, 46, 259],
    "é": [258, 195, 169, 259],
    "漢字": [258, 230, 188, 162, 229, 173, 151, 259],
    "🙂": [258, 240, 159, 153, 130, 259],
    "\ud800": [258, 259],
    "a\udfffb": [258, 97, 98, 259],
    "": [258, 259],
    "\x00": [258, 0, 259],
    "x" * 48: [258, *[120] * 48, 259],
    "x" * 49: [258, *[120] * 48, 259],
    "x" * 200: [258, *[120] * 48, 259],
    "x" * 47 + "é": [258, *[120] * 47, 195, 259],  # cut inside a character
}


def expected(word):
    """bilm-tf's rule, one byte at a time."""
    if word in ("<S>", "</S>"):
        ids = [BEGIN, 256 if word == "<S>" else 257, END]
    else:
        ids = [BEGIN, *list(word.encode("utf-8", "ignore"))[:48], END]
    return ids + [260] * (50 - len(ids))


def test_the_numbers_of_the_published_format():
    assert (NUM_CHARACTERS, MAX_CHARACTERS, PAD) == (261, 50, 260)


def test_by_hand():
    ids = characters(TABLE)
    assert ids.dtype == np.int32
    assert ids.tolist() == [row + [260] * (50 - len(row)) for row in TABLE.values()]


WORD = st.one_of(
    st.text(),
    st.text(st.characters(categories=["Cs", "L", "So"]), max_size=60),
    st.sampled_from(list(TABLE)),
    st.binary(min_size=40, max_size=200).map(lambda data: data.decode("latin-1")),
)


@settings(deadline=None)
@given(words=st.lists(WORD, max_size=8))
@example(words=[])
def test_any_words(words):
    assert characters(words).tolist() == [expected(word) for word in words]


@settings(deadline=None)
@given(words=st.lists(WORD, max_size=8))
def test_spelled_inverts_characters_up_to_the_end_of_a_row(words):
    kept = [word.encode("utf-8", "ignore")[:48].decode("utf-8", "replace") for word in words]
    assert spelled(characters(words)) == kept


@settings(deadline=None)
@given(words=st.lists(WORD, min_size=1, max_size=8), data=st.data())
def test_any_of_the_words_in_any_order(words, data):
    spellings = Spellings.of(words)
    assert len(spellings) == len(words)
    numbers = np.array(data.draw(st.lists(st.integers(0, len(words) - 1), max_size=20)), int)
    assert spellings.characters(numbers).tolist() == [expected(words[number]) for number in numbers]
    with pytest.raises(IndexError):
        spellings.characters(np.array([len(words)]))
