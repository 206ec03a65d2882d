"""The base class of the `tokenizers` library's tokenizers: encoding that caches chunks, and files for transformers."""

import json
import os
import string
from array import array
from collections.abc import Iterable, Mapping

import numpy as np
import tokenizers

from prelm_jax.tokenizers.base import Tokenizer, write_files
from prelm_jax.tokenizers.tokenizer_json import tokenizer_json

CACHED_CHARACTERS = 1 << 23  # Of chunks in the cache; they and their ids take about 200 MB.
CHARACTERS_AT_ONCE = 1 << 18
UNSEEN, SPACE, IN_SPAN = -3, -2, -1  # Kinds of characters; chunks of one character have their number instead.


class CachedEncoder(Tokenizer):
    """A vocabulary, and a pipeline whose words depend on nothing outside of them and never contain a space.

    The pipeline does not know special tokens: "[MASK]" or "<unk>" in a text is text.

    A text is cut into chunks: single characters that are words of their own in any company (for BERT, punctuation and
    ideographs), and the spans of other characters between these and spaces. No word extends beyond its chunk. So each
    distinct chunk is encoded once and cached, and NumPy does the rest for many texts together, several times faster
    than the pipeline encodes whole texts, with the same ids.
    """

    def __init__(self, tokens: list[str], roles: Mapping[str, str]):
        super().__init__(tokens, roles)
        self._pipeline = pipeline = self._make_pipeline()
        # If the normalizer lower-cases, ASCII letters are lower-cased before the lookup: fewer distinct chunks.
        self._lowercase = getattr(pipeline.normalizer, "lowercase", False)
        # Whether a chunk of ASCII letters and digits is one word, unchanged by the normalizer.
        plain = string.digits + (string.ascii_lowercase if self._lowercase else string.ascii_letters)
        self._keeps_plain = self._words(plain) == [plain]
        self._clear()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, without special tokens."""
        ids, lengths = self.encode_flat(texts)
        flat, ends = ids.tolist(), np.cumsum(lengths).tolist()
        return [flat[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]

    def encode_flat(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts end to end (int32), and the number of ids of each text (int64)."""
        joined = " ".join([*texts, ""])
        text_ends = np.cumsum([len(text) + 1 for text in texts], dtype=np.int64)
        lengths, blocks, begin = np.zeros(len(texts), np.int64), [np.zeros(0, np.int32)], 0
        while begin < len(joined):
            end = joined.find(" ", begin + CHARACTERS_AT_ONCE) + 1 or len(joined)
            ids, positions, offsets = self._encode(joined[begin:end])
            # Texts low to high - 1 end inside this block; its last ids belong to text `high`, which may have begun in
            # an earlier block and may end in a later one, hence +=.
            low, high = np.searchsorted(text_ends, begin, "right"), np.searchsorted(text_ends, end)
            # The chunks before a text's end are those that begin before it; `offsets` counts their ids.
            borders = offsets[np.searchsorted(positions, text_ends[low:high] - begin)]
            lengths[low : high + 1] += np.diff(borders, prepend=0, append=len(ids))
            blocks.append(ids)
            begin = end
        return np.concatenate(blocks), lengths

    def _encode(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The ids of a text that ends with a space, the position of each chunk in it, and each chunk's offset in ids.

        An example, where the chunk "'" has number 0, and "don" (do, ##n) has number 1:

            text        d o n ' t _ s t o p _     _ is a space
            in_span     1 1 1 0 1 0 1 1 1 1 0
            after_span  0 1 1 1 0 1 0 1 1 1 1     in_span, one position later
            positions   0     3 4   6             where spans begin, and chunks of one character
            spans       d o n _ t _ s t o p _     in_span or after_span, the latter alone being spaces
            numbers     1     0 2   3             t and stop are new: they get the next numbers

        The cache holds the ids of all chunks end to end, in the order of their numbers:

            _chunk_ids  ' do ##n t stop           _chunk_ends 0 1 3 4 5
            begins      1 0 3 4                   where the ids of these chunks begin in the cache
            counts      2 1 1 1                   how many they are
            offsets     0 2 3 4 5                 where they begin in the result
            index       1 2 0 3 4                 positions 0 … 4 of the result, each shifted by begins - offsets
            ids         do ##n ' t stop
        """
        if self._cached_characters > CACHED_CHARACTERS:
            self._clear()
        if self._lowercase:
            text = text.encode().lower().decode()
        characters = np.frombuffer(text.encode("utf-32-le"), np.int32)
        kinds = self._kinds[characters]
        if (unseen := characters[kinds == UNSEEN]).size:
            for character in np.unique(unseen).tolist():
                self._kinds[character] = self._kind(chr(character))
            kinds = self._kinds[characters]
        in_span = kinds == IN_SPAN
        after_span = np.roll(in_span, 1)  # The last character wraps around to the first position; it is a space.
        positions = np.flatnonzero((in_span & ~after_span) | (kinds >= 0))
        # Each span is followed by one character, now a space, whatever it is in the text.
        separated = np.where(in_span, characters, ord(" "))[in_span | after_span]
        spans = separated.tobytes().decode("utf-32-le").split(" ")[:-1]
        numbers = kinds[positions]
        numbers[numbers == IN_SPAN] = np.fromiter(map(self._numbers.__getitem__, spans), np.int32, len(spans))
        self._encode_new_chunks()

        ends = np.frombuffer(self._chunk_ends, np.int64)
        begins, counts = ends[numbers], ends[numbers + 1] - ends[numbers]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        index = np.arange(offsets[-1]) + np.repeat(begins - offsets[:-1], counts)
        return np.frombuffer(self._chunk_ids, np.int32)[index], positions, offsets

    def _clear(self) -> None:
        """Empties the cache."""
        self._numbers = _ChunkNumbers()
        # The ids of all chunks end to end. Those of chunk n are at _chunk_ends[n] to _chunk_ends[n + 1] - 1.
        self._chunk_ids, self._chunk_ends = array("i"), array("q", [0])
        self._cached_characters = 0
        # By code point: the number of the chunk that the character is by itself, else IN_SPAN, SPACE or UNSEEN.
        self._kinds = np.full(0x110000, UNSEEN, np.int32)

    def _kind(self, character: str) -> int:
        words, letter = self._words(character), self._words("a")
        if self._words(f"a{character}a") != [*letter, *words, *letter]:
            return IN_SPAN
        return self._numbers[character] if words else SPACE

    def _words(self, text: str) -> list[str]:
        normal = self._pipeline.normalizer.normalize_str(text)
        return [word for word, _ in self._pipeline.pre_tokenizer.pre_tokenize_str(normal)]

    def _encode_new_chunks(self) -> None:
        new, self._numbers.new = self._numbers.new, []
        tokenize = self._pipeline.model.tokenize
        for chunk in new:
            plain = self._keeps_plain and chunk.isascii() and chunk.isalnum()
            for word in [chunk] if plain else self._words(chunk):
                self._chunk_ids.extend([token.id for token in tokenize(word)])
            self._chunk_ends.append(len(self._chunk_ids))
        self._cached_characters += sum(map(len, new))

    def decode(self, ids: Iterable[int]) -> str:
        """Words with spaces between them, the subwords of each joined, as transformers decodes."""
        return self._pipeline.decode([int(index) for index in ids], skip_special_tokens=False)

    def save(self, directory: str | os.PathLike, model_max_length: int | None = None) -> None:
        """Writes the files that transformers' AutoTokenizer reads, and the vocabulary in the format of its kind.

        `model_max_length` is the model's number of positions: without it, readers do not know where to truncate.
        """
        special_tokens = {f"{role}_token": token for role, token in self.roles.items()}
        settings = {**self._settings(), **special_tokens}
        if model_max_length is not None:
            settings["model_max_length"] = model_max_length
        files = {
            "tokenizer.json": tokenizer_json(self._pipeline, self.roles),
            "tokenizer_config.json": json.dumps(settings, indent=2, sort_keys=True) + "\n",
            "special_tokens_map.json": json.dumps(special_tokens, indent=2, sort_keys=True) + "\n",
        }
        write_files(directory, files | self._vocabulary_files())

    def _make_pipeline(self) -> tokenizers.Tokenizer:
        """The pipeline of the vocabulary, which is complete when this is called."""
        raise NotImplementedError

    def _settings(self) -> dict[str, object]:
        """transformers' class and its arguments, for tokenizer_config.json."""
        raise NotImplementedError

    def _vocabulary_files(self) -> dict[str, str | bytes]:
        """The files of the vocabulary in the format of its kind, by name."""
        raise NotImplementedError


class _ChunkNumbers(dict[str, int]):
    """Numbers chunks in the order of their first lookup; `new` collects the numbered ones that are not encoded yet."""

    def __init__(self):
        self.new: list[str] = []

    def __missing__(self, chunk: str) -> int:
        self.new.append(chunk)
        number = self[chunk] = len(self)
        return number
