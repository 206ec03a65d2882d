"""Framing: examples to rows, for training and for use alike.

Texts that are too long for the model are cut, the longer one of a pair first, and counted. Sentences to tag and
passages to answer from are never cut: they become several rows, windows that overlap, and what is read of a word or
token is taken from the window that shows most of its context.

References: google-research/bert, run_classifier.py (`_truncate_seq_pair`) and run_squad.py (`doc_stride`, the step from
a window to the next; `_check_is_max_context`).
"""

from collections.abc import Sequence
from typing import cast

import numpy as np

from prelm_jax.data.examples import Answers, Example, Kind, Label, Part
from prelm_jax.data.frames import Frame
from prelm_jax.data.rows import Row, Text
from prelm_jax.errors import InputError

QUESTION_LENGTH = 64  # Tokens of a question at most (run_squad.py, max_query_length).
PASSAGE_STRIDE = 128  # Tokens from a window of a passage to the next (run_squad.py, doc_stride).

ONE = np.ones((), np.float32)  # The weight of an example.


def frame_examples(
    frame: Frame, examples: Sequence[Example], kind: Kind, names: Sequence[str] = (), stride: int | None = None
) -> tuple[list[Row], int]:
    """The rows of examples, and how many examples were cut.

    names: of labels; a label becomes its number in them. stride: tokens from a window to the next; None: 128 in a
    passage, half a row in a sentence. Raises InputError for a sentence without words, a question that leaves no room
    for its passage, and an answer that is not in its passage.

        rows, num_cut = frame_examples(frame, [Example("0", (("A fine film.",),), "good")], "label", ("bad", "good"))
    """
    if kind == "tags":
        return _frame_tags(frame, examples, names, stride), 0
    if kind == "spans":
        return _frame_spans(frame, examples, stride or PASSAGE_STRIDE)
    return _frame_texts(frame, examples, kind, names)


# ---- Labels and choices ----------------------------------------------------------------------------------------------


def _frame_texts(frame: Frame, examples: Sequence[Example], kind: Kind, names: Sequence[str]) -> tuple[list[Row], int]:
    sequences = [_sequences(frame, example, kind) for example in examples]
    texts = [cast(str, part) for each in sequences for parts in each for part in parts]
    encoded = iter(frame.encode(texts))
    numbers = {name: number for number, name in enumerate(names)}
    rows, num_cut = [], 0
    for number, (example, own) in enumerate(zip(examples, sequences, strict=True)):
        framed = [_frame_text(frame, [next(encoded) for _ in parts]) for parts in own]
        num_cut += any(is_cut for _, is_cut in framed)
        label = None if example.label is None else _label(example.label, kind, numbers)
        rows.append(Row(number, tuple(text for text, _ in framed), label, None if label is None else ONE))
    return rows, num_cut


def _sequences(frame: Frame, example: Example, kind: Kind) -> Sequence[tuple[Part, ...]]:
    """The texts and pairs of an example, each of which becomes a Text."""
    first = example.sequences[0]
    if kind == "choice" or len(first) == 1 or frame.pairs == "together":
        return example.sequences
    return ((first[0],), (first[1],)) if frame.pairs == "apart" else (first, first[::-1])


def _frame_text(frame: Frame, parts: Sequence[np.ndarray]) -> tuple[Text, bool]:
    """The text of one or two parts, and whether they were cut."""
    first, second = parts if len(parts) == 2 else (parts[0], parts[0][:0])
    between = frame.between if len(parts) == 2 else []
    a, b = _lengths_that_fit(len(first), len(second), frame.room - len(between))
    head = [*frame.before, *first[:a], *between]
    ids = np.array([*head, *second[:b], *frame.after], np.int32)
    read = np.array([0 if frame.reads == "first" else len(ids) - 1], np.int32)
    return Text(ids, len(head) if len(parts) == 2 else len(ids), read), a + b < len(first) + len(second)


def _lengths_that_fit(a: int, b: int, room: int) -> tuple[int, int]:
    """The lengths of two texts after tokens of the longer one, or else of the second, were dropped until both fit."""
    if a + b <= room:
        return a, b
    if 2 * min(a, b) <= room:
        return (room - b, b) if b < a else (a, room - a)
    return room - room // 2, room // 2


def _label(label: Label, kind: Kind, numbers: dict[str, int]) -> np.ndarray:
    """As `labels` in models/task.py, of one row."""
    if kind == "label":
        return np.array(numbers[cast(str, label)], np.int32)
    if kind == "labels":
        is_set = np.zeros(len(numbers), np.float32)
        is_set[[numbers[name] for name in cast(tuple[str, ...], label)]] = 1
        return is_set
    return np.array(label, np.int32 if kind == "choice" else np.float32)


# ---- Tags and answers, in windows ------------------------------------------------------------------------------------


def _frame_tags(frame: Frame, examples: Sequence[Example], names: Sequence[str], stride: int | None) -> list[Row]:
    numbers = {name: number for number, name in enumerate(names)}
    sentences = [cast(tuple[str, ...], example.sequences[0][0]) for example in examples]
    encoded = iter(frame.encode_words([word for words in sentences for word in words]))
    rows: list[Row] = []
    for number, (example, words) in enumerate(zip(examples, sentences, strict=True)):
        if not words:
            raise InputError(f"example {example.id} is a sentence without words")
        ids = [next(encoded)[: frame.room] for _ in words]
        ends = np.cumsum([len(each) for each in ids])
        begins = ends - [len(each) for each in ids]
        read = begins if frame.reads == "first" else ends - 1
        labels = None
        if example.label is not None:
            labels = np.array([numbers[name] for name in cast(tuple[str, ...], example.label)], np.int32)
        for a, b, most_context in _windows(begins, ends, frame.room, stride or max(1, frame.room // 2)):
            row_ids = np.concatenate([frame.before, *ids[a:b], frame.after]).astype(np.int32)
            row_read = (len(frame.before) + read[a:b] - begins[a]).astype(np.int32)
            label, weight = (None, None) if labels is None else (labels[a:b], most_context.astype(np.float32))
            rows.append(Row(number, (Text(row_ids, len(row_ids), row_read),), label, weight, a, most_context))
    return rows


def _frame_spans(frame: Frame, examples: Sequence[Example], stride: int) -> tuple[list[Row], int]:
    questions = frame.encode([cast(str, example.sequences[0][0]) for example in examples])
    rows: list[Row] = []
    for number, (example, question) in enumerate(zip(examples, questions, strict=True)):
        passage, answers = cast(str, example.sequences[0][1]), cast(Answers | None, example.label)
        ids, characters = frame.encode_with_characters(passage)
        question = question[:QUESTION_LENGTH]
        head = [*frame.before, *question, *frame.between]
        room = frame.max_length - len(head) - len(frame.after)
        if room < 1:
            raise InputError(f"example {example.id}: a question of {len(question)} tokens leaves no room")
        answer = None if answers is None else _answer(answers, characters, passage, example.id)
        tokens = np.arange(len(ids))
        for a, b, most_context in _windows(tokens, tokens + 1, room, stride):
            label = weight = None
            if answers is not None:
                inside = answer is not None and a <= answer[0] and answer[1] < b
                label = np.array(answer, np.int32) + len(head) - a if inside else np.zeros(2, np.int32)
                weight = ONE
            text = Text(np.array([*head, *ids[a:b], *frame.after], np.int32), len(head), np.zeros(1, np.int32))
            rows.append(Row(number, (text,), label, weight, a, most_context, len(head), characters[a:b]))
    return rows, sum(len(question) > QUESTION_LENGTH for question in questions)


def _windows(begins: np.ndarray, ends: np.ndarray, room: int, stride: int) -> list[tuple[int, int, np.ndarray]]:
    """Windows of words, or of tokens, that overlap: (first, one after the last, most_context), as in `Row`.

    Words of 2 tokens, room 7, stride 3: words 0 to 2, 2 to 4, 4 to 6, …

    begins, ends: int [words], the tokens at which each begins and ends; none is longer than `room`.
    """
    if not len(begins):
        return [(0, 0, np.zeros(0, bool))]  # A passage without tokens is a row as well.
    windows, first, last = [], 0, 0
    while last < len(ends):
        last = int(np.searchsorted(ends, begins[first] + room, side="right"))
        windows.append((first, last))
        first = min(last, max(first + 1, int(np.searchsorted(begins, begins[first] + stride))))
    # The context of a word is that of its shorter side; of two windows that show as much, the longer one counts.
    most, owners = np.full(len(ends), -1.0), np.zeros(len(ends), np.int64)
    for i, (first, last) in enumerate(windows):
        a, b, words = begins[first], ends[last - 1], slice(first, last)
        context = np.minimum(begins[words] - a, b - ends[words]) + 0.01 * (b - a)
        owners[words] = np.where(context > most[words], i, owners[words])
        most[words] = np.maximum(context, most[words])
    return [(first, last, owners[first:last] == i) for i, (first, last) in enumerate(windows)]


def _answer(answers: Answers, characters: np.ndarray, passage: str, id: str) -> tuple[int, int] | None:
    """The first and the last token of the first answer; None for a question without one."""
    if not answers.texts:
        return None
    text, start = answers.texts[0], answers.starts[0]
    inside = np.flatnonzero((characters[:, 1] > start) & (characters[:, 0] < start + len(text)))
    if passage[start : start + len(text)] != text or not len(inside):
        raise InputError(f"example {id}: the answer {text!r} is not at character {start} of its passage")
    return int(inside[0]), int(inside[-1])
