"""Parts of heads: the scalar mix against its formula, LSTMs against torch, CRFs against all sequences of tags."""

import itertools

import jax
import numpy as np
import pytest
import torch

from prelm_jax.models.heads import BidirectionalLSTM, ScalarMix, crf_decode, crf_nll

HIDDEN = np.random.default_rng(0).normal(1, 2, (3, 2, 4, 6)).astype(np.float32)
MASK = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize(
    ("weights", "gamma"), [((0, 0, 0), 1.0), ((0.1, 0.3, 0.5), 1.1), ((-5, 2, 40), 0.88)], ids=["mean", "mild", "one"]
)
def test_a_mix_is_its_formula(weights, gamma, layer_norm):
    mix = ScalarMix(layer_norm)
    params = {"weights": np.array(weights, np.float32), "gamma": np.float32(gamma)}
    found = mix.apply({"params": params}, HIDDEN, MASK)
    assert found.shape == (2, 4, 6)
    shares = np.exp(np.array(weights, float)) / np.exp(np.array(weights, float)).sum()
    layers = HIDDEN.astype(float)
    if layer_norm:
        tokens = [layer[MASK] for layer in layers]  # Of each layer the tokens that are there, [5, 6].
        layers = [(layer - t.mean()) / np.sqrt(t.var() + 1e-13) for layer, t in zip(layers, tokens, strict=True)]
    expected = gamma * sum(share * layer for share, layer in zip(shares, layers, strict=True))
    np.testing.assert_allclose(found[MASK], expected[MASK], rtol=1e-5, atol=1e-6)


def test_a_fresh_mix_is_the_mean():
    mix = ScalarMix()
    params = mix.init(jax.random.key(0), HIDDEN, MASK)["params"]
    assert jax.tree.map(np.shape, params) == {"weights": (3,), "gamma": ()}
    np.testing.assert_allclose(mix.apply({"params": params}, HIDDEN, MASK), HIDDEN.mean(0), atol=1e-6)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_padding_does_not_reach_tokens(layer_norm):
    params = {"weights": np.array([0.1, 0.2, -0.3], np.float32), "gamma": np.float32(1)}
    other = np.where(MASK[None, ..., None], HIDDEN, 100)
    found, expected = (ScalarMix(layer_norm).apply({"params": params}, x, MASK)[MASK] for x in (other, HIDDEN))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


# Conditional random fields, against all sequences of tags.

RNG = np.random.default_rng(1)
TAGS, WORDS = 3, 4
SCORES = RNG.normal(size=(5, WORDS, TAGS)).astype(np.float32)
TRANSITIONS = [RNG.normal(size=shape).astype(np.float32) for shape in ((TAGS, TAGS), (TAGS,), (TAGS,))]
LENGTHS = np.array([4, 3, 2, 1, 0])
KNOWN = np.arange(WORDS)[None] < LENGTHS[:, None]


def score(sequence, scores, transitions, start, end):
    emitted = sum(scores[i, tag] for i, tag in enumerate(sequence))
    return (
        start[sequence[0]]
        + emitted
        + sum(map(lambda a, b: transitions[a, b], sequence, sequence[1:]))
        + end[sequence[-1]]
    )


def all_scores(scores, length):
    sequences = list(itertools.product(range(TAGS), repeat=int(length)))
    return sequences, np.array([score(sequence, scores, *TRANSITIONS) for sequence in sequences])


def test_crf_against_all_sequences():
    tags = RNG.integers(0, TAGS, (5, WORDS))
    nll = jax.jit(crf_nll)(SCORES, tags, KNOWN, *TRANSITIONS)
    best = jax.jit(crf_decode)(SCORES, KNOWN, *TRANSITIONS)
    for i, length in enumerate(LENGTHS[:-1]):
        sequences, scores = all_scores(SCORES[i], length)
        normalizer = np.log(np.exp(scores.astype(float)).sum())
        expected = normalizer - score(tags[i, :length], SCORES[i], *TRANSITIONS)
        np.testing.assert_allclose(nll[i], expected, rtol=1e-5)
        assert tuple(best[i, :length].tolist()) == sequences[int(scores.argmax())]
    assert nll[4] == 0  # A row of padding.


def test_the_gradient_of_a_crf_is_its_marginals_less_the_tags():
    tags = np.zeros((5, WORDS), int)
    gradient = jax.jit(jax.grad(lambda *x: crf_nll(*x).sum()))(SCORES, tags, KNOWN, *TRANSITIONS)
    sequences, scores = all_scores(SCORES[1], LENGTHS[1])
    probabilities = np.exp(scores) / np.exp(scores).sum()
    for word in range(3):
        for tag in range(TAGS):
            marginal = sum(p for p, sequence in zip(probabilities, sequences, strict=True) if sequence[word] == tag)
            np.testing.assert_allclose(gradient[1, word, tag], marginal - (tag == 0), atol=1e-5)
    assert (np.asarray(gradient)[~KNOWN] == 0).all()


def test_a_bidirectional_lstm_is_torchs():
    """Rows of unequal length, packed there; torch's gates are i, f, g, o, and here 1 is added to the forget gate."""
    size, width = 3, 5
    module = BidirectionalLSTM(size)
    x = RNG.normal(size=(4, WORDS, width)).astype(np.float32)
    lengths = np.array([4, 3, 2, 1])
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, lengths)["params"]
    params = jax.tree.map(lambda leaf: RNG.normal(size=leaf.shape).astype(np.float32), shapes)
    theirs = torch.nn.LSTM(width, size, batch_first=True, bidirectional=True)
    for direction, suffix in (("forward", ""), ("backward", "_reverse")):
        order = [0, 2, 1, 3]
        gates = np.split(params[direction]["kernel"], 4, 1)
        bias = np.split(params[direction]["bias"].copy(), 4)
        bias[2] = bias[2] + 1
        kernel = np.concatenate([gates[i] for i in order], 1).T
        values = {
            "weight_ih": kernel[:, :width],
            "weight_hh": kernel[:, width:],
            "bias_ih": np.concatenate([bias[i] for i in order]),
            "bias_hh": np.zeros(4 * size),
        }
        for name, value in values.items():
            getattr(theirs, f"{name}_l0{suffix}").data = torch.tensor(value, dtype=torch.float32)
    packed = torch.nn.utils.rnn.pack_padded_sequence(torch.tensor(x), lengths, batch_first=True)
    expected, _ = torch.nn.utils.rnn.pad_packed_sequence(theirs(packed)[0], batch_first=True)
    found = np.asarray(jax.jit(module.apply)({"params": params}, x, lengths))
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(found[row, :length], expected[row, :length].detach().numpy(), atol=2e-6)
