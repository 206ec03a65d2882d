"""What tokenizers of the `tokenizers` library share: a vocabulary, and encoding chunk by chunk, each only once."""

import string
from array import array
from collections.abc import Iterable

import numpy as np
import tokenizers

from prelm_jax.errors import InputError

REMEMBERED_CHARACTERS = 1 << 23  # of chunks; they and their ids take some 200 MB
CHARACTERS_AT_ONCE = 1 << 18
UNSEEN, SPACE, PART = -3, -2, -1


def numbered(tokens: list[str]) -> dict[str, int]:
    """The id of each entry of a vocabulary; InputError for one that it holds more than once."""
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        again = next(token for index, token in enumerate(tokens) if ids[token] != index)
        raise InputError(f"the vocabulary holds {again!r} more than once: remove all but one")
    return ids


class WordEncoder:
    """A vocabulary, and a pipeline that looks at each word alone and never across a space.

    The pipeline knows no special tokens: what is written "[MASK]" or "<unk>" in a text is text.

    A text is cut into chunks: characters that are words by themselves wherever they stand (to BERT, punctuation and
    ideographs), and the runs of other characters between these and spaces. No word goes over the end of a chunk, so
    each chunk is encoded once and remembered, and NumPy does the rest for many texts together: several times faster
    than the pipeline is on whole texts, with the same ids.
    """

    special_ids: dict[str, int]
    pad_id = property(lambda self: self.special_ids.get("[PAD]"))
    cls_id = property(lambda self: self.special_ids.get("[CLS]"))
    sep_id = property(lambda self: self.special_ids.get("[SEP]"))
    mask_id = property(lambda self: self.special_ids.get("[MASK]"))

    def __init__(self, tokens: list[str], pipeline: tokenizers.Tokenizer):
        self.tokens = tokens
        self._pipeline = pipeline
        # Where the normalizer lower-cases, ASCII letters may be so before all else: that makes fewer chunks.
        self._lowercase = getattr(pipeline.normalizer, "lowercase", False)
        # Whether what consists of ASCII letters and digits is a word and stays as it is.
        plain = string.digits + (string.ascii_lowercase if self._lowercase else string.ascii_letters)
        self._keeps_plain = self._words(plain) == [plain]
        self._forget()

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, without special tokens."""
        ids, lengths = self.encode_flat(texts)
        flat, ends = ids.tolist(), np.cumsum(lengths).tolist()
        return [flat[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]

    def encode_flat(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts end to end, int32, and how many each text has, int64; without special tokens."""
        joined = " ".join([*texts, ""])
        text_ends = np.cumsum([len(text) + 1 for text in texts], dtype=np.int64)
        lengths, parts, begin = np.zeros(len(texts), np.int64), [np.zeros(0, np.int32)], 0
        while begin < len(joined):
            end = joined.find(" ", begin + CHARACTERS_AT_ONCE) + 1 or len(joined)
            ids, positions, offsets = self._encode(joined[begin:end])
            # Texts that end within this part, and the one that its last character belongs to.
            low, high = np.searchsorted(text_ends, begin, "right"), np.searchsorted(text_ends, end)
            borders = offsets[np.searchsorted(positions, text_ends[low:high] - begin)]
            lengths[low : high + 1] += np.diff(borders, prepend=0, append=len(ids))
            parts.append(ids)
            begin = end
        return np.concatenate(parts), lengths

    def _encode(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The ids of a text that ends with a space, each chunk's position in it, and the chunks' offsets in the ids."""
        if self._remembered > REMEMBERED_CHARACTERS:
            self._forget()
        if self._lowercase:
            text = text.encode().lower().decode()
        characters = np.frombuffer(text.encode("utf-32-le"), np.int32)
        kinds = self._kinds[characters]
        if (unseen := characters[kinds == UNSEEN]).size:
            for character in np.unique(unseen).tolist():
                self._kinds[character] = self._kind(chr(character))
            kinds = self._kinds[characters]
        in_run = kinds == PART
        after_run = np.roll(in_run, 1)  # the first character follows the last one, a space
        positions = np.flatnonzero((in_run & ~after_run) | (kinds >= 0))
        # Runs with one space after each, whatever stood there.
        runs = np.where(in_run, characters, ord(" "))[in_run | after_run].tobytes().decode("utf-32-le").split(" ")[:-1]
        numbers = kinds[positions]
        numbers[numbers == PART] = np.fromiter(map(self._numbers.__getitem__, runs), np.int32, len(runs))
        self._learn()

        ends = np.frombuffer(self._ends, np.int64)
        begins, counts = ends[numbers], ends[numbers + 1] - ends[numbers]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        index = np.arange(offsets[-1]) + np.repeat(begins - offsets[:-1], counts)
        return np.frombuffer(self._ids, np.int32)[index], positions, offsets

    def _forget(self) -> None:
        self._numbers = _Numbers()
        # The ids of all chunks end to end, and where those of each end; the number of a chunk is its place here.
        self._ids, self._ends = array("i"), array("q", [0])
        self._remembered = 0
        # Of each code point: a chunk's number if it is one by itself, else SPACE, PART of a run, or UNSEEN so far.
        self._kinds = np.full(0x110000, UNSEEN, np.int32)

    def _kind(self, character: str) -> int:
        words, letter = self._words(character), self._words("a")
        if self._words(f"a{character}a") != [*letter, *words, *letter]:
            return PART
        return self._numbers[character] if words else SPACE

    def _words(self, text: str) -> list[str]:
        normal = self._pipeline.normalizer.normalize_str(text)
        return [word for word, _ in self._pipeline.pre_tokenizer.pre_tokenize_str(normal)]

    def _learn(self) -> None:
        """Encodes the chunks that are new."""
        new, self._numbers.new = self._numbers.new, []
        tokenize = self._pipeline.model.tokenize
        for chunk in new:
            plain = self._keeps_plain and chunk.isascii() and chunk.isalnum()
            for word in [chunk] if plain else self._words(chunk):
                self._ids.extend([token.id for token in tokenize(word)])
            self._ends.append(len(self._ids))
        self._remembered += sum(map(len, new))

    def decode(self, ids: Iterable[int]) -> str:
        """Words with spaces between them, pieces joined, as transformers decodes."""
        return self._pipeline.decode([int(index) for index in ids], skip_special_tokens=False)


class _Numbers(dict):
    """Numbers what is looked up in it by the order of its first time; `new`: what came since one last looked."""

    def __init__(self):
        self.new: list[str] = []

    def __missing__(self, chunk: str) -> int:
        self.new.append(chunk)
        number = self[chunk] = len(self)
        return number
