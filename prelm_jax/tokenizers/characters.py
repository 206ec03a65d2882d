"""Words as ELMo reads them: rows of 50 character ids, the bytes of UTF-8 between marks (bilm-tf, bilm/data.py).

A row is BOW, the first 48 bytes of the word, EOW, and PAD to the end. The ids are those of training, 0 to 260; readers
of the published weights add one to each, and have 0 for what is no word at all.
"""

import functools
from collections.abc import Iterable

import numpy as np

MAX_CHARACTERS = 50  # of a word, with the marks
NUM_CHARACTERS = 261
BOS, EOS, BOW, EOW, PAD = range(256, NUM_CHARACTERS)

# These two are no words: their rows are those of one character of their own. "<UNK>" is a word like any other.
BEGIN_SENTENCE, END_SENTENCE = "<S>", "</S>"

# For each length of a word a row that is 255 where its bytes stand, and one that has what stands around them, else 0.
_COLUMN, _LENGTH = np.arange(MAX_CHARACTERS), np.arange(MAX_CHARACTERS - 1)[:, None]
_INSIDE = np.where((_COLUMN > 0) & (_COLUMN <= _LENGTH), np.uint8(255), np.uint8(0))
_AROUND = np.select([_COLUMN == 0, _COLUMN <= _LENGTH, _COLUMN == _LENGTH + 1], [BOW, 0, EOW], PAD).astype(np.int32)


class Spellings:
    """How words are written: their UTF-8 bytes end to end, and where each begins. 10 bytes or so for a word, and 8.

    bytes: uint8. offsets: int64 [words + 1].
    """

    def __init__(self, bytes: np.ndarray, offsets: np.ndarray):
        self.bytes = bytes
        self.offsets = offsets

    @classmethod
    def of(cls, words: Iterable[str]) -> "Spellings":
        """The spellings of words, without what UTF-8 cannot write (lone surrogates)."""
        encoded = [word.encode("utf-8", "ignore") for word in words]
        offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @functools.cached_property
    def _padded(self) -> np.ndarray:
        """The bytes, with room for a mark before them and for a row after them."""
        return np.concatenate([np.zeros(1, np.uint8), self.bytes, np.zeros(MAX_CHARACTERS, np.uint8)])

    def characters(self, word_U: np.ndarray, fewest: int = MAX_CHARACTERS) -> np.ndarray:
        """The character ids of the words of some numbers: int32 [U, C].

        C is the number of characters of the longest word, rounded up to a multiple of 8, at least `fewest`, at most 50.
        """
        begin_U = self.offsets[word_U]
        length_U = np.minimum(self.offsets[word_U + 1] - begin_U, MAX_CHARACTERS - 2)
        longest = int(length_U.max(initial=0)) + 2
        columns = min(max(-(-longest // 8) * 8, fewest), MAX_CHARACTERS)
        # The bytes from one before each word on, as single items: NumPy copies these four times as fast as rows.
        windows = np.ndarray(len(self.bytes) + 1, f"V{columns}", self._padded, strides=1)
        bytes_UC = windows[begin_U].view(np.uint8).reshape(-1, columns)
        ids_UC = (bytes_UC & _rows(_INSIDE, columns, length_U)).astype(np.int32)
        ids_UC |= _rows(_AROUND, columns, length_U)
        for mark, id in ((BEGIN_SENTENCE, BOS), (END_SENTENCE, EOS)):
            same = np.flatnonzero(length_U == len(mark))
            same = same[(ids_UC[same, 1 : len(mark) + 1] == list(mark.encode())).all(axis=1)]
            ids_UC[same, 1 : len(mark) + 2] = [id, EOW] + [PAD] * (len(mark) - 1)
        return ids_UC


def _rows(table: np.ndarray, columns: int, number_U: np.ndarray) -> np.ndarray:
    """`table[number_U, :columns]`, likewise."""
    items = np.ascontiguousarray(table[:, :columns]).view(f"V{columns * table.itemsize}").ravel()
    return items[number_U].view(table.dtype).reshape(-1, columns)


def spelled(ids_UC: np.ndarray) -> list[str]:
    """The words that were so written, long ones as far as their rows reach."""
    characters = [*(bytes([byte]) for byte in range(256)), BEGIN_SENTENCE.encode(), END_SENTENCE.encode()]
    words = (b"".join(characters[id] for id in row[1 : row.index(EOW)]) for row in ids_UC.tolist())
    return [word.decode("utf-8", "replace") for word in words]


def characters(words: Iterable[str]) -> np.ndarray:
    """The character ids of words, training numbering: int32 [n, 50]."""
    spellings = Spellings.of(words)
    return spellings.characters(np.arange(len(spellings)))
