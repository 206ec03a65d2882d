"""Muon: its updates are nearly orthogonal, alike at any width and on any mesh; and each parameter has one optimizer."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from test_experiments import EXPERIMENTS, build

from prelm_jax.planning.hlo import COLLECTIVES
from prelm_jax.pretraining import pretrain
from prelm_jax.training.muon import Muon, groups, newton_schulz, orthogonalize
from prelm_jax.training.parameters import path_name
from prelm_jax.training.sharding import MeshConfig, state_sharding

pytestmark = pytest.mark.usefixtures("shared_programs")
MUON = Muon(learning_rate=3e-3, matrix_learning_rate=0.02, warmup_steps=4, decay_steps=300, weight_decay=0.01)


def matrix(rows, columns, condition, seed=0):
    """A random matrix whose singular values fall geometrically by a factor of `condition`; and U V^T of it."""
    rng, rank = np.random.default_rng(seed), min(rows, columns)
    u, _ = np.linalg.qr(rng.normal(size=(rows, rank)))
    v, _ = np.linalg.qr(rng.normal(size=(columns, rank)))
    values = np.geomspace(1, 1 / condition, rank)
    return ((u * values) @ v.T).astype(np.float32), u @ v.T


@pytest.mark.parametrize("shape", [(32, 32), (24, 96), (96, 24)])
@pytest.mark.parametrize("size", [1e-4, 1e3])
def test_updates_are_nearly_orthogonal(shape, size):
    """Against the singular value decomposition."""
    x, exact = matrix(*shape, condition=20)
    y, _ = orthogonalize().update({"kernel": size * x}, optax.EmptyState())
    update = np.asarray(y["kernel"], np.float64) / np.sqrt(max(1, shape[1] / shape[0]))
    values = np.linalg.svd(update, compute_uv=False)
    assert values.min() > 0.68 and values.max() < 1.21
    cosine = (update * exact).sum() / np.linalg.norm(update) / np.linalg.norm(exact)
    assert cosine > 0.98


def test_iterations_equal_the_polynomial_of_the_singular_values():
    """In float64, from the decomposition; also where a direction is 1e-5 of the largest."""
    x = np.stack([matrix(16, 40, condition=1e5, seed=seed)[0] for seed in range(3)])
    u, values, vt = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    np.testing.assert_allclose(newton_schulz(jnp.asarray(x)), (u * values[:, None]) @ vt, atol=2e-5)


def test_a_matrix_without_gradient_stays():
    update, _ = orthogonalize().update({"a": jnp.zeros((4, 8)), "b": jnp.ones((4, 8))}, optax.EmptyState())
    assert not update["a"].any() and update["b"].any()


def test_muon_equals_numpy():
    """Momentum, decay, both learning rates; AdamW's own numbers are held by its own test."""
    config = dataclasses.replace(MUON, warmup_steps=2, decay_steps=10, weight_decay=0.1, momentum=0.9)
    rng = np.random.default_rng(0)
    params = {"layer_0": {"kernel": rng.normal(size=(3, 6)).astype(np.float32)}}
    optimizer = config.build((r"layer_0/kernel$",))
    state, ours = optimizer.init(params), params
    reference, momentum = params["layer_0"]["kernel"].astype(np.float64), np.zeros((3, 6))
    for rate in (0.0, 0.01, 0.016, 0.014):
        gradient = rng.normal(size=(3, 6)).astype(np.float32)
        updates, state = optimizer.update({"layer_0": {"kernel": gradient}}, state, ours)
        ours = optax.apply_updates(ours, updates)
        clipped = gradient / np.linalg.norm(gradient).astype(np.float64)
        momentum = 0.9 * momentum + 0.1 * clipped
        direction = newton_schulz(jnp.asarray(0.9 * momentum + 0.1 * clipped, jnp.float32)[None])[0]
        reference = reference - rate * (np.sqrt(2) * np.asarray(direction) + 0.1 * reference)
        np.testing.assert_allclose(ours["layer_0"]["kernel"], reference, atol=2e-5)


@pytest.mark.parametrize("ratio", [(1, 1), (1, 4), (4, 1)])
def test_a_step_changes_outputs_equally_at_any_width(ratio):
    """The root mean square of the change in y = x W, for the x whose gradient made the update."""
    changes = []
    for width in (32, 64, 128, 256):
        rows, columns = width * ratio[0], width * ratio[1]
        rng = np.random.default_rng(width)
        x, dy = rng.normal(size=(8, rows)), rng.normal(size=(8, columns))
        update, _ = orthogonalize().update({"kernel": jnp.asarray(x.T @ dy, jnp.float32)}, optax.EmptyState())
        changes.append(np.sqrt(np.square(x @ np.asarray(update["kernel"])).mean()))
    assert max(changes) < 1.35 * min(changes)


@pytest.mark.parametrize("parameters", ["replicated", "fsdp"])
def test_each_device_iterates_its_part_of_the_matrices(parameters):
    """Twelve of a shape on four devices of a slice: three each, in the program and in the formula."""
    mesh_config = MeshConfig(8, parameters, slices=2)
    mesh = mesh_config.build()
    shapes = {f"layer_{i}": {"kernel": (64, 128) if i % 2 else (128, 64)} for i in range(12)}
    with jax.set_mesh(mesh):
        arrays = jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
        )
        shardings = state_sharding(arrays, mesh, parameters)
        placed = jax.tree.map(lambda x, y: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=y), arrays, shardings)
        step = jax.jit(lambda x: orthogonalize().update(x, optax.EmptyState())[0], out_shardings=shardings)
        compiled = step.lower(placed).compile()
    expected = MUON.flops(arrays, (r"layer_\d+/kernel$",), 4)
    assert expected == 5 * 3 * (4 * 64**2 * 128 + 2 * 64**3)
    assert expected < compiled.cost_analysis()["flops"] < 1.05 * expected
    text = compiled.as_text()
    assert "operand_precision={highest,highest}" in text
    count = {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in COLLECTIVES}
    assert {name: n for name, n in count.items() if n} == {"all-gather": 1} | (
        {"all-to-all": 1} if parameters == "fsdp" else {}
    )


@pytest.mark.parametrize("reference", EXPERIMENTS)
def test_every_parameter_of_every_experiment_has_one_optimizer(reference):
    """Muon takes the kernels of numbered layers, and ELMo's of the character encoder; never tables, heads and norms.

    Two layers are enough, because all layers of a model are alike.
    """
    run = EXPERIMENTS[reference]()
    model = build(run, num_layers=min(run.model.num_layers, 2))
    params = jax.eval_shape(model.init_params, jax.random.key(0))
    state = jax.eval_shape(MUON.build(model.matrices).init, params)
    moments = [path_name(path) for path, leaf in jax.tree_util.tree_leaves_with_path(state) if leaf.ndim]
    for path, group in jax.tree_util.tree_leaves_with_path(groups(params, model.matrices)):
        name = path_name(path)
        of_layer = re.search(r"layer_\d+/.*kernel$|encoder/(highway_\d/\w+|projection)/kernel$", name)
        assert group == ("muon" if of_layer else "adamw"), name
        found = sorted(moment.split("/")[2] for moment in moments if moment.endswith(f"/{name}"))
        assert found == (["muon"] if group == "muon" else ["adamw", "adamw"])


def test_paths_without_a_rule():
    params = {"encoder": {"layer_0": {"dense": {"kernel": np.ones((2, 2)), "bias": np.ones(2)}}}}
    rule = r"layer_\d+/dense/kernel$"
    assert jax.tree.leaves(groups(params, (rule,))) == ["adamw", "muon"]
    with pytest.raises(ValueError, match="no rule covers encoder/layer_0/dense/kernel"):
        groups(params, ())
    with pytest.raises(ValueError, match="no rule covers gate"):
        groups({**params, "gate": np.ones((2, 2))}, (rule,))
    with pytest.raises(ValueError, match=r"nothing/kernel"):
        groups(params, (rule, "nothing/kernel"))
    with pytest.raises(ValueError, match=r"bias\$"):
        groups(params, (rule, r"bias$"))


@pytest.fixture
def run(request, tmp_path):
    """The tiny run of a family, with Muon."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(tiny.text(seed=0))
    return dataclasses.replace(tiny.FAMILIES[request.param](), corpus=(str(corpus),), optimizer=MUON)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["bert", "elmo"], indirect=True)
def test_resumed_equals_uninterrupted(run, tmp_path, capsys):
    pretrain(run, tmp_path / "whole")
    assert re.search(r"Muon takes \d+\.\d% of a step's matrix products: \d\.\d\d GFLOP", capsys.readouterr().err)
    with tiny.interruption(8, tiny.crash), pytest.raises(tiny.Crash):
        pretrain(run, tmp_path / "parts")
    pretrain(run, tmp_path / "parts")
    tiny.assert_same_bits(tmp_path / "parts", tmp_path / "whole", run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "parameters"), [("bert", "replicated"), ("openai-gpt", "zero1"), ("elmo", "fsdp")], indirect=["run"]
)
def test_losses_do_not_depend_on_the_mesh(run, parameters, tmp_path):
    """In fp32 with dropout, whose masks are the same on every mesh; test_step.py has BERT on two slices with fsdp."""
    losses = []
    for mesh in (MeshConfig(1), MeshConfig(8, parameters)):
        workdir = tmp_path / str(mesh)
        without_evaluation = dataclasses.replace(run, held_out=0.0)
        pretrain(tiny.with_loop(without_evaluation, mesh=mesh, steps=20, save_every=20, log_every=1), workdir)
        losses.append([line["train/loss"] for line in tiny.metrics(workdir)])
    expected, found = losses
    assert len(expected) == 20 and expected[-1] < expected[0]
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
