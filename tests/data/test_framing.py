"""Framing: examples as rows of tokens, and what is read of them."""

import functools

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from tiny import example

from prelm_jax.data.examples import Answers, Example
from prelm_jax.data.frames import ELMoFrame
from prelm_jax.data.framing import QUESTION_LENGTH, frame_examples
from prelm_jax.errors import InputError

bert_frame = functools.cache(functools.partial(tiny.frame, "bert"))  # Examples of a property share frames.


def read(frame, text) -> str:
    """A text as its tokens, ELMo's as its words."""
    names = list(frame.numbers) if isinstance(frame, ELMoFrame) else frame.tokenizer.tokens
    return " ".join(names[id] for id in text.ids)


@pytest.mark.parametrize(
    ("family", "symmetric", "parts", "expected", "positions"),
    [
        ("bert", False, ("the cat",), ["[CLS] the cat [SEP]"], [0]),
        ("bert", True, ("the cat", "a"), ["[CLS] the cat [SEP] a [SEP]"], [0]),
        ("openai-gpt", False, ("a",), ["_start_ a</w> _classify_"], [2]),
        ("openai-gpt", False, ("a", "in"), ["_start_ a</w> _delimiter_ i n</w> _classify_"], [5]),
        (
            "openai-gpt",
            True,
            ("a", "in"),
            ["_start_ a</w> _delimiter_ i n</w> _classify_", "_start_ i n</w> _delimiter_ a</w> _classify_"],
            [5, 5],
        ),
        ("elmo", False, ("the cat",), ["<S> the cat </S>"], [0]),
        ("elmo", False, ("the cat", "sees it"), ["<S> the cat </S>", "<S> sees it </S>"], [0, 0]),
    ],
)
def test_texts(family, symmetric, parts, expected, positions):
    frame = tiny.frame(family, symmetric=symmetric)
    (row,), num_cut = frame_examples(frame, [example(*parts)], "label")
    assert [read(frame, text) for text in row.texts] == expected
    assert [text.read.tolist() for text in row.texts] == [[position] for position in positions]
    assert num_cut == 0


@given(st.integers(0, 40), st.integers(0, 40), st.integers(5, 32))
def test_a_pair_is_cut_like_the_reference(a, b, max_length):
    """run_classifier.py, `_truncate_seq_pair`: tokens are popped from the longer text, or else from the second."""
    frame = bert_frame(max_length)
    (row,), num_cut = frame_examples(frame, [example(" ".join(["cat"] * a), " ".join(["dog"] * b))], "label")
    left, right = a, b
    while left + right > max_length - 3:
        if left > right:
            left -= 1
        else:
            right -= 1
    names = read(frame, row.texts[0]).split()
    assert (names.count("cat"), names.count("dog"), num_cut) == (left, right, int((left, right) != (a, b)))


def test_labels_are_numbers_of_names():
    frame, names = tiny.frame("bert"), ("no", "yes")

    def label(kind, value):
        (row,), _ = frame_examples(
            frame, [Example("0", (("a",), ("b",))[: 2 if kind == "choice" else 1], value)], kind, names
        )
        return frame.batch([[row]], slice(0, 1), 8, len(row.texts), 1)

    for kind, value, expected, dtype in (
        ("label", "yes", [[1]], np.int32),
        ("labels", ("yes",), [[[0, 1]]], np.float32),
        ("number", 2.5, [[2.5]], np.float32),
        ("choice", 1, [[1]], np.int32),
    ):
        batch = label(kind, value)
        np.testing.assert_array_equal(batch["labels"], expected)
        assert batch["labels"].dtype == dtype and batch["label_weights"].tolist() == [[1.0]]
    assert "labels" not in label("label", None)


SENTENCE = ("the", "unseen", "cat", "xyz", "a", "dog")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_tag_is_read_at_one_token_of_its_word(family):
    """The first; of a GPT the last, because the others have not seen the end of the word."""
    frame = tiny.frame(family)
    tags = ("O", "B", "O", "B", "O", "O")
    (row,), _ = frame_examples(frame, [example(SENTENCE, label=tags)], "tags", ("B", "O"))
    tokens = read(frame, row.texts[0]).split()
    places = [tokens[position] for position in row.texts[0].read]
    for word, token in zip(SENTENCE, places, strict=True):
        end = f"{word[-1]}</w>" if family == "openai-gpt" else word[0]
        assert token in (word, end, f"{word}</w>", "[UNK]", "<unk>"), (word, token)
    batch = frame.batch([[row]], slice(0, 1), 32, 1, 32)
    assert batch["labels"][0, :7].tolist() == [1, 0, 1, 0, 1, 1, 0] and batch["label_weights"].sum() == 6
    assert (batch["read_positions"][0, 0, 6:] == -1).all() and (batch["read_positions"][0, 0, :6] > 0).all()


@given(st.lists(st.integers(1, 12), min_size=1, max_size=60), st.integers(6, 20), st.integers(1, 9) | st.none())
def test_windows_show_each_word_and_own_it_once(lengths, max_length, stride):
    """A word of n letters is n tokens. The owner has the most context of all windows that hold the word."""
    frame, words = bert_frame(max_length), tuple("c" * n for n in lengths)
    rows, _ = frame_examples(frame, [example(words, label=("O",) * len(words))], "tags", ("O",), stride)
    room = max_length - 2
    sizes = np.minimum(lengths, room)
    ends = np.cumsum(sizes)
    seen, owned = np.zeros(len(words), int), np.zeros(len(words), int)
    best, own = np.full(len(words), -1.0), np.full(len(words), -1.0)
    for row in rows:
        count = len(row.most_context)
        numbers = np.arange(row.first, row.first + count)
        assert row.length <= max_length and row.length - 2 == sizes[numbers].sum()
        begin, end = ends[row.first] - sizes[row.first], ends[numbers[-1]]
        context = np.minimum(ends[numbers] - sizes[numbers] - begin, end - ends[numbers]) + 0.01 * (end - begin)
        best[numbers] = np.maximum(best[numbers], context)
        own[numbers[row.most_context]] = context[row.most_context]
        seen[numbers] += 1
        owned[numbers[row.most_context]] += 1
        np.testing.assert_array_equal(row.weight, row.most_context)
    assert (seen > 0).all() and (owned == 1).all()
    np.testing.assert_allclose(own, best)


def test_a_sentence_without_words_is_refused():
    with pytest.raises(InputError, match="example 7"):
        frame_examples(tiny.frame("bert"), [example((), label=(), id="7")], "tags")


def passage(words=600):
    return " ".join(tiny.WORDS[i % 3] for i in range(words))


def test_windows_of_a_long_passage_are_those_of_the_reference():
    """run_squad.py on 600 tokens, a question of 12 and rows of 384: windows at 0, 128 and 256."""
    frame, text = tiny.frame("bert", 384), passage()
    start = len(" ".join(text.split()[:300])) + 1
    answer = Answers((" ".join(text.split()[300:303]),), (start,))
    rows, _ = frame_examples(frame, [example("cat " * 12, text, label=answer)], "spans")
    assert [row.first for row in rows] == [0, 128, 256]
    assert [row.length for row in rows] == [384, 384, 15 + 344]
    # Token i of a window that begins at token w is at position 14 + i - w.
    assert [row.label.tolist() for row in rows] == [[314, 316], [186, 188], [58, 60]]

    # `_check_is_max_context`, as the reference words it: the window with the most context on its shorter side.
    windows = [(0, 369), (128, 369), (256, 344)]
    for token in range(600):
        scores = [
            min(token - start, start + length - 1 - token) + 0.01 * length if start <= token < start + length else -1
            for start, length in windows
        ]
        owners = [
            row.first <= token < row.first + len(row.most_context) and bool(row.most_context[token - row.first])
            for row in rows
        ]
        assert owners == [i == int(np.argmax(scores)) for i in range(3)], token


def test_an_answer_outside_of_a_window_and_no_answer_are_at_the_first_token():
    frame, text = tiny.frame("bert", 64), passage(100)
    outside = Answers((text.split()[99],), (len(text) - len(text.split()[99]),))
    rows, _ = frame_examples(
        frame, [example("cat", text, label=outside), example("cat", text, label=Answers())], "spans", (), 20
    )
    labels = [row.label.tolist() for row in rows]
    assert labels[0] == [0, 0] and rows[0].example == 0
    last = max(i for i, row in enumerate(rows) if row.example == 0)
    assert labels[last][0] == labels[last][1] == rows[last].length - 2  # Before [SEP].
    assert all(label == [0, 0] for label, row in zip(labels, rows, strict=True) if row.example == 1)


@pytest.mark.parametrize("text", ["In (1912) she won.", "北京在1912年。", "Ein Café, „so“ – é"])
def test_characters_lead_back_to_the_passage(text):
    frame = tiny.frame("bert")
    rows, _ = frame_examples(frame, [example("a", text, label=Answers())], "spans")
    places = sorted({(int(a), int(b)) for row in rows for a, b in row.characters})
    assert "".join(text[a:b] for a, b in places) == "".join(text.split())
    answer = Answers((text[4:6],), (4,))
    (row, *_), _ = frame_examples(frame, [example("a", text, label=answer)], "spans")
    first, last = row.label - row.begin
    assert row.characters[first, 0] <= 4 and row.characters[last, 1] >= 6


def test_an_answer_that_is_not_in_its_passage_is_refused():
    for answers in (Answers(("dog",), (0,)), Answers(("cat",), (2,)), Answers(("",), (3,))):
        with pytest.raises(InputError, match="example 3"):
            frame_examples(tiny.frame("bert"), [example("a", "cat sees", label=answers, id="3")], "spans")


def test_a_long_question_is_cut_and_counted():
    frame = tiny.frame("bert", 128)
    (row, *_), num_cut = frame_examples(frame, [example("cat " * 100, "a dog", label=Answers())], "spans")
    assert row.begin == QUESTION_LENGTH + 2 and num_cut == 1
    with pytest.raises(InputError, match="example 0"):
        frame_examples(tiny.frame("bert", 16), [example("cat " * 100, "a dog", label=Answers())], "spans")


def test_a_passage_without_tokens_is_a_row_all_the_same():
    rows, num_cut = frame_examples(tiny.frame("bert"), [example("a", ""), example("a", "cat")], "spans")
    assert [row.example for row in rows] == [0, 1] and num_cut == 0
    assert rows[0].length == 4 and len(rows[0].characters) == len(rows[0].most_context) == 0
