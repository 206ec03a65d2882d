"""Every experiment is held to one contract, and frozen: a changed default shows up here, as text, in a review.

After an intended change, update the golden files with PRELM_UPDATE_GOLDEN=1 python -m pytest tests/test_experiments.py
"""

import dataclasses
import importlib.util
import inspect
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from prelm_jax import pretraining
from prelm_jax.cli.main import main
from prelm_jax.corpus.store import Store
from prelm_jax.families import FAMILIES, find_family
from prelm_jax.planning.plan import TokenizerOfSize
from prelm_jax.run import SOURCES, Run
from prelm_jax.training.contract import Model
from prelm_jax.training.muon import groups
from prelm_jax.training.optimizer import decays
from prelm_jax.training.parameters import path_name
from prelm_jax.training.sharding import MeshConfig, abstract_batch, partition
from prelm_jax.training.step import abstract_state, make_train_step

ROOT = Path(__file__).parents[1]
FILES = ("bert", "elmo", "gpt1", "study")
GOLDEN = Path(__file__).parent / "golden"


def experiments() -> dict:
    """`reference` -> function: every pretraining that ships with the package, and the family outside of it."""
    found = {}
    for path in [*(ROOT / "experiments" / f"{name}.py" for name in FILES), ROOT / "examples" / "electra.py"]:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module  # For the dataclasses that a file defines.
        spec.loader.exec_module(module)
        prefix = path.stem if path.parent.name == "experiments" else f"{path.parent.name}/{path.name}"
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == path.stem and not name.startswith("_"):
                found[f"{prefix}:{name}"] = function
    return found


EXPERIMENTS = experiments()
SHIPPED = [reference for reference in EXPERIMENTS if "/" not in reference]


def build(run: Run, **changes: object) -> Model:
    """The model at the expected size of its vocabulary, with other sizes if asked."""
    vocab_size = run.tokenizer.expected_vocab_size
    return dataclasses.replace(run.model, vocab_size=vocab_size, **changes).build(jnp.dtype(run.precision))


@pytest.mark.parametrize("reference", EXPERIMENTS)
def test_one_step_lowers_on_four_devices(reference):
    """Batch, model, optimizer and mesh fit together; nothing is allocated or compiled.

    Two layers are enough, because all layers of a model are alike.
    """
    function = EXPERIMENTS[reference]
    assert f"prelm pretrain {reference}" in inspect.getdoc(function)
    run = function()
    model = build(run, num_layers=min(run.model.num_layers, 2))
    tokenizer = TokenizerOfSize(run.tokenizer.expected_vocab_size)
    store = Store.from_documents([[[5, 6, 7]] * 400, [[8, 9]] * 400], tokenizer.tokens)
    batches = run.data.build(store, tokenizer, run.batch_size, run.seed)
    example = batches[0]
    model.check(example)
    mesh = MeshConfig(devices=4).build()
    with jax.set_mesh(mesh):
        state = abstract_state(model, run.optimizer, run.batch_size, mesh, "fsdp")
        batch = abstract_batch(example, batches.layout, mesh)
        step = make_train_step(model, run.optimizer, run.accumulate, batches.layout, state)
        new_state, metrics = step.eval_shape(state, batch, jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new_state) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert {"loss", "grad_norm", "learning_rate", "tokens"} < set(metrics)


@pytest.mark.parametrize("reference", SHIPPED)
def test_shipped_experiments_are_of_a_family(reference):
    run = EXPERIMENTS[reference]()
    family = find_family(run.model.model_type, reference)
    assert (type(run.model), type(run.data)) == (family.model, family.data)


def test_a_family_from_outside_is_not_in_the_table():
    run = EXPERIMENTS["examples/electra.py:demo"]()
    assert run.model.model_type not in FAMILIES
    assert len((ROOT / "examples" / "electra.py").read_text().splitlines()) <= 200


@pytest.mark.usefixtures("shared_programs")
def test_a_family_from_outside_trains_resumes_and_is_evaluated(tmp_path, capsys):
    """A tiny ELECTRA by the commands. It samples in its loss, yet evaluates alike at any time and under any seed."""
    (tmp_path / "corpus.txt").write_text(tiny.text(seed=0))
    experiment, reference = EXPERIMENTS["examples/electra.py:demo"](), f"{ROOT}/examples/electra.py:demo"
    sizes = "hidden-size 16 num-layers 1 num-heads 2 intermediate-size 32 embedding-size 8 generator-hidden-size 8"
    sizes = [f"--model.{x}" if i % 2 == 0 else x for i, x in enumerate(sizes.split())]
    options = "--tokenizer.vocab-size 150 --data.max-length 32 --data.max-predictions 4 --batch-size 8 --held-out 0.3"
    options += " --steps 6 --save-every 2 --evaluate-every 6 --evaluate-batches 2 --log-every 1 --mesh.devices 1"
    arguments = ["pretrain", reference, "--corpus", str(tmp_path / "corpus.txt"), *sizes, *options.split(), "--workdir"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    main([*arguments, str(whole)])
    with tiny.interruption(3, tiny.crash), pytest.raises(tiny.Crash):
        main([*arguments, str(parts)])
    assert (parts / "checkpoints" / "2").is_dir()
    main([*arguments, str(parts)])
    tiny.assert_same_bits(parts, whole, experiment)

    capsys.readouterr()
    main(["evaluate", reference, "--workdir", str(whole), "--mesh.devices", "1"])
    printed = capsys.readouterr().out
    tiny.change_seed(parts)
    first, second = (pretraining.evaluate(workdir, experiment=experiment, devices=1) for workdir in (whole, parts))
    assert first.evaluation == second.evaluation
    last = tiny.metrics(whole)[-1]
    for name in ("loss", "masked_lm_loss", "replaced_token_loss", "replaced_rate"):
        np.testing.assert_allclose(first.evaluation[name], last[f"evaluation/{name}"], rtol=0.25)  # A sample.
        assert f" {first.evaluation[name]:.3f} " in printed


@pytest.mark.parametrize("reference", SHIPPED)
def test_golden(reference):
    run = EXPERIMENTS[reference]()
    model = build(run)
    params = jax.eval_shape(model.init_params, jax.random.key(0))
    lines = [
        f"{field.name}: {getattr(run, field.name)}"
        for field in dataclasses.fields(run)
        if field.name not in {*SOURCES, "loop"} - {"tokenizer"}
    ]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    lines.append(f"parameters (vocabulary padded): {sum(leaf.size for _, leaf in leaves):,}")
    group_of = jax.tree.leaves(groups(params, model.matrices))
    for (path, leaf), decay, group in zip(leaves, jax.tree.leaves(decays(params)), group_of, strict=True):
        parameter = path_name(path)
        if "layer_" not in parameter or "layer_0/" in parameter or "layer_norm" in parameter.split("/")[0]:
            axes = tuple(partition(parameter, leaf.shape, 4, model.replicated))
            lines.append(f"{parameter} {list(leaf.shape)} decay={decay} muon={group == 'muon'} fsdp={axes}")
    text = "\n".join(lines) + "\n"
    golden = GOLDEN / f"{reference.replace(':', '-')}.txt"
    if os.environ.get("PRELM_UPDATE_GOLDEN"):
        GOLDEN.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()


def test_initial_values_follow_the_paper():
    """Normal of deviation 0.02 truncated at two deviations, ones for scales, zeros for biases."""
    run = EXPERIMENTS["bert:demo"]()
    assert EXPERIMENTS["bert:base"]().model.initializer_range == 0.02
    params = jax.jit(build(run, initializer_range=0.02, num_layers=1).init_params)(jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(path)
        if name.endswith(("kernel", "embedding")):
            assert np.abs(leaf).max() <= 0.04
            if leaf.size > 10_000:
                np.testing.assert_allclose(leaf.std(), 0.01759, rtol=0.02)
        else:
            np.testing.assert_array_equal(leaf, 1 if name.endswith("scale") else 0)
