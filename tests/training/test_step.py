"""The train step gives the same result on every mesh and with any number of micro-batches; and it learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prelm_jax.errors import InputError
from prelm_jax.training.muon import Muon
from prelm_jax.training.optimizer import AdamW, decays
from prelm_jax.training.parameters import path_name
from prelm_jax.training.sharding import MeshConfig, partition, shard_batch
from prelm_jax.training.step import (
    Keys,
    abstract_state,
    evaluated_means,
    make_evaluate,
    make_train_step,
    means,
    new_state,
)

pytestmark = pytest.mark.usefixtures("shared_programs")
MUON = Muon(learning_rate=3e-3, matrix_learning_rate=0.02, warmup_steps=4, decay_steps=300, weight_decay=0.01)
OPTIMIZER = AdamW(learning_rate=3e-3, warmup_steps=4, decay_steps=300, weight_decay=0.01)


@pytest.fixture(params=["bert", "gpt"])
def family(request):
    """(config of one layer, function from a step to a random batch) of each Transformer family."""
    config = dataclasses.replace(request.getfixturevalue(f"tiny_{request.param}"), num_layers=1)
    return config, request.getfixturevalue(f"random_{request.param}_batch")


@pytest.fixture
def train(family):
    """`(steps, mesh, …) -> (losses, final state)`, trained on a new random batch each step."""

    def train(steps, mesh_config, accumulate=1, config=family[0], batch=family[1], optimizer=OPTIMIZER):
        mesh, model = mesh_config.build(), config.build()
        layout = dict.fromkeys(batch(0), "rows")
        with jax.set_mesh(mesh):
            abstract = abstract_state(model, optimizer, 8, mesh, mesh_config.parameters)
            state = new_state(model, optimizer, 8, 0, abstract)
            for leaf, expected in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
                assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)
            step_function = make_train_step(model, optimizer, accumulate, layout, abstract)
            losses = []
            for step in range(steps):
                placed = shard_batch(batch(step), layout, mesh)
                state, metrics = step_function(state, placed, Keys.from_seed(0).dropout)
                losses.append(float(metrics["loss"]))
        return np.array(losses), state

    return train


def without_dropout(config):
    rates = [field.name for field in dataclasses.fields(config) if field.name.endswith("dropout")]
    return dataclasses.replace(config, **dict.fromkeys(rates, 0.0))


@pytest.fixture(scope="module")
def one_device():
    return {}


@pytest.mark.parametrize(
    ("mesh_config", "parameter_shards", "moment_shards"),
    [
        (MeshConfig(2), 1, 1),
        (MeshConfig(8, "zero1"), 1, 8),
        (MeshConfig(8, "fsdp"), 8, 8),
        (MeshConfig(8, "fsdp", slices=2), 4, 4),
    ],
    ids=str,
)
def test_losses_do_not_depend_on_the_mesh(train, family, one_device, mesh_config, parameter_shards, moment_shards):
    """In fp32 with dropout, whose masks are the same on every mesh."""
    if family[0] not in one_device:
        one_device[family[0]], _ = train(20, MeshConfig(devices=1))
    expected = one_device[family[0]]
    losses, state = train(20, mesh_config)
    np.testing.assert_allclose(losses[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)

    kernel, *moments = (
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path((state.params, state.opt_state))
        if path_name(path).endswith("layer_0/intermediate/kernel")
    )
    assert len(moments) == 2
    assert kernel.addressable_shards[0].data.size * parameter_shards == kernel.size
    for moment in moments:
        assert moment.addressable_shards[0].data.size * moment_shards == moment.size


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert"], indirect=True)
def test_losses_with_muon_do_not_depend_on_the_mesh(train):
    """Each device of a slice iterates some of the matrices; test_muon.py tries other meshes and families."""
    expected, _ = train(20, MeshConfig(devices=1), optimizer=MUON)
    losses, _ = train(20, MeshConfig(8, "fsdp", slices=2), optimizer=MUON)
    np.testing.assert_allclose(losses[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


def test_accumulated_micro_batches_equal_one_batch(train, family):
    """Rows have unequal weights: a mean of means would differ."""
    config = without_dropout(family[0])
    whole, state = train(5, MeshConfig(2), config=config)
    losses, accumulated = train(5, MeshConfig(2), accumulate=4, config=config)
    np.testing.assert_allclose(losses, whole, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(accumulated.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_dropout_changes_with_the_step(train, family):
    """With one batch and a learning rate of zero, only dropout differs between steps."""
    frozen = dataclasses.replace(OPTIMIZER, learning_rate=0.0)
    losses, _ = train(3, MeshConfig(1), batch=lambda step: family[1](0), optimizer=frozen)
    assert len(set(losses)) == 3
    again, _ = train(3, MeshConfig(1), batch=lambda step: family[1](0), optimizer=frozen)
    assert losses.tolist() == again.tolist()


def test_one_batch_overfits(train, family):
    config, batch = family
    losses, _ = train(200, MeshConfig(2), config=without_dropout(config), batch=lambda step: batch(0))
    assert losses[0] > np.log(120) - 0.3
    assert losses[-1] < 0.05


def test_an_evaluation_is_one_division_without_dropout(tiny_bert, random_bert_batch):
    """Over batches of unequal weights: NumPy on the logits of the model."""
    config, batches = dataclasses.replace(tiny_bert, num_layers=1), [random_bert_batch(step) for step in range(3)]
    model = config.build()

    @jax.jit
    def masked_logits(params, batch):
        hidden = config.encoder().apply({"params": params}, batch, method="hidden_states")[-1]
        masked = jnp.take_along_axis(hidden, batch["masked_positions"][..., None], 1)
        return model.apply({"params": params}, masked, method="masked_lm_logits")

    params = jax.jit(model.init_params)(jax.random.key(0))
    total = weight = 0.0
    for batch in batches:
        logits = np.asarray(masked_logits(params, batch), np.float64)
        log_normalizer = np.log(np.exp(logits).sum(-1))
        picked = np.take_along_axis(logits, batch["masked_targets"][..., None], -1)[..., 0]
        total += ((log_normalizer - picked) * batch["masked_weights"]).sum()
        weight += batch["masked_weights"].sum()
    values = evaluated_means(model, make_evaluate(model)(params, {}, batches))
    np.testing.assert_allclose(values["masked_lm_loss"], total / weight, rtol=1e-5)


def test_a_batch_without_weight_has_no_loss_and_no_nan(tiny_bert, random_bert_batch):
    batch = random_bert_batch(0) | {"next_sentence_weights": np.zeros((8, 1), np.float32)}
    model = dataclasses.replace(tiny_bert, num_layers=1).build()
    params = jax.jit(model.init_params)(jax.random.key(0))
    losses, metrics, _ = jax.jit(model.loss, static_argnums=4)(params, {}, batch, jax.random.key(1), False)
    values = means(model, losses | metrics)
    assert values["next_sentence_loss"] == 0
    assert values["loss"] == values["masked_lm_loss"] > 0


def test_more_devices_than_there_are():
    with pytest.raises(InputError, match=r"--mesh.devices 9: there are 8"):
        MeshConfig(devices=9).build()


def test_slices_that_do_not_divide_the_devices():
    with pytest.raises(InputError, match=r"--mesh.slices 3: does not divide 8 devices"):
        MeshConfig(slices=3).build()


def test_fsdp_needs_a_dimension_that_the_devices_divide(tiny_bert):
    mesh_config = MeshConfig(devices=5, parameters="fsdp")
    with pytest.raises(
        InputError, match=r"--mesh.parameters: 5 devices divide no dimension of \S+/(kernel|embedding) \("
    ):
        abstract_state(tiny_bert.build(), OPTIMIZER, 8, mesh_config.build(), "fsdp")


def test_every_parameter_needs_a_rule():
    with pytest.raises(ValueError, match="no rule covers encoder/gate"):
        partition("encoder/gate", (4, 4), 2)
    with pytest.raises(ValueError, match="no rule covers encoder/gate"):
        decays({"encoder": {"gate": np.ones(2)}})
