"""The code paths of TPUs give the same results as the others: layouts, activation, the attention kernel."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prelm_jax.models import attention as heads
from prelm_jax.models import cross_entropy, layers
from prelm_jax.models.attention import attention, attention_mask, splash_attention


@pytest.mark.parametrize("family", ["bert", "gpt"])
def test_tpu_code_paths_match_the_reference(family, request, monkeypatch):
    """The loss and its gradients, where heads are split by einsum and GELU and biases have other VJPs."""
    model = dataclasses.replace(request.getfixturevalue(f"tiny_{family}"), num_layers=1).build()
    batch = request.getfixturevalue(f"random_{family}_batch")(0)
    params = jax.jit(model.init_params)(jax.random.key(0))

    def loss(params):
        losses, _, _ = model.loss(params, {}, batch, jax.random.key(1), True)
        return sum(total for total, _ in losses.values())

    expected = jax.jit(jax.value_and_grad(loss))(params)
    for module in (layers, heads, cross_entropy):
        monkeypatch.setattr(module, "backend", lambda: "tpu")
    found = jax.jit(jax.value_and_grad(loss))(params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_the_attention_kernel(causal):
    """Two segments and padding in a row, one and none in the other: outputs and gradients at all real positions."""
    rng = np.random.default_rng(0)
    T = 256
    q, k, v = (jnp.asarray(rng.normal(size=(2, 2, T, 16)), jnp.float32) for _ in range(3))
    segments = np.zeros((2, T), np.int32)
    segments[0, :70], segments[0, 70:201], segments[1] = 1, 2, 1
    real = jnp.asarray(rng.normal(size=(2, 1, T, 1)) * (segments != 0)[:, None, :, None])
    mask = attention_mask(jnp.asarray(segments), causal)

    def value(attend):
        loss = jax.value_and_grad(lambda q, k, v: (real * jnp.sin(attend(q, k, v))).sum(), argnums=(0, 1, 2))
        return jax.jit(loss)(q, k, v)

    found = value(lambda q, k, v: splash_attention(q / 4, k, v, mask.segments_BT, causal))
    expected = value(lambda q, k, v: attention(q, k, v, mask))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
