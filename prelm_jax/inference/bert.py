"""A pretrained BERT: hidden states, filled masks, pseudo-log-likelihoods."""

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from prelm_jax.errors import InputError
from prelm_jax.formats.base import LoadedModel
from prelm_jax.inference import batching
from prelm_jax.inference.base import Sample, Scores, SentenceScore
from prelm_jax.inference.transformer import TransformerPretrained, hidden_states
from prelm_jax.models.bert import BertConfig
from prelm_jax.models.cross_entropy import cross_entropy
from prelm_jax.tokenizers.base import Tokenizer
from prelm_jax.training.contract import Params


class BertPretrained(TransformerPretrained[BertConfig]):
    """A BERT with `embed`, `fill` and `score`. A text is one segment: [CLS] text [SEP]."""

    scoring = "pseudo-log-likelihood, within words from left to right"

    def __init__(self, loaded: LoadedModel[BertConfig, Tokenizer]):
        super().__init__(loaded)
        cls_id, sep_id, mask_id = loaded.tokenizer.cls_id, loaded.tokenizer.sep_id, loaded.tokenizer.mask_id
        if cls_id is None or sep_id is None or mask_id is None:
            raise InputError("a BERT needs a vocabulary with [CLS], [SEP] and [MASK]")
        self._before, self._after, self._mask_id = (cls_id,), (sep_id,), mask_id

    def fill(self, text: str, top_k: int = 5) -> list[list[tuple[str, float]]]:
        """For each "[MASK]" in a text the `top_k` most probable tokens, each with its probability.

        load("bert-mini").fill("The [MASK] is returned.", top_k=2)  # [[("list", 0.12), ("value", 0.08)]]
        """
        self._require_masked_lm()
        mask = self.tokenizer.tokens[self._mask_id]
        chunks = self.tokenizer.encode_batch(text.split(mask))
        if len(chunks) == 1:
            raise InputError(f'no "{mask}" in the text: write it where a token is to be filled in')
        ids, positions = [*self._before, *chunks[0]], []
        for chunk in chunks[1:]:
            positions.append(len(ids))
            ids += [self._mask_id, *chunk]
        ids += self._after
        longest = self.config.max_position_embeddings
        if len(ids) > longest:
            raise InputError(f"the text has {len(ids) - 2} tokens, but the model takes {longest - 2}")
        inputs = batching.batch([ids], 1, batching.padded_length(len(ids), longest))
        logits_1MV = _masked_lm_logits(self.config, self.params, *inputs, np.array([positions]))
        probabilities_MV = jax.nn.softmax(logits_1MV[0])[:, : self.tokenizer.vocab_size]
        values_MK, ids_MK = jax.lax.top_k(probabilities_MV, min(top_k, self.tokenizer.vocab_size))
        return [
            [(self.tokenizer.tokens[id], float(value)) for id, value in zip(ids_K, values_K, strict=True)]
            for ids_K, values_K in zip(np.asarray(ids_MK), np.asarray(values_MK), strict=True)
        ]

    def sample(self, texts: Sequence[str], count: int) -> list[Sample]:
        """The longest word that is one token, masked: the five most probable tokens in its place."""
        mask, room = self.tokenizer.tokens[self._mask_id], self.config.max_position_embeddings - 2
        samples = []
        for text in texts[:count]:
            words = text.split()
            ids = self.tokenizer.encode_batch(words)
            fits = [i for i, found in enumerate(ids) if len(found) == 1]
            if not fits or sum(map(len, ids)) > room:
                continue
            masked = max(fits, key=lambda i: len(words[i]))
            given = " ".join([*words[:masked], mask, *words[masked + 1 :]])
            found = ", ".join(f"{token} {probability:.2f}" for token, probability in self.fill(given)[0])
            samples.append(Sample(given, words[masked], found))
        return samples

    def score(self, texts: Collection[str]) -> Scores:
        """For each text, in order, its pseudo-log-likelihood (Salazar et al. 2020) in nats and its number of tokens.

        Each token is masked in turn, and its natural-log probability added. [CLS] and [SEP] are not counted.
        """
        for total, ids in self._score(texts):
            yield total, max(0, len(ids) - 2)

    def score_sentences(self, texts: Collection[str]) -> Iterator[SentenceScore]:
        """The pseudo-log-likelihood of each text; while a subword is masked, those after it in its word are as well.

        Otherwise the rest of a rare word gives it away (Kauf & Ivanova 2023, "PLL-word-l2r").
        """
        for total, ids in self._score(texts, within_words=True):
            yield SentenceScore(total, max(0, len(ids) - 2), self._unknown(ids))

    def _score(self, texts: Collection[str], within_words: bool = False) -> Iterator[tuple[float, list[int]]]:
        """The pseudo-log-likelihood of each text, and its ids. `within_words`: mask the rest of a word too."""
        self._require_masked_lm()
        for window in batching.windows(self._encode(texts)):
            yield from zip(self._pseudo_log_likelihoods(window, within_words), window, strict=True)

    def _pseudo_log_likelihoods(self, encoded: list[list[int]], within_words: bool) -> list[float]:
        continues_V = np.zeros(self.tokenizer.vocab_size, bool)
        if within_words:
            continues_V |= getattr(self.tokenizer, "continuation", False)

        def masked(ids: list[int], position: int) -> list[int]:
            end = position + 1
            while end < len(ids) - 1 and continues_V[ids[end]]:
                end += 1
            return [*ids[:position], *[self._mask_id] * (end - position), *ids[end:]]

        examples = (
            ((i, position, ids[position]), masked(ids, position))
            for i, ids in enumerate(encoded)
            for position in range(1, len(ids) - 1)
        )
        sums = [0.0] * len(encoded)
        for tags, *inputs in batching.batches(examples, self.config.max_position_embeddings):
            positions_B1, targets_B1 = np.zeros((2, len(inputs[0]), 1), np.int32)
            lines, positions_B1[: len(tags), 0], targets_B1[: len(tags), 0] = zip(*tags, strict=True)
            logits_B1V = _masked_lm_logits(self.config, self.params, *inputs, positions_B1)
            nll_B1, _ = _cross_entropy(logits_B1V, targets_B1)
            for i, nll in zip(lines, np.asarray(nll_B1)[:, 0], strict=False):
                sums[i] -= float(nll)
        return sums

    def _encode(self, texts: Collection[str], truncate: bool = False) -> Iterator[list[int]]:
        """The ids of each text with [CLS] and [SEP]; none for a blank text."""
        for ids in batching.encode(self.tokenizer, texts, self.config.max_position_embeddings - 2, truncate):
            yield [*self._before, *ids, *self._after] if ids else []

    def _require_masked_lm(self) -> None:
        if missing := sorted(path for path in self.missing if path.startswith("masked_lm_")):
            raise InputError(f"the model has no masked LM head (its directory lacks {missing[0]})")


@partial(jax.jit, static_argnums=0)
def _masked_lm_logits(
    config: BertConfig, params: Params, tokens_BT: Array, segments_BT: Array, positions_BM: Array
) -> Array:
    """[B, M, padded vocabulary], at M positions of each row."""
    with jax.default_matmul_precision("highest"):
        last_BTD = hidden_states(config, params, tokens_BT, segments_BT)[-1]
        masked_BMD = jnp.take_along_axis(last_BTD, positions_BM[..., None], 1)
        return cast("Array", config.build().apply({"params": params}, masked_BMD, method="masked_lm_logits"))


_cross_entropy = jax.jit(cross_entropy)
