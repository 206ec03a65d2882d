"""Encoding by the `tokenizers` library, word by word: what WordPiece and BPE share."""

import itertools
from collections.abc import Iterable

import tokenizers

REMEMBERED_WORDS = 1 << 20


class WordEncoder:
    """Encodes texts by a pipeline that looks at each word between spaces alone, as BERT's and GPT-1's do."""

    def __init__(self, pipeline: tokenizers.Tokenizer):
        self._pipeline = pipeline
        self._word_ids: dict[str, list[int]] = {}

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
