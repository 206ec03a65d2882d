"""The whole of training gives the losses of PyTorch; `benchmarks/fidelity.py` trains longer."""

import dataclasses
import importlib
import random
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


@pytest.mark.slow
def test_losses_of_a_fine_tuning_are_those_of_pytorch(monkeypatch, tmp_path):
    """Over batches of two widths; the head is new."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    fidelity, rng = importlib.import_module("fidelity"), random.Random(0)
    sentences = [" ".join(rng.choices(tiny.WORDS, k=rng.choice([3, 9, 9, 9, 40]))) for _ in range(24)]
    rows = [f"{sentence}\t{'yes' if 'cat' in sentence.split() else 'no'}\n" for sentence in sentences]
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + "".join(rows))
    tiny.directory(
        tmp_path / "bert", "bert", hidden_size=32, num_layers=2, initializer_range=0.1, max_position_embeddings=64
    )
    settings = fidelity.Settings(steps=STEPS, init_from=tmp_path / "bert", train=tmp_path / "train.tsv")
    run = fidelity.fine_tuning(settings, tmp_path)
    optimizer = dataclasses.replace(run.optimizer, learning_rate=1e-2, b2=0.99, weight_decay=1.0)
    run = dataclasses.replace(run, optimizer=optimizer, batch_size=4, epochs=3)
    losses = fidelity.compare_finetuning(run, tmp_path)
    assert len(losses["ours"]) == 18 and losses["ours"][-1] < losses["ours"][0] - 0.1
    np.testing.assert_allclose(losses["ours"], losses["torch"], atol=2e-5, rtol=0)
