"""ELMo's examples: endless rows of sentences, read in both directions.

ELMo, section 3.1 (Peters et al., 2018); bilm-tf, bilm/data.py.

The sentences of an epoch are laid end to end, in random order, as a line of positions: n + 1 for a sentence of n words.
At them the forward direction reads `<S> w1 … wn` to predict `w1 … wn </S>`, and the backward direction reads
`</S> wn … w1` to predict `wn … w1 <S>`. So both are in the same sentence, one as far after its beginning as the other
is before its end.

The line is cut into as many equal slices as there are rows. A row reads its slice of one epoch, then its slice of the
next, without end, T positions a step; the next step resumes where the last one stopped. A slice that is one position
shorter than others is followed by one position without weight, so that all rows begin an epoch together. Two rows, a
line of 9 positions and T = 2:

    line            0 1 2 3 4 5 6 7 8      slices [0, 4) and [4, 9)
    steps, row 0    0 1 | 2 3 | 4 0 | …    4 is after its slice: weight 0; then the next epoch's line begins
    steps, row 1    4 5 | 6 7 | 8 4 | …

Divergences from that reference:

- Both directions read the same sentences, so that a word's characters are encoded once for both. Only of a sentence
  that is cut by the end of a step do they read different parts: one its beginning, the other its end. In the reference
  each direction has its own random order (`independent_directions`).
- Each row has its own slice; in the reference rows take sentences from one queue, whenever they need one. The sentences
  at the ends of slices, one for each row, are split between two rows.
- Sentences are in random order in the whole corpus, not only within the shard that was loaded.
- The negatives are the same for all devices; in the reference each device draws its own.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from prelm_jax.bounds import Length, NotNegative
from prelm_jax.corpus.store import Store
from prelm_jax.data.baselines import Baselines, perplexity, stream_baselines
from prelm_jax.data.batches import StoreBatches, special_id
from prelm_jax.data.randomness import bits, key, log_uniform, permute
from prelm_jax.data.show import show_streams
from prelm_jax.data.spans import Spans, cut
from prelm_jax.errors import InputError
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.training.contract import HostBatch, Layout

DIRECTIONS = ("forward", "backward")
FEWEST_WORDS = 128  # distinct words that a batch has room for: a multiple of the devices that share them
FEWEST_CHARACTERS = 24  # characters that a distinct word has room for; in most batches they are enough
PERMUTED_AT_ONCE = 1 << 20  # sentences
MOST_ROWS, FEWEST_WORDS_IN_ROW = 32, 400  # of an evaluation: more rows are faster, but more words follow a zero state
EPOCHS_KEPT = 2  # a step may read the end of one epoch and the beginning of the next


@dataclasses.dataclass(frozen=True)
class StreamsConfig:
    """Continuous streams of sentences for a bidirectional language model of words."""

    max_length: Length = 20  # Words per row (T): backpropagation through time is truncated there.
    num_negatives: NotNegative = 8192  # Words drawn for the sampled softmax of each direction; 0 for the full softmax.
    # Give each direction its own random order of sentences, as the original does: more distinct words, slower steps.
    independent_directions: bool = False

    def build(self, store: Store, tokenizer: Tokenizer, batch_size: int, seed: int) -> "StreamBatches":
        """The batches of a run. Raises InputError for an empty store, or one whose tokens are not words."""
        return StreamBatches(self, store, tokenizer, batch_size, seed)

    def evaluated(self) -> "StreamsConfig":
        """The same."""
        return self

    def evaluation(self, store: Store, tokenizer: Tokenizer) -> "StreamEvaluation":
        """All of a text as a few streams. Raises InputError as `build`."""
        return StreamEvaluation(self, store, tokenizer)

    def baselines(self, batches: "StreamBatches", evaluation: Iterable[HostBatch]) -> Baselines:
        """See `stream_baselines`."""
        return stream_baselines(batches.targets(), batches.vocab_size, evaluation)

    def derived_metrics(self, name: str, value: float, store: Store) -> dict[str, float]:
        """Perplexity of each direction, and of both: their geometric mean, as in bilm-tf's `run_test.py`."""
        names = {"loss": "perplexity"} | {f"{direction}_loss": f"{direction}_perplexity" for direction in DIRECTIONS}
        return perplexity(names, name, value)

    def describe(self, batches: "StreamBatches") -> str:
        """The number of words of a step and of an epoch."""
        words = batches.batch_size * self.max_length
        return f"a step reads {words:,} of {batches.store.num_tokens:,} words, in {batches.batch_size:,} streams"

    def show(self, batch: HostBatch, tokenizer: Tokenizer) -> Iterator[str]:
        """See `show_streams`."""
        return show_streams(batch, tokenizer)


class StreamBatches(StoreBatches):
    """Batches of streams.

    Keys, int32 unless said: `characters` [U, C], the character ids of the distinct words of the global batch; U and C
    are padded to one of a few sizes. For each direction d, forward and backward: `d_words` [B, T], the inputs, as row
    numbers of `characters`; `d_targets` [B, T], ids of the vocabulary; `d_weights` (float32) [B, T], 1, or 0 for the
    position after a slice; `d_negatives` [num_negatives], distinct ids in the order they were drawn; and `d_tries` [],
    the number of draws until they were complete.
    """

    def __init__(self, config: StreamsConfig, store: Store, tokenizer: Tokenizer, batch_size: int, seed: int):
        if store.spellings is None:
            raise InputError("the tokens of this store are not words: streams need a WordVocabularyConfig")
        if (n := config.num_negatives) >= (words := tokenizer.vocab_size):
            raise InputError(f"data.num_negatives is {n}, but there are {words} words: give fewer, or 0 (full softmax)")
        super().__init__(store, tokenizer.vocab_size, batch_size)
        self._config = config
        self._spellings = store.spellings
        begin, end = (special_id(tokenizer, role, "word streams") for role in ("bos", "eos"))
        self._boundaries = {"forward": (begin, end), "backward": (end, begin)}
        self._unknown_id = np.int32(special_id(tokenizer, "unknown", "word streams"))
        self._epoch_keys = {d: key(seed, f"streams: epoch {d}") for d in DIRECTIONS}
        self._negative_keys = {d: key(seed, f"streams: negatives {d}") for d in DIRECTIONS}
        if n:
            _, tries = log_uniform(self._negative_keys["forward"], n, self.vocab_size, n)
            self._draws = int(tries * 1.03) + 1  # enough for most steps
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

        positions = store.num_tokens + store.num_sentences
        if not positions:
            raise InputError("the corpus is empty: give one with at least one word")
        bounds = np.arange(batch_size + 1) * positions // batch_size
        self._slice_begins, self._slice_lengths = bounds[:-1], np.diff(bounds)
        self.slice_length = int(self._slice_lengths[-1])  # of the longest slice; others may be one shorter

    @functools.cached_property
    def layout(self) -> Mapping[str, Layout]:
        """How each key is spread over hosts and devices."""
        layout: dict[str, Layout] = {"characters": "shared"}
        for d in DIRECTIONS:
            layout |= {f"{d}_words": "rows", f"{d}_targets": "rows", f"{d}_weights": "rows"}
            if self._config.num_negatives:
                layout |= {f"{d}_negatives": "replicated", f"{d}_tries": "replicated"}
        return layout

    def rows(self, step: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows start to stop of the batch of a step, and all of the keys that do not hold rows."""
        T, n = self._config.max_length, self._config.num_negatives
        # The distinct words of all rows and both directions are numbered together.
        inputs_2BT, targets_2BT, parts = [], [], []
        for direction in DIRECTIONS:
            if not parts or self._config.independent_directions:
                parts = self._parts(step, direction)
            inputs, targets = zip(*(self._read(direction, spans) for spans in parts), strict=True)
            inputs_2BT.append(self._side_by_side(inputs))
            targets_2BT.append(self._side_by_side(targets))
        words_U, number_2BT = _distinct(np.stack(inputs_2BT))
        padding = np.full(bucket(len(words_U)) - len(words_U), self._unknown_id)
        batch = {"characters": self._spellings.characters(np.append(words_U, padding), FEWEST_CHARACTERS)}

        weights_BT = (step * T + np.arange(T)) % self.slice_length < self._slice_lengths[start:stop, None]
        for direction, number_BT, targets_BT in zip(DIRECTIONS, number_2BT, targets_2BT, strict=True):
            batch[f"{direction}_words"] = number_BT[start:stop]
            batch[f"{direction}_targets"] = self._known(targets_BT[start:stop])
            batch[f"{direction}_weights"] = weights_BT.astype(np.float32)
            if n:
                step_key = bits(self._negative_keys[direction], step)
                drawn = log_uniform(step_key, n, self.vocab_size, self._draws)
                batch[f"{direction}_negatives"], batch[f"{direction}_tries"] = drawn
        return batch

    def targets(self) -> dict[str, "StreamTargets"]:
        """The targets of all sentences, for each direction, to fit baselines on."""
        return {d: StreamTargets(self, d) for d in DIRECTIONS}

    def _parts(self, step: int, direction: str) -> list[Spans]:
        """The spans of all rows of a step: of one epoch, or of the end of one and the beginning of the next.

        Their items are the numbers of sentences in the store.
        """
        position, stop = step * self._config.max_length, (step + 1) * self._config.max_length
        parts = []
        while position < stop:
            epoch, offset = divmod(position, self.slice_length)
            count = min(self.slice_length - offset, stop - position)
            sentences, offsets = self._epoch(epoch, direction)
            begin_B = self._slice_begins + offset
            spans = cut(offsets, begin_B, begin_B + count)
            parts.append(spans._replace(item=sentences[spans.item]))
            position += count
        return parts

    def _epoch(self, epoch: int, direction: str) -> tuple[np.ndarray, np.ndarray]:
        """The sentences of an epoch in their order; where each begins on the line, and the length of the line."""
        epoch_key = bits(self._epoch_keys[direction], epoch)
        name = int(epoch_key)
        if name not in self._epochs:
            n = self.store.num_sentences
            sentences = np.empty(n, np.min_scalar_type(n))
            for start in range(0, n, PERMUTED_AT_ONCE):
                index = np.arange(start, min(start + PERMUTED_AT_ONCE, n))
                sentences[start : start + len(index)] = permute(index, n, epoch_key)
            offsets = np.append(0, np.cumsum(np.diff(self.store.sentence_offsets)[sentences] + 1))
            if len(self._epochs) >= EPOCHS_KEPT * len(DIRECTIONS):
                del self._epochs[next(iter(self._epochs))]
            self._epochs[name] = sentences, offsets
        return self._epochs[name]

    def _read(self, direction: str, spans: Spans) -> tuple[np.ndarray, np.ndarray]:
        """The ids of the words that a direction reads in spans, end to end, and of the words that follow them.

        A sentence of the words a b c, tokens 100 to 102 of the store, read whole and from position 1 to 2:

            position            0     1    2    3         1    2
            forward inputs      <S>   a    b    c         a    b
            forward targets     a     b    c    </S>      b    c      token 100 + position
            backward inputs     </S>  c    b    a         c    b
            backward targets    c     b    a    <S>       b    a      token 102 - position

        An input is the token one step before its target. The tokens beyond the ends of the sentence are replaced by
        the boundaries.
        """
        before, after = self._boundaries[direction]
        ahead = 1 if direction == "forward" else -1
        stop_R = np.cumsum(spans.length)
        start_R = stop_R - spans.length
        bounds = self.store.sentence_offsets
        begin_R, end_R = bounds[spans.item], bounds[spans.item + 1]
        target_R = begin_R + spans.start if direction == "forward" else end_R - 1 - spans.start
        target = np.repeat(target_R - ahead * start_R, spans.length) + ahead * np.arange(stop_R[-1])
        last = self.store.num_tokens - 1
        inputs = self.store.gather(np.clip(target - ahead, 0, last))
        inputs[start_R[spans.start == 0]] = before
        targets = self.store.gather(np.clip(target, 0, last))
        targets[stop_R[spans.start + spans.length > end_R - begin_R] - 1] = after
        return inputs, targets

    def _side_by_side(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """[B, T] from the words of each of `_parts`, whose rows are end to end."""
        return np.concatenate([part.reshape(self.batch_size, -1) for part in parts], axis=1)

    def _known(self, words: np.ndarray) -> np.ndarray:
        """Words outside of the vocabulary become <UNK>."""
        return np.where(words < self.vocab_size, words, self._unknown_id)


class _OrderedStreams(StreamBatches):
    """Streams that read the sentences of every epoch in the order of the text."""

    def _epoch(self, epoch: int, direction: str) -> tuple[np.ndarray, np.ndarray]:
        """See StreamBatches."""
        if not self._epochs:
            sentences = np.arange(self.store.num_sentences)
            self._epochs[0] = sentences, self.store.sentence_offsets + np.arange(len(sentences) + 1)
        return self._epochs[0]


class StreamEvaluation:
    """One epoch of a text in its order, as a few rows that begin in the zero state, for the full softmax.

    Every word and every end of a sentence is a target once in each direction.
    """

    def __init__(self, config: StreamsConfig, store: Store, tokenizer: Tokenizer):
        self.num_rows = max(1, min(MOST_ROWS, store.num_tokens // FEWEST_WORDS_IN_ROW))
        config = dataclasses.replace(config, num_negatives=0, independent_directions=False)
        self._batches = _OrderedStreams(config, store, tokenizer, self.num_rows, seed=0)
        self.layout = self._batches.layout
        self._max_length = config.max_length
        self.num_steps = -(-self._batches.slice_length // config.max_length)

    def rows(self, step: int, row_B: np.ndarray) -> dict[str, np.ndarray]:
        """Part `step` of the rows with these numbers; after the end of its slice a row weighs nothing."""
        batch = self._batches[step]
        here_T = step * self._max_length + np.arange(self._max_length) < self._batches.slice_length
        for d in DIRECTIONS:
            batch[f"{d}_weights"] *= here_T
        return {name: x[row_B] if self.layout[name] == "rows" else x for name, x in batch.items()}


class StreamTargets:
    """The targets of a direction, read like a `Store` in which each sentence is a document."""

    def __init__(self, batches: StreamBatches, direction: str):
        store = batches.store
        self.num_tokens = store.num_tokens + store.num_sentences
        self.sentence_offsets = store.sentence_offsets + np.arange(store.num_sentences + 1)
        self.document_offsets = np.arange(store.num_sentences + 1)
        _, self.end_id = batches._boundaries[direction]
        self._batches, self._direction = batches, direction

    def gather(self, positions: np.ndarray) -> np.ndarray:
        """The targets at some positions of the sentences in the order of the store."""
        batches = self._batches
        position = positions.ravel()
        sentence = np.searchsorted(self.sentence_offsets, position, side="right") - 1
        before = position - self.sentence_offsets[sentence]  # the number of targets before it in its sentence
        bounds = batches.store.sentence_offsets
        begin, end = bounds[sentence], bounds[sentence + 1]
        token = begin + before if self._direction == "forward" else end - 1 - before
        targets = batches.store.gather(np.clip(token, 0, batches.store.num_tokens - 1))
        targets[before == end - begin] = self.end_id
        return batches._known(targets).reshape(positions.shape)

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """int64 [vocab_size]: how often each id is a target."""
        batches = self._batches
        counts = batches.store.token_counts(len(batches._spellings))
        counts_V = counts[:vocab_size].copy()
        counts_V[batches._unknown_id] += counts[vocab_size:].sum()
        counts_V[self.end_id] += batches.store.num_sentences
        return counts_V


def _distinct(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`np.unique` with the inverse (int32), for ids from 0 to 2^32: twice as fast, because it sorts single numbers.

    The ids 7 5 7 are sorted as (5, 1) (7, 0) (7, 2), an id in the high bits and its index in the low ones; so the
    distinct ids are 5 7 and the inverse is 1 0 1.
    """
    index_bits = ids.size.bit_length()
    order = ids.ravel().astype(np.int64) << index_bits | np.arange(ids.size)
    order.sort()
    id, index = order >> index_bits, order & (1 << index_bits) - 1
    first = np.append(True, id[1:] != id[:-1])
    number = np.empty(ids.size, np.int32)
    number[index] = np.cumsum(first) - 1
    return id[first].astype(ids.dtype), number.reshape(ids.shape)


def bucket(n: int) -> int:
    """The smallest of 128, 192, 256, 384, … (powers of two, and one and a half times these) that is n or more."""
    size = max(1 << (n - 1).bit_length(), FEWEST_WORDS)
    return size * 3 // 4 if n <= size * 3 // 4 and size > FEWEST_WORDS else size
