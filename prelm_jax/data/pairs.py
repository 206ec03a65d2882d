"""BERT's examples: sentence pairs with a next-sentence label, masked; a batch is a pure function of (seed, step).

BERT, appendix A.2 (Devlin et al., 2019); google-research/bert, create_pretraining_data.py.

Divergences from that reference:

- A pair is drawn on the fly around an anchor sentence, and each sentence is the anchor once an epoch; the reference
  cuts documents into chunks from their beginning, for each of ten copies. So every example is as full as its document
  allows.
- The label is a true coin. The reference calls a pair random whenever its chunk has one sentence only: 57 % of the
  labels on articles, 77 % on paragraphs.
- A random second segment never comes from the same document (the reference gives up after ten draws, and calls it
  random all the same), and its length gives nothing away: it is drawn among the sentences that have as many tokens
  left in their document as the true next one has.
- Whether a sequence is a short one is drawn for each example, not for each document.
- The first segment is cut at its front, so that it stays adjacent to the second, and the second at its end; the
  reference takes each token off the front or the end at random.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from prelm_jax.corpus.store import Store
from prelm_jax.data.masking import MaskingConfig
from prelm_jax.data.randomness import bits, key, permute, uniform
from prelm_jax.data.segmentation import continuations
from prelm_jax.data.show import mark
from prelm_jax.errors import InputError

_SPECIAL_TOKENS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
_DRAWS = 10  # of a random second segment, as in the reference
_FEWEST_CHOICES = 64  # among which a random second segment is drawn
_BINS = 16  # of a segment's length
_VOTERS = 10_000  # examples that vote on the lengths


@dataclass(frozen=True)
class PairsConfig:
    """Sentence pairs `[CLS] A [SEP] B [SEP]`, or single segments `[CLS] A [SEP]` without `next_sentence`.

    `max_length` (T) and `max_predictions` (M) are the widths of a batch in tokens. With `short_sequence_probability` an
    example's tokens are limited to a random number, so that the model also sees short inputs.
    """

    max_length: int = 128
    max_predictions: int = 20
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    short_sequence_probability: float = 0.0
    next_sentence: bool = True

    def __post_init__(self):
        if not 8 <= self.max_length < 2**16:
            raise InputError(f"data.max_length is {self.max_length}: give a number of tokens from 8 to 65535")
        if not 1 <= self.max_predictions <= self.max_length:
            raise InputError(
                f"data.max_predictions is {self.max_predictions}: give a number from 1 to max_length, {self.max_length}"
            )
        if not 0 <= self.short_sequence_probability <= 1:
            raise InputError(
                f"data.short_sequence_probability is {self.short_sequence_probability}: give a number from 0 to 1"
            )

    def build(self, store: Store, tokenizer, batch_size: int, seed: int) -> "PairBatches":
        """The batches of a run; `tokenizer` has `vocab_size`, `special_ids` and `tokens` (the string of each id)."""
        return PairBatches(self, store, tokenizer, batch_size, seed)


class PairBatches:
    """`batches[step]`: the batch of a step, a dict of arrays; pure in (seed, step), without end (epochs reshuffle).

    Keys, int32 unless said: `tokens`, `token_types` (1 for the second segment and its [SEP]), `positions`, `segments`
    (1 for real tokens, 0 for padding) [B, T]; `masked_positions`, `masked_targets`, `masked_weights` (float32) [B,
    M]; with next sentences `next_sentence_positions` (0), `next_sentence_labels` (0 next, 1 random) and
    `next_sentence_weights` (float32) [B, 1].
    """

    def __init__(self, config: PairsConfig, store: Store, tokenizer, batch_size: int, seed: int):
        if missing := [token for token in _SPECIAL_TOKENS if token not in tokenizer.special_ids]:
            raise InputError(f"the vocabulary has no {' '.join(missing)}: sentence pairs need a WordPiece vocabulary")
        self.batch_size = batch_size
        self._config = config
        self._store = store
        self._pad_id, self._cls_id, self._sep_id, _ = (tokenizer.special_ids[token] for token in _SPECIAL_TOKENS)
        self._vocab_size = tokenizer.vocab_size
        self._masking = config.masking.build(tokenizer, config.max_predictions, seed)
        self._epoch_key = key(seed, "pairs: epoch")
        self._window_keys = np.stack([key(seed, f"pairs: {name}") for name in ("short", "budget", "window")])[:, None]
        self._pair_keys = np.stack([key(seed, f"pairs: {name}") for name in ("split", "label")])[:, None]
        self._random_keys = [key(seed, f"pairs: random {draw}") for draw in range(_DRAWS)]
        self._elsewhere_key = key(seed, "pairs: elsewhere")

        num_sentences_D = np.diff(store.document_offsets)
        self._anchor_documents = np.flatnonzero(num_sentences_D >= (2 if config.next_sentence else 1))
        self._anchor_offsets = np.append(0, np.cumsum(num_sentences_D[self._anchor_documents]))
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

    @property
    def layout(self) -> dict[str, str]:
        """Which keys hold a host's rows ("rows") and which the same on every host ("replicated"): here all are rows."""
        keys = ["tokens", "token_types", "positions", "segments"]
        keys += ["masked_positions", "masked_targets", "masked_weights"]
        if self._config.next_sentence:
            keys += ["next_sentence_positions", "next_sentence_labels", "next_sentence_weights"]
        return dict.fromkeys(keys, "rows")

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        return self.rows(step, 0, self.batch_size)

    def rows(self, step: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows start to stop of the batch of a step, built without the others."""
        return self._examples(step * self.batch_size + np.arange(start, stop))

    def baselines(self, evaluation: Iterable[dict[str, np.ndarray]]) -> dict[str, dict[str, float]]:
        """What models that know next to nothing reach on the evaluation batches, after training on these batches.

        `masked_lm_loss`: cross-entropy (nats) of the masked tokens under the training frequencies (plus one each);
        `masked_lm_accuracy`: always the most frequent token; `next_sentence_accuracy`: always the label that is more
        frequent in the evaluation, and a guess from the lengths of the two segments.
        """
        batches = list(evaluation)
        batch = {name: np.concatenate([batch[name] for batch in batches]) for name in self.layout}
        targets = batch["masked_targets"][batch["masked_weights"] > 0]
        counts_V = self._store.token_counts(self._vocab_size) + 1
        result = {
            "masked_lm_loss": {"unigram": float(np.log(counts_V.sum()) - np.log(counts_V)[targets].mean())},
            "masked_lm_accuracy": {"most frequent token": float(np.mean(targets == counts_V.argmax()))},
        }
        if self._config.next_sentence:
            random = float(batch["next_sentence_labels"].mean())
            result["next_sentence_accuracy"] = {
                "majority": max(random, 1 - random),
                "lengths only": length_only_accuracy(self._examples(np.arange(_VOTERS)), batch),
            }
        return result

    def in_other_units(self, name: str, value: float) -> dict[str, float]:
        """The perplexity of masked tokens."""
        return {"masked_lm_perplexity": math.exp(value)} if name == "masked_lm_loss" else {}

    def show(self, batch: dict[str, np.ndarray], tokenizer) -> Iterator[str]:
        """Each row in lines: how much is filled and masked, the label; then A and B, with masked places marked."""
        T = batch["tokens"].shape[1]
        for row, tokens in enumerate(batch["tokens"]):
            length, second = batch["segments"][row].sum(), batch["token_types"][row].sum()
            used = batch["masked_weights"][row] > 0
            positions, targets = batch["masked_positions"][row, used], batch["masked_targets"][row, used]
            texts = [tokenizer.tokens[id] for id in tokens[:length]]
            for position, target in zip(positions, targets, strict=True):
                texts[position] = mark(texts[position], tokenizer.tokens[target])
            lines = [
                f"row {row}: {length} of {T} places, {len(targets)} to predict",
                f"  A {' '.join(texts[: length - second])}",
            ]
            if self._config.next_sentence:
                lines[0] += ", B is random" if batch["next_sentence_labels"][row, 0] else ", B follows A"
                lines.append(f"  B {' '.join(texts[length - second :])}")
            yield "\n".join(lines)

    def _sort_by_tokens_left(self):
        """Sorts the sentences by the number of tokens from their beginning to their document's end, counted up to T.

        `_by_tokens_left[_with_fewer[n] : _with_fewer[n + 1]]` are those with exactly n tokens left.
        """
        store, T = self._store, self._config.max_length
        document_ends_D = store.sentence_offsets[store.document_offsets[1:]]
        tokens_left = np.repeat(document_ends_D, np.diff(store.document_offsets)) - store.sentence_offsets[:-1]
        self._tokens_left = np.minimum(tokens_left, T).astype(np.uint16)  # 16 bits: NumPy sorts them by radix
        order = np.argsort(self._tokens_left, kind="stable")
        self._by_tokens_left = order.astype(np.min_scalar_type(store.num_sentences))
        self._with_fewer = np.append(0, np.cumsum(np.bincount(self._tokens_left, minlength=T + 1)))

    def _examples(self, example_B: np.ndarray) -> dict[str, np.ndarray]:
        """The batch of any examples."""
        B, T = len(example_B), self._config.max_length
        if self._config.next_sentence:
            first_start_B, first_length_B, second_start_B, second_length_B, label_B = self._pairs(example_B)
            length_B = first_length_B + second_length_B + 3
        else:
            first_start_B, first_length_B = self._single_segments(example_B)
            second_start_B = first_start_B
            length_B = first_length_B + 2

        # A row is three runs: [CLS] A [SEP], B [SEP], padding. The second is empty where there is one segment.
        second_B = first_length_B + 2
        runs_B3 = np.array([second_B, length_B - second_B, T - length_B]).T
        shift_B3 = np.array([first_start_B - 1, second_start_B - second_B, np.zeros(B, np.int64)]).T
        position_BT = _spread(shift_B3, runs_B3)
        position_BT += np.arange(T)
        # Special and padding positions may lie outside of the store; they are overwritten.
        np.clip(position_BT, 0, self._store.num_tokens - 1, out=position_BT)
        tokens_BT = self._store.gather(position_BT)
        segments_BT = _spread(np.tile(np.array([1, 1, 0], np.int32), (B, 1)), runs_B3)
        candidates_BT = segments_BT.astype(bool)
        np.copyto(tokens_BT, self._pad_id, where=~candidates_BT)
        row_B = np.arange(B)
        for column, id in ((0, self._cls_id), (second_B - 1, self._sep_id), (length_B - 1, self._sep_id)):
            tokens_BT[row_B, column] = id
            candidates_BT[row_B, column] = False
        batch = {
            "tokens": tokens_BT,
            "token_types": _spread(np.tile(np.array([0, 1, 0], np.int32), (B, 1)), runs_B3),
            "positions": np.tile(np.arange(T, dtype=np.int32), (B, 1)),
            "segments": segments_BT,
        }
        continues_BT = False if self._continues is None else self._continues[position_BT]
        batch |= self._masking(tokens_BT, candidates_BT, length_B, example_B, continues_BT)
        if self._config.next_sentence:
            batch["next_sentence_positions"] = np.zeros((B, 1), np.int32)
            batch["next_sentence_labels"] = label_B[:, None].astype(np.int32)
            batch["next_sentence_weights"] = np.ones((B, 1), np.float32)
        return batch

    def _windows(self, example_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """How much text an example may have (tokens), the sentence to begin with, and its document (begin, end)."""
        config, offsets, document_offsets = self._config, self._store.sentence_offsets, self._store.document_offsets
        short_B, budget_B, window_B = uniform(self._window_keys, example_B)
        longest = config.max_length - (3 if config.next_sentence else 2)
        budget_B = np.where(short_B < config.short_sequence_probability, 2 + _below(longest - 1, budget_B), longest)

        epoch_B, index_B = np.divmod(example_B, self.examples_per_epoch)
        anchor_B = permute(index_B, self.examples_per_epoch, bits(self._epoch_key, epoch_B))
        i_B = np.searchsorted(self._anchor_offsets, anchor_B, side="right") - 1
        document_B = self._anchor_documents[i_B]
        begin_B, end_B = document_offsets[document_B], document_offsets[document_B + 1]
        anchor_B += begin_B - self._anchor_offsets[i_B]

        # A window of the budget anywhere around the anchor, but not past the document's end: it is full if it can be.
        start_B = offsets[anchor_B] - _below(budget_B, window_B)
        start_B = np.maximum(np.minimum(start_B, offsets[end_B] - budget_B), offsets[begin_B])
        sentence_B = self._sentences_at(start_B, np.maximum(anchor_B - budget_B, begin_B))
        return budget_B, sentence_B, begin_B, end_B

    def _sentences_at(self, token_B: np.ndarray, low_B: np.ndarray) -> np.ndarray:
        """The sentence of each token of the store, where it is among the T that follow low_B.

        Bisection like `np.searchsorted`, but near low_B instead of through all of a large array: there it is 4 times
        as fast.
        """
        offsets, last = self._store.sentence_offsets, self._store.num_sentences
        for bit in reversed(range((self._config.max_length - 1).bit_length())):
            next_B = np.minimum(low_B + (1 << bit), last)
            low_B = np.where(offsets[next_B] <= token_B, next_B, low_B)
        return low_B

    def _single_segments(self, example_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First token and length of each example's text."""
        offsets = self._store.sentence_offsets
        budget_B, sentence_B, _, end_B = self._windows(example_B)
        return offsets[sentence_B], np.minimum(offsets[end_B] - offsets[sentence_B], budget_B)

    def _pairs(self, example_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """First token and length of each example's first segment and of its second, and its label."""
        offsets = self._store.sentence_offsets
        budget_B, sentence_B, begin_B, end_B = self._windows(example_B)
        split_B, label_B = uniform(self._pair_keys, example_B)
        label_B = _below(2, label_B)

        # Of the sentences up to the budget the first ones are the first segment; the second begins at next_B, at the
        # latest with the last of them (or, after one that fills the budget alone, with the one that follows).
        sentence_B = np.minimum(sentence_B, end_B - 2)
        start_B = offsets[sentence_B]
        stop_B = np.minimum(self._sentences_at(start_B + budget_B - 1, sentence_B) + 1, end_B)
        next_B = sentence_B + 1 + _below(stop_B - sentence_B - 1, split_B)
        next_start_B = offsets[next_B]
        first_text_B, next_text_B = next_start_B - start_B, offsets[end_B] - next_start_B
        room_B = np.maximum(budget_B - first_text_B, budget_B // 2)
        first_length_B = np.minimum(first_text_B, budget_B - np.minimum(next_text_B, room_B))

        random_B = self._random_sentences(example_B, next_text_B, room_B, begin_B, end_B)
        second_start_B = np.where(label_B, offsets[random_B], next_start_B)
        second_text_B = np.where(label_B, self._tokens_left[random_B], next_text_B)
        second_length_B = np.minimum(second_text_B, budget_B - first_length_B)
        return next_start_B - first_length_B, first_length_B, second_start_B, second_length_B, label_B

    def _random_sentences(
        self, example_B: np.ndarray, next_text_B: np.ndarray, room_B: np.ndarray, begin_B: np.ndarray, end_B: np.ndarray
    ) -> np.ndarray:
        """A sentence outside of the document that fills as much of the room as the next sentence and its successors."""
        num_sentences = self._store.num_sentences
        # Where the text from the next sentence on fills the room, all that fill it too; else all with as much left.
        text_B = np.minimum(next_text_B, room_B)
        low_B = self._with_fewer[text_B]
        high_B = np.where(next_text_B < room_B, self._with_fewer[text_B + 1], num_sentences)
        # Where these are few, their neighbours in the order too.
        lacking_B = np.maximum(_FEWEST_CHOICES - (high_B - low_B), 0)
        low_B = np.maximum(np.minimum(low_B - lacking_B // 2, num_sentences - _FEWEST_CHOICES), 0)
        high_B = np.minimum(np.maximum(high_B, low_B + _FEWEST_CHOICES), num_sentences)

        random_B = np.empty_like(begin_B)
        again = np.arange(len(example_B))
        for draw_key in self._random_keys:
            choice = _below(high_B[again] - low_B[again], uniform(draw_key, example_B[again]))
            random_B[again] = self._by_tokens_left[low_B[again] + choice]
            again = again[(begin_B[again] <= random_B[again]) & (random_B[again] < end_B[again])]
            if not again.size:
                return random_B
        # Perhaps all choices are in the document itself. Any sentence before or after it:
        begin, size = begin_B[again], end_B[again] - begin_B[again]
        elsewhere = _below(num_sentences - size, uniform(self._elsewhere_key, example_B[again]))
        random_B[again] = elsewhere + size * (elsewhere >= begin)
        return random_B


def _spread(values_BR: np.ndarray, runs_BR: np.ndarray) -> np.ndarray:
    """Each value as often as its run is long: [B, T] for runs that add up to T in each row."""
    return np.repeat(values_BR.ravel(), runs_BR.ravel()).reshape(len(values_BR), -1)


def _below(n: np.ndarray | int, uniform: np.ndarray) -> np.ndarray:
    """The integer in [0, n) that a uniform draw stands for."""
    return (uniform * n).astype(np.int64)


def length_only_accuracy(training: dict[str, np.ndarray], evaluation: dict[str, np.ndarray]) -> float:
    """How often the lengths of the two segments alone tell a next sentence from a random one.

    The examples of one batch vote for each pair of (binned) lengths, those of the other test the votes. The accuracy of
    next-sentence prediction is to be compared with it: 0.5 where the lengths say nothing.
    """
    votes = np.bincount(_length_bins(training), 1 - 2 * training["next_sentence_labels"][:, 0], minlength=_BINS**2)
    guesses = votes[_length_bins(evaluation)] < 0
    return float(np.mean(guesses == evaluation["next_sentence_labels"][:, 0]))


def _length_bins(batch: dict[str, np.ndarray]) -> np.ndarray:
    T = batch["tokens"].shape[1]
    total_B, second_B = batch["segments"].sum(axis=1), batch["token_types"].sum(axis=1)
    return (total_B - second_B) * _BINS // (T + 1) * _BINS + second_B * _BINS // (T + 1)
