"""The whole of training gives the losses of PyTorch; `benchmarks/fidelity.py` trains longer."""

import dataclasses
import importlib
from pathlib import Path

import numpy as np
import pytest
import tiny

from prelm_jax.training.optimizer import AdamW

STEPS = 20
PLAIN = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
SIZES = {"hidden_size": 32, "num_layers": 2, "initializer_range": 0.1}
MODELS = {
    "bert": SIZES | PLAIN | {"intermediate_size": 64},
    "openai-gpt": SIZES | PLAIN | {"embedding_dropout": 0.0},
    "elmo": {"dropout": 0.0},
}
# Large enough that each option shows within so few steps; the gradient is clipped in some of them.
ADAMW = AdamW(1e-2, 5, STEPS, b2=0.99, eps=1e-6, weight_decay=1.0, clip_norm=1.5)
OPTIMIZERS = {
    "bert": dataclasses.replace(ADAMW, bias_correction="none"),
    "openai-gpt": dataclasses.replace(ADAMW, bias_correction="rate", decay="cosine"),
}


@pytest.mark.parametrize("family", ["bert", "openai-gpt", pytest.param("elmo", marks=pytest.mark.slow)])
def test_losses_are_those_of_pytorch(family, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    (tmp_path / "corpus.txt").write_text(tiny.text(seed=0))
    run = tiny.with_loop(tiny.FAMILIES[family](), steps=STEPS, log_every=1, save_every=STEPS)
    run = dataclasses.replace(
        run,
        corpus=(str(tmp_path / "corpus.txt"),),
        held_out=0.0,
        model=dataclasses.replace(run.model, **MODELS[family]),
        optimizer=OPTIMIZERS.get(family, run.optimizer),
    )
    losses = importlib.import_module("fidelity").compare(run, tmp_path)
    assert len(losses["ours"]) == STEPS
    assert losses["ours"][-1] < losses["ours"][0] - 0.1
    np.testing.assert_allclose(losses["ours"], losses["torch"], atol=2e-5, rtol=0)
