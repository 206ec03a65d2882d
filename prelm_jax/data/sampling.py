"""The text of BERT's examples: windows of documents around an anchor sentence, split into pairs.

BERT, appendix A.2 (Devlin et al., 2019); google-research/bert, create_pretraining_data.py.

Divergences from that reference:

- A pair is drawn on the fly around an anchor sentence, and each sentence is the anchor once an epoch; the reference
  cuts documents into chunks from their beginning, for each of ten copies. So every example is as full as its document
  allows.
- The label is a true coin. The reference calls a pair random whenever its chunk has one sentence only: 57 % of the
  labels on articles, 77 % on paragraphs.
- A random second segment never comes from the same document (the reference gives up after ten draws and calls it
  random all the same), and its length gives nothing away: it is drawn among the sentences that have as many tokens
  left in their document as the true next one has.
- Whether a sequence is a short one is drawn for each example, not for each document.
- The first segment is cut at its front, so that it stays adjacent to the second, and the second at its end; the
  reference takes each token off the front or the end at random.
"""

from typing import NamedTuple

import numpy as np

from prelm_jax.corpus.store import Store
from prelm_jax.data.randomness import bits, key, permute, uniform
from prelm_jax.errors import InputError

_DRAWS = 10  # of a random second segment, as in the reference
_FEWEST_CHOICES = 64  # among which a random second segment is drawn


class Segments(NamedTuple):
    """Where the segments of examples are in a store: int64 [B] each."""

    first_begin: np.ndarray  # first token of A
    first_length: np.ndarray
    second_begin: np.ndarray  # first token of B
    second_length: np.ndarray  # 0 without B

    @property
    def length(self) -> np.ndarray:
        """Tokens of each example, [CLS] and [SEP] included."""
        return self.first_length + 2 + np.where(self.second_length > 0, self.second_length + 1, 0)


class SegmentSampler:
    """Draws the segments of examples, in pairs or single: a pure function of (seed, example).

    `num_anchors` is the number of sentences around which examples are drawn, each once an epoch; `budget` the tokens of
    text in an example at most.

    Args:
        max_length: T, tokens of an example with its special tokens at most.
        short_probability: fraction of the examples that are cut to a random length.
        pairs: draw pairs; else single segments.

    Raises:
        InputError: if the store has no sentences, or none for pairs.
    """

    def __init__(self, store: Store, max_length: int, short_probability: float, pairs: bool, seed: int):
        self._store, self._max_length, self._short_probability = store, max_length, short_probability
        self.pairs, self.budget = pairs, max_length - (3 if pairs else 2)
        self._epoch_key = key(seed, "pairs: epoch")
        self._window_keys = np.stack([key(seed, f"pairs: {name}") for name in ("short", "budget", "window")])[:, None]
        self._split_key, self._label_key = key(seed, "pairs: split"), key(seed, "pairs: label")
        self._random_keys = [key(seed, f"pairs: random {draw}") for draw in range(_DRAWS)]
        self._elsewhere_key = key(seed, "pairs: elsewhere")

        # Anchors are numbered through the documents that can have one; a pair needs a document of two sentences.
        sentences_X = np.diff(store.document_offsets)
        self._anchor_documents = np.flatnonzero(sentences_X >= (2 if pairs else 1))
        self._anchor_offsets = np.append(0, np.cumsum(sentences_X[self._anchor_documents]))
        self.num_anchors = int(self._anchor_offsets[-1])
        if pairs:
            if store.num_documents < 2 or not self.num_anchors:
                raise InputError(
                    f"no next sentences in this corpus: {store.num_documents} documents, {len(self._anchor_documents)} "
                    "with two sentences or more (a random one must come from another document): "
                    "give a corpus of several documents, or --data.no-next-sentence"
                )
            self._sort_by_tokens_left()
        elif not self.num_anchors:
            raise InputError("the corpus is empty: give one with at least one document")

    def _sort_by_tokens_left(self):
        """Sorts the sentences by the number of tokens from their beginning to their document's end, counted up to T.

        `_by_tokens_left[_with_fewer[n] : _with_fewer[n + 1]]` are the sentences with exactly n tokens left. For
        documents with sentences of 4 3 5 and 2 3 tokens:

            sentence           0   1   2   3   4
            tokens left       12   8   5   5   3
            _by_tokens_left    4   2   3   1   0
            _with_fewer[5]     1                      so [1, 3) are sentences 2 and 3, the ones with 5 tokens left
            _with_fewer[6]     3
        """
        store, T = self._store, self._max_length
        document_end_X = store.sentence_offsets[store.document_offsets[1:]]
        tokens_left_Y = np.repeat(document_end_X, np.diff(store.document_offsets)) - store.sentence_offsets[:-1]
        self._tokens_left = np.minimum(tokens_left_Y, T).astype(np.uint16)  # 16 bits: NumPy sorts them by radix
        order = np.argsort(self._tokens_left, kind="stable")
        self._by_tokens_left = order.astype(np.min_scalar_type(store.num_sentences))
        self._with_fewer = np.append(0, np.cumsum(np.bincount(self._tokens_left, minlength=T + 1)))

    def draw(self, example_B: np.ndarray) -> tuple[Segments, np.ndarray | None]:
        """The segments of each example, and its label (0: B follows A, 1: B is random) if it is a pair."""
        return self._pairs(example_B) if self.pairs else (self._single_segments(example_B), None)

    def _windows(self, example_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Where the text of each example begins: around its anchor, but so that the document fills the budget.

        Budget 8, a document with sentences of 4 3 5 2 tokens from token 100 on, and its third sentence as the anchor:

            sentences begin at tokens   100 104 107 112   (document's end: 114)
            draw 3 of [0, 8)            107 - 3 = 104, the beginning of the second sentence: so begin with that
            draw 5                      107 - 5 = 102, inside the first sentence: begin with that
            anchor 112, draw 2          112 - 2 = 110, but 8 tokens that begin there go past the end: 114 - 8 = 106,
                                        inside the second sentence

        Returns the budget (tokens of text), the sentence to begin with, and the first sentence and the end of the
        document.
        """
        offsets, document_offsets = self._store.sentence_offsets, self._store.document_offsets
        short_B, length_B, window_B = uniform(self._window_keys, example_B)
        short_budget_B = 2 + _below(self.budget - 1, length_B)
        budget_B = np.where(short_B < self._short_probability, short_budget_B, self.budget)

        # The anchor: first its number among the anchors, then the sentence's number in the store.
        epoch_B, index_B = np.divmod(example_B, self.num_anchors)
        anchor_B = permute(index_B, self.num_anchors, bits(self._epoch_key, epoch_B))
        i_B = np.searchsorted(self._anchor_offsets, anchor_B, side="right") - 1
        document_B = self._anchor_documents[i_B]
        begin_B, end_B = document_offsets[document_B], document_offsets[document_B + 1]
        anchor_B += begin_B - self._anchor_offsets[i_B]

        token_B = offsets[anchor_B] - _below(budget_B, window_B)
        token_B = np.maximum(np.minimum(token_B, offsets[end_B] - budget_B), offsets[begin_B])
        sentence_B = self._sentences_at(token_B, np.maximum(anchor_B - budget_B, begin_B))
        return budget_B, sentence_B, begin_B, end_B

    def _sentences_at(self, token_B: np.ndarray, low_B: np.ndarray) -> np.ndarray:
        """The sentence that each token of the store belongs to, if it is one of the T that follow low_B.

        Bisects like `np.searchsorted`, but near low_B instead of through a large array, which is 4 times as fast.
        """
        offsets, last = self._store.sentence_offsets, self._store.num_sentences
        for bit in reversed(range((self._max_length - 1).bit_length())):
            next_B = np.minimum(low_B + (1 << bit), last)
            low_B = np.where(offsets[next_B] <= token_B, next_B, low_B)
        return low_B

    def _single_segments(self, example_B: np.ndarray) -> Segments:
        """The text of each example."""
        offsets = self._store.sentence_offsets
        budget_B, sentence_B, _, end_B = self._windows(example_B)
        begin_B = offsets[sentence_B]
        return Segments(begin_B, np.minimum(offsets[end_B] - begin_B, budget_B), begin_B, np.zeros_like(begin_B))

    def _pairs(self, example_B: np.ndarray) -> tuple[Segments, np.ndarray]:
        """The segments and the label of each example.

        The sentences from the window's beginning up to the budget are split: the first ones are A, and B begins with
        the next sentence, at the latest with the last of them (or, after a sentence that fills the budget alone, with
        the sentence after it). For the example of `_windows`, budget 8, which begins with the sentence at token 104:

            sentences up to the budget   104 107      token 104 + 8 - 1 = 111 is in the sentence at 107
            next sentence                107          the only choice here
        """
        offsets = self._store.sentence_offsets
        budget_B, sentence_B, begin_B, end_B = self._windows(example_B)
        sentence_B = np.minimum(sentence_B, end_B - 2)  # a next sentence must follow in the document
        first_B = offsets[sentence_B]
        stop_B = np.minimum(self._sentences_at(first_B + budget_B - 1, sentence_B) + 1, end_B)
        next_B = sentence_B + 1 + _below(stop_B - sentence_B - 1, uniform(self._split_key, example_B))
        return self.pairs_at(example_B, next_B, offsets[next_B] - first_B, budget_B, begin_B, end_B)

    def pairs_at(
        self,
        example_B: np.ndarray,
        next_B: np.ndarray,
        first_text_B: np.ndarray,
        budget_B: np.ndarray | int,
        begin_B: np.ndarray,
        end_B: np.ndarray,
    ) -> tuple[Segments, np.ndarray]:
        """Pairs of the text before a sentence, and the text from this sentence (label 0) or another one (label 1) on.

        In the example of `_pairs`, for the sentence at 107:

            text before and from it      3 and 7      104 to 106, and 107 to the document's end
            room for B                   5            what A leaves, 8 - 3, but at least half of the budget
            length of A                  3            min(3, 8 - 5), where B needs min(7, 5); A is cut at its front
            length of B                  5            min(7, 8 - 3); B is cut at its end

        A random B begins with another sentence, with as many tokens left in its document: here, 5 or more.

        Args:
            example_B: number of each pair; it determines the random draws.
            next_B: the sentences.
            first_text_B: tokens before each that A may have.
            budget_B: tokens of A and B.
            begin_B, end_B: the document of each, in sentences.
        """
        offsets = self._store.sentence_offsets
        next_begin_B, next_text_B = offsets[next_B], offsets[end_B] - offsets[next_B]
        room_B = np.maximum(budget_B - first_text_B, budget_B // 2)
        first_length_B = np.minimum(first_text_B, budget_B - np.minimum(next_text_B, room_B))

        label_B = _below(2, uniform(self._label_key, example_B))
        random_B = self._random_sentences(example_B, next_text_B, room_B, begin_B, end_B)
        second_begin_B = np.where(label_B, offsets[random_B], next_begin_B)
        second_text_B = np.where(label_B, self._tokens_left[random_B], next_text_B)
        second_length_B = np.minimum(second_text_B, budget_B - first_length_B)
        return Segments(next_begin_B - first_length_B, first_length_B, second_begin_B, second_length_B), label_B

    def _random_sentences(
        self, example_B: np.ndarray, next_text_B: np.ndarray, room_B: np.ndarray, begin_B: np.ndarray, end_B: np.ndarray
    ) -> np.ndarray:
        """A sentence outside of the document whose text fills as much of the room as the next sentence's text does.

        Choices are a range [low, high) of `_by_tokens_left`. For a room of 5 tokens:

            next text 7   fills the room: all sentences with 5 tokens left or more
            next text 4   does not: the sentences with exactly 4 tokens left

        Args:
            next_text_B: tokens from the next sentence to the document's end.
            room_B: tokens that B may have.
            begin_B, end_B: the document, in sentences.
        """
        num_sentences = self._store.num_sentences
        text_B = np.minimum(next_text_B, room_B)
        low_B = self._with_fewer[text_B]
        high_B = np.where(next_text_B < room_B, self._with_fewer[text_B + 1], num_sentences)
        # If there are few choices, take their neighbors in the order too, half of them below.
        lacking_B = np.maximum(_FEWEST_CHOICES - (high_B - low_B), 0)
        low_B = np.maximum(np.minimum(low_B - lacking_B // 2, num_sentences - _FEWEST_CHOICES), 0)
        high_B = np.minimum(np.maximum(high_B, low_B + _FEWEST_CHOICES), num_sentences)

        # Draw again for the examples whose sentence is in their own document.
        random_B = np.empty_like(begin_B)
        again = np.arange(len(example_B))
        for draw_key in self._random_keys:
            choice = _below(high_B[again] - low_B[again], uniform(draw_key, example_B[again]))
            random_B[again] = self._by_tokens_left[low_B[again] + choice]
            again = again[(begin_B[again] <= random_B[again]) & (random_B[again] < end_B[again])]
            if not again.size:
                return random_B
        # Perhaps all choices are in the document itself: any sentence before or after it.
        begin, size = begin_B[again], end_B[again] - begin_B[again]
        elsewhere = _below(num_sentences - size, uniform(self._elsewhere_key, example_B[again]))
        random_B[again] = elsewhere + size * (elsewhere >= begin)
        return random_B


def _below(n: np.ndarray | int, uniform: np.ndarray) -> np.ndarray:
    """A random integer in [0, n), from a random number in [0, 1)."""
    return (uniform * n).astype(np.int64)
