"""Masked language modeling: which tokens are to be predicted, and what the model reads in their place.

BERT, appendix A.1 (Devlin et al., 2019); google-research/bert, create_masked_lm_predictions in
create_pretraining_data.py. As there, the number of predictions counts the special tokens too, a random token is drawn
from the whole vocabulary, and the 80/10/10 choice is made for each subword, also in whole words.

Divergences: masks are drawn for each example, where the original draws ten masks for each text; a subword right after a
special token, where a segment was cut inside a word, is a word of its own, where the original joins it to the word
before the special token.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from prelm_jax.bounds import Bounds, Fraction, OutOfBounds
from prelm_jax.data.batches import special_id
from prelm_jax.data.randomness import bits, key, random_uint32
from prelm_jax.errors import InputError
from prelm_jax.tokenizers.base import Tokenizer

Chosen = tuple[np.ndarray, np.ndarray]  # position_BM, and used_BM: false for slots without a position

EVALUATED_PROBABILITY = 0.15  # Of the tokens of an evaluated text, as in the paper (A.1).

_LARGEST = np.uint32(2**32 - 1)


@dataclass(frozen=True)
class MaskingConfig:
    """Selects `probability` × length tokens to predict and replaces most of them."""

    # Fraction of a sequence's tokens to predict; special tokens count towards its length. Evaluations predict 15 %.
    probability: Annotated[Fraction, Bounds(above=0)] = 0.15
    mask: Fraction = 0.8  # Fraction of the predicted tokens that the model reads as [MASK].
    random: Fraction = 0.1  # Fraction that it reads as a random token; the rest is left as it is.
    whole_word: bool = False  # Predict all subwords of a word or none (needs a vocabulary with subwords).
    # Word segmenter for Chinese, where every character is a token (needs whole_word and the extra "chinese").
    segmenter: Literal["jieba"] | None = None

    def check_together(self) -> None:
        """Raises OutOfBounds for fractions of more than all, and for a segmenter without whole words."""
        if self.mask + self.random > 1:
            raise OutOfBounds(("random",), self.random, f"must be at most 1 in sum with mask, {self.mask}")
        if self.segmenter is not None and not self.whole_word:
            raise OutOfBounds(("segmenter",), self.segmenter, "is for whole words: turn whole_word on")

    def build(self, tokenizer: Tokenizer, max_predictions: int, seed: int) -> "Masking":
        """The masking of a run, for at most `max_predictions` (M) tokens a row."""
        return Masking(self, tokenizer, max_predictions, seed)


class Masking:
    """Masks the tokens of examples: a pure function of (seed, example)."""

    def __init__(self, config: MaskingConfig, tokenizer: Tokenizer, max_predictions: int, seed: int):
        self._config = config
        self._max_predictions = max_predictions
        self._mask_id = np.int32(special_id(tokenizer, "mask", "masked language models"))
        self._vocab_size = np.uint64(tokenizer.vocab_size)
        self._order_key, self._choice_key = key(seed, "masking: order"), key(seed, "masking: choice")
        # 32 random bits below the first threshold make a token [MASK], below the second a random token.
        self._mask_below = np.uint32(config.mask * _LARGEST)
        self._random_below = np.uint32((config.mask + config.random) * _LARGEST)
        self._continuation_V = None
        if config.whole_word:
            # bool [V]: the tokens that continue a word. Only vocabularies of subwords have it.
            self._continuation_V = getattr(tokenizer, "continuation", np.zeros(tokenizer.vocab_size, bool))
            if not self._continuation_V.any() and config.segmenter is None:
                raise InputError(
                    "masking.whole_word needs a vocabulary with subwords that continue a word, and this one has none: "
                    "choose one that has, set masking.segmenter (Chinese), or turn masking.whole_word off"
                )

    def count(self, length_B: np.ndarray) -> np.ndarray:
        """The number of tokens to predict (int64) in sequences of these lengths, [CLS] and [SEP] included; at most M.

        Masking predicts fewer where there are fewer candidates, or only words with more tokens than are left to choose.
        """
        # Halves are rounded to even, like Python's round() in the original.
        count_B = np.rint(length_B * self._config.probability).astype(np.int64)
        return np.minimum(np.maximum(count_B, 1), self._max_predictions)

    def __call__(
        self,
        tokens_BT: np.ndarray,
        candidates_BT: np.ndarray,
        length_B: np.ndarray,
        example_B: np.ndarray,
        continues_BT: np.ndarray | bool = False,
    ) -> dict[str, np.ndarray]:
        """Chooses positions among the candidates and replaces their tokens in `tokens_BT` itself.

        Args:
            tokens_BT: int32, C-contiguous; changed in place.
            candidates_BT: bool, the positions that may be chosen: real tokens but [CLS] and [SEP].
            length_B: number of real tokens, [CLS] and [SEP] included.
            example_B: number of each example; it determines the random draws.
            continues_BT: bool, where a token continues a word although the vocabulary does not say so (Chinese).

        Returns:
            `masked_positions` (ascending) and `masked_targets`, int32 [B, M], and `masked_weights`, float32 [B, M].
            Unused slots come last; all three are 0 there.
        """
        (B, T), M = tokens_BT.shape, self._max_predictions
        count_B = self.count(length_B)
        random_BT = random_uint32(bits(self._order_key, example_B), T)
        if self._continuation_V is None:
            position_BM, used_BM = self._choose_tokens(candidates_BT, count_B, random_BT)
        else:
            continues_BT = self._continuation_V[tokens_BT] | continues_BT
            position_BM, used_BM = self._choose_words(continues_BT, candidates_BT, count_B, random_BT)

        # A view of all rows end to end, and the indices of the chosen positions in it.
        tokens, index_BM = tokens_BT.reshape(-1), position_BM + np.arange(0, B * T, T)[:, None]
        target_BM = tokens[index_BM]
        random_BM, choice_BM = np.split(random_uint32(bits(self._choice_key, example_B), 2 * M), 2, axis=1)
        # 32 random bits times V, divided by 2^32: a random id.
        random_BM = (random_BM.astype(np.uint64) * self._vocab_size >> np.uint64(32)).astype(np.int32)
        # An unused slot points at position 0 and must leave its token as it is.
        choice_BM = np.where(used_BM, choice_BM, _LARGEST)
        replacement_BM = np.where(choice_BM < self._random_below, random_BM, target_BM)
        tokens[index_BM] = np.where(choice_BM < self._mask_below, self._mask_id, replacement_BM)
        return {
            "masked_positions": position_BM.astype(np.int32),
            "masked_targets": target_BM * used_BM,
            "masked_weights": used_BM.astype(np.float32),
        }

    def _choose_tokens(self, candidates_BT: np.ndarray, count_B: np.ndarray, random_BT: np.ndarray) -> Chosen:
        """Positions of count_B random candidates, or of all where there are fewer."""
        position_BM, used_BM = _shuffle(candidates_BT, random_BT, self._max_predictions)
        used_BM &= np.arange(self._max_predictions) < count_B[:, None]
        # Unused slots are sorted to the end.
        position_BM[~used_BM] = candidates_BT.shape[1]
        position_BM.sort(axis=1)
        position_BM[~used_BM] = 0
        return position_BM, used_BM

    def _choose_words(
        self, continues_BT: np.ndarray, candidates_BT: np.ndarray, count_B: np.ndarray, random_BT: np.ndarray
    ) -> Chosen:
        """Positions of random whole words that have at most count_B tokens together.

        One row with count 3, in which the word at 4 is drawn before the word at 1:

            position     0      1   2         3       4    5
            token        [CLS]  un  ##believ  ##able  day  [SEP]
            continues    0      0   1         1       0    0
            next_begin   0      1   4         4       4    5      the first position from here on that begins a word
            word at 4    ends at next_begin[5] = 5: 1 token of 3, chosen, 2 left
            word at 1    ends at next_begin[2] = 4: 3 tokens of 2, passed over
            change       0      0   0         0       1    -1     its running sum is 1 at chosen positions: at 4
        """
        B, T = candidates_BT.shape
        # A word does not continue over a special token.
        continues_BT &= candidates_BT
        continues_BT[:, 1:] &= candidates_BT[:, :-1]
        begin_BT, is_word_BT = _shuffle(candidates_BT & ~continues_BT, random_BT, T)
        next_begin_BT = np.where(np.pad(continues_BT, ((0, 0), (0, 1))), T, np.arange(T + 1))
        next_begin_BT = np.minimum.accumulate(next_begin_BT[:, ::-1], axis=1)[:, ::-1]

        # One word of every row at a time; a word too long for what is left is passed over, as in the original.
        change_BT = np.zeros((B, T + 1), np.int8)
        row_B, left_B = np.arange(B), count_B.copy()
        for begin_B, is_word_B in zip(begin_BT.T, is_word_BT.T, strict=True):
            if not (is_word_B & (left_B > 0)).any():
                break
            end_B = next_begin_BT[row_B, begin_B + 1]
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
    """The first n of each row's positions in random order, allowed ones first; and whether each of them is allowed.

    Overwrites `random_BT`, because sorting single numbers is fastest: in each the highest bit says that the position is
    not allowed, the lowest bits are the position, and the bits between are random. With T = 4:

        position 2, allowed       0 <random> 10
        position 3, not allowed   1 <random> 11    sorted after all that are allowed
    """
    T = allowed_BT.shape[1]
    not_allowed, position = np.uint32(1 << 31), np.uint32((1 << (T - 1).bit_length()) - 1)
    random_BT &= ~(not_allowed | position)
    random_BT |= np.arange(T, dtype=np.uint32)
    random_BT |= (~allowed_BT).astype(np.uint32) * not_allowed
    random_BT.sort(axis=1)
    return (random_BT[:, :n] & position).astype(np.int64), random_BT[:, :n] < not_allowed
