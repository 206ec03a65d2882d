"""GPT's examples: windows of contiguous text, to predict each token from the tokens before it.

GPT-1, section 4.1 (Radford et al., 2018), which trains on "contiguous sequences of 512 tokens"; how they were drawn was
not published.

A window is T + 1 ids: each of the first T is an input, each of the last T a target. Windows of one document overlap by
one id, so that every token but a document's first is a target exactly once an epoch. The remainders of documents, short
documents included, are laid end to end and cut into shared windows, as segments that do not see each other; only the
last window of an epoch has padding.

Divergences: an epoch visits every window once, in random order, where the original is said to sample; no window joins
the text of two books as if it were one, which is not known of the original.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from prelm_jax.bounds import Bounds, Length
from prelm_jax.corpus.store import Store
from prelm_jax.data.baselines import Baselines, bits_per_byte, perplexity, window_baselines
from prelm_jax.data.batches import StoreBatches
from prelm_jax.data.randomness import bits, key, permute
from prelm_jax.data.show import show_windows
from prelm_jax.data.spans import count_up, cut
from prelm_jax.errors import InputError
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.training.contract import HostBatch


@dataclass(frozen=True)
class WindowsConfig:
    """Windows of contiguous text for a language model that reads from left to right."""

    max_length: Annotated[Length, Bounds(2)] = 512  # Tokens per row (T), at most the model's number of positions.
    # Let tokens of a shared window attend to the documents before their own, and count positions through all of them.
    across_documents: bool = False

    def build(self, store: Store, tokenizer: Tokenizer, batch_size: int, seed: int) -> "WindowBatches":
        """The batches of a run. Raises InputError if the store does not fill one window."""
        batches = WindowBatches(self, store, tokenizer, batch_size, seed)
        if batches.num_targets < self.max_length:
            raise InputError(
                f"{batches.num_targets} tokens to predict in {store.num_documents} documents do not fill a window of "
                f"{self.max_length}: give a larger corpus or a smaller --data.max-length"
            )
        return batches

    def evaluated(self) -> "WindowsConfig":
        """The same."""
        return self

    def evaluation(self, store: Store, tokenizer: Tokenizer) -> "WindowEvaluation":
        """All windows of a text. Raises InputError if no document has two tokens."""
        return WindowEvaluation(WindowBatches(self, store, tokenizer, batch_size=1, seed=0))

    def baselines(self, batches: "WindowBatches", evaluation: Iterable[HostBatch]) -> Baselines:
        """See `window_baselines`."""
        return window_baselines(batches, evaluation)

    def derived_metrics(self, name: str, value: float, store: Store) -> dict[str, float]:
        """Perplexity per token, and bits per byte of the documents of the store that was evaluated."""
        bits = {"bits_per_byte": bits_per_byte(value, store)} if name == "lm_loss" else {}
        return perplexity({"lm_loss": "perplexity"}, name, value) | bits

    def describe(self, batches: "WindowBatches") -> str:
        """The number of windows of a step and of an epoch."""
        return f"a step reads {batches.batch_size:,} of {batches.examples_per_epoch:,} windows"

    def show(self, batch: HostBatch, tokenizer: Tokenizer) -> Iterator[str]:
        """See `show_windows`."""
        return show_windows(batch, tokenizer)


class WindowBatches(StoreBatches):
    """Batches of windows; the end of `windows` lists their keys.

    `examples_per_epoch` is the number of windows, `num_targets` the number of tokens that they predict.
    """

    def __init__(self, config: WindowsConfig, store: Store, tokenizer: Tokenizer, batch_size: int, seed: int):
        super().__init__(store, tokenizer.vocab_size, batch_size)
        self._config = config
        self._epoch_key = key(seed, "windows: epoch")

        # The line that windows are cut from: the inputs of each document's full windows, then the remainders. All the
        # full parts come first and their lengths are multiples of T, so no window of theirs crosses two documents.
        #
        # T = 4, documents of 7, 1, 2 and 3 tokens, which begin at tokens 0 7 8 10 of the store:
        #     inputs (the last token of a document is none)   6 0 1 2
        #     full parts 4 0 0 0, remainders 2 0 1 2; without the empty ones:
        #     parts begin at tokens                           0   4   8   10
        #     and on the line at                              0   4   6   7   9 (end)
        #     windows                                         [0, 4) [4, 8) [8, 9 and padding)
        T = config.max_length
        begin_X = store.sentence_offsets[store.document_offsets]
        inputs_X = np.diff(begin_X) - 1
        full_X = inputs_X - inputs_X % T
        lengths = np.concatenate([full_X, inputs_X - full_X])
        begins = np.concatenate([begin_X[:-1], begin_X[:-1] + full_X])
        kept = np.flatnonzero(lengths)
        self._part_begins = begins[kept]
        self._line_offsets = np.append(0, np.cumsum(lengths[kept]))
        self.num_targets = int(self._line_offsets[-1])
        self.examples_per_epoch = -(-self.num_targets // T)

    def rows(self, step: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows start to stop of the batch of a step, built without the others."""
        epoch_B, index_B = np.divmod(step * self.batch_size + np.arange(start, stop), self.examples_per_epoch)
        return self.windows(permute(index_B, self.examples_per_epoch, bits(self._epoch_key, epoch_B)))

    def windows(self, window_B: np.ndarray) -> dict[str, np.ndarray]:
        """The batch of any windows of an epoch.

        Window 1 of the example above, [4, 8) of the line:

            part of the line (items 1 2 3)  1 1 2 3    spans of lengths 2 1 1, from tokens 4 8 10 of the store
            tokens                          4 5 8 10   by index in the store
            targets                         5 6 9 11   the next token; behind a span's end it is not in `tokens`
            positions                       0 1 0 0
            segments                        1 1 2 3
        """
        T = self._config.max_length
        begin_B = window_B * T
        end_B = np.minimum(begin_B + T, self._line_offsets[-1])
        spans = cut(self._line_offsets, begin_B, end_B)
        begin_R = self._part_begins[spans.item] + spans.start

        positions = count_up(spans.length)
        segments = np.repeat(spans.number + 1, spans.length)
        tokens = self.store.gather(np.repeat(begin_R, spans.length) + positions)
        targets = np.append(tokens[1:], np.int32(0))
        targets[np.cumsum(spans.length) - 1] = self.store.gather(begin_R + spans.length)
        if self._config.across_documents:
            positions, segments = count_up(end_B - begin_B), np.ones_like(segments)

        real_BT = np.arange(T) < (end_B - begin_B)[:, None]

        def rows(values: np.ndarray) -> np.ndarray:
            """int32 [B, T] of values laid end to end, 0 in padding."""
            if values.size == real_BT.size:
                return values.astype(np.int32, copy=False).reshape(-1, T)
            padded_BT = np.zeros(real_BT.shape, np.int32)
            padded_BT[real_BT] = values
            return padded_BT

        # All [B, T].
        return {
            "tokens": rows(tokens),
            "targets": rows(targets),  # the token that follows each
            "positions": rows(positions),  # from 0 in each segment
            "segments": rows(segments),  # from 1 in each window; 0 in padding
            "weights": real_BT.astype(np.float32),  # 1, or 0 in padding
        }


class WindowEvaluation:
    """The windows of an epoch in order: every token but a document's first is a target once."""

    num_steps = 1

    def __init__(self, batches: WindowBatches):
        if not batches.num_targets:
            raise InputError("no document has two tokens, so there is none to predict: give a larger corpus")
        self._batches, self.num_rows, self.layout = batches, batches.examples_per_epoch, batches.layout

    def rows(self, step: int, row_B: np.ndarray) -> dict[str, np.ndarray]:
        """The windows with these numbers."""
        return self._batches.windows(row_B)
