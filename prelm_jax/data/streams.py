"""ELMo's examples: endless rows of sentences, read in both directions; a batch is a pure function of (seed, step).

ELMo, section 3.1 (Peters et al., 2018); bilm-tf, bilm/data.py.

The sentences of an epoch, in random order, stand end to end as a line of places: a sentence of n words has n + 1. The
forward direction reads `<S> w1 … wn` there to predict `w1 … wn </S>`, the backward direction `</S> wn … w1` to predict
`wn … w1 <S>`: at each place both are in the same sentence, one that much after its beginning, the other as much before
its end. The line is cut into as many equal slices as there are rows, of the same place in every epoch; a row reads its
slice of one epoch, then that of the next, without end, T places a step, so it goes on where the step before stopped.
There is no padding, and a loss at every place.

Divergences from that reference:

- Both directions read the same sentences, so that a word's characters are encoded once for both; what only one of them
  reads in a step is the rest of a sentence that the step's border cuts. In the reference each direction has its own
  random order: `independent_directions`.
- A row is the owner of its slice; in the reference rows take sentences from one queue, whenever they have none. The
  sentences at the borders of slices, one for each row, are read by two rows, each a part.
- Sentences are in random order in the whole corpus, not only within the shard that was loaded.
- The negatives are the same for all devices; in the reference each device draws its own.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np

from prelm_jax.data.ngrams import trigram_loss
from prelm_jax.data.randomness import bits, key, permute, uniform
from prelm_jax.errors import InputError
from prelm_jax.text.store import Store

DIRECTIONS = ("forward", "backward")
FEWEST_WORDS = 128  # for which a batch has room: a multiple of the devices that share them
PERMUTED_AT_ONCE = 1 << 20
EPOCHS_KEPT = 2  # rows do not come to the end of one at quite the same step


@dataclass(frozen=True)
class StreamsConfig:
    """Rows that are cut every `max_length` (T) words. `num_negatives` words are drawn for sampled softmax.

    With `num_negatives=0` there are none, for a model that has the full softmax in training too.
    """

    max_length: int = 20
    num_negatives: int = 8192
    independent_directions: bool = False

    def __post_init__(self):
        if not 1 <= self.max_length < 2**16:
            raise InputError(f"data.max_length is {self.max_length}: give a number of words from 1 to 65535")
        if self.num_negatives < 0:
            raise InputError(f"data.num_negatives is {self.num_negatives}: give 0 or more")

    def build(self, store: Store, tokenizer, batch_size: int, seed: int) -> "StreamBatches":
        """The batches of a run; `tokenizer` has `vocab_size`, `special_ids` and `unknown_id` (`prelm_jax.text.words`).

        Raises InputError if the store is not one of words, or has less of them than there are rows.
        """
        return StreamBatches(self, store, tokenizer, batch_size, seed)


class StreamBatches:
    """`batches[step]`: the batch of a step, a dict of arrays; pure in (seed, step), without end (epochs reshuffle).

    Keys, int32 unless said: `characters` [U, 50], the character ids of the different words of the global batch, padded
    to one of a few U; and for each direction d, forward and backward, `d_words` [B, T], what is read, as numbers of
    rows of `characters`; `d_targets` [B, T], what is predicted, ids of the vocabulary; `d_weights` (float32) [B, T],
    1; `d_negatives` [num_negatives], different ids in the order they were drawn; and `d_tries` [], how many draws it
    took to have so many different ones.
    """

    def __init__(self, config: StreamsConfig, store: Store, tokenizer, batch_size: int, seed: int):
        if store.words is None:
            raise InputError("the tokens of this store are not words: streams need a vocabulary of words (WordsConfig)")
        if 0 < config.num_negatives >= tokenizer.vocab_size:
            raise InputError(
                f"data.num_negatives is {config.num_negatives}, but the vocabulary has only {tokenizer.vocab_size} "
                "words: give fewer, or 0 for the full softmax"
            )
        self.batch_size = batch_size
        self._config = config
        self._store = store
        self._vocab_size = tokenizer.vocab_size
        self._unknown_id = tokenizer.unknown_id
        begin, end = (tokenizer.special_ids[token] for token in ("<S>", "</S>"))
        self._marks = {"forward": (begin, end), "backward": (end, begin)}
        streams = DIRECTIONS if config.independent_directions else ("forward", "forward")
        self._epoch_keys = {d: key(seed, f"streams: epoch {s}") for d, s in zip(DIRECTIONS, streams, strict=True)}
        self._negative_keys = {d: key(seed, f"streams: negatives {d}") for d in DIRECTIONS}
        self._epochs: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

        self._places = store.num_tokens + store.num_sentences
        if self._places < batch_size:
            raise InputError(
                f"{store.num_sentences} sentences of {store.num_tokens} words do not give each of {batch_size} rows a "
                "word to predict: give a larger corpus or a smaller --batch-size"
            )
        borders = np.arange(batch_size + 1) * self._places // batch_size
        self._slice_begins, self._slice_lengths = borders[:-1], np.diff(borders)

    @property
    def layout(self) -> dict[str, str]:
        """Which keys hold a host's rows ("rows"), and which are the same on every host ("shared", "replicated")."""
        layout = {"characters": "shared"}
        for direction in DIRECTIONS:
            layout |= {f"{direction}_{name}": "rows" for name in ("words", "targets", "weights")}
            if self._config.num_negatives:
                layout |= {f"{direction}_{name}": "replicated" for name in ("negatives", "tries")}
        return layout

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        return self.rows(step, 0, self.batch_size)

    def rows(self, step: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows start to stop of the batch of a step; what belongs to all rows is of the global batch."""
        read_2BT, targets = [], {}
        for direction in DIRECTIONS:
            words_BT, targets[direction] = self._read(step, direction)
            read_2BT.append(words_BT)
        words_U, number_2BT = np.unique(np.stack(read_2BT), return_inverse=True)
        padding = np.full(bucket(len(words_U)) - len(words_U), self._unknown_id)
        batch = {"characters": self._store.words.characters(np.append(words_U, padding))}
        for direction, number_BT in zip(DIRECTIONS, number_2BT.astype(np.int32), strict=True):
            batch[f"{direction}_words"] = number_BT[start:stop]
            batch[f"{direction}_targets"] = targets[direction][start:stop]
            batch[f"{direction}_weights"] = np.ones((stop - start, self._config.max_length), np.float32)
            if self._config.num_negatives:
                drawn = log_uniform(
                    bits(self._negative_keys[direction], step), self._config.num_negatives, self._vocab_size
                )
                batch[f"{direction}_negatives"], batch[f"{direction}_tries"] = drawn
        return batch

    def baselines(self, evaluation: Iterable[dict[str, np.ndarray]]) -> dict[str, dict[str, float]]:
        """What models that know next to nothing reach on consecutive evaluation batches, after training on this store.

        For each direction's loss the cross-entropy (nats) of the targets under the training frequencies (plus one
        each), and under an interpolated trigram (`prelm_jax.data.ngrams`) that reads in that direction.
        """
        batches = list(evaluation)
        counts = self._store.token_counts(len(self._store.words))
        counts_V = counts[: self._vocab_size] + 1
        counts_V[self._unknown_id] += counts[self._vocab_size :].sum()
        result = {}
        for direction in DIRECTIONS:
            end = self._marks[direction][1]
            frequencies_V = counts_V.copy()
            frequencies_V[end] += self._store.num_sentences
            # Row by row the batches go on, so the targets before a target are those it is predicted from.
            targets_BT = np.concatenate([batch[f"{direction}_targets"] for batch in batches], axis=1)
            nothing = np.full((len(targets_BT), 2), self._vocab_size)
            before_BT = np.concatenate([nothing, np.where(targets_BT == end, self._vocab_size, targets_BT)], axis=1)
            second_BT = before_BT[:, 1:-1]
            first_BT = np.where(second_BT == self._vocab_size, self._vocab_size, before_BT[:, :-2])
            trigrams = np.stack([first_BT.ravel(), second_BT.ravel(), targets_BT.ravel()])
            result[f"{direction}_loss"] = {
                "unigram": float(np.log(frequencies_V.sum()) - np.log(frequencies_V)[targets_BT].mean()),
                "trigram": trigram_loss(
                    _Line(self._store, partial(self._targets, direction)), self._vocab_size, trigrams
                ),
            }
        return result

    def _read(self, step: int, direction: str) -> tuple[np.ndarray, np.ndarray]:
        """What a direction reads, ids of the store, and predicts, ids of the vocabulary: [B, T] each."""
        T = self._config.max_length
        epoch_BT, place_BT = np.divmod(step * T + np.arange(T), self._slice_lengths[:, None])
        place_BT += self._slice_begins[:, None]
        sentence_BT, offset_BT = np.empty_like(place_BT), np.empty_like(place_BT)
        for epoch in range(epoch_BT.min(), epoch_BT.max() + 1):
            sentences, begins = self._epoch(epoch, direction)
            there = epoch_BT == epoch
            place = place_BT[there]
            number = np.searchsorted(begins, place, side="right") - 1
            sentence_BT[there] = sentences[number]
            offset_BT[there] = place - begins[number]
        return self._words(direction, sentence_BT, offset_BT - 1), self._targets(direction, sentence_BT, offset_BT)

    def _words(self, direction: str, sentence: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """Ids of the words (from 0) of sentences in a direction: before them and after them are the marks."""
        begin, end = self._store.sentence_offsets[sentence], self._store.sentence_offsets[sentence + 1]
        before, after = self._marks[direction]
        position = begin + offset if direction == "forward" else end - 1 - offset
        words = self._store.gather(np.clip(position, 0, self._store.num_tokens - 1))
        words[offset < 0] = before
        words[offset == end - begin] = after
        return words

    def _targets(self, direction: str, sentence: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """The same as ids of the vocabulary."""
        words = self._words(direction, sentence, offset)
        words[words >= self._vocab_size] = self._unknown_id
        return words

    def _epoch(self, epoch: int, direction: str) -> tuple[np.ndarray, np.ndarray]:
        """The sentences of an epoch in their order, and the place where each begins."""
        epoch_key = bits(self._epoch_keys[direction], epoch)
        name = int(epoch_key)
        if name not in self._epochs:
            n = self._store.num_sentences
            sentences = np.empty(n, np.min_scalar_type(n))
            for start in range(0, n, PERMUTED_AT_ONCE):
                index = np.arange(start, min(start + PERMUTED_AT_ONCE, n))
                sentences[index] = permute(index, n, epoch_key)
            places = np.diff(self._store.sentence_offsets)[sentences] + 1
            if len(self._epochs) >= EPOCHS_KEPT * len(DIRECTIONS):
                del self._epochs[next(iter(self._epochs))]
            self._epochs[name] = sentences, np.cumsum(places) - places
        return self._epochs[name]


class _Line:
    """The targets of all sentences as a store of documents, each a sentence: what a trigram is fitted on."""

    def __init__(self, store: Store, targets: Callable[[np.ndarray, np.ndarray], np.ndarray]):
        self.num_tokens = store.num_tokens + store.num_sentences
        self.sentence_offsets = store.sentence_offsets + np.arange(store.num_sentences + 1)
        self.document_offsets = np.arange(store.num_sentences + 1)
        self._targets = targets

    def gather(self, positions: np.ndarray) -> np.ndarray:
        sentence = np.searchsorted(self.sentence_offsets, positions, side="right") - 1
        return self._targets(sentence, positions - self.sentence_offsets[sentence])


def bucket(n: int) -> int:
    """The least of 128, 192, 256, 384, … (powers of two, and one and a half times these) that has room for n."""
    size = max(1 << (n - 1).bit_length(), FEWEST_WORDS)
    return size * 3 // 4 if n <= size * 3 // 4 and size > FEWEST_WORDS else size


def log_uniform(key: np.ndarray, n: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """n different ids of a vocabulary sorted by falling count, and how many draws it took.

    As TensorFlow's LogUniformCandidateSampler: id k is drawn with the probability log((k + 2) / (k + 1)) /
    log(vocab_size + 1), again and again, until there are n different ones. Returns int32 [n], in the order they were
    drawn, and int32 [].
    """
    draws = np.empty(0, np.int64)
    while True:
        more = uniform(key, np.arange(len(draws), 2 * len(draws) + 2 * n))
        draws = np.append(draws, np.exp(more * np.log(vocab_size + 1)).astype(np.int64) - 1)
        first = np.sort(np.unique(draws, return_index=True)[1])
        if len(first) >= n:
            return draws[first[:n]].astype(np.int32), np.array(first[n - 1] + 1, np.int32)
