"""BERT's examples: sentence pairs with a next-sentence label, masked.

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

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, NamedTuple

import numpy as np

from prelm_jax.bounds import Bounds, Fraction, Length, OutOfBounds, Positive
from prelm_jax.corpus.store import Store
from prelm_jax.data.baselines import Baselines, pair_baselines, perplexity
from prelm_jax.data.batches import StoreBatches, special_id
from prelm_jax.data.masking import EVALUATED_PROBABILITY, MaskingConfig
from prelm_jax.data.packing import Packing, choose_packing, join, pack
from prelm_jax.data.randomness import bits, key, permute, uniform
from prelm_jax.data.segmentation import continuations
from prelm_jax.data.show import show_pairs
from prelm_jax.errors import InputError
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.training.contract import HostBatch

_DRAWS = 10  # of a random second segment, as in the reference
_DESCRIBED = 4096  # examples whose lengths `describe` averages
_PACKED_TOGETHER = 512  # rows, at least: the more, the less do their lengths in all vary
_FEWEST_CHOICES = 64  # among which a random second segment is drawn


@dataclass(frozen=True)
class PairsConfig:
    """Sentence pairs `[CLS] A [SEP] B [SEP]`, or single segments `[CLS] A [SEP]` without `next_sentence`."""

    # Tokens per row (T), special tokens included; at most the model's number of positions.
    max_length: Annotated[Length, Bounds(8)] = 128
    max_predictions: Positive = 20  # Masked tokens per row (M) at most; about masking.probability × max_length.
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    # Fraction of examples that are cut to a random length, so that the model also sees short inputs (original: 0.1).
    short_sequence_probability: Fraction = 0.0
    next_sentence: bool = True  # Predict whether B follows A; turn it off for corpora of single sentences.
    # Put several short examples into a row instead of padding, so that a step reads more text; see docs/corpora.md.
    packing: bool = False

    def check_together(self) -> None:
        """Raises OutOfBounds for more predictions than tokens."""
        if self.max_predictions > self.max_length:
            rule = f"must be at most max_length, {self.max_length}"
            raise OutOfBounds(("max_predictions",), self.max_predictions, rule)

    def build(self, store: Store, tokenizer: Tokenizer, batch_size: int, seed: int) -> "PairBatches":
        """The batches of a run. Raises InputError for a tokenizer without BERT's special tokens or an unfit corpus."""
        return PairBatches(self, store, tokenizer, batch_size, seed)

    def evaluated(self) -> "PairsConfig":
        """With 15 % of masked tokens, so that models trained at different rates can be compared."""
        return replace(self, masking=replace(self.masking, probability=EVALUATED_PROBABILITY))

    def evaluation(self, store: Store, tokenizer: Tokenizer) -> "PairEvaluation":
        """All of a text, in windows and pairs. Raises InputError for an empty store, or as `build` for a tokenizer."""
        return PairEvaluation(self, store, tokenizer)

    def baselines(self, batches: "PairBatches", evaluation: Iterable[HostBatch]) -> Baselines:
        """See `pair_baselines`."""
        return pair_baselines(batches, batches.unpacked, evaluation)

    def derived_metrics(self, name: str, value: float, store: Store) -> dict[str, float]:
        """The perplexity of masked tokens."""
        return perplexity({"masked_lm_loss": "masked_lm_perplexity"}, name, value)

    def describe(self, batches: "PairBatches") -> str:
        """The number of examples of a step and of an epoch, how full rows are, and how much packing changes that."""
        return batches.describe()

    def show(self, batch: HostBatch, tokenizer: Tokenizer) -> Iterator[str]:
        """See `show_pairs`."""
        return show_pairs(batch, tokenizer)


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


class PairBatches(StoreBatches):
    """Batches of sentence pairs; the end of `examples` lists their keys.

    `examples_per_epoch` is the number of anchors.
    """

    def __init__(self, config: PairsConfig, store: Store, tokenizer: Tokenizer, batch_size: int, seed: int):
        super().__init__(store, tokenizer.vocab_size, batch_size)
        self._config = config
        self._pad_id = special_id(tokenizer, "pad", "sentence pairs")
        self._cls_id = special_id(tokenizer, "cls", "sentence pairs")
        self._sep_id = special_id(tokenizer, "sep", "sentence pairs")
        self._masking = config.masking.build(tokenizer, config.max_predictions, seed)
        # Of a packed row: its size, and the most pairs, because each has a mask, and five tokens or more.
        self._capacity = config.max_length * config.max_predictions
        self._group = -(-_PACKED_TOGETHER // batch_size)  # in steps
        self._num_pairs = min(config.max_length // 5, config.max_predictions)
        self._epoch_key = key(seed, "pairs: epoch")
        self._window_keys = np.stack([key(seed, f"pairs: {name}") for name in ("short", "budget", "window")])[:, None]
        self._split_key, self._label_key = key(seed, "pairs: split"), key(seed, "pairs: label")
        self._random_keys = [key(seed, f"pairs: random {draw}") for draw in range(_DRAWS)]
        self._elsewhere_key = key(seed, "pairs: elsewhere")

        # Anchors are numbered through the documents that can have one; a pair needs a document of two sentences.
        sentences_X = np.diff(store.document_offsets)
        self._anchor_documents = np.flatnonzero(sentences_X >= (2 if config.next_sentence else 1))
        self._anchor_offsets = np.append(0, np.cumsum(sentences_X[self._anchor_documents]))
        self.examples_per_epoch = int(self._anchor_offsets[-1])
        if config.next_sentence:
            if store.num_documents < 2 or not self.examples_per_epoch:
                raise InputError(
                    f"no next sentences in this corpus: {store.num_documents} documents, {len(self._anchor_documents)} "
                    "with two sentences or more (a random one must come from another document): "
                    "give a corpus of several documents, or --data.no-next-sentence"
                )
            self._sort_by_tokens_left()
        elif not self.examples_per_epoch:
            raise InputError("the corpus is empty: give one with at least one document")
        self._continues = None if config.masking.segmenter is None else continuations(store, tokenizer.tokens)

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
        store, T = self.store, self._config.max_length
        document_end_X = store.sentence_offsets[store.document_offsets[1:]]
        tokens_left_Y = np.repeat(document_end_X, np.diff(store.document_offsets)) - store.sentence_offsets[:-1]
        self._tokens_left = np.minimum(tokens_left_Y, T).astype(np.uint16)  # 16 bits: NumPy sorts them by radix
        order = np.argsort(self._tokens_left, kind="stable")
        self._by_tokens_left = order.astype(np.min_scalar_type(store.num_sentences))
        self._with_fewer = np.append(0, np.cumsum(np.bincount(self._tokens_left, minlength=T + 1)))

    def rows(self, step: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows start to stop of the batch of a step, built without the others."""
        if not self._config.packing:
            return self.unpacked(step * self.batch_size + np.arange(start, stop))
        # The examples of a group of steps are packed together. Rows are dealt to these steps in turn, because the first
        # ones have the longest examples.
        group, part = divmod(step, self._group)
        N = self.packing.num_examples
        example_N = group * N + np.arange(N)
        segments, label_N = self._draw(example_N)
        packed_N = pack(self._sizes(segments.length), self._capacity, self._group * self.batch_size)
        row_N, part_N = np.divmod(packed_N, self._group)
        # The examples of these rows, sorted by row.
        own_E = np.flatnonzero((part_N == part) & (start <= row_N) & (row_N < stop))
        own_E = own_E[np.argsort(row_N[own_E], kind="stable")]
        label_E = None if label_N is None else label_N[own_E]
        examples = self.examples(example_N[own_E], Segments(*(x[own_E] for x in segments)), label_E)
        return join(examples, row_N[own_E] - start, self._num_pairs)

    @functools.cached_property
    def packing(self) -> Packing:
        """How many examples are packed together: the same on all hosts, and in all of a run."""
        rows = self._group * self.batch_size
        return choose_packing(lambda example_X: self._sizes(self._lengths(example_X)), self._capacity, rows)

    def describe(self) -> str:
        """One line: see `PairsConfig.describe`."""
        filled = self._lengths(np.arange(_DESCRIBED)).mean() / self._config.max_length
        anchors = f"{self.examples_per_epoch:,} examples"
        if not self._config.packing:
            return f"a step reads {self.batch_size:,} of {anchors}, one a row: {filled:.1%} of its positions are tokens"
        (N, dropped), rows = self.packing, self._group * self.batch_size
        steps = "a step reads" if self._group == 1 else f"{self._group} steps read"
        return (
            f"{steps} {N:,} of {anchors}, packed into {rows:,} rows: {filled * N * (1 - dropped) / rows:.1%} of the "
            f"positions are tokens ({filled:.1%} with one example a row), {dropped:.2%} of the examples are dropped"
        )

    def _lengths(self, example_X: np.ndarray) -> np.ndarray:
        """The number of tokens of the examples with these numbers."""
        return self._draw(example_X)[0].length

    def _sizes(self, length_X: np.ndarray) -> np.ndarray:
        """How much of a row's capacity examples of these lengths fill: by their tokens or their masks, what is more.

        The unit is the same for both: a row has room for T tokens of size M, and for M masks of size T.
        """
        T, M = self._config.max_length, self._config.max_predictions
        return np.maximum(length_X * M, self._masking.count(length_X) * T)

    def unpacked(self, example_B: np.ndarray) -> dict[str, np.ndarray]:
        """The examples with these numbers, one a row."""
        return self.examples(example_B, *self._draw(example_B))

    def _draw(self, example_B: np.ndarray) -> tuple[Segments, np.ndarray | None]:
        """The segments of each example, and its label if it is a pair."""
        if self._config.next_sentence:
            return self._pairs(example_B)
        return self._single_segments(example_B), None

    def examples(
        self, example_B: np.ndarray, segments: Segments, label_B: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """The batch of any segments of the store, as pairs if they have labels.

        example_B: their numbers, which determine the random draws of masks.
        """
        B, T = len(example_B), self._config.max_length
        first_begin_B, first_length_B, second_begin_B, _ = segments
        second_B, length_B = first_length_B + 2, segments.length
        next_sentence = {}
        if label_B is not None:
            next_sentence = {
                "next_sentence_positions": np.zeros((B, 1), np.int32),  # of [CLS]
                "next_sentence_labels": label_B[:, None].astype(np.int32),  # 0: B follows A, 1: B is random
                "next_sentence_weights": np.ones((B, 1), np.float32),
            }

        # A row is three spans: [CLS] A [SEP], B [SEP] (empty without B), and padding. Its tokens are gathered from the
        # store at column + shift of the span. With T = 13, A the tokens 104 to 106 and B the tokens 107 to 111:
        #
        #     column   0     1   2   3   4      5   6   7   8   9   10     11  12
        #     row      [CLS] A   A   A   [SEP]  B   B   B   B   B   [SEP]  pad pad
        #     shift    103   103 103 103 103    102 102 102 102 102 102    0   0      104 - column 1, 107 - column 5
        #     index    103   104 105 106 107    107 108 109 110 111 112    11  12
        #
        # What is gathered for special tokens and padding is overwritten; their indices may be outside of the store.
        lengths_B3 = np.array([second_B, length_B - second_B, T - length_B]).T
        shift_B3 = np.array([first_begin_B - 1, second_begin_B - second_B, np.zeros(B, np.int64)]).T
        index_BT = _spread(shift_B3, lengths_B3)
        index_BT += np.arange(T)
        np.clip(index_BT, 0, self.store.num_tokens - 1, out=index_BT)
        tokens_BT = self.store.gather(index_BT)
        segments_BT = _spread(np.tile(np.array([1, 1, 0], np.int32), (B, 1)), lengths_B3)
        candidates_BT = segments_BT.astype(bool)
        np.copyto(tokens_BT, self._pad_id, where=~candidates_BT)
        row_B = np.arange(B)
        for column, id in ((0, self._cls_id), (second_B - 1, self._sep_id), (length_B - 1, self._sep_id)):
            tokens_BT[row_B, column] = id
            candidates_BT[row_B, column] = False
        continues_BT = False if self._continues is None else self._continues[index_BT]
        masked = self._masking(tokens_BT, candidates_BT, length_B, example_B, continues_BT)
        # int32 [B, T]; the keys of masking are [B, M], the keys of the next sentence [B, K] with K = 1. `join` makes
        # packed rows of these.
        return {
            "tokens": tokens_BT,
            "token_types": _spread(np.tile(np.array([0, 1, 0], np.int32), (B, 1)), lengths_B3),  # 1: B and its [SEP]
            "positions": np.tile(np.arange(T, dtype=np.int32), (B, 1)),
            "segments": segments_BT,  # 1, or 0 in padding
            **masked,
            **next_sentence,
        }

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
        config, offsets, document_offsets = self._config, self.store.sentence_offsets, self.store.document_offsets
        short_B, budget_B, window_B = uniform(self._window_keys, example_B)
        longest = config.max_length - (3 if config.next_sentence else 2)
        budget_B = np.where(short_B < config.short_sequence_probability, 2 + _below(longest - 1, budget_B), longest)

        # The anchor: first its number among the anchors, then the sentence's number in the store.
        epoch_B, index_B = np.divmod(example_B, self.examples_per_epoch)
        anchor_B = permute(index_B, self.examples_per_epoch, bits(self._epoch_key, epoch_B))
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
        offsets, last = self.store.sentence_offsets, self.store.num_sentences
        for bit in reversed(range((self._config.max_length - 1).bit_length())):
            next_B = np.minimum(low_B + (1 << bit), last)
            low_B = np.where(offsets[next_B] <= token_B, next_B, low_B)
        return low_B

    def _single_segments(self, example_B: np.ndarray) -> Segments:
        """The text of each example."""
        offsets = self.store.sentence_offsets
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
        offsets = self.store.sentence_offsets
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
        offsets = self.store.sentence_offsets
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
        num_sentences = self.store.num_sentences
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


class PairEvaluation:
    """All of a text: first windows with masked tokens, then, for next sentences, a pair for each two adjacent ones.

    Each document is cut into windows without overlap, as long as a row has room for, so every token is in one of them.
    Of a window's tokens 15 % are predicted, drawn by a hash of the window's number, whatever `masking.probability` is,
    so that models trained at different rates can be compared; `max_predictions` does not limit them. With
    `next_sentence` a window is a pair, too: B begins with the sentence that begins nearest to the middle; without one
    inside the window there is no B.

    Every sentence but a document's first is once the true B, or in half of the cases, drawn by a hash of the pair's
    number, a random sentence takes its place. A is the text before it. A text of one document has no pairs, because
    a random B comes from another document.

    Rows, with budget 8, for documents with sentences of 4 3 5 2 and 3 tokens:

        windows   A [0, 4) B [4, 8)   A [8, 12) B [12, 14)   A [14, 17)
        pairs     B, or what replaces it, begins at tokens 4, 7 and 12
    """

    num_steps = 1

    def __init__(self, config: PairsConfig, store: Store, tokenizer: Tokenizer):
        pairs_X = np.diff(store.document_offsets) - 1
        if not config.next_sentence or store.num_documents < 2:
            pairs_X[:] = 0
        self._pair_offsets = np.append(0, np.cumsum(pairs_X))
        num_pairs = int(self._pair_offsets[-1])
        most = max(1, round(config.max_length * EVALUATED_PROBABILITY))
        config = replace(config.evaluated(), next_sentence=num_pairs > 0, max_predictions=most, packing=False)
        self._batches = PairBatches(config, store, tokenizer, batch_size=1, seed=0)
        self.layout = self._batches.layout

        self._budget = config.max_length - (3 if num_pairs else 2)
        self._document_begins = store.sentence_offsets[store.document_offsets]
        self._window_offsets = np.append(0, np.cumsum(-(-np.diff(self._document_begins) // self._budget)))
        self._num_windows = int(self._window_offsets[-1])
        self.num_rows = self._num_windows + num_pairs

    def rows(self, step: int, row_B: np.ndarray) -> dict[str, np.ndarray]:
        """The rows with these numbers, windows before pairs."""
        windows = self._windows(np.minimum(row_B, self._num_windows - 1))
        if self._num_windows == self.num_rows:
            return self._batches.examples(row_B, windows)
        pairs, label_B = self._pairs(np.maximum(row_B - self._num_windows, 0))
        is_window_B = row_B < self._num_windows
        segments = Segments(*(np.where(is_window_B, x, y) for x, y in zip(windows, pairs, strict=True)))
        batch = self._batches.examples(row_B, segments, np.where(is_window_B, 0, label_B))
        batch["masked_weights"] *= is_window_B[:, None]
        batch["next_sentence_weights"] *= ~is_window_B[:, None]
        return batch

    def _windows(self, window_B: np.ndarray) -> Segments:
        """The segments of windows with these numbers."""
        offsets = self._batches.store.sentence_offsets
        document_B = np.searchsorted(self._window_offsets, window_B, side="right") - 1
        begin_B = self._document_begins[document_B] + (window_B - self._window_offsets[document_B]) * self._budget
        end_B = np.minimum(begin_B + self._budget, self._document_begins[document_B + 1])
        split_B = end_B
        if self._num_windows < self.num_rows:
            middle_B = (begin_B + end_B) // 2
            sentence_B = np.searchsorted(offsets, middle_B)  # the first one that begins at the middle or after it
            before_B, after_B = offsets[np.maximum(sentence_B - 1, 0)], offsets[sentence_B]
            too_far = self._budget
            to_before_B = np.where(before_B > begin_B, middle_B - before_B, too_far)
            to_after_B = np.where((begin_B < after_B) & (after_B < end_B), after_B - middle_B, too_far)
            nearest_B = np.where(to_after_B < to_before_B, after_B, before_B)
            split_B = np.where(np.minimum(to_before_B, to_after_B) < too_far, nearest_B, end_B)
        return Segments(begin_B, split_B - begin_B, split_B, end_B - split_B)

    def _pairs(self, pair_B: np.ndarray) -> tuple[Segments, np.ndarray]:
        """The segments and labels of pairs with these numbers."""
        store = self._batches.store
        document_B = np.searchsorted(self._pair_offsets, pair_B, side="right") - 1
        begin_B, end_B = store.document_offsets[document_B], store.document_offsets[document_B + 1]
        next_B = begin_B + 1 + pair_B - self._pair_offsets[document_B]
        before_B = store.sentence_offsets[next_B] - store.sentence_offsets[begin_B]
        first_text_B = np.minimum(before_B, self._budget)
        return self._batches.pairs_at(pair_B, next_B, first_text_B, self._budget, begin_B, end_B)


def _spread(values_B3: np.ndarray, lengths_B3: np.ndarray) -> np.ndarray:
    """Repeats the value of each span over the span's length: [7 8 9] with lengths [2 1 0] gives 7 7 8. [B, T]."""
    return np.repeat(values_B3.ravel(), lengths_B3.ravel()).reshape(len(values_B3), -1)


def _below(n: np.ndarray | int, uniform: np.ndarray) -> np.ndarray:
    """A random integer in [0, n), from a random number in [0, 1)."""
    return (uniform * n).astype(np.int64)
