"""A pretrained BERT: hidden states, filled masks, pseudo-log-likelihoods."""

from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from prelm_jax.errors import InputError
from prelm_jax.formats.base import LoadedModel
from prelm_jax.inference import batching
from prelm_jax.inference.base import Sample, Scores, SentenceScore
from prelm_jax.inference.batching import Program, Query, Result
from prelm_jax.inference.compiling import compiled
from prelm_jax.inference.transformer import Compute, TransformerPretrained, hidden_states
from prelm_jax.models.bert import BertConfig
from prelm_jax.models.cross_entropy import cross_entropy
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.training.contract import Params

COMPARED = 64  # Logits that `score_program` adds.
FILLED = 100  # Candidates for a mask that a program gives; a second one gives the whole vocabulary.

Masked = tuple[Sequence[int], int]  # The ids of a text with its special tokens, and the position that is masked.
Candidates = tuple[np.ndarray, np.ndarray]  # Probabilities [K], the greatest first, and ids [K].


class BertPretrained(TransformerPretrained[BertConfig]):
    """A BERT with `embed`, `fill` and `score`. A text is one segment: [CLS] text [SEP]."""

    scoring = "pseudo-log-likelihood, within words from left to right"

    def __init__(self, loaded: LoadedModel[BertConfig, Tokenizer]):
        super().__init__(loaded)
        cls_id, sep_id, mask_id = loaded.tokenizer.cls_id, loaded.tokenizer.sep_id, loaded.tokenizer.mask_id
        if cls_id is None or sep_id is None or mask_id is None:
            raise InputError("a BERT needs a vocabulary with [CLS], [SEP] and [MASK]")
        self._before, self._after, self._mask_id = (cls_id,), (sep_id,), mask_id
        self._continues_V = np.zeros(loaded.tokenizer.vocab_size, bool) | getattr(
            loaded.tokenizer, "continuation", False
        )

    def fill(self, text: str, top_k: int = 5) -> list[list[tuple[str, float]]]:
        """For each "[MASK]" in a text the `top_k` most probable tokens, each with its probability.

        load("bert-mini").fill("The [MASK] is returned.", top_k=2)  # [[("list", 0.12), ("value", 0.08)]]
        """
        ids, positions = self.split_at_masks(text)
        if len(ids) > self.room:
            raise InputError(f"the text has {len(ids)} tokens, but the model takes {self.room}")
        (found,) = batching.answers([self.fill_query(ids, positions, top_k)])
        return found

    def split_at_masks(self, text: str) -> tuple[list[int], list[int]]:
        """The ids of a text with "[MASK]" in it, without special tokens around it, and the positions of the masks."""
        first, *rest = self.tokenizer.encode_batch(text.split(self.mask))
        if not rest:
            raise InputError(f'no "{self.mask}" in the text: write it where a token is to be filled in')
        ids, positions = list(first), []
        for chunk in rest:
            positions.append(len(ids))
            ids += [self._mask_id, *chunk]
        return ids, positions

    def fill_query(
        self, ids: Sequence[int], positions: Sequence[int], top_k: int
    ) -> Query[Masked, Candidates, list[list[tuple[str, float]]]]:
        """The `top_k` most probable tokens and their probabilities at positions of ids without special tokens.

        Raises InputError if the model has no masked LM head.
        """
        self._require_masked_lm()

        def finish(found: Sequence[Candidates]) -> list[list[tuple[str, float]]]:
            return [
                [
                    (self.tokenizer.tokens[id], value)
                    for id, value in zip(ids_K.tolist(), values_K.tolist(), strict=True)
                ]
                for values_K, ids_K in ((values[:top_k], ids[:top_k]) for values, ids in found)
            ]

        program = self.fill_program if top_k <= FILLED else self._complete_fill_program
        framed = self.frame(ids)
        return Query(program, [(framed, position + 1) for position in positions], finish)

    @cached_property
    def fill_program(self) -> Program[Masked, Candidates]:
        """The FILLED most probable tokens at a masked position, and their probabilities."""
        return self._fill_program(min(FILLED, self.tokenizer.vocab_size))

    @cached_property
    def _complete_fill_program(self) -> Program[Masked, Candidates]:
        return self._fill_program(self.tokenizer.vocab_size)

    def _fill_program(self, count: int) -> Program[Masked, Candidates]:
        def compute(params: Params, examples: Sequence[Masked], rows: int, length: int) -> list[Candidates]:
            masked = self._masked(examples, rows, length)[:3]
            found = _fill(self.config, self.tokenizer.vocab_size, count, params, *masked)
            values_BK, ids_BK = map(np.asarray, found)
            return list(zip(values_BK, ids_BK, strict=True))[: len(examples)]

        return self._masked_program("fill", compute)

    def sample(self, texts: Sequence[str], count: int) -> list[Sample]:
        """The longest word that is one token, masked: the five most probable tokens in its place."""
        samples = []
        for text in texts[:count]:
            words = text.split()
            ids = self.tokenizer.encode_batch(words)
            fits = [i for i, found in enumerate(ids) if len(found) == 1]
            if not fits or sum(map(len, ids)) > self.room:
                continue
            masked = max(fits, key=lambda i: len(words[i]))
            given = " ".join([*words[:masked], self.mask, *words[masked + 1 :]])
            found = " · ".join(f"{token} {probability:.2f}" for token, probability in self.fill(given)[0])
            samples.append(Sample(given, words[masked], found))
        return samples

    def score(self, texts: Collection[str]) -> Scores:
        """For each text, in order, its pseudo-log-likelihood (Salazar et al. 2020) in nats and its number of tokens.

        Each token is masked in turn, and its natural-log probability added. [CLS] and [SEP] are not counted.
        """
        self._require_masked_lm()
        for window in batching.windows(batching.encode(self.tokenizer, texts, self.room)):
            for found in batching.answers([self.score_query(ids) for ids in window]):
                yield sum(found), len(found)

    def score_sentences(self, texts: Collection[str]) -> Iterator[SentenceScore]:
        """The pseudo-log-likelihood of each text; while a subword is masked, those after it in its word are as well.

        Otherwise the rest of a rare word gives it away (Kauf & Ivanova 2023, "PLL-word-l2r").
        """
        self._require_masked_lm()
        for window in batching.windows(batching.encode(self.tokenizer, texts, self.room)):
            found = batching.answers([self.score_query(ids, within_words=True) for ids in window])
            for ids, values in zip(window, found, strict=True):
                yield SentenceScore(sum(values), len(ids), self._unknown(ids))

    def score_query(self, ids: Sequence[int], within_words: bool = False) -> Query[Masked, np.ndarray, list[float]]:
        """The natural-log probability of each of the ids, without special tokens, where it alone is masked.

        within_words: the rest of its word is masked too. Raises InputError if the model has no masked LM head.
        """
        self._require_masked_lm()
        framed = self.frame(ids)
        masked = self._without_rest if within_words else lambda ids, position: ids
        examples = [(masked(framed, position), position) for position in range(1, len(ids) + 1)]
        return Query(self.score_program, examples, lambda found: [0.0 - float(each[0]) for each in found])

    @cached_property
    def score_program(self) -> Program[Masked, np.ndarray]:
        """The negative log-likelihood of the token at a masked position, and a few logits there.

        The logits are for comparisons of bits: one number has the same ones by chance, now and then.
        """

        def compute(params: Params, examples: Sequence[Masked], rows: int, length: int) -> list[np.ndarray]:
            found_BK = np.asarray(_masked_nll(self.config, params, *self._masked(examples, rows, length)))
            return list(found_BK[: len(examples)])

        return self._masked_program("score", compute)

    def _without_rest(self, framed: Sequence[int], position: int) -> list[int]:
        """Framed ids, with masks instead of those after a position that continue its word."""
        end = position + 1
        while self._continues_V[framed[end]]:
            end += 1
        return [*framed[: position + 1], *[self._mask_id] * (end - position - 1), *framed[end:]]

    def _masked(self, examples: Sequence[Masked], rows: int, length: int) -> tuple[np.ndarray, ...]:
        """(tokens, segments, positions, targets): rows of examples, each with the token at its position masked."""
        tokens_BT, segments_BT = batching.batch([ids for ids, _ in examples], rows, length)
        positions_B = np.zeros(rows, np.int32)
        positions_B[: len(examples)] = [position for _, position in examples]
        targets_B = tokens_BT[np.arange(rows), positions_B]
        tokens_BT[np.arange(len(examples)), positions_B[: len(examples)]] = self._mask_id
        return tokens_BT, segments_BT, positions_B, targets_B

    def _masked_program(self, name: str, compute: Compute[Masked, Result]) -> Program[Masked, Result]:
        def canary(length: int, rng: np.random.Generator) -> Masked:
            return self.random_ids(length, rng), length // 2

        return self.program(name, compute, lambda example: len(example[0]), canary)

    @property
    def has_masked_lm(self) -> bool:
        """Whether the directory had the masked LM head, which `fill` and `score` need."""
        return not self._missing_heads

    @property
    def mask(self) -> str:
        """What stands in a text for a token to be filled in: "[MASK]"."""
        return self.tokenizer.tokens[self._mask_id]

    @property
    def _missing_heads(self) -> list[str]:
        return sorted(path for path in self.missing if path.startswith("masked_lm_"))

    def _require_masked_lm(self) -> None:
        if missing := self._missing_heads:
            raise InputError(f"the model has no masked LM head (its directory lacks {missing[0]})")


@compiled(static=(0, 1, 2), shapes=("b, t", "b, t", "b"))
def _fill(
    config: BertConfig,
    vocab_size: int,
    count: int,
    params: Params,
    tokens_BT: Array,
    segments_BT: Array,
    positions_B: Array,
) -> tuple[Array, Array]:
    """The `count` greatest probabilities at a position of each row, [B, K], and their ids."""
    logits_BV = _masked_lm_logits(config, params, tokens_BT, segments_BT, positions_B)
    return tuple(jax.lax.top_k(jax.nn.softmax(logits_BV)[:, :vocab_size], count))


@compiled(static=(0,), shapes=("b, t", "b, t", "b", "b"))
def _masked_nll(
    config: BertConfig, params: Params, tokens_BT: Array, segments_BT: Array, positions_B: Array, targets_B: Array
) -> Array:
    """[B, 1 + COMPARED]: of a position of each row the negative log-likelihood of the target, and some logits."""
    logits_BV = _masked_lm_logits(config, params, tokens_BT, segments_BT, positions_B)
    return jnp.concatenate([cross_entropy(logits_BV, targets_B)[0][:, None], logits_BV[:, :COMPARED]], 1)


def _masked_lm_logits(
    config: BertConfig, params: Params, tokens_BT: Array, segments_BT: Array, positions_B: Array
) -> Array:
    """[B, padded vocabulary], at a position of each row."""
    with jax.default_matmul_precision("highest"):
        last_BTD = hidden_states(config, params, tokens_BT, segments_BT)[-1]
        masked_BD = jnp.take_along_axis(last_BTD, positions_B[:, None, None], 1)[:, 0]
        return cast("Array", config.build().apply({"params": params}, masked_BD, method="masked_lm_logits"))
