"""ScalarMix against its formula in NumPy, token by token."""

import jax
import numpy as np
import pytest

from prelm_jax.models.heads import ScalarMix

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
