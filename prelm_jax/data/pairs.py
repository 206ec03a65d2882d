"""BERT's examples: sentence pairs with a next-sentence label, masked, one a row or packed.

`sampling` draws the text of a pair, `masking` the tokens to predict; each lists how it differs from the reference,
google-research/bert. `packing` finds the row of each example.
"""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated

import numpy as np

from prelm_jax.bounds import Bounds, Fraction, Length, OutOfBounds, Positive
from prelm_jax.corpus.store import Store
from prelm_jax.data.baselines import Baselines, pair_baselines, perplexity
from prelm_jax.data.batches import StoreBatches, special_id
from prelm_jax.data.masking import EVALUATED_PROBABILITY, MaskingConfig
from prelm_jax.data.packing import Packing, choose_packing, join, pack
from prelm_jax.data.sampling import Segments, SegmentSampler
from prelm_jax.data.segmentation import continuations
from prelm_jax.data.show import show_pairs
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.training.contract import HostBatch

_DESCRIBED = 4096  # examples whose lengths `describe` averages
_PACKED_TOGETHER = 512  # rows, at least: the more rows, the less the total length of their examples varies


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
        self._capacity = config.max_length * config.max_predictions  # of a packed row, see `_sizes`
        self._num_pairs = min(
            config.max_length // 5, config.max_predictions
        )  # each has a mask, and five tokens or more
        self._group = -(-_PACKED_TOGETHER // batch_size)  # steps whose examples are packed together
        self.sampler = SegmentSampler(
            store, config.max_length, config.short_sequence_probability, config.next_sentence, seed
        )
        self.examples_per_epoch = self.sampler.num_anchors
        self._continues = None if config.masking.segmenter is None else continuations(store, tokenizer.tokens)

    def rows(self, step: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows start to stop of the batch of a step, built without the others."""
        if not self._config.packing:
            return self.unpacked(step * self.batch_size + np.arange(start, stop))
        # The examples of a group of steps are packed together. Each step takes every `_group`-th row, because the first
        # rows have the longest examples.
        group, part = divmod(step, self._group)
        N = self.packing.num_examples
        example_N = group * N + np.arange(N)
        segments, label_N = self.sampler.draw(example_N)
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
        return self.sampler.draw(example_X)[0].length

    def _sizes(self, length_X: np.ndarray) -> np.ndarray:
        """The part of a packed row's capacity, T · M, that examples of these lengths fill.

        A row has room for T tokens, each of size M, and for M masks, each of size T; the larger sum counts.
        """
        T, M = self._config.max_length, self._config.max_predictions
        return np.maximum(length_X * M, self._masking.count(length_X) * T)

    def unpacked(self, example_B: np.ndarray) -> dict[str, np.ndarray]:
        """The examples with these numbers, one a row."""
        return self.examples(example_B, *self.sampler.draw(example_B))

    def examples(
        self, example_B: np.ndarray, segments: Segments, label_B: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """The batch of any segments of the store, as pairs if they have labels.

        example_B: their numbers, which determine the random draws of masks.
        """
        B, T = len(example_B), self._config.max_length
        second_B, length_B = segments.first_length + 2, segments.length
        # A row is three spans: [CLS] A [SEP], B [SEP] (empty without B), and padding.
        lengths_B3 = np.array([second_B, length_B - second_B, T - length_B]).T
        index_BT = self._indices(segments, lengths_B3)
        tokens_BT = self.store.gather(index_BT)
        segments_BT = _spread(np.array([1, 1, 0], np.int32), lengths_B3)
        candidates_BT = segments_BT.astype(bool)
        np.copyto(tokens_BT, self._pad_id, where=~candidates_BT)
        row_B = np.arange(B)
        for column, id in ((0, self._cls_id), (second_B - 1, self._sep_id), (length_B - 1, self._sep_id)):
            tokens_BT[row_B, column] = id
            candidates_BT[row_B, column] = False
        continues_BT = False if self._continues is None else self._continues[index_BT]
        masked = self._masking(tokens_BT, candidates_BT, length_B, example_B, continues_BT)
        next_sentence = {}
        if label_B is not None:
            next_sentence = {
                "next_sentence_positions": np.zeros((B, 1), np.int32),  # of [CLS]
                "next_sentence_labels": label_B[:, None].astype(np.int32),  # 0: B follows A, 1: B is random
                "next_sentence_weights": np.ones((B, 1), np.float32),
            }
        # int32 [B, T]; the keys of masking are [B, M], the keys of the next sentence [B, K] with K = 1. `join` makes
        # packed rows of these.
        return {
            "tokens": tokens_BT,
            "token_types": _spread(np.array([0, 1, 0], np.int32), lengths_B3),  # 1: B and its [SEP]
            "positions": np.tile(np.arange(T, dtype=np.int32), (B, 1)),
            "segments": segments_BT,  # 1, or 0 in padding
            **masked,
            **next_sentence,
        }

    def _indices(self, segments: Segments, lengths_B3: np.ndarray) -> np.ndarray:
        """The index in the store of each token of the rows, [B, T]; of special tokens and padding any index.

        It is column + shift of the span. With T = 13, A the tokens 104 to 106 and B the tokens 107 to 111:

            column   0     1   2   3   4      5   6   7   8   9   10     11  12
            row      [CLS] A   A   A   [SEP]  B   B   B   B   B   [SEP]  pad pad
            shift    103   103 103 103 103    102 102 102 102 102 102    0   0      104 - column 1, 107 - column 5
            index    103   104 105 106 107    107 108 109 110 111 112    11  12
        """
        (B, _), T = lengths_B3.shape, self._config.max_length
        shifts = (segments.first_begin - 1, segments.second_begin - lengths_B3[:, 0], np.zeros(B, np.int64))
        index_BT = _spread(np.array(shifts).T, lengths_B3)
        index_BT += np.arange(T)
        return np.clip(index_BT, 0, self.store.num_tokens - 1, out=index_BT)


class PairEvaluation:
    """All of a text: windows with masked tokens, then, with `next_sentence`, a pair for each two adjacent sentences.

    Windows cut each document into full rows without overlap, so every token is in one of them. 15 % of a window's
    tokens are predicted, drawn by a hash of the window's number, whatever `masking.probability` is, so that models
    trained at different rates can be compared; `max_predictions` does not limit them. With `next_sentence` a window has
    a B as well, from the beginning of a sentence nearest to its middle on, if there is one inside the window.

    In the pairs, every sentence but a document's first begins B once; in half of them, drawn by a hash of the pair's
    number, a random sentence replaces it. A is the text before it. A text of one document has no pairs, because a
    random B comes from another document.

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

        self._budget = self._batches.sampler.budget
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
        return self._batches.sampler.pairs_at(pair_B, next_B, first_text_B, self._budget, begin_B, end_B)


def _spread(values: np.ndarray, lengths_B3: np.ndarray) -> np.ndarray:
    """[B, T]: repeats the value ([3] or [B, 3]) of each span over the span; [7 8 9], lengths [2 1 0] give 7 7 8."""
    values_B3 = np.broadcast_to(values, lengths_B3.shape)
    return np.repeat(values_B3.ravel(), lengths_B3.ravel()).reshape(len(lengths_B3), -1)
