"""Optimizers equal ten lines of NumPy, schedules their values at named steps; what decays."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from prelm_jax.training.muon import Muon
from prelm_jax.training.optimizer import Adagrad, AdamW, decays
from prelm_jax.training.parameters import path_name


@pytest.mark.parametrize("bias_correction", ["moments", "rate", "none"])
def test_adamw_equals_numpy(bias_correction):
    """Sources of the other two: google-research/bert, optimization.py; openai/finetune-transformer-lm, opt.py."""
    config = AdamW(
        learning_rate=0.1, warmup_steps=2, decay_steps=10, eps=1e-6, weight_decay=0.01, bias_correction=bias_correction
    )
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 2)).astype(np.float32), "bias": rng.normal(size=2).astype(np.float32)}
    optimizer = config.build(())
    state, ours = optimizer.init(params), params
    reference = {name: x.astype(np.float64) for name, x in params.items()}
    m, v = ({name: np.zeros_like(x) for name, x in reference.items()} for _ in range(2))
    for step, rate in enumerate([0.0, 0.05, 0.08, 0.07]):
        gradients = {name: rng.normal(size=x.shape).astype(np.float32) for name, x in params.items()}
        updates, state = optimizer.update(gradients, state, ours)
        ours = optax.apply_updates(ours, updates)

        norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients.values()))
        for name, gradient in gradients.items():
            clipped = gradient / max(1, norm)
            m[name] = 0.9 * m[name] + 0.1 * clipped
            v[name] = 0.999 * v[name] + 0.001 * clipped**2
            correction = 1 - 0.9 ** (step + 1), 1 - 0.999 ** (step + 1)
            of_moments = correction if bias_correction == "moments" else (1, 1)
            update = m[name] / of_moments[0] / (np.sqrt(v[name] / of_moments[1]) + 1e-6)
            if name == "kernel":
                update = update + 0.01 * reference[name]
            of_rate = np.sqrt(correction[1]) / correction[0] if bias_correction == "rate" else 1
            reference[name] = reference[name] - rate * of_rate * update
            np.testing.assert_allclose(ours[name], reference[name], rtol=2e-5, atol=1e-6)


def test_adagrad_equals_numpy():
    """Reference: bilm-tf, training.py, with tf.train.AdagradOptimizer; some steps are clipped and some are not."""
    config = Adagrad(learning_rate=0.2, unroll_steps=20)
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 2)).astype(np.float32), "bias": rng.normal(size=2).astype(np.float32)}
    optimizer = config.build(())
    state, ours = optimizer.init(params), params
    reference = {name: x.astype(np.float64) for name, x in params.items()}
    accumulators = {name: np.ones_like(x) for name, x in reference.items()}
    norms = []
    for scale in (0.05, 1.0, 0.0, 0.2):
        gradients = {name: (scale * rng.normal(size=x.shape)).astype(np.float32) for name, x in params.items()}
        updates, state = optimizer.update(gradients, state, ours)
        ours = optax.apply_updates(ours, updates)
        norms.append(np.sqrt(sum(((20 * g.astype(np.float64)) ** 2).sum() for g in gradients.values())))
        for name, gradient in gradients.items():
            clipped = 20 * gradient.astype(np.float64) * min(1, 10 / max(norms[-1], 1e-9))
            accumulators[name] += clipped**2
            reference[name] -= 0.2 * clipped / np.sqrt(accumulators[name])
            np.testing.assert_allclose(ours[name], reference[name], rtol=1e-5, atol=1e-6)
    assert min(norms) < 10 < max(norms)
    assert config.schedule(0) == config.schedule(10**6) == np.float32(0.2)


def test_schedule_at_named_steps():
    """BERT's: the decay counts from step 0, the warm-up replaces it; zero at the end and past it."""
    schedule = AdamW(learning_rate=1e-4, warmup_steps=10_000, decay_steps=1_000_000).schedule
    expected = {0: 0.0, 1: 1e-8, 5000: 5e-5, 9999: 9.999e-5, 10_000: 0.99e-4, 500_000: 5e-5, 1_000_000: 0, 1_100_000: 0}
    for step, rate in expected.items():
        np.testing.assert_allclose(schedule(step), rate, rtol=1e-5)


def test_cosine_at_named_steps():
    """GPT-1's: over all steps, including the warm-up; half the rate halfway, zero at the end and past it."""
    schedule = AdamW(learning_rate=2.5e-4, warmup_steps=2000, decay_steps=100_000, decay="cosine").schedule
    expected = {0: 0.0, 1000: 1.25e-4, 2000: 2.4975e-4, 50_000: 1.25e-4, 75_000: 3.6612e-5, 100_000: 0, 110_000: 0}
    for step, rate in expected.items():
        np.testing.assert_allclose(schedule(step), rate, rtol=1e-4, atol=1e-12)


def test_trapezoid_and_no_decay_at_named_steps():
    """Constant from the end of the warm-up; the trapezoid falls over the last fifth of its steps."""
    constant = AdamW(learning_rate=1e-3, warmup_steps=10, decay_steps=100, decay="none")
    trapezoid = dataclasses.replace(constant, decay="trapezoid")
    for step, rate in {0: 0.0, 5: 5e-4, 10: 1e-3, 79: 1e-3, 80: 1e-3, 90: 5e-4, 99: 5e-5, 100: 0, 120: 0}.items():
        np.testing.assert_allclose(trapezoid.schedule(step), rate, rtol=1e-5, atol=1e-10)
        np.testing.assert_allclose(constant.schedule(step), rate if step < 10 else 1e-3, rtol=1e-5)


@pytest.mark.parametrize("decay", ["linear", "cosine", "trapezoid"])
@pytest.mark.parametrize("muon", [False, True])
def test_a_schedule_that_ends_at_another_step(muon, decay):
    """The schedule of an optimizer planned for that many steps; all else stays."""
    options = {"learning_rate": 0.1, "warmup_steps": 2, "b1": 0.8, "decay": decay}
    kind = functools.partial(Muon, matrix_learning_rate=0.2) if muon else AdamW
    config = kind(**options, decay_steps=40).ending_at(60)
    assert config == kind(**options, decay_steps=60)
    assert config.schedule(59) > 0 == config.schedule(60)


def test_a_constant_rate_has_no_end():
    config = Adagrad(learning_rate=0.2, unroll_steps=8)
    assert config.ending_at(60) == config


def test_what_decays(tiny_bert):
    """Everything but biases and norms; the reference decays embeddings, pooler and NSP weights as well."""
    params = jax.eval_shape(tiny_bert.build().init_params, jax.random.key(0))
    decayed = {path_name(path): decay for path, decay in jax.tree_util.tree_leaves_with_path(decays(params))}
    for name in ("word_embeddings/embedding", "pooler/kernel", "next_sentence/kernel", "encoder/layer_0/output/kernel"):
        assert decayed[name]
    for name in ("masked_lm_bias", "pooler/bias", "embeddings_layer_norm/scale", "encoder/layer_1/layer_norm/bias"):
        assert not decayed[name]
    assert sum(decayed.values()) == 3 + 6 * 2 + 3
