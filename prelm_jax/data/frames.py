"""Frames: how the texts of a task are written as tokens for each family; `framing` makes rows of examples with them.

    BERT    [CLS] a [SEP], [CLS] a [SEP] b [SEP]              a task reads [CLS]
    GPT-1   start a extract, start a delimiter b extract      a task reads the extract token
    ELMo    <S> a </S>; of a pair each text by itself         a task reads all words

A word to tag is read at its first token; by GPT-1 at its last, the only one that has seen the whole word.

References: google-research/bert, run_classifier.py; openai/finetune-transformer-lm, train.py (`transform_roc`).
"""

import abc
from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal

import numpy as np
from tokenizers import Regex, pre_tokenizers

from prelm_jax.data.batches import special_id
from prelm_jax.data.rows import Row, fill_batch
from prelm_jax.errors import InputError
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.tokenizers.characters import BEGIN_SENTENCE, END_SENTENCE, Spellings
from prelm_jax.tokenizers.words import SPECIAL_TOKENS, WordVocabulary
from prelm_jax.training.contract import Layout

# The lengths to which rows are padded if they do not follow from the lengths of all rows; none beyond the model's.
WIDTHS = (32, 64, 128, 256, 384, 512)

Pairs = Literal["together", "orders", "apart"]


class Frame(abc.ABC):
    """How a family reads the texts of a task; a subclass knows the tokens `before`, `between` and `after` them.

    max_length: tokens of a row at most. symmetric: the texts of a pair have no order.
    """

    reads: ClassVar[Literal["first", "last"]] = "first"  # The position that sums up a text, or a word to tag.
    answers: ClassVar[bool] = True  # Whether a token is read together with what comes after it, as spans need.
    packs: ClassVar[bool] = True  # Whether the encoder keeps the segments of a row apart, so that examples share rows.

    def __init__(self, tokenizer: Tokenizer, max_length: int, symmetric: bool = False):
        self.tokenizer, self.max_length = tokenizer, max_length
        # How the pair of a Label is read: as one text, as two with its texts in both orders, or each text by itself.
        self.pairs: Pairs = self._pairs(symmetric)
        self.before, self.between, self.after = self._roles(tokenizer)

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
        """The ids of the tokens before the texts, between two of them, and after them."""

    @property
    def room(self) -> int:
        """Tokens that a single text may have."""
        return self.max_length - len(self.before) - len(self.after)

    @property
    def widths(self) -> tuple[int, ...]:
        """The lengths that rows are padded to: at most six, up to `max_length`."""
        shorter = [width for width in WIDTHS if width < self.max_length]
        return (*shorter[1 - len(WIDTHS) :], self.max_length)

    def fitting_width(self, rows: Sequence[Row], num_texts: int, widths: Sequence[int] | None = None) -> int:
        """The smallest of `widths` (by default the frame's) that holds the rows; the last must be `max_length`."""
        longest = max(row.length for row in rows)
        return next(width for width in widths or self.widths if width >= longest)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text, int32."""
        ids, lengths = self.tokenizer.encode_flat(texts)
        return np.split(ids, np.cumsum(lengths)[:-1])

    def encode_words(self, words: list[str]) -> list[np.ndarray]:
        """The ids of each word, at least one."""
        unknown = np.array([special_id(self.tokenizer, "unknown", "words to tag")], np.int32)
        return [ids if len(ids) else unknown for ids in self.encode(words)]

    def encode_with_characters(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a text, and the characters [tokens, 2] at which they begin and end."""
        return self.tokenizer.encode_with_offsets(text)

    def layout(self, keys: Iterable[str]) -> dict[str, Layout]:
        """How each key of a batch is spread over hosts and devices."""
        return dict.fromkeys(keys, "rows")

    def batch(
        self, groups: Sequence[Sequence[Row]], own: slice, width: int, num_texts: int, num_read: int
    ) -> dict[str, np.ndarray]:
        """The batch of the groups `own` of a global batch; see `fill_batch`."""
        return fill_batch(groups[own], width, num_texts, num_read, self.max_length)


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
        characters = np.array([ends for _, ends in words], int).reshape(-1, 2)
        return np.concatenate([np.zeros(0, np.int32), *encoded]), characters.repeat([len(ids) for ids in encoded], 0)

    def layout(self, keys: Iterable[str]) -> dict[str, Layout]:
        """As in pretraining, the characters are shared by all rows."""
        return {**super().layout(keys), "characters": "shared"}

    def fitting_width(self, rows: Sequence[Row], num_texts: int, widths: Sequence[int] | None = None) -> int:
        """The smallest width whose batches hold the longest text and all distinct words of the rows."""
        longest, distinct = max(row.length for row in rows), len(_distinct(rows))
        long_enough = (width for width in widths or self.widths if width >= longest)
        return next(width for width in long_enough if self._capacity(len(rows), num_texts, width) >= distinct)

    def _capacity(self, num_rows: int, num_texts: int, width: int) -> int:
        """Room for distinct words in a batch (U): half as many as positions, or at the widest as many."""
        positions = num_rows * num_texts * width
        most = min(positions, len(self.numbers)) if width == self.max_length else positions // 2
        return -(-most // 128) * 128

    def batch(
        self, groups: Sequence[Sequence[Row]], own: slice, width: int, num_texts: int, num_read: int
    ) -> dict[str, np.ndarray]:
        """See Frame. `words` replaces `tokens`: it indexes `characters`, which has a row for each distinct word."""
        batch = super().batch(groups, own, width, num_texts, num_read)
        distinct = _distinct([row for group in groups for row in group])
        words = np.searchsorted(distinct, batch["tokens"]).astype(np.int32) * batch["segments"]  # 0 in padding.
        padding = np.zeros(max(0, self._capacity(len(groups), num_texts, width) - len(distinct)), np.int32)
        characters = self._spellings().characters(np.append(distinct, padding))
        read_and_labels = {key: batch[key] for key in batch if key not in ("tokens", "token_types", "positions")}
        return {"characters": characters, "words": words, **read_and_labels}

    def _spellings(self) -> Spellings:
        if len(self._known) != len(self.numbers):
            self._known = Spellings.of(self.numbers)
        return self._known


def _distinct(rows: Sequence[Row]) -> np.ndarray:
    """The ids of some rows, sorted, each once."""
    return np.unique(np.concatenate([text.ids for row in rows for text in row.texts]))


# Words with their characters, as BERT splits texts.
_SPLIT_WORDS = pre_tokenizers.Sequence(
    [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated")]
)
