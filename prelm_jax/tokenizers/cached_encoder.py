"""The base class of the `tokenizers` library's tokenizers: encoding that caches chunks, and files for transformers."""

import dataclasses
import functools
import json
import os
import re
import string
from array import array
from collections.abc import Iterable, Mapping
from typing import Self

import numpy as np
import tokenizers
from tokenizers import normalizers

from prelm_jax.errors import InputError, first_line
from prelm_jax.tokenizers.added_tokens import AddedToken, with_added_tokens, with_ids
from prelm_jax.tokenizers.base import FRAME_ROLES, Tokenizer, check_distinct, write_files
from prelm_jax.tokenizers.tokenizer_json import tokenizer_json

CACHED_CHARACTERS = 1 << 23  # Of chunks in the cache; they and their ids take about 200 MB.
CHARACTERS_AT_ONCE = 1 << 18
COMMON_PUNCTUATION = ".,'\"-():;?!/"  # Too common to tell where an added token is.
UNSEEN, SPACE, IN_SPAN = -3, -2, -1  # Kinds of characters; chunks of one character have their number instead.

# The zero-width joiners spell words of Persian, Sinhala and others. Noncharacters, which no text has, in their place.
JOINERS = {"\u200c": "\ufdd0", "\u200d": "\ufdd1"}


def keeping_joiners(normalizer: normalizers.Normalizer) -> list[normalizers.Normalizer]:
    """The steps of a normalizer that takes U+200C and U+200D for letters. BERT's drops them as it drops controls."""
    hide = [normalizers.Replace(joiner, letter) for joiner, letter in JOINERS.items()]
    show = [normalizers.Replace(letter, joiner) for joiner, letter in JOINERS.items()]
    return [*hide, normalizer, *show]


def pipeline_of(parts: Mapping[str, object]) -> tokenizers.Tokenizer:
    """The pipeline of the parts of a tokenizer.json. Raises InputError for those that the library cannot read."""
    try:
        return tokenizers.Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], **parts}))
    except Exception as error:  # The library raises bare Exceptions for wrong files.
        raise InputError(f"the tokenizers library cannot read it ({first_line(error)})") from None


class CachedEncoder(Tokenizer):
    """A vocabulary, and a pipeline whose words depend on nothing outside of them and never contain a space.

    The pipeline does not know the special tokens of roles: "[MASK]" or "<unk>" in a text is text. `added` are other
    tokens that are matched in a text before it is split into words; those that `tokens` lacks follow it. `frame`: the
    tokens of FRAME_ROLES, all of them in `tokens` or `added`.

    A text is cut into chunks: single characters that are words of their own in any company (for BERT, punctuation and
    ideographs), and the spans of other characters between these and spaces. No word extends beyond its chunk. So each
    distinct chunk is encoded once and cached, and NumPy does the rest for many texts together, several times faster
    than the pipeline encodes whole texts, with the same ids. Only texts with a chunk that may be a part of an added
    token go to the library as a whole.

    Raises InputError if the ids of added tokens do not follow the vocabulary, or if two are the same when normalized.
    """

    isolates_characters: bool = True  # Whether there may be characters that are words of their own in any company.

    def __init__(
        self,
        tokens: list[str],
        roles: Mapping[str, str],
        added: Iterable[AddedToken] = (),
        frame: Mapping[str, str] = {},
    ):
        check_distinct(tokens)
        placed = with_ids(added, tokens)
        further = [token.content for token in placed if token.id >= len(tokens)]
        super().__init__([*tokens, *further], {**roles, **frame})
        self.frame = frame
        self.added = [token for token in placed if token.content not in self.special_ids]
        self.known_size = len(tokens)  # Without added tokens.
        if self.unknown_id is None or self.unknown_id >= len(tokens):
            raise InputError(f"the vocabulary lacks {roles['unk']}, which stands for words that it cannot spell")
        self._pipeline = pipeline = self._make_pipeline()
        # If the normalizer lower-cases, ASCII letters are lower-cased before the lookup: fewer distinct chunks.
        self._lowercase = getattr(pipeline.normalizer, "lowercase", False)
        # Whether a chunk of ASCII letters and digits is one word, unchanged by the normalizer.
        plain = string.digits + (string.ascii_lowercase if self._lowercase else string.ascii_letters)
        self._keeps_plain = self._words(plain) == [plain]
        self._clear()
        self._check_added()
        # What a chunk contains in every text with an added token; None if an added token is white space.
        parts = [self._part(token) for token in self.added]
        self._parts = None if None in parts else re.compile("|".join(re.escape(part or "") for part in parts))
        self._clear()

    @property
    def _added_identity(self) -> list[object]:
        """What a fingerprint covers of the added tokens and the frame: nothing where there are none."""
        identity: list[object] = [[dataclasses.astuple(token) for token in self.added]] if self.added else []
        return [*identity, *([self.tokens, dict(self.frame)] if self.frame else [])]

    def framed(self) -> Self:
        """The tokenizer with a special token for each of FRAME_ROLES; itself if it has them."""
        frame = {role: self.roles.get(role, token) for role, token in FRAME_ROLES.items()}
        if taken := [token for role, token in frame.items() if role not in self.roles and token in self.ids]:
            raise InputError(f"the vocabulary has {taken[0]!r} as text, which GPT-1 puts around texts: rename it there")
        new = [AddedToken(token, special=True, normalized=False) for token in frame.values() if token not in self.ids]
        return self._with_frame([*self.added, *new], frame) if new else self

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
        may_have_added = np.full(len(texts), self._parts is None)
        while begin < len(joined):
            end = joined.find(" ", begin + CHARACTERS_AT_ONCE) + 1 or len(joined)
            ids, positions, offsets, parts = self._encode(joined[begin:end])
            may_have_added[np.searchsorted(text_ends, begin + parts, "right")] = True
            # Texts low to high - 1 end inside this block; its last ids belong to text `high`, which may have begun in
            # an earlier block and may end in a later one, hence +=.
            low, high = np.searchsorted(text_ends, begin, "right"), np.searchsorted(text_ends, end)
            # The chunks before a text's end are those that begin before it; `offsets` counts their ids.
            borders = offsets[np.searchsorted(positions, text_ends[low:high] - begin)]
            lengths[low : high + 1] += np.diff(borders, prepend=0, append=len(ids))
            blocks.append(ids)
            begin = end
        ids = np.concatenate(blocks)
        if not may_have_added.any():
            return ids, lengths
        ids_of = np.split(ids, np.cumsum(lengths)[:-1])
        for i in np.flatnonzero(may_have_added):
            ids_of[i] = np.array(self._encode_with_added(texts[i]), np.int32)
        return np.concatenate(ids_of), np.array([len(ids) for ids in ids_of])

    def _encode_with_added(self, text: str) -> list[int]:
        """The ids of a text, all of it encoded by the library, which knows the added tokens."""
        library, ids = self._library
        return [ids.get(id, id) for id in library.encode(text, add_special_tokens=False).ids]

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a text, and the characters [tokens, 2] at which each begins and ends in it, without white space.

        Slower than `encode_batch`, by the library alone.
        """
        library, ids = self._library
        (encoded,) = library.encode_batch([text], add_special_tokens=False)  # Unlike `encode` it releases the GIL.
        offsets = np.array(encoded.offsets, np.int64).reshape(-1, 2)
        for i, (begin, end) in enumerate(encoded.offsets):
            piece = text[begin:end]
            offsets[i, 0] += len(piece) - len(piece.lstrip())
            offsets[i, 1] -= len(piece) - len(piece.rstrip()) if piece.strip() else 0
        return np.array([ids.get(id, id) for id in encoded.ids], np.int32), offsets

    @functools.cached_property
    def _library(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """The pipeline with the added tokens, and those of its ids that are others here, where special tokens count."""
        pipeline = with_added_tokens(self._pipeline, self.added)
        ids = {pipeline.token_to_id(token.content) or 0: token.id for token in self.added}
        return pipeline, {theirs: ours for theirs, ours in ids.items() if theirs != ours}

    def _matched(self, token: AddedToken) -> str:
        """What is matched for an added token, in the normalized text if it is `normalized`."""
        return self._pipeline.normalizer.normalize_str(token.content) if token.normalized else token.content

    def _check_added(self) -> None:
        """Raises InputError for normalized tokens of which the library finds the one or the other, or none."""
        first: dict[str, AddedToken] = {}
        for token in self.added:
            text = self._matched(token)
            if not text:
                raise InputError(
                    f"the added token {token.content!r} is nothing when normalized: set normalized to false"
                )
            if token.normalized and (other := first.setdefault(text, token)) is not token:
                raise InputError(
                    f"the added tokens {other.content!r} and {token.content!r} are the same when normalized: leave one "
                    "out, or set normalized to false"
                )

    def _part(self, token: AddedToken) -> str | None:
        """What a chunk contains, as it is or normalized, in every text with the token; None for white space.

        The rarest part of the token, as a guess: a character that is a chunk by itself, or else its longest span.
        """
        text = self._matched(token)
        text = text.encode().lower().decode() if self._lowercase else text
        kinds = [min(self._kind(character), 0) for character in text]
        singles = [character for character, kind in zip(text, kinds, strict=True) if kind == 0]
        spans = "".join(character if kind == IN_SPAN else " " for character, kind in zip(text, kinds, strict=True))
        rare = [character for character in singles if character.isascii() and character not in COMMON_PUNCTUATION]
        return next(iter([*rare, *sorted(filter(None, spans.split(" ")), key=len, reverse=True), *singles]), None)

    def _encode(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The ids of a text that ends with a space, the position of each chunk in it, and each chunk's offset in ids.

        Last, the positions of the chunks that may be parts of added tokens.

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
        parts = positions[np.frombuffer(self._chunk_parts, bool)[numbers]] if self.added else positions[:0]
        return np.frombuffer(self._chunk_ids, np.int32)[index], positions, offsets, parts

    def _clear(self) -> None:
        """Empties the cache."""
        self._numbers = _ChunkNumbers()
        # The ids of all chunks end to end. Those of chunk n are at _chunk_ends[n] to _chunk_ends[n + 1] - 1.
        self._chunk_ids, self._chunk_ends = array("i"), array("q", [0])
        self._chunk_parts = bytearray()  # For each chunk 1 if it may be a part of an added token, else 0.
        self._cached_characters = 0
        # By code point: the number of the chunk that the character is by itself, else IN_SPAN, SPACE or UNSEEN.
        self._kinds = np.full(0x110000, UNSEEN, np.int32)

    def _kind(self, character: str) -> int:
        words, letter = self._words(character), self._words("a")
        if self._words(f"a{character}a") != [*letter, *words, *letter] or (words and not self.isolates_characters):
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
            if self.added:
                forms = [chunk] if plain else [chunk, self._pipeline.normalizer.normalize_str(chunk)]
                self._chunk_parts.append(self._parts is not None and any(map(self._parts.search, forms)))
        self._cached_characters += sum(map(len, new))

    def decode(self, ids: Iterable[int]) -> str:
        """Words with spaces between them, the subwords of each joined, as transformers decodes."""
        pipeline = self._full_pipeline if self.added else self._pipeline
        return pipeline.decode([int(index) for index in ids], skip_special_tokens=False)

    @functools.cached_property
    def _full_pipeline(self) -> tokenizers.Tokenizer:
        """The pipeline with the special tokens and the added ones, in the order of their ids, which readers keep."""
        special = [AddedToken(token, id, special=True, normalized=False) for token, id in self.special_ids.items()]
        return with_added_tokens(self._pipeline, sorted([*special, *self.added], key=lambda token: token.id))

    def save(self, directory: str | os.PathLike, model_max_length: int | None = None) -> None:
        """Writes the files that transformers' AutoTokenizer reads, and the vocabulary in the format of its kind.

        `model_max_length` is the model's number of positions: without it, readers do not know where to truncate.
        """
        special_tokens: dict[str, object] = {f"{role}_token": token for role, token in self.roles.items()}
        if further := [token.content for token in self.added if token.special]:
            special_tokens["additional_special_tokens"] = further
        settings = {**self._settings(), **special_tokens}
        if model_max_length is not None:
            settings["model_max_length"] = model_max_length
        files = {
            "tokenizer.json": tokenizer_json(self._full_pipeline, self.roles),
            "tokenizer_config.json": json.dumps(settings, indent=2, sort_keys=True) + "\n",
            "special_tokens_map.json": json.dumps(special_tokens, indent=2, sort_keys=True) + "\n",
        }
        if self.vocab_size > self.known_size:
            ids = {token: id for token, id in self.ids.items() if id >= self.known_size}
            files["added_tokens.json"] = json.dumps(ids, indent=2, ensure_ascii=False) + "\n"
        write_files(directory, files | self._vocabulary_files())

    def _with_frame(self, added: list[AddedToken], frame: Mapping[str, str]) -> Self:
        """The same vocabulary with other added tokens and a frame."""
        raise NotImplementedError

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
