"""Heads of tasks, which read the hidden states of an encoder: labels, choices, tags, spans.

    Label   a class, several independent labels, or a number for a text or a pair of texts
    Choice  one of several texts (or pairs)
    Tags    a tag for each word, by a softmax each or by a conditional random field (CRF)
    Span    the first and the last token of an answer

What a head reads: the summary of a text (BERT's pooled [CLS], GPT-1's extract token), or the states of its tokens.
For an encoder that is not trained, the mix of its layers and LSTMs in both directions may come before the head, as in
ELMo (Peters et al. 2018, 3.2 and 3.3); then a text is summed up by the maximum and the mean over its tokens.

References: google-research/bert, run_classifier.py and run_squad.py; openai/finetune-transformer-lm, train.py;
allennlp, modules/scalar_mix.py and modules/conditional_random_field.py. Divergences:
- Padding can be no answer; in run_squad.py its tokens are part of the softmax.
- Dropout drops elements; in GPT-1's code the texts of a choice share their mask.
- The scores of transitions are zero at first; AllenNLP draws them.
- The mix: none from AllenNLP. bilm-tf's layer norm has epsilon 1e-12 for 1e-13, and it adds λ Σ w² to the task's loss.

Letters of axes besides those of `layers`: R rows of the encoder (examples times texts of each), K positions that are
read, N classes.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from prelm_jax.bounds import FractionBelow1, Layers, Size
from prelm_jax.models.cross_entropy import cross_entropy
from prelm_jax.models.layers import MASKED, Dropout, add_bias, glorot_uniform, truncated_normal
from prelm_jax.models.lstm import lstm, reverse
from prelm_jax.training.contract import Batch

INITIALIZER_RANGE = 0.02  # BERT's and GPT-1's, for the classifier on any encoder.


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """What all heads share."""

    mix: bool = False  # Read a learned mix of all layers instead of the last (for a frozen encoder).
    lstm_size: Size | None = None  # Width of an LSTM in each direction before the head; None: no LSTM.
    lstm_layers: Layers = 1  # Layers of that LSTM.
    dropout: FractionBelow1 = 0.1  # Dropout before the LSTM and before the classifier.

    reads_summary: ClassVar[bool] = False

    @property
    def pools(self) -> bool:
        """Whether the head sums a text up itself."""
        return self.reads_summary and (self.mix or self.lstm_size is not None)

    @property
    def packs(self) -> bool:
        """Whether it reads each of several examples in a row by itself."""
        return self.lstm_size is None and not self.pools


@dataclasses.dataclass(frozen=True)
class Label(HeadConfig):
    """A class, several labels, or a number for a text or a pair of texts."""

    num_labels: Size | None = None  # Number of labels; None: as many as the training file has.
    kind: Literal["label", "labels", "number"] = "label"  # One label; any number of labels; a number (num_labels is 1).
    bias: bool = True  # Add a bias to the scores; GPT-1's published format has none.
    pair: bool = False  # Encode the two texts of an example separately (ELMo's pairs, GPT-1's two orders).

    reads_summary: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class Choice(HeadConfig):
    """One of several texts (or pairs)."""

    kind: ClassVar[Literal["choice"]] = "choice"
    reads_summary: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class Tags(HeadConfig):
    """A tag for each word."""

    num_tags: Size | None = None  # Number of tags; None: as many as the training file has.
    crf: bool = False  # Score sequences of tags by a conditional random field, not each tag by a softmax.

    kind: ClassVar[Literal["tags"]] = "tags"

    @property
    def packs(self) -> bool:
        """Without a CRF, which would run on from a sentence into the next."""
        return super().packs and not self.crf


@dataclasses.dataclass(frozen=True)
class Span(HeadConfig):
    """The first and the last token of an answer; both are 0, [CLS], where there is none."""

    dropout: FractionBelow1 = dataclasses.field(default=0.0, kw_only=True)  # BERT's has none.

    kind: ClassVar[Literal["spans"]] = "spans"

    @property
    def packs(self) -> bool:
        """No: its softmax is over all tokens of a row."""
        return False


Config = Label | Choice | Tags | Span


class ScalarMix(nn.Module):
    """γ Σ softmax(w)_l h_l over the leading axis; at first the mean of the layers.

    layer_norm: normalize each h_l first by a single mean and variance, over all elements of all tokens that are not
    padding, without parameters; the result for a text then depends on the rest of its batch.

    Example: `ScalarMix().apply({"params": params}, jnp.stack(hidden_states), batch["segments"] != 0)`.
    """

    layer_norm: bool = False

    @nn.compact
    def __call__(self, hidden_LBTD: Array, mask_BT: Array) -> Array:
        """[B, T, D]; `mask_BT` is true where there is a token."""
        weights_L = self.param("weights", nn.initializers.zeros, hidden_LBTD.shape[:1])
        gamma = self.param("gamma", nn.initializers.ones, ())
        if self.layer_norm:
            hidden_LBTD = _normalize(hidden_LBTD, mask_BT)
        return gamma * jnp.einsum("L,LBTD->BTD", jax.nn.softmax(weights_L), hidden_LBTD)


def _normalize(hidden_LBTD: Array, mask_BT: Array) -> Array:
    mask_1BT1 = mask_BT.astype(hidden_LBTD.dtype)[None, :, :, None]
    elements = mask_1BT1.sum() * hidden_LBTD.shape[-1]

    def mean(values_LBTD: Array) -> Array:
        return (values_LBTD * mask_1BT1).sum((1, 2, 3), keepdims=True) / elements

    centered_LBTD = hidden_LBTD - mean(hidden_LBTD)
    return centered_LBTD * jax.lax.rsqrt(mean(jnp.square(centered_LBTD)) + 1e-13)


class LSTMWeights(nn.Module):
    """kernel [D + P, 4 · P], the rows of the input first, and bias, of an LSTM whose output is not projected."""

    size: int

    @nn.compact
    def __call__(self, width: int) -> dict[str, Array]:
        kernel = self.param("kernel", glorot_uniform, (width + self.size, 4 * self.size))
        bias = self.param("bias", nn.initializers.zeros, (4 * self.size,))
        return {"kernel": kernel, "bias": bias, "projection": jnp.eye(self.size)}


class BidirectionalLSTM(nn.Module):
    """[R, T, 2 · P], forward half first: an LSTM of width P in each direction, over the first `lengths_R` steps."""

    size: int

    def setup(self):
        self.forward = LSTMWeights(self.size)
        self.backward = LSTMWeights(self.size)

    def __call__(self, x_RTD: Array, lengths_R: Array) -> Array:
        weights = [self.forward(x_RTD.shape[-1]), self.backward(x_RTD.shape[-1])]
        zero = {name: jnp.zeros((x_RTD.shape[0], self.size)) for name in ("cell", "hidden")}
        bound = float("inf")
        inputs = [x_RTD, reverse(x_RTD, lengths_R)]
        (forward_RTP, backward_RTP), _, _ = lstm(weights, inputs, [zero, zero], bound, bound)
        return jnp.concatenate([forward_RTP, reverse(backward_RTP, lengths_R)], -1)


class Classifier(nn.Module):
    """x W + b over the last axis, fp32; without `bias` x W."""

    features: int
    bias: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", truncated_normal(INITIALIZER_RANGE), (x.shape[-1], self.features))
        y = x.reshape(-1, x.shape[-1]).astype(jnp.float32) @ kernel
        if self.bias:
            y = add_bias(y, self.param("bias", nn.initializers.zeros, (self.features,)))
        return y.reshape(*x.shape[:-1], self.features)


class Head(nn.Module):
    """The scores of a task's classes from hidden states, and losses and predictions from scores."""

    config: Config
    pools: bool  # Sum texts up by the maximum and the mean over their tokens.

    def setup(self):
        c = self.config
        if c.mix:
            self.scalar_mix = ScalarMix()
        if c.lstm_size is not None:
            self.lstm = [BidirectionalLSTM(c.lstm_size) for _ in range(c.lstm_layers)]
        self.dropout = Dropout(c.dropout)
        self.classifier = Classifier(self.num_classes, bias=not isinstance(c, Label) or c.bias)
        if isinstance(c, Tags) and c.crf:
            zeros, n = nn.initializers.zeros, self.num_classes
            self.transitions = self.param("transitions", zeros, (n, n))
            self.start_transitions = self.param("start_transitions", zeros, (n,))
            self.end_transitions = self.param("end_transitions", zeros, (n,))

    @property
    def num_classes(self) -> int:
        """N: the columns of the classifier."""
        c = self.config
        if isinstance(c, Choice | Span):
            return 1 if isinstance(c, Choice) else 2
        number = c.num_labels if isinstance(c, Label) else c.num_tags
        if number is None:
            raise ValueError("the number of classes is None; set it to that of the training file")
        return number

    def states(self, hidden: Sequence[Array], mask_RT: Array, train: bool) -> Array:
        """[R, T, D]: the last layer or the mix of all, read by the LSTMs; tokens come first in a row."""
        x_RTD = self.scalar_mix(jnp.stack(list(hidden)), mask_RT) if self.config.mix else hidden[-1]
        if self.config.lstm_size is not None:
            for layer in self.lstm:
                x_RTD = layer(self.dropout(x_RTD, train), mask_RT.sum(1))
        return x_RTD

    def pooled(self, x_RTD: Array, mask_RT: Array) -> Array:
        """[R, 2 · D]: the maximum and the mean over the tokens of a row; 0 for a row without tokens."""
        mask_RT1 = mask_RT[..., None]
        count_R1 = jnp.maximum(1, mask_RT.sum(1)[:, None])
        greatest_RD = jnp.where(mask_RT1, x_RTD, MASKED).max(1)
        mean_RD = jnp.where(mask_RT1, x_RTD, 0).sum(1) / count_R1
        return jnp.concatenate([jnp.where(mask_RT.any(1)[:, None], greatest_RD, 0), mean_RD], -1)

    def text_scores(self, x_BSD: Array, real_BS: Array, train: bool) -> Array:
        """[B, N] of a Label, [B, S] of a Choice, from the vectors of each example's texts.

        Two texts with a Label: vectors that were pooled are compared, [u, v, |u - v|, u · v] (Conneau et al. 2017);
        others are GPT-1's two orders, and added.
        """
        x_BSD = self.dropout(x_BSD, train)
        if isinstance(self.config, Choice):
            return jnp.where(real_BS, self.classifier(x_BSD)[..., 0], MASKED)
        if x_BSD.shape[1] == 2 and self.pools:
            u_BD, v_BD = x_BSD[:, 0], x_BSD[:, 1]
            return self.classifier(jnp.concatenate([u_BD, v_BD, jnp.abs(u_BD - v_BD), u_BD * v_BD], -1))
        return self.classifier(x_BSD.sum(1))

    def __call__(
        self, hidden: Sequence[Array], summary_RKD: Array | None, batch: Batch, texts: int, train: bool
    ) -> Array:
        """The scores, fp32: Label [B, N], Choice [B, S], Tags [B, K, N], Span [B, T, 2] (start and end).

        In packed rows, B of a Label or Choice counts places for examples, K a row. hidden: of all layers, [R, T, D].
        summary_RKD: what a Label or Choice reads that does not pool. batch: texts are rows. texts: S, the number of an
        example's texts.
        """
        mask_RT = batch["segments"] != 0
        if isinstance(self.config, Tags):
            positions_RK = batch["read_positions"]
            index_RK1 = jnp.maximum(0, positions_RK)[..., None]
            read = [jnp.take_along_axis(x_RTD, index_RK1, 1) for x_RTD in (hidden if self.config.mix else hidden[-1:])]
            return self.classifier(self.dropout(self.states(read, positions_RK >= 0, train), train))
        if isinstance(self.config, Span):
            scores_RT2 = self.classifier(self.dropout(self.states(hidden, mask_RT, train), train))
            return jnp.where(mask_RT[..., None], scores_RT2, MASKED)
        if summary_RKD is None:
            summary_RKD = self.pooled(self.states(hidden, mask_RT, train), mask_RT)[:, None]
        return self.text_scores(
            _examples(summary_RKD, texts), _examples(batch["read_positions"][..., None] >= 0, texts)[..., 0], train
        )

    def losses(self, scores: Array, batch: Batch) -> tuple[Array, Array | None]:
        """For each example its loss and the number of its classes that are right, both times their weights, fp32.

        [B · K], but of tags [B]. None instead of the second for what is not right or wrong: a number.
        """
        c, labels, weights = self.config, batch["labels"], batch["label_weights"]
        if not isinstance(c, Tags):
            labels, weights = labels.reshape(-1, *labels.shape[2:]), weights.reshape(-1)
        if isinstance(c, Label) and c.kind == "number":
            return weights * jnp.square(scores[:, 0] - labels), None
        if isinstance(c, Label) and c.kind == "labels":
            nll_BN = jnp.maximum(scores, 0) - scores * labels + jnp.log1p(jnp.exp(-jnp.abs(scores)))
            return weights * nll_BN.sum(1), weights * ((scores > 0) == (labels > 0.5)).sum(1)
        if isinstance(c, Span):
            nll_B2, right_B2 = cross_entropy(scores.swapaxes(1, 2), labels)
            return weights * nll_B2.mean(1), weights * right_B2.mean(1)
        if isinstance(c, Tags) and c.crf:
            mask_BK = batch["read_positions"] >= 0
            right_BK = self.tags(scores, mask_BK) == labels
            # A window whose words count in part counts in this part.
            share_B = weights.sum(1) / jnp.maximum(1, mask_BK.sum(1))
            return share_B * crf_nll(scores, labels, mask_BK, *self._scores_of_transitions()), (weights * right_BK).sum(
                1
            )
        nll, right = cross_entropy(scores, labels)
        return (weights * nll).reshape(len(nll), -1).sum(1), (weights * right).reshape(len(nll), -1).sum(1)

    def tags(self, scores_BKN: Array, mask_BK: Array) -> Array:
        """The best tags, int32 [B, K]: each by itself, or with a CRF the best sequence."""
        if isinstance(self.config, Tags) and self.config.crf:
            return crf_decode(scores_BKN, mask_BK, *self._scores_of_transitions())
        return scores_BKN.argmax(-1).astype(jnp.int32)

    def _scores_of_transitions(self) -> tuple[Array, Array, Array]:
        return self.transitions, self.start_transitions, self.end_transitions


def class_weights(config: Config, batch: Batch) -> Array:
    """The weight of each example's loss, [B]: of its class, its labels, its words or its answer."""
    weights = batch["label_weights"]
    if isinstance(config, Label) and config.kind == "labels":
        weights = weights * batch["labels"].shape[-1]
    return weights.sum(1)


def _examples(x_RKD: Array, texts: int) -> Array:
    """[B · K, S, D]: the vectors of the texts of each example, from the rows of texts that examples share."""
    x_BSKD = x_RKD.reshape(-1, texts, *x_RKD.shape[1:])
    return x_BSKD.swapaxes(1, 2).reshape(-1, texts, x_RKD.shape[-1])


def crf_nll(
    scores_BKN: Array, tags_BK: Array, mask_BK: Array, transitions_NN: Array, start_N: Array, end_N: Array
) -> Array:
    """[B]: negative log-likelihoods of sequences of tags in a linear-chain CRF (Lafferty et al. 2001); 0 for none.

    The score of a sequence is the sum of the scores of its tags, of each transition from a tag to the next, and of its
    first and last tag. mask_BK: true for the words, which come first in a row.
    """

    def step(alpha_BN: Array, word: tuple[Array, Array]) -> tuple[Array, None]:
        scores_BN, mask_B = word
        longer_BN = jax.nn.logsumexp(alpha_BN[:, :, None] + transitions_NN[None], 1) + scores_BN
        return jnp.where(mask_B[:, None], longer_BN, alpha_BN), None

    words = scores_BKN[:, 1:].swapaxes(0, 1), mask_BK[:, 1:].T
    alpha_BN, _ = jax.lax.scan(step, start_N[None] + scores_BKN[:, 0], words)
    normalizer_B = jax.nn.logsumexp(alpha_BN + end_N[None], 1)

    picked_BK = jnp.take_along_axis(scores_BKN, tags_BK[..., None], 2)[..., 0]
    last_B = jnp.take_along_axis(tags_BK, jnp.maximum(0, mask_BK.sum(1) - 1)[:, None], 1)[:, 0]
    score_B = jnp.where(mask_BK, picked_BK, 0).sum(1) + start_N[tags_BK[:, 0]] + end_N[last_B]
    score_B += jnp.where(mask_BK[:, 1:], transitions_NN[tags_BK[:, :-1], tags_BK[:, 1:]], 0).sum(1)
    return jnp.where(mask_BK[:, 0], normalizer_B - score_B, 0)


def crf_decode(scores_BKN: Array, mask_BK: Array, transitions_NN: Array, start_N: Array, end_N: Array) -> Array:
    """The sequence of tags with the highest score of `crf_nll`, int32 [B, K]; anything where the mask is false."""

    def step(best_BN: Array, word: tuple[Array, Array]) -> tuple[Array, Array]:
        scores_BN, mask_B = word
        through_BNN = best_BN[:, :, None] + transitions_NN[None]
        # Padding keeps the scores and points from each tag to itself.
        before_BN = jnp.where(mask_B[:, None], through_BNN.argmax(1), jnp.arange(best_BN.shape[1])[None])
        return jnp.where(mask_B[:, None], through_BNN.max(1) + scores_BN, best_BN), before_BN

    words = scores_BKN[:, 1:].swapaxes(0, 1), mask_BK[:, 1:].T
    best_BN, before_KBN = jax.lax.scan(step, start_N[None] + scores_BKN[:, 0], words)

    def step_back(tag_B: Array, before_BN: Array) -> tuple[Array, Array]:
        return jnp.take_along_axis(before_BN, tag_B[:, None], 1)[:, 0], tag_B

    first_B, later_KB = jax.lax.scan(step_back, (best_BN + end_N[None]).argmax(1), before_KBN, reverse=True)
    return jnp.concatenate([first_B[None], later_KB]).T.astype(jnp.int32)
