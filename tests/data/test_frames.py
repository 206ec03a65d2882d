"""Frames: the widths and batches of each family."""

import numpy as np
import pytest
import tiny
from tiny import example

from prelm_jax.data.frames import WIDTHS, ELMoFrame
from prelm_jax.data.framing import frame_examples
from prelm_jax.tokenizers.characters import spelled
from prelm_jax.tokenizers.words import WordVocabulary


def test_a_lower_cased_elmo_reads_lower_case():
    """Texts as well as words that are given as such."""
    frame = ELMoFrame(WordVocabulary(tiny.tokenizer("elmo").tokens, lowercase=True), 32)
    (text,), words = frame.encode(["The CAT"]), np.concatenate(frame.encode_words(["The", "CAT"]))
    np.testing.assert_array_equal(text, words)
    assert list(frame.numbers)[2:] == ["the", "cat"]


@pytest.mark.parametrize("max_length", [20, 32, 100, 512, 1000])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_few_widths_hold_every_row(family, max_length):
    frame = tiny.frame(family, max_length)
    assert len(frame.widths) <= len(WIDTHS) == 6 and frame.widths[-1] == max_length
    rows, _ = frame_examples(frame, [example("a " * n) for n in (1, 5, 40, 2000)], "label")
    widths = [frame.fitting_width(rows[: i + 1], 1) for i in range(4)]
    assert set(widths) <= set(frame.widths) and widths[-1] == max_length
    assert all(width >= row.length for width, row in zip(widths, rows, strict=True))
    assert widths[0] == frame.widths[0]


def test_elmo_has_the_characters_of_the_distinct_words_of_all_rows():
    frame = tiny.frame("elmo", 512)
    rows, _ = frame_examples(frame, [example("the cat sees the dog"), example("a dog"), example("new words")], "label")
    width = frame.fitting_width(rows, 1)
    whole, part = (frame.batch([[row] for row in rows], own, width, 1, 1) for own in (slice(0, 3), slice(1, 2)))
    np.testing.assert_array_equal(whole["characters"], part["characters"])
    assert len(whole["characters"]) % 128 == 0
    words = spelled(part["characters"])
    assert [words[i] for i in part["words"][0, 0, :4]] == ["<S>", "a", "dog", "</S>"]
    assert frame.layout(whole)["characters"] == "shared" and frame.layout(whole)["words"] == "rows"


def test_elmo_takes_a_wider_batch_for_more_distinct_words():
    """A batch has room for half as many words as it has positions, at the widest for all that there are."""
    frame = tiny.frame("elmo", 64)
    texts = [" ".join(f"w{i}x{j}" for j in range(29)) for i in range(40)]
    rows, _ = frame_examples(frame, [example(text) for text in texts], "label")
    assert frame.fitting_width(rows[:8], 1) == 64  # 232 words and 2 in 8 · 32 positions.
    assert frame.fitting_width([rows[0]] * 8, 1) == 32
    assert len(frame.batch([[row] for row in rows[:8]], slice(0, 8), 64, 1, 1)["characters"]) == 512
