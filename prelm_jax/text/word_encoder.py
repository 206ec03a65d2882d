"""What tokenizers of the `tokenizers` library share, WordPiece and BPE: a vocabulary, and encoding word by word."""

import itertools
from collections.abc import Iterable

import tokenizers

from prelm_jax.errors import InputError

REMEMBERED_WORDS = 1 << 20


def numbered(tokens: list[str]) -> dict[str, int]:
    """The id of each entry of a vocabulary; InputError for one that it holds more than once."""
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        again = next(token for index, token in enumerate(tokens) if ids[token] != index)
        raise InputError(f"the vocabulary holds {again!r} more than once: remove all but one")
    return ids


class WordEncoder:
    """A vocabulary, and a pipeline that looks at each word between spaces alone, as BERT's and GPT-1's do.

    The pipeline knows no special tokens: what is written "[MASK]" or "<unk>" in a text is text.
    """

    def __init__(self, tokens: list[str], pipeline: tokenizers.Tokenizer):
        self.tokens = tokens
        self._pipeline = pipeline
        self._word_ids: dict[str, list[int]] = {}

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, without special tokens."""
        # Each word is encoded once and remembered: several times faster than encoding the texts, with the same ids.
        if len(self._word_ids) > REMEMBERED_WORDS:
            self._word_ids = {}
        known = self._word_ids
        split = [text.split(" ") for text in texts]
        new = [word for word in set(itertools.chain.from_iterable(split)) if word not in known]
        encodings = self._pipeline.encode_batch_fast(new, add_special_tokens=False)
        known.update(zip(new, (encoding.ids for encoding in encodings), strict=True))
        return [list(itertools.chain.from_iterable(map(known.__getitem__, words))) for words in split]

    def decode(self, ids: Iterable[int]) -> str:
        """Words with spaces between them, pieces joined, as transformers decodes."""
        return self._pipeline.decode([int(index) for index in ids], skip_special_tokens=False)
