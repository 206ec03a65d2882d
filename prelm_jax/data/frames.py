"""Frames: how the examples of a task are written as tokens, for training and for use alike.

    BERT    [CLS] a [SEP], [CLS] a [SEP] b [SEP]              a task reads [CLS]
    GPT-1   start a extract, start a delimiter b extract      a task reads the extract token
    ELMo    <S> a </S>; of a pair each text by itself         a task reads all words

A word to tag is read at its first token; by GPT-1 at its last, the only one that has seen the whole word.

Texts that are too long for the model are cut, the longer one of a pair first, and counted. Sentences to tag and
passages to answer from are never cut: they become several rows, windows that overlap, and what is read of a word or
token is taken from the window that shows most of its context.

References: google-research/bert, run_classifier.py (`_truncate_seq_pair`) and run_squad.py (`doc_stride`, the step from
a window to the next; `_check_is_max_context`); openai/finetune-transformer-lm, train.py (`transform_roc`).
"""

import abc
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, Literal, NamedTuple, cast

import numpy as np
from tokenizers import Regex, pre_tokenizers

from prelm_jax.data.batches import special_id
from prelm_jax.data.examples import Answers, Example, Kind, Label, Part
from prelm_jax.errors import InputError
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.tokenizers.characters import BEGIN_SENTENCE, END_SENTENCE, Spellings
from prelm_jax.tokenizers.words import SPECIAL_TOKENS, WordVocabulary
from prelm_jax.training.contract import Layout

# The lengths that rows are padded to where nothing is known of the others, as far as the model has positions.
WIDTHS = (32, 64, 128, 256, 384, 512)

QUESTION_LENGTH = 64  # Tokens of a question at most (run_squad.py, max_query_length).


ONE = np.ones((), np.float32)  # The weight of an example.


class Text(NamedTuple):
    """A text, or a pair, as the model reads it."""

    ids: np.ndarray  # int32 [tokens]
    second: int  # The position where the second text of a pair begins; the number of tokens if there is none.
    read: np.ndarray  # int32 [K]: the positions that a task reads.


class Row(NamedTuple):
    """An example, or a window of it."""

    example: int  # Its number.
    texts: tuple[Text, ...]
    label: np.ndarray | None = None  # As `labels` in models/task.py, of one row; None: not known.
    weight: np.ndarray | None = None  # As `label_weights` there.
    # Of a window: the number of its first word or token in the example, and for each of them whether this window shows
    # more of its context than the others do.
    first: int = 0
    most_context: np.ndarray | None = None
    # Of a window of a passage: the position of its first token in the row, and for each token the characters of the
    # passage at which it begins and ends.
    begin: int = 0
    characters: np.ndarray | None = None  # int [tokens, 2]

    @property
    def length(self) -> int:
        """Tokens of the longest text."""
        return max(len(text.ids) for text in self.texts)


class Framed(NamedTuple):
    """The rows of examples, and how many examples were cut."""

    rows: list[Row]
    num_examples: int
    num_cut: int


Pairs = Literal["together", "orders", "apart"]


class Frame(abc.ABC):
    """The frame of a family, by the roles of its tokens; `BertFrame` and its like know them.

    max_length: tokens of a row at most. symmetric: the texts of a pair have no order.
    """

    reads: ClassVar[Literal["first", "last"]] = "first"  # The position that sums up a text, or a word to tag.
    answers: ClassVar[bool] = True  # Whether a token is read together with what comes after it, as spans need.
    packs: ClassVar[bool] = True  # Whether the encoder keeps the segments of a row apart, so that examples share rows.

    def __init__(self, tokenizer: Tokenizer, max_length: int, symmetric: bool = False):
        self.tokenizer, self.max_length = tokenizer, max_length
        # How the pair of a Label is read: as one text, as two with its texts in both orders, or each text by itself.
        self.pairs: Pairs = self._pairs(symmetric)
        self._before, self._between, self._after = self._roles(tokenizer)

    @staticmethod
    def task_tokenizer(tokenizer: Tokenizer | None) -> Tokenizer:
        """The tokenizer that a task is trained with, from that of a pretrained model."""
        if tokenizer is None:
            raise InputError("the model has no tokenizer, without which it reads no texts")
        return tokenizer

    def _pairs(self, symmetric: bool) -> Pairs:
        return "together"

    @abc.abstractmethod
    def _roles(self, tokenizer: Tokenizer) -> tuple[list[int], list[int], list[int]]:
        """The tokens before the texts, between two of them, and after them."""

    @property
    def widths(self) -> tuple[int, ...]:
        """The lengths that rows are padded to, at most as many as WIDTHS."""
        shorter = [width for width in WIDTHS if width < self.max_length]
        return (*shorter[1 - len(WIDTHS) :], self.max_length)

    def fitting_width(self, rows: Sequence[Row], num_texts: int, widths: Sequence[int] | None = None) -> int:
        """The least of some widths, by default `widths`, that holds some rows; the last must be `max_length`."""
        longest = max(row.length for row in rows)
        return next(width for width in widths or self.widths if width >= longest)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text, int32."""
        ids, lengths = self.tokenizer.encode_flat(texts)
        return np.split(ids, np.cumsum(lengths)[:-1])

    def encode_words(self, words: list[str]) -> list[np.ndarray]:
        """The ids of each word, at least one."""
        unknown = np.array([self._unknown_id], np.int32)
        return [ids if len(ids) else unknown for ids in self.encode(words)]

    @functools.cached_property
    def _unknown_id(self) -> int:
        return special_id(self.tokenizer, "unknown", "words to tag")

    def frame(
        self, examples: Sequence[Example], kind: Kind, names: Sequence[str] = (), stride: int | None = None
    ) -> Framed:
        """The rows of examples; a label is its number in `names`.

        stride: tokens from a window to the next; None: 128 in a passage, as run_squad.py, half a row in a sentence.
        """
        if kind == "tags":
            return self._tags(examples, names, stride)
        if kind == "spans":
            return self._spans(examples, stride or 128)
        return self._texts(examples, kind, names)

    # Labels and choices

    def _texts(self, examples: Sequence[Example], kind: Kind, names: Sequence[str]) -> Framed:
        sequences = [cast(tuple[str, ...], parts) for example in examples for parts in self._sequences(example, kind)]
        encoded = iter(self.encode([part for parts in sequences for part in parts]))
        numbers = {name: number for number, name in enumerate(names)}
        rows, num_cut = [], 0
        for number, example in enumerate(examples):
            texts, cut = [], False
            for parts in self._sequences(example, kind):
                text, shorter = self._text([next(encoded) for _ in parts])
                texts.append(text)
                cut |= shorter
            num_cut += cut
            label = None if example.label is None else _label(example.label, kind, numbers)
            rows.append(Row(number, tuple(texts), label, None if label is None else ONE))
        return Framed(rows, len(examples), num_cut)

    def _sequences(self, example: Example, kind: Kind) -> Sequence[tuple[Part, ...]]:
        """The texts of an example, as they are encoded."""
        first = example.sequences[0]
        if kind == "choice" or len(first) == 1 or self.pairs == "together":
            return example.sequences
        return ((first[0],), (first[1],)) if self.pairs == "apart" else (first, first[::-1])

    def _text(self, parts: list[np.ndarray]) -> tuple[Text, bool]:
        """The text of one or two parts, and whether they were cut."""
        room = self.max_length - len(self._before) - len(self._after)
        if len(parts) == 1:
            kept, between = [min(len(parts[0]), room)], []
        else:
            between = self._between
            kept = _lengths_that_fit(len(parts[0]), len(parts[1]), room - len(between))
        first = [*self._before, *parts[0][: kept[0]]]
        second = [*between, *parts[1][: kept[1]]] if len(parts) > 1 else []
        ids = np.array([*first, *second, *self._after], np.int32)
        start = len(first) + len(between) if len(parts) > 1 else len(ids)
        read = np.array([0 if self.reads == "first" else len(ids) - 1], np.int32)
        return Text(ids, start, read), sum(kept) < sum(map(len, parts))

    # Tags

    def _tags(self, examples: Sequence[Example], names: Sequence[str], stride: int | None) -> Framed:
        numbers = {name: number for number, name in enumerate(names)}
        sentences = [cast(tuple[str, ...], example.sequences[0][0]) for example in examples]
        encoded = iter(self.encode_words([word for words in sentences for word in words]))
        room = self.max_length - len(self._before) - len(self._after)
        rows: list[Row] = []
        for number, (example, words) in enumerate(zip(examples, sentences, strict=True)):
            if not words:
                raise InputError(f"example {example.id} is a sentence without words")
            pieces = [next(encoded)[:room] for _ in words]
            ends = np.cumsum([len(piece) for piece in pieces])
            begins = ends - [len(piece) for piece in pieces]
            windows = _word_windows(begins, ends, room, stride or max(1, room // 2))
            owners = _owners([(int(begins[a]), int(ends[b - 1])) for a, b in windows], begins, ends)
            labels = None
            if example.label is not None:
                labels = np.array([numbers[name] for name in cast(tuple[str, ...], example.label)], np.int32)
            for i, (a, b) in enumerate(windows):
                ids = np.concatenate([np.array(self._before, np.int32), *pieces[a:b], self._after]).astype(np.int32)
                places = begins[a:b] if self.reads == "first" else ends[a:b] - 1
                read = (len(self._before) + places - begins[a]).astype(np.int32)
                mine = owners[a:b] == i
                label, weight = (None, None) if labels is None else (labels[a:b], mine.astype(np.float32))
                rows.append(Row(number, (Text(ids, len(ids), read),), label, weight, a, mine))
        return Framed(rows, len(examples), 0)

    # Spans

    def _spans(self, examples: Sequence[Example], stride: int) -> Framed:
        questions = self.encode([cast(str, example.sequences[0][0]) for example in examples])
        rows: list[Row] = []
        num_cut = 0
        for number, (example, question) in enumerate(zip(examples, questions, strict=True)):
            num_cut += len(question) > QUESTION_LENGTH
            question = question[:QUESTION_LENGTH]
            passage = cast(str, example.sequences[0][1])
            ids, characters = self.encode_with_characters(passage)
            head = [*self._before, *question, *self._between]
            room = self.max_length - len(head) - len(self._after)
            if room < 1:
                raise InputError(f"example {example.id}: a question of {len(question)} tokens leaves no room")
            starts = [0]
            while starts[-1] + room < len(ids):
                starts.append(starts[-1] + min(stride, room))
            windows = [(start, min(start + room, len(ids))) for start in starts]
            tokens = np.arange(len(ids))
            owners = _owners(windows, tokens, tokens + 1)
            answer = None
            if example.label is not None:
                answer = _answer(cast(Answers, example.label), characters, passage, example.id)
            for i, (a, b) in enumerate(windows):
                row = np.array([*head, *ids[a:b], *self._after], np.int32)
                label = weight = None
                if example.label is not None:
                    inside = answer is not None and a <= answer[0] and answer[1] < b
                    label = np.array(answer, np.int32) + len(head) - a if inside else np.zeros(2, np.int32)
                    weight = ONE
                text = Text(row, len(head), np.zeros(1, np.int32))
                rows.append(Row(number, (text,), label, weight, a, owners[a:b] == i, len(head), characters[a:b]))
        return Framed(rows, len(examples), num_cut)

    def encode_with_characters(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a text, and the characters [tokens, 2] at which they begin and end."""
        return self.tokenizer.encode_with_offsets(text)

    # Batches

    def layout(self, keys: Iterable[str]) -> dict[str, Layout]:
        """How each key of a batch is spread over hosts and devices."""
        return dict.fromkeys(keys, "rows")

    def batch(
        self, groups: Sequence[Sequence[Row]], own: slice, width: int, num_texts: int, num_read: int
    ) -> dict[str, np.ndarray]:
        """The batch of the groups `own` of a global batch, as models/task.py has it: [B, num_texts, width].

        Each group shares a row of the batch, one after the other; without packing it is a single Row.
        """
        mine = groups[own]
        shape = (len(mine), num_texts, width)
        tokens, types, segments = (np.zeros(shape, np.int32) for _ in range(3))
        place_T = np.minimum(np.arange(width, dtype=np.int32), self.max_length - 1)
        positions = np.tile(place_T, (*shape[:2], 1))
        for i, group in enumerate(mine):
            for segment, (begin, row) in enumerate(_placed(group), 1):
                positions[i, :, begin:] = place_T[: width - begin]
                for j, text in enumerate(row.texts):
                    end = begin + len(text.ids)
                    tokens[i, j, begin:end] = text.ids
                    types[i, j, begin + text.second : end] = 1
                    segments[i, j, begin:end] = segment
        batch = {"tokens": tokens, "token_types": types, "positions": positions, "segments": segments}
        return batch | _read_and_labels(mine, num_texts, num_read)


class BertFrame(Frame):
    """[CLS] a [SEP] b [SEP]; token types are 1 from b on."""

    def _roles(self, tokenizer: Tokenizer) -> tuple[list[int], list[int], list[int]]:
        cls, sep = (special_id(tokenizer, role, "the texts of a task") for role in ("cls", "sep"))
        return [cls], [sep], [sep]


class GPTFrame(Frame):
    """start a delimiter b extract; tokens that a published vocabulary lacks are left out."""

    reads = "last"
    answers = False

    @staticmethod
    def task_tokenizer(tokenizer: Tokenizer | None) -> Tokenizer:
        """The tokenizer with the tokens of the frame."""
        return Frame.task_tokenizer(tokenizer).framed()

    def _pairs(self, symmetric: bool) -> Pairs:
        return "orders" if symmetric else "together"

    def _roles(self, tokenizer: Tokenizer) -> tuple[list[int], list[int], list[int]]:
        start, delimiter, extract = (
            [] if id is None else [id] for id in (tokenizer.bos_id, tokenizer.sep_id, tokenizer.cls_id)
        )
        return start, delimiter, extract


class ELMoFrame(Frame):
    """<S> a </S>, in numbers of distinct words; a batch has the characters of its words.

    The texts of a pair are read each by itself, those of a choice as one.
    """

    packs = False

    def __init__(self, tokenizer: Tokenizer, max_length: int, symmetric: bool = False):
        super().__init__(tokenizer, max_length, symmetric)
        self.numbers = {BEGIN_SENTENCE: 0, END_SENTENCE: 1}
        self._known = Spellings.of(())
        self._num_characters = 0

    @staticmethod
    def task_tokenizer(tokenizer: Tokenizer | None) -> Tokenizer:
        """The tokenizer; words between white space for a directory without a vocabulary, which a task does not need."""
        return WordVocabulary(SPECIAL_TOKENS) if tokenizer is None else tokenizer

    def _pairs(self, symmetric: bool) -> Pairs:
        return "apart"

    def _roles(self, tokenizer: Tokenizer) -> tuple[list[int], list[int], list[int]]:
        return [0], [], [1]

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The numbers of the words of each text."""
        ids, lengths = self.tokenizer.number_flat(texts, self.numbers)
        return np.split(ids, np.cumsum(lengths)[:-1])

    def encode_words(self, words: list[str]) -> list[np.ndarray]:
        """The number of each word, which is not split."""
        if self.tokenizer.lowercase:
            words = [word.lower() for word in words]
        return [np.array([self.numbers.setdefault(word, len(self.numbers))], np.int32) for word in words]

    def encode_with_characters(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a text, and the characters [tokens, 2] at which they begin and end."""
        words = _SPLIT_WORDS.pre_tokenize_str(text)
        encoded = self.encode([word for word, _ in words]) if words else []
        characters = np.repeat(
            np.array([place for _, place in words], int).reshape(-1, 2), [len(ids) for ids in encoded], 0
        )
        return np.concatenate([np.zeros(0, np.int32), *encoded]), characters

    def layout(self, keys: Iterable[str]) -> dict[str, Layout]:
        """As in pretraining, the characters are shared by all rows."""
        return {**super().layout(keys), "characters": "shared"}

    def fitting_width(self, rows: Sequence[Row], num_texts: int, widths: Sequence[int] | None = None) -> int:
        """The width whose batches have room for the longest text and for all distinct words of some rows."""
        longest, distinct = max(row.length for row in rows), len(_distinct(rows))
        long_enough = (width for width in widths or self.widths if width >= longest)
        return next(width for width in long_enough if self._room(len(rows), num_texts, width) >= distinct)

    def _room(self, num_rows: int, num_texts: int, width: int) -> int:
        """Distinct words that a batch of a width has room for (U): half of its positions, or all at the widest."""
        positions = num_rows * num_texts * width
        most = min(positions, len(self.numbers)) if width == self.max_length else positions // 2
        return -(-most // 128) * 128

    def batch(
        self, groups: Sequence[Sequence[Row]], own: slice, width: int, num_texts: int, num_read: int
    ) -> dict[str, np.ndarray]:
        """See Frame. `words` replaces `tokens`: it indexes `characters`, which has a row for each distinct word."""
        batch = super().batch(groups, own, width, num_texts, num_read)
        distinct = _distinct([row for group in groups for row in group])
        words = np.searchsorted(distinct, batch["tokens"]).astype(np.int32) * batch["segments"]
        padding = np.zeros(max(0, self._room(len(groups), num_texts, width) - len(distinct)), np.int32)
        characters = self._spellings().characters(np.append(distinct, padding), self._num_characters)
        read_and_labels = {key: batch[key] for key in batch if key not in ("tokens", "token_types", "positions")}
        return {"characters": characters, "words": words, **read_and_labels}

    def _spellings(self) -> Spellings:
        if len(self._known) != len(self.numbers):
            self._known = Spellings.of(self.numbers)
            longest = self._known.characters(np.arange(len(self._known)))
            self._num_characters = longest.shape[1]
        return self._known


def _distinct(rows: Sequence[Row]) -> np.ndarray:
    """The ids of some rows, sorted, each once."""
    return np.unique(np.concatenate([text.ids for row in rows for text in row.texts]))


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
        found = np.zeros(len(numbers), np.float32)
        found[[numbers[name] for name in cast(tuple[str, ...], label)]] = 1
        return found
    return np.array(label, np.int32 if kind == "choice" else np.float32)


def _word_windows(begins: np.ndarray, ends: np.ndarray, room: int, stride: int) -> list[tuple[int, int]]:
    """Windows of words, as (first, one after the last), whose tokens fit into a row.

    Words of 2 tokens, room 7, stride 3: words 0 to 2, 2 to 4, 4 to 6, …
    """
    windows, first = [], 0
    while True:
        last = int(np.searchsorted(ends, begins[first] + room, side="right"))
        windows.append((first, last))
        if last == len(ends):
            return windows
        first = min(last, max(first + 1, int(np.searchsorted(begins, begins[first] + stride))))


def _owners(windows: Sequence[tuple[int, int]], begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """For each word or token from `begins` to `ends` the number of the window that shows most of its context.

    The context is the shorter side's, and of two windows that show as much of it the longer one counts.
    """
    a, b = np.array(windows).T[:, :, None]
    context = np.minimum(begins - a, b - ends) + 0.01 * (b - a)
    return np.where((begins >= a) & (ends <= b), context, -1.0).argmax(0)


def _answer(answers: Answers, characters: np.ndarray, passage: str, id: str) -> tuple[int, int] | None:
    """The first and the last token of the first answer; None for a question without one."""
    if not answers.texts:
        return None
    text, start = answers.texts[0], answers.starts[0]
    inside = np.flatnonzero((characters[:, 1] > start) & (characters[:, 0] < start + len(text)))
    if passage[start : start + len(text)] != text or not len(inside):
        raise InputError(f"example {id}: the answer {text!r} is not at character {start} of its passage")
    return int(inside[0]), int(inside[-1])


def _placed(group: Sequence[Row]) -> Iterator[tuple[int, Row]]:
    """The rows of a group, each with the position at which it begins in the row that they share."""
    begin = 0
    for row in group:
        yield begin, row
        begin += row.length


def _read_and_labels(groups: Sequence[Sequence[Row]], num_texts: int, num_read: int) -> dict[str, np.ndarray]:
    """What is read of each group, and its labels, both in the order of its rows."""
    read = np.full((len(groups), num_texts, num_read), -1, np.int32)
    found: dict[str, np.ndarray] = {"read_positions": read}
    for i, group in enumerate(groups):
        number = 0
        for begin, row in _placed(group):
            for j, text in enumerate(row.texts):
                read[i, j, number : number + len(text.read)] = begin + text.read
            if row.label is not None and row.weight is not None:
                # An example adds one label to its group, or a tag for each word of its sentence.
                labels, weights = (x if row.weight.ndim else x[None] for x in (row.label, row.weight))
                for name, x in (("labels", labels), ("label_weights", weights)):
                    if name not in found:
                        found[name] = np.zeros((len(groups), num_read, *x.shape[1:]), x.dtype)
                    found[name][i, number : number + len(x)] = x
            number += max(len(text.read) for text in row.texts)
    return found


# Words with their characters, as BERT splits texts.
_SPLIT_WORDS = pre_tokenizers.Sequence(
    [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated")]
)
