"""Words as ELMo reads them: rows of 50 character ids, UTF-8 bytes between boundary characters (bilm-tf, bilm/data.py).

A row is BOW (beginning of word), the first 48 bytes of the word, EOW (end of word), and PAD to the end. Ids are 0 to
260, as in training. Readers of published weights add 1 to each, and use 0 for positions without a word.
"""

import functools
from collections.abc import Iterable

import numpy as np

MAX_CHARACTERS = 50  # Ids of a word, boundary characters included.
NUM_CHARACTERS = 261
BOS, EOS, BOW, EOW, PAD = range(256, NUM_CHARACTERS)

# These two are not spelled: their rows are BOS or EOS between BOW and EOW. "<UNK>" is spelled like any word.
BEGIN_SENTENCE, END_SENTENCE = "<S>", "</S>"

# One row for each length of a word: 255 at the positions of its bytes, else 0; and the ids around the bytes, else 0.
# A word of 2 bytes has 0 255 255 0 0 … and BOW 0 0 EOW PAD ….
_COLUMN, _LENGTH = np.arange(MAX_CHARACTERS), np.arange(MAX_CHARACTERS - 1)[:, None]
_BYTES = np.where((_COLUMN > 0) & (_COLUMN <= _LENGTH), np.uint8(255), np.uint8(0))
_AROUND = np.select([_COLUMN == 0, _COLUMN <= _LENGTH, _COLUMN == _LENGTH + 1], [BOW, 0, EOW], PAD).astype(np.int32)


class Spellings:
    """The UTF-8 bytes of many words end to end, and the offset of each word: about 18 bytes per word.

    bytes: uint8. offsets: int64 [words + 1].
    """

    def __init__(self, bytes: np.ndarray, offsets: np.ndarray):
        self.bytes = bytes
        self.offsets = offsets

    @classmethod
    def of(cls, words: Iterable[str]) -> "Spellings":
        """The spellings of words, without characters that UTF-8 cannot encode (lone surrogates)."""
        encoded = [word.encode("utf-8", "ignore") for word in words]
        offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @functools.cached_property
    def _padded(self) -> np.ndarray:
        """The bytes, after one byte for BOW and before the bytes of a whole row."""
        return np.concatenate([np.zeros(1, np.uint8), self.bytes, np.zeros(MAX_CHARACTERS, np.uint8)])

    def characters(self, word_U: np.ndarray, fewest: int = MAX_CHARACTERS) -> np.ndarray:
        """The character ids, int32 [U, C], of the words with these numbers.

        C is `fewest`, or 50 if that is not enough for a word: only two shapes, because each is compiled.

        An example, for the word "at" between the words "x" and "y", with C = 8:

            bytes_UC    x    a    t    y …                   from one byte before the word
            & _BYTES    0    a    t    0    0 …
            | _AROUND   BOW  a    t    EOW  PAD …
        """
        begin_U = self.offsets[word_U]
        length_U = np.minimum(self.offsets[word_U + 1] - begin_U, MAX_CHARACTERS - 2)
        longest = int(length_U.max(initial=0)) + 2
        columns = fewest if longest <= fewest else MAX_CHARACTERS
        # Each window is one item of `columns` bytes: NumPy gathers such items four times as fast as rows.
        windows = np.ndarray(len(self.bytes) + 1, f"V{columns}", self._padded, strides=1)
        bytes_UC = windows[begin_U].view(np.uint8).reshape(-1, columns)
        ids_UC = (bytes_UC & _rows(_BYTES, columns, length_U)).astype(np.int32)
        ids_UC |= _rows(_AROUND, columns, length_U)
        for token, id in ((BEGIN_SENTENCE, BOS), (END_SENTENCE, EOS)):
            same = np.flatnonzero(length_U == len(token))
            same = same[(ids_UC[same, 1 : len(token) + 1] == list(token.encode())).all(axis=1)]
            ids_UC[same, 1 : len(token) + 2] = [id, EOW] + [PAD] * (len(token) - 1)
        return ids_UC


def _rows(table: np.ndarray, columns: int, number_U: np.ndarray) -> np.ndarray:
    """`table[number_U, :columns]`, gathered in the same way."""
    items = np.ascontiguousarray(table[:, :columns]).view(f"V{columns * table.itemsize}").ravel()
    return items[number_U].view(table.dtype).reshape(-1, columns)


def spelled(ids_UC: np.ndarray) -> list[str]:
    """The words of rows of character ids; long words are cut at the end of their row."""
    characters = [*(bytes([byte]) for byte in range(256)), BEGIN_SENTENCE.encode(), END_SENTENCE.encode()]
    words = (b"".join(characters[id] for id in row[1 : row.index(EOW)]) for row in ids_UC.tolist())
    return [word.decode("utf-8", "replace") for word in words]


def characters(words: Iterable[str]) -> np.ndarray:
    """The character ids of words: int32 [n, 50]."""
    spellings = Spellings.of(words)
    return spellings.characters(np.arange(len(spellings)))
