"""GPT's examples: windows of contiguous text, to predict each token from those before it; pure in (seed, step).

GPT-1, section 4.1 (Radford et al., 2018), which trains on "contiguous sequences of 512 tokens"; how they were drawn was
not published.

A window is T + 1 ids: each of the first T is an input, each of the last T a target. Windows of one document overlap by
one id, so that every token but a document's first is a target exactly once an epoch. What is left at the ends of
documents, short documents too, is laid end to end and cut into shared windows, as segments that do not see each other;
only the last window of all has padding.

Divergences: an epoch visits every window once, in random order, where the original is said to sample; none has text of
two books as if it were one, which is not known of the original.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from prelm_jax.corpus.store import Store
from prelm_jax.data.ngrams import trigram_loss
from prelm_jax.data.randomness import bits, key, permute
from prelm_jax.data.show import read_on
from prelm_jax.errors import InputError


@dataclass(frozen=True)
class WindowsConfig:
    """Windows of `max_length` (T) inputs and as many targets.

    With `across_documents` the pieces of a shared window are one segment: tokens attend to the documents before their
    own, and positions do not start again. What is predicted stays the same.
    """

    max_length: int = 512
    across_documents: bool = False

    def __post_init__(self):
        if not 2 <= self.max_length < 2**16:
            raise InputError(f"data.max_length is {self.max_length}: give a number of tokens from 2 to 65535")

    def build(self, store: Store, tokenizer, batch_size: int, seed: int) -> "WindowBatches":
        """The batches of a run; `tokenizer` has `vocab_size`. InputError if the store does not fill one window."""
        return WindowBatches(self, store, tokenizer, batch_size, seed)


class WindowBatches:
    """`batches[step]`: the batch of a step, a dict of arrays; pure in (seed, step), without end (epochs reshuffle).

    Keys, int32 unless said, all [B, T]: `tokens`; `targets`, the token that follows each; `positions`, from 0 in each
    piece; `segments`, the number of the piece in its window, from 1; `weights` (float32), 1. In padding all are 0.
    """

    def __init__(self, config: WindowsConfig, store: Store, tokenizer, batch_size: int, seed: int):
        self.batch_size = batch_size
        self._config = config
        self._store = store
        self._vocab_size = tokenizer.vocab_size
        self._epoch_key = key(seed, "windows: epoch")

        # A run is a piece of a document: the inputs of its full windows, or what is left of it. Laid end to end, full
        # ones first, runs are cut every T inputs; so the windows of the first kind never cross from one to the next.
        T = config.max_length
        begin_D = store.sentence_offsets[store.document_offsets]
        inputs_D = np.diff(begin_D) - 1  # a document's last token is no input
        full_D = inputs_D - inputs_D % T
        length_R = np.concatenate([full_D, inputs_D - full_D])
        begin_R = np.concatenate([begin_D[:-1], begin_D[:-1] + full_D])
        kept = np.flatnonzero(length_R)
        self._run_begins = begin_R[kept]
        self._run_offsets = np.append(0, np.cumsum(length_R[kept]))
        self._inputs = int(self._run_offsets[-1])
        if self._inputs < T:
            raise InputError(
                f"{self._inputs} tokens to predict in {store.num_documents} documents do not fill a window of {T}: "
                "give a larger corpus or a smaller --data.max-length"
            )
        self.examples_per_epoch = -(-self._inputs // T)

    @property
    def layout(self) -> dict[str, str]:
        """Which keys hold a host's rows ("rows") and which the same on every host ("replicated"): here all are rows."""
        return dict.fromkeys(["tokens", "targets", "positions", "segments", "weights"], "rows")

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        return self.rows(step, 0, self.batch_size)

    def rows(self, step: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows start to stop of the batch of a step, built without the others."""
        epoch_B, index_B = np.divmod(step * self.batch_size + np.arange(start, stop), self.examples_per_epoch)
        return self._windows(permute(index_B, self.examples_per_epoch, bits(self._epoch_key, epoch_B)))

    def baselines(self, evaluation: Iterable[dict[str, np.ndarray]]) -> dict[str, dict[str, float]]:
        """What models that know next to nothing reach on the evaluation batches, after training on these documents.

        `lm_loss`: cross-entropy (nats) of the targets under the training frequencies (plus one each), and under an
        interpolated trigram (`prelm_jax.data.ngrams`); `lm_accuracy`: always the most frequent token.
        """
        batches = list(evaluation)
        batch = {name: np.concatenate([batch[name] for batch in batches]) for name in self.layout}
        real_BT = batch["weights"] > 0
        targets = batch["targets"][real_BT]
        counts_V = self._store.token_counts(self._vocab_size) + 1
        before_BT = np.where(batch["positions"] > 0, np.roll(batch["tokens"], 1, axis=1), self._vocab_size)
        trigrams = np.stack([before_BT[real_BT], batch["tokens"][real_BT], targets])
        return {
            "lm_loss": {
                "unigram": float(np.log(counts_V.sum()) - np.log(counts_V)[targets].mean()),
                "trigram": trigram_loss(self._store, self._vocab_size, trigrams),
            },
            "lm_accuracy": {"most frequent token": float(np.mean(targets == counts_V.argmax()))},
        }

    def in_other_units(self, name: str, value: float) -> dict[str, float]:
        """Perplexity per token; and bits per byte of the original text, which do not depend on the vocabulary.

        So many bits as the documents of these batches have tokens, by their bytes; a document's first token counts as
        much as the others. Unknown tokens cost no more than others, though they say less.
        """
        if name != "lm_loss":
            return {}
        tokens_per_byte = self._store.num_tokens / self._store.document_bytes.sum()
        return {"perplexity": math.exp(value), "bits_per_byte": float(value / math.log(2) * tokens_per_byte)}

    def show(self, batch: dict[str, np.ndarray], tokenizer) -> Iterator[str]:
        """Each row in lines: how much is filled; then its segments, each with what its last place is to predict."""
        for row, segments in enumerate(batch["segments"]):
            lines = [f"row {row}: {np.count_nonzero(segments)} of {len(segments)} places"]
            for number in range(1, segments.max() + 1):
                tokens, targets, weights = (
                    batch[name][row, segments == number] for name in ("tokens", "targets", "weights")
                )
                read = [tokenizer.tokens[id] for id in tokens]
                lines.append(f"  {number} {read_on(read, targets, weights, tokenizer)}")
            yield "\n".join(lines)

    def _windows(self, window_B: np.ndarray) -> dict[str, np.ndarray]:
        """The batch of any windows of the epoch."""
        offsets, T = self._run_offsets, self._config.max_length
        begin_B = window_B * T
        end_B = np.minimum(begin_B + T, self._inputs)
        # The pieces (P) of all rows: a run each, as far as it lies in the window; and one of padding, mostly empty.
        first_B = np.searchsorted(offsets, begin_B, side="right") - 1
        count_B = np.searchsorted(offsets, end_B) - first_B + 1
        number_P = count_up(count_B) + 1
        run_P = np.minimum(np.repeat(first_B, count_B) + number_P, len(self._run_begins)) - 1
        begin_P = np.maximum(offsets[run_P], np.repeat(begin_B, count_B))
        length_P = np.minimum(offsets[run_P + 1], np.repeat(end_B, count_B)) - begin_P
        token_P = self._run_begins[run_P] + begin_P - offsets[run_P]
        padding = np.cumsum(count_B) - 1
        number_P[padding], length_P[padding], token_P[padding] = 0, T - (end_B - begin_B), 0
        number_P, length_P, token_P = (x[length_P > 0] for x in (number_P, length_P, token_P))

        positions = count_up(length_P)
        tokens = self._store.gather(np.repeat(token_P, length_P) + positions)
        targets = np.append(tokens[1:], np.int32(0))
        targets[np.cumsum(length_P) - 1] = self._store.gather(token_P + length_P)
        if self._config.across_documents:
            positions, number_P = np.tile(np.arange(T), len(window_B)), np.minimum(number_P, 1)
        batch = {
            "tokens": tokens,
            "targets": targets,
            "positions": positions.astype(np.int32),
            "segments": np.repeat(number_P.astype(np.int32), length_P),
        }
        batch = {name: array.reshape(-1, T) for name, array in batch.items()}
        real_BT = batch["segments"] > 0
        short = end_B - begin_B < T
        for name in ("tokens", "targets", "positions"):
            batch[name][short] *= real_BT[short]
        return batch | {"weights": real_BT.astype(np.float32)}


def count_up(length: np.ndarray) -> np.ndarray:
    """0, 1, … in runs of the given lengths, end to end."""
    ends = np.cumsum(length)
    return np.arange(ends[-1]) - np.repeat(ends - length, length)
