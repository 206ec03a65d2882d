"""Every experiment fulfills one contract; golden files show a changed default as text, in a review.

After an intended change, update the golden files with
PRELM_UPDATE_GOLDEN=1 python -m pytest tests/test_experiments.py
"""

import dataclasses
import importlib.util
import inspect
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from prelm_jax.corpus.store import Store
from prelm_jax.planning.plan import TokenizerOfSize
from prelm_jax.pretraining import CIRCUMSTANCE, DATA, Run
from prelm_jax.training import loop
from prelm_jax.training.optimizer import decays
from prelm_jax.training.parameters import path_name
from prelm_jax.training.sharding import MeshConfig, partition

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"


def experiments() -> dict:
    """Every experiment on disk, by `file-function`."""
    found = {}
    for path in sorted((ROOT / "experiments").glob("*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == path.stem and not name.startswith("_"):
                found[f"{path.stem}-{name}"] = function
    return found


EXPERIMENTS = experiments()


def build(run: Run, **changes: object):
    """The model with its expected vocabulary size."""
    model = dataclasses.replace(run.model, vocab_size=run.tokenizer.expected_vocab_size, **changes)
    return model.build(jnp.dtype(run.precision))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_one_step_lowers_on_four_devices(name):
    """Batch, model, optimizer and mesh fit together; nothing is allocated or compiled.

    Two layers are enough, for all layers of a model are alike.
    """
    function = EXPERIMENTS[name]
    assert f"prelm pretrain experiments/{name.replace('-', '.py:', 1)}" in inspect.getdoc(function)
    run = function()
    model = build(run, num_layers=min(run.model.num_layers, 2))
    assert type(run.data) is DATA[run.model.model_type]
    tokenizer = TokenizerOfSize(run.tokenizer.expected_vocab_size)
    store = Store.from_documents([[[5, 6, 7]] * 400, [[8, 9]] * 400], tokenizer.tokens)
    batches = run.data.build(store, tokenizer, run.batch_size, run.seed)
    example = batches[0]
    model.check(example)
    mesh = MeshConfig(devices=4).build()
    with jax.set_mesh(mesh):
        state = loop.abstract_state(model, run.optimizer, run.batch_size, mesh, "fsdp")
        parts = {"rows": P("data"), "shared": P("data"), "replicated": P()}
        batch = {
            key: jax.ShapeDtypeStruct(
                example[key].shape, example[key].dtype, sharding=NamedSharding(mesh, parts[layout])
            )
            for key, layout in batches.layout.items()
        }
        step = loop.make_train_step(model, run.optimizer, run.accumulate, batches.layout, state)
        new_state, metrics = step.eval_shape(state, batch, jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new_state) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert {"loss", "grad_norm", "learning_rate", "tokens"} < set(metrics)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_golden(name):
    run = EXPERIMENTS[name]()
    params = jax.eval_shape(build(run).init_params, jax.random.key(0))
    lines = [
        f"{field.name}: {getattr(run, field.name)}"
        for field in dataclasses.fields(run)
        if field.name not in CIRCUMSTANCE or field.name == "tokenizer"
    ]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    lines.append(f"parameters (vocabulary padded): {sum(leaf.size for _, leaf in leaves):,}")
    for (path, leaf), decay in zip(leaves, jax.tree.leaves(decays(params)), strict=True):
        parameter = path_name(path)
        if "layer_" not in parameter or "layer_0/" in parameter or "layer_norm" in parameter.split("/")[0]:
            axes = tuple(partition(parameter, leaf.shape, 4))
            lines.append(f"{parameter} {list(leaf.shape)} decay={decay} fsdp={axes}")
    text = "\n".join(lines) + "\n"
    golden = GOLDEN / f"{name}.txt"
    if os.environ.get("PRELM_UPDATE_GOLDEN"):
        GOLDEN.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()


def test_initial_values_follow_the_paper():
    """Normal of deviation 0.02 truncated at two deviations, ones for scales, zeros for biases."""
    run = EXPERIMENTS["bert-demo"]()
    assert EXPERIMENTS["bert-base"]().model.initializer_range == 0.02
    model = build(run, initializer_range=0.02, num_layers=1)
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.jit(model.init_params)(jax.random.key(0))):
        name = path_name(path)
        if name.endswith(("kernel", "embedding")):
            assert np.abs(leaf).max() <= 0.04
            if leaf.size > 10_000:
                np.testing.assert_allclose(leaf.std(), 0.01759, rtol=0.02)
        else:
            np.testing.assert_array_equal(leaf, 1 if name.endswith("scale") else 0)
