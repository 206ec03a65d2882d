"""ELMo's examples: endless rows of sentences, read in both directions; a batch is a pure function of (seed, step).

ELMo, section 3.1 (Peters et al., 2018); bilm-tf, bilm/data.py.

The sentences of an epoch, in random order, stand end to end as a line of places: a sentence of n words has n + 1. The
forward direction reads `<S> w1 … wn` there to predict `w1 … wn </S>`, the backward direction `</S> wn … w1` to predict
`wn … w1 <S>`: at each place both are in the same sentence, one that much after its beginning, the other as much before
its end. The line is cut into as many equal slices as there are rows; a row reads its slice of one epoch, then that of
the next, without end, T places a step, so it goes on where the step before stopped. Where a slice is a place shorter
than others, its row reads the place after it too, without weight: all rows begin an epoch together.

Divergences from that reference:

- Both directions read the same sentences, so that a word's characters are encoded once for both. Only of a sentence
  that the border of a step cuts do they read different parts: the one its beginning, the other its end. In the
  reference each direction has its own random order (`independent_directions`).
- A row is the owner of its slice; in the reference rows take sentences from one queue, whenever they have none. The
  sentences at the borders of slices, one for each row, are read by two rows, each a part.
- Sentences are in random order in the whole corpus, not only within the shard that was loaded.
- The negatives are the same for all devices; in the reference each device draws its own.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from prelm_jax.corpus.store import Store
from prelm_jax.data.ngrams import trigram_loss
from prelm_jax.data.randomness import bits, key, permute, uniform
from prelm_jax.data.show import read_on
from prelm_jax.data.windows import count_up
from prelm_jax.errors import InputError
from prelm_jax.tokenizers.characters import spelled

DIRECTIONS = ("forward", "backward")
FEWEST_WORDS = 128  # for which a batch has room: a multiple of the devices that share them
FEWEST_CHARACTERS = 24  # that a row of them has room for; in most batches it is enough
PERMUTED_AT_ONCE = 1 << 20
EPOCHS_KEPT = 2  # a step may have the end of one and the beginning of the next


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
        """The batches of a run; `tokenizer` has `vocab_size`, `special_ids` and `unknown_id`.

        Raises InputError if the store is not one of words, or has less of them than there are rows.
        """
        return StreamBatches(self, store, tokenizer, batch_size, seed)


class StreamBatches:
    """`batches[step]`: the batch of a step, a dict of arrays; pure in (seed, step), without end (epochs reshuffle).

    Keys, int32 unless said: `characters` [U, C], the character ids of the different words of the global batch, with
    room for the longest of them, both padded to one of a few sizes; and for each direction d, forward and backward,
    `d_words` [B, T], what is read, as numbers of rows of `characters`; `d_targets` [B, T], what is predicted, ids of
    the vocabulary; `d_weights` (float32) [B, T], 1 or, for the place after a slice, 0; `d_negatives` [num_negatives],
    different ids in the order they were drawn; and `d_tries` [], how many draws it took to have so many different ones.
    """

    def __init__(self, config: StreamsConfig, store: Store, tokenizer, batch_size: int, seed: int):
        if store.words is None:
            raise InputError(
                "the tokens of this store are not words: streams need a vocabulary of words (WordVocabularyConfig)"
            )
        if config.num_negatives >= tokenizer.vocab_size:
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
        self._epoch_keys = {d: key(seed, f"streams: epoch {d}") for d in DIRECTIONS}
        self._negative_keys = {d: key(seed, f"streams: negatives {d}") for d in DIRECTIONS}
        if n := config.num_negatives:
            _, tries = log_uniform(self._negative_keys["forward"], n, self._vocab_size, n)
            # About as many as are needed at every step.
            self._negatives = partial(log_uniform, n=n, vocab_size=self._vocab_size, at_once=int(tries * 1.03) + 1)
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

        places = store.num_tokens + store.num_sentences
        if not places:
            raise InputError("the corpus is empty: give one with at least one word")
        borders = np.arange(batch_size + 1) * places // batch_size
        self._slice_begins, self._slice_lengths = borders[:-1], np.diff(borders)
        self._slice = int(self._slice_lengths[-1])  # the longest, by one

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
        T = self._config.max_length
        weights_BT = (step * T + np.arange(T)) % self._slice < self._slice_lengths[start:stop, None]
        read_2BT, targets, parts = [], {}, None
        for direction in DIRECTIONS:
            if parts is None or self._config.independent_directions:
                parts = self._parts(step, direction)
            places = [self._words(direction, *pieces) for pieces in parts]
            read_BT, targets_BT = (
                np.concatenate([words.reshape(self.batch_size, -1) for words in part], axis=1)
                for part in zip(*places, strict=True)
            )
            read_2BT.append(read_BT)
            targets[direction] = self._known(targets_BT[start:stop])
        words_U, number_2BT = _distinct(np.stack(read_2BT))
        padding = np.full(bucket(len(words_U)) - len(words_U), self._unknown_id)
        batch = {"characters": self._store.words.characters(np.append(words_U, padding), FEWEST_CHARACTERS)}
        for direction, number_BT in zip(DIRECTIONS, number_2BT, strict=True):
            batch[f"{direction}_words"] = number_BT[start:stop]
            batch[f"{direction}_targets"] = targets[direction]
            batch[f"{direction}_weights"] = weights_BT.astype(np.float32)
            if self._config.num_negatives:
                drawn = self._negatives(bits(self._negative_keys[direction], step))
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
            real_BT = np.concatenate([batch[f"{direction}_weights"] for batch in batches], axis=1) > 0
            trigrams = np.stack([first_BT[real_BT], second_BT[real_BT], targets_BT[real_BT]])
            result[f"{direction}_loss"] = {
                "unigram": float(np.log(frequencies_V.sum()) - np.log(frequencies_V)[trigrams[2]].mean()),
                "trigram": trigram_loss(self._line(direction), self._vocab_size, trigrams),
            }
        forward, backward = (result[f"{direction}_loss"] for direction in DIRECTIONS)
        result["loss"] = {name: (forward[name] + backward[name]) / 2 for name in forward}
        return result

    def in_other_units(self, name: str, value: float) -> dict[str, float]:
        """The perplexity of each direction, and of both: their geometric mean, as bilm-tf's `run_test.py` has it."""
        units = {"loss": "perplexity"} | {f"{direction}_loss": f"{direction}_perplexity" for direction in DIRECTIONS}
        return {units[name]: math.exp(value)} if name in units else {}

    def show(self, batch: dict[str, np.ndarray], tokenizer) -> Iterator[str]:
        """Each row in lines: what each direction reads, and marked, before a word outside the vocabulary, <UNK>."""
        for row in range(len(batch["forward_words"])):
            lines = [f"row {row}"]
            for direction in DIRECTIONS:
                words, targets, weights = (
                    batch[f"{direction}_{name}"][row] for name in ("words", "targets", "weights")
                )
                read = spelled(batch["characters"][words])
                lines.append(f"  {direction:8} {read_on(read, targets, weights, tokenizer)}")
            yield "\n".join(lines)

    def _parts(self, step: int, direction: str) -> list[tuple[np.ndarray, ...]]:
        """The pieces of a step's places: of one epoch, or of the end of one and the beginning of the next."""
        place, stop = step * self._config.max_length, (step + 1) * self._config.max_length
        parts = []
        while place < stop:
            epoch, offset = divmod(place, self._slice)
            count = min(self._slice - offset, stop - place)
            parts.append(self._pieces(self._slice_begins + offset, count, epoch, direction))
            place += count
        return parts

    def _pieces(self, begin_B: np.ndarray, count: int, epoch: int, direction: str) -> tuple[np.ndarray, ...]:
        """The pieces (P) of all rows, for `count` places from some on in the line of an epoch: each of one sentence.

        int64 [P]: the tokens between which the sentence lies, the words before the piece in it, and its places.
        """
        sentences, offsets = self._epoch(epoch, direction)
        first_B = np.searchsorted(offsets, begin_B, side="right") - 1
        count_B = np.searchsorted(offsets, begin_B + count) - first_B
        number_P = np.repeat(first_B, count_B) + count_up(count_B)
        begin_P = np.maximum(offsets[number_P], np.repeat(begin_B, count_B))
        length_P = np.minimum(offsets[number_P + 1], np.repeat(begin_B + count, count_B)) - begin_P
        bounds, sentence_P = self._store.sentence_offsets, sentences[number_P]
        return bounds[sentence_P], bounds[sentence_P + 1], begin_P - offsets[number_P], length_P

    def _epoch(self, epoch: int, direction: str) -> tuple[np.ndarray, np.ndarray]:
        """The sentences of an epoch in their order, and the place where each begins (and the number of places)."""
        epoch_key = bits(self._epoch_keys[direction], epoch)
        name = int(epoch_key)
        if name not in self._epochs:
            n = self._store.num_sentences
            sentences = np.empty(n, np.min_scalar_type(n))
            for start in range(0, n, PERMUTED_AT_ONCE):
                index = np.arange(start, min(start + PERMUTED_AT_ONCE, n))
                sentences[start : start + len(index)] = permute(index, n, epoch_key)
            offsets = np.append(0, np.cumsum(np.diff(self._store.sentence_offsets)[sentences] + 1))
            if len(self._epochs) >= EPOCHS_KEPT * len(DIRECTIONS):
                del self._epochs[next(iter(self._epochs))]
            self._epochs[name] = sentences, offsets
        return self._epochs[name]

    def _words(
        self, direction: str, begin_P: np.ndarray, end_P: np.ndarray, offset_P: np.ndarray, length_P: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The ids of the words that a direction reads at the places of pieces, end to end, and of those that follow."""
        before, after = self._marks[direction]
        ahead = 1 if direction == "forward" else -1
        stop_P = np.cumsum(length_P)
        start_P = stop_P - length_P
        position_P = begin_P + offset_P if direction == "forward" else end_P - 1 - offset_P
        position = np.repeat(position_P - ahead * start_P, length_P) + ahead * np.arange(stop_P[-1])
        # Beyond the ends of a sentence stand the marks.
        last = self._store.num_tokens - 1
        read = self._store.gather(np.clip(position - ahead, 0, last))
        read[start_P[offset_P == 0]] = before
        follow = self._store.gather(np.clip(position, 0, last))
        follow[stop_P[offset_P + length_P > end_P - begin_P] - 1] = after
        return read, follow

    def _known(self, words: np.ndarray) -> np.ndarray:
        """Ids of the vocabulary for those of any words."""
        return np.where(words < self._vocab_size, words, np.int32(self._unknown_id))

    def _line(self, direction: str) -> "_Line":
        return _Line(self._store, lambda *pieces: self._known(self._words(direction, *pieces)[1]))


class _Line:
    """The targets of all sentences as a store of documents, each a sentence: what a trigram is fitted on."""

    def __init__(self, store: Store, targets: Callable[..., np.ndarray]):
        self.num_tokens = store.num_tokens + store.num_sentences
        self.sentence_offsets = store.sentence_offsets + np.arange(store.num_sentences + 1)
        self.document_offsets = np.arange(store.num_sentences + 1)
        self._bounds = store.sentence_offsets
        self._targets = targets

    def gather(self, positions: np.ndarray) -> np.ndarray:
        place = positions.ravel()
        sentence = np.searchsorted(self.sentence_offsets, place, side="right") - 1
        begin, end = self._bounds[sentence], self._bounds[sentence + 1]
        pieces = begin, end, place - self.sentence_offsets[sentence], np.ones_like(place)
        return self._targets(*pieces).reshape(positions.shape)


def _distinct(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What `np.unique` gives with the inverse (int32), of ids from 0 to 2^32: one sort of numbers is twice as fast."""
    place_bits = ids.size.bit_length()
    order = ids.ravel().astype(np.int64) << place_bits | np.arange(ids.size)
    order.sort()
    id, place = order >> place_bits, order & (1 << place_bits) - 1
    first = np.append(True, id[1:] != id[:-1])
    number = np.empty(ids.size, np.int32)
    number[place] = np.cumsum(first) - 1
    return id[first].astype(ids.dtype), number.reshape(ids.shape)


def bucket(n: int) -> int:
    """The least of 128, 192, 256, 384, … (powers of two, and one and a half times these) that has room for n."""
    size = max(1 << (n - 1).bit_length(), FEWEST_WORDS)
    return size * 3 // 4 if n <= size * 3 // 4 and size > FEWEST_WORDS else size


def log_uniform(key: np.ndarray, n: int, vocab_size: int, at_once: int) -> tuple[np.ndarray, np.ndarray]:
    """n different ids of a vocabulary sorted by falling count, and how many draws it took.

    As TensorFlow's LogUniformCandidateSampler: id k is drawn with the probability log((k + 2) / (k + 1)) /
    log(vocab_size + 1), again and again, until there are n different ones. `at_once`, how many draws are made before
    they are looked at, changes nothing but the time it takes.

    Returns int32 [n], in the order they were drawn, and int32 [].
    """
    while True:
        draws = np.exp(uniform(key, np.arange(at_once)) * np.log(vocab_size + 1)).astype(np.int64) - 1
        # Of several draws of an id the first is written last.
        number = np.arange(at_once, dtype=np.min_scalar_type(at_once))
        first_V = np.empty(vocab_size, number.dtype)
        first_V[draws[::-1]] = number[::-1]
        first = np.flatnonzero(first_V[draws] == number)
        if len(first) >= n:
            return draws[first[:n]].astype(np.int32), np.array(first[n - 1] + 1, np.int32)
        at_once *= 2
