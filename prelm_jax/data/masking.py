"""Masked language modelling: which positions are to be predicted, and what stands in their place.

BERT, appendix A.1 (Devlin et al., 2019); google-research/bert, create_masked_lm_predictions in
create_pretraining_data.py. As there, the number of predictions counts the special tokens too, a random token is drawn
from the whole vocabulary, and the 80/10/10 choice is made for each piece, also in whole words.

Divergences: masks are drawn afresh for each example, where the original draws ten for each text; a piece that follows a
special token, where a segment was cut inside a word, is a word of its own, where the original joins it to the word
before the special token.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from prelm_jax.data.randomness import bits, key, words
from prelm_jax.errors import InputError

_LARGEST = np.uint32(2**32 - 1)


@dataclass(frozen=True)
class MaskingConfig:
    """Which tokens are to be predicted: `probability` · length of them.

    Of these `mask` become [MASK] and `random` any token of the vocabulary; the others stay. With `whole_word` all
    pieces of a word are chosen or none (a piece that begins with ## belongs to the word before it). Chinese, whose
    characters are tokens, has words with a `segmenter` alone (`prelm_jax.data.segmentation`).
    """

    probability: float = 0.15
    mask: float = 0.8
    random: float = 0.1
    whole_word: bool = False
    segmenter: Literal["jieba"] | None = None

    def __post_init__(self):
        if not 0 < self.probability <= 1:
            raise InputError(f"masking.probability is {self.probability}: give a number above 0 and up to 1")
        if min(self.mask, self.random) < 0 or self.mask + self.random > 1:
            raise InputError(
                f"masking.mask is {self.mask} and masking.random {self.random}: "
                "give two numbers of 0 or more that add up to 1 or less"
            )
        if self.segmenter is not None and not self.whole_word:
            raise InputError(
                f"masking.segmenter is {self.segmenter}, which is for whole words: turn masking.whole_word on too"
            )

    def build(self, tokenizer, max_predictions: int, seed: int) -> "Masking":
        """The masking of a run; `tokenizer` has `vocab_size`, `special_ids` and `continuation` (bool [vocab_size])."""
        return Masking(self, tokenizer, max_predictions, seed)


class Masking:
    """Masks the tokens of examples; a pure function of (seed, example)."""

    def __init__(self, config: MaskingConfig, tokenizer, max_predictions: int, seed: int):
        self._config = config
        self._max_predictions = max_predictions
        self._mask_id = np.int32(tokenizer.special_ids["[MASK]"])
        self._vocab_size = np.uint64(tokenizer.vocab_size)
        self._order_key, self._choice_key = key(seed, "masking: order"), key(seed, "masking: choice")
        # Of 32 random bits: below the first a token becomes [MASK], and else below the second a random one.
        self._mask_below = np.uint32(config.mask * _LARGEST)
        self._random_below = np.uint32((config.mask + config.random) * _LARGEST)
        if config.whole_word:
            self._continuation_V = tokenizer.continuation
            if not self._continuation_V.any() and config.segmenter is None:
                raise InputError(
                    "masking.whole_word needs a vocabulary with pieces that continue a word, and this one has none: "
                    "give one of pieces, for Chinese also masking.segmenter, or leave it off"
                )

    def __call__(
        self,
        tokens_BT: np.ndarray,
        candidates_BT: np.ndarray,
        length_B: np.ndarray,
        example_B: np.ndarray,
        continues_BT: np.ndarray | bool = False,
    ) -> dict[str, np.ndarray]:
        """Chooses positions among the candidates and replaces what stands there, in `tokens_BT` itself.

        Args:
            tokens_BT: int32, C-contiguous; changed in place.
            candidates_BT: bool, where a token may be chosen: the real tokens but [CLS] and [SEP].
            length_B: number of real tokens, [CLS] and [SEP] included.
            example_B: number of each example; it decides the draws.
            continues_BT: bool, where a token continues a word that the vocabulary does not tell (whole words).

        Returns:
            `masked_positions` (ascending) and `masked_targets`, int32 [B, M], and `masked_weights`, float32 [B, M].
            Slots that are not used come last; in them all three are 0.
        """
        (B, T), M = tokens_BT.shape, self._max_predictions
        # Halves are rounded to even, as Python rounds them in the original.
        count_B = np.rint(length_B * self._config.probability).astype(np.int64)
        count_B = np.minimum(np.maximum(count_B, 1), M)
        random_BT = words(bits(self._order_key, example_B), T)
        if self._config.whole_word:
            inside_BT = self._continuation_V[tokens_BT] | continues_BT
            position_BM, used_BM = self._whole_words(inside_BT, candidates_BT, count_B, random_BT)
        else:
            position_BM, used_BM = self._pieces(candidates_BT, count_B, random_BT)

        tokens, index_BM = tokens_BT.reshape(-1), position_BM + np.arange(0, B * T, T)[:, None]
        target_BM = tokens[index_BM]
        random_BM, choice_BM = np.split(words(bits(self._choice_key, example_B), 2 * M), 2, axis=1)
        random_BM = (random_BM.astype(np.uint64) * self._vocab_size >> np.uint64(32)).astype(np.int32)
        # A slot that is not used points at position 0 and leaves it as it is.
        choice_BM = np.where(used_BM, choice_BM, _LARGEST)
        replacement_BM = np.where(choice_BM < self._random_below, random_BM, target_BM)
        tokens[index_BM] = np.where(choice_BM < self._mask_below, self._mask_id, replacement_BM)
        return {
            "masked_positions": position_BM.astype(np.int32),
            "masked_targets": target_BM * used_BM,
            "masked_weights": used_BM.astype(np.float32),
        }

    def _pieces(self, candidates_BT, count_B, random_BT) -> tuple[np.ndarray, np.ndarray]:
        """Positions of count_B random candidates, or of all where there are fewer: (position_BM, used_BM)."""
        position_BM, used_BM = _shuffle(candidates_BT, random_BT, self._max_predictions)
        used_BM &= np.arange(self._max_predictions) < count_B[:, None]
        position_BM[~used_BM] = candidates_BT.shape[1]
        position_BM.sort(axis=1)
        position_BM[~used_BM] = 0
        return position_BM, used_BM

    def _whole_words(self, inside_BT, candidates_BT, count_B, random_BT) -> tuple[np.ndarray, np.ndarray]:
        """Positions of random whole words of together at most count_B pieces: (position_BM, used_BM)."""
        B, T = candidates_BT.shape
        inside_BT &= candidates_BT
        inside_BT[:, 1:] &= candidates_BT[:, :-1]
        begin_BT, is_word_BT = _shuffle(candidates_BT & ~inside_BT, random_BT, T)
        # The first position from here on that is not inside a word: the word that begins at i ends before end_BT[i +
        # 1].
        end_BT = np.where(np.pad(inside_BT, ((0, 0), (0, 1))), T, np.arange(T + 1))
        end_BT = np.minimum.accumulate(end_BT[:, ::-1], axis=1)[:, ::-1]

        # One word of every row at a time; a word too long for what is left is passed over, as in the original.
        change_BT = np.zeros((B, T + 1), np.int8)  # 1 where a chosen word begins, -1 where it has ended
        row_B, left_B = np.arange(B), count_B.copy()
        for begin_B, is_word_B in zip(begin_BT.T, is_word_BT.T, strict=True):
            if not (is_word_B & (left_B > 0)).any():
                break
            end_B = end_BT[row_B, begin_B + 1]
            chosen_B = is_word_B & (end_B - begin_B <= left_B)
            left_B -= (end_B - begin_B) * chosen_B
            change_BT[row_B, begin_B] += chosen_B
            change_BT[row_B, end_B] -= chosen_B
        position = np.nonzero(np.cumsum(change_BT[:, :T], axis=1))[1]
        used_BM = np.arange(self._max_predictions) < (count_B - left_B)[:, None]
        position_BM = np.zeros(used_BM.shape, np.int64)
        position_BM[used_BM] = position
        return position_BM, used_BM


def _shuffle(allowed_BT: np.ndarray, random_BT: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The first n of each row's positions in random order, the allowed ones first; and which of them are allowed."""
    T = allowed_BT.shape[1]
    # From its highest bit one number holds: not allowed, at random, the position. So it is enough to sort the numbers.
    not_allowed, position = np.uint32(1 << 31), np.uint32((1 << (T - 1).bit_length()) - 1)
    random_BT &= ~(not_allowed | position)
    random_BT |= np.arange(T, dtype=np.uint32)
    random_BT |= (~allowed_BT).astype(np.uint32) * not_allowed
    random_BT.sort(axis=1)
    return (random_BT[:, :n] & position).astype(np.int64), random_BT[:, :n] < not_allowed
