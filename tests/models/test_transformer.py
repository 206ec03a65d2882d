"""The code paths of TPUs give the same results as the others: attention, activation, biases."""

import dataclasses

import jax
import numpy as np
import pytest

from prelm_jax.models import attention, attention_kernel, cross_entropy, layers


@pytest.mark.parametrize("family", ["bert", "gpt"])
def test_tpu_code_paths_match_the_reference(family, request, monkeypatch):
    """The loss and its gradients, where attention is a kernel and GELU and biases have other VJPs."""
    model = dataclasses.replace(request.getfixturevalue(f"tiny_{family}"), num_layers=1).build()
    batch = request.getfixturevalue(f"random_{family}_batch")(0)
    params = jax.jit(model.init_params)(jax.random.key(0))

    def loss(params):
        losses, _, _ = model.loss(params, {}, batch, jax.random.key(1), True)
        return sum(total for total, _ in losses.values())

    expected = jax.jit(jax.value_and_grad(loss))(params)
    assert attention_kernel.backend() == "cpu"
    for module in (layers, attention, cross_entropy):
        monkeypatch.setattr(module, "backend", lambda: "tpu")
    found = jax.jit(jax.value_and_grad(loss))(params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)
