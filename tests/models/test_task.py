"""An encoder with the head of a task: its parameters, what it reads, its losses, and what of it is trained."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from prelm_jax.bounds import OutOfBounds
from prelm_jax.data.examples import Answers, Example
from prelm_jax.data.framing import frame_examples
from prelm_jax.formats.base import abstract_params
from prelm_jax.models.heads import Choice, Label, Span, Tags
from prelm_jax.models.task import TaskModelConfig
from prelm_jax.training.muon import groups
from prelm_jax.training.optimizer import AdamW, decays
from prelm_jax.training.parameters import path_name
from prelm_jax.training.sharding import MeshConfig, abstract_batch, shard_batch, state_sharding
from prelm_jax.training.step import abstract_state, make_train_step, new_state, transformation

FROZEN = {"mix": True, "lstm_size": 4}
HEADS = {
    "label": Label(2),
    "labels": Label(2, "labels"),
    "number": Label(1, "number"),
    "pair": Label(2, **FROZEN),
    "choice": Choice(),
    "tags": Tags(2),
    "crf": Tags(2, crf=True, lstm_layers=2, **FROZEN),
    "spans": Span(),
}
TEXTS = ("the cat sees a dog", "in the old house", "a bird", "new")


def encoder(family):
    return dataclasses.replace(tiny.FAMILIES[family]().model, vocab_size=64)


def task(family, head, **changes):
    """Pairs of texts are two for an ELMo."""
    config = HEADS[head]
    if family == "elmo" and isinstance(config, Label):
        config = dataclasses.replace(config, pair=True)
    return TaskModelConfig(encoder(family), config, **changes)


@functools.cache
def examples(head):
    """Four examples of a head, of several lengths."""
    found = []
    for i, text in enumerate(TEXTS):
        words = tuple(text.split())
        kind = head if head not in ("pair", "crf") else {"pair": "label", "crf": "tags"}[head]
        label = {
            "label": "ab"[i % 2],
            "labels": ("a", "b")[: i % 3],
            "number": i / 2,
            "choice": i % 2,
            "tags": tuple("ab"[len(word) % 2] for word in words),
            "spans": Answers(("a",), (0,)) if i else Answers(),
        }[kind]
        sequences = {"tags": ((words,),), "choice": ((text, "a"), (text, "old dog"))}.get(kind, ((text, "a big cat"),))
        found.append(Example(str(i), sequences[: 2 if kind == "choice" else 1], label))
    return kind, found


def make_batch(family, head, rows=slice(0, 4), width=None, copies=1, group=1):
    kind, found = examples(head)
    frame = tiny.frame(family)
    framed = frame_examples(frame, found, kind, ("a", "b"))[0] * copies
    texts = max(len(row.texts) for row in framed)
    width = width or frame.fitting_width(framed, texts)
    groups = [framed[i : i + group] for i in range(0, len(framed), group)]
    return frame.batch(groups, rows, width, texts, width if kind == "tags" else group), frame


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), abstract_params(config)
    )


def names(tree):
    return {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_parameters(family, head):
    """The encoder's have the paths and shapes of pretraining; every rule of optimizers and meshes covers the head's."""
    config = task(family, head)
    params = abstract_params(config)
    found, pretraining = names(params), names(abstract_params(encoder(family)))
    own = {name for name in found if name.startswith("head/")}
    assert own and {name: pretraining[name] for name in found if name not in own} == {
        name: shape for name, shape in found.items() if name not in own
    }
    assert ("pooler/kernel" in found) == (family == "bert" and head in ("label", "labels", "number", "choice"))
    assert "head/classifier/kernel" in own and ("head/scalar_mix/gamma" in own) == config.head.mix
    decay = dict(zip(found, jax.tree.leaves(decays(params)), strict=True))
    assert {name for name in own if decay[name]} == {name for name in own if name.endswith("kernel")}
    group = dict(zip(found, jax.tree.leaves(groups(params, config.build().matrices)), strict=True))
    assert {group[name] for name in own} == {"adamw"}
    state_sharding(params, MeshConfig(devices=2).build(), "replicated")
    depths = {config.depth(name) for name in found}
    assert depths == {0, *range(1, config.encoder.num_layers + 2)} and {config.depth(name) for name in own} == {0}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_step_lowers_on_two_devices(family, head):
    """Batch, model and optimizer fit together, the head alone or all being trained; nothing is compiled."""
    batch, frame = make_batch(family, head)
    for tune in ("all", "head"):
        model = task(family, head, tune=tune, layer_decay=0.9).build()
        model.check({name: x for name, x in batch.items()})
        assert model.flops(batch) > 0
        mesh, optimizer = MeshConfig(devices=2).build(), AdamW(1e-3, 0, 10)
        with jax.set_mesh(mesh):
            state = abstract_state(model, optimizer, 4, mesh, "fsdp")
            layout = frame.layout(batch)
            step = make_train_step(model, optimizer, 2, layout, state)
            new, metrics = step.eval_shape(state, abstract_batch(batch, layout, mesh), jax.random.key(0))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
        assert "label_loss" in metrics
        outputs = jax.eval_shape(model.predict, new.params, {}, batch)
        assert {len(x) for x in outputs.values()} == {4}
        moments = {name for name in names(new.opt_state) if "/mu/" in name}
        assert all(("head/" in name) or tune == "all" for name in moments) and moments


@pytest.mark.parametrize(
    ("family", "head"), [("bert", "label"), ("bert", "crf"), ("elmo", "pair"), ("openai-gpt", "choice")]
)
def test_padding_and_company_change_nothing(family, head):
    """Scores and losses of a row alone, in its width, and beside others in a wider batch."""
    config = task(family, head)
    model, params = config.build(), random_params(config)
    predict = jax.jit(model.predict)
    whole = predict(params, {}, make_batch(family, head, width=32)[0])
    alone, _ = make_batch(family, head, rows=slice(1, 2), width=24)
    if "characters" not in alone:
        alone = predict(params, {}, alone)
        words = alone["scores"].shape[1]
        count = 4 if head == "crf" else words
        np.testing.assert_allclose(alone["scores"][0][:count], whole["scores"][1][:count], atol=1e-5)
        np.testing.assert_allclose(alone["loss"][0], whole["loss"][1], rtol=1e-5)
    sums = jax.jit(lambda params, batch: model.loss(params, {}, batch, jax.random.key(0), False)[0])
    losses = sums(params, make_batch(family, head)[0])
    np.testing.assert_allclose(losses["label_loss"], (whole["loss"].sum(), whole["weight"].sum()), rtol=1e-5)


def test_losses_are_those_of_their_formulas():
    for head in ("label", "labels", "number", "spans"):
        config = task("bert", head)
        model, params = config.build(), random_params(config)
        batch, _ = make_batch("bert", head)
        batch["label_weights"] = np.array([[1], [2], [0.5], [0]], np.float32)
        (loss, weight), outputs = jax.jit(
            lambda params, batch, model=model: (
                model.loss(params, {}, batch, jax.random.key(0), False)[0]["label_loss"],
                model.predict(params, {}, batch),
            )
        )(params, batch)
        scores, labels, weights = (np.asarray(outputs["scores"]), batch["labels"][:, 0], batch["label_weights"][:, 0])
        if head == "label":
            expected = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
        elif head == "labels":
            expected = optax.sigmoid_binary_cross_entropy(scores, labels).mean(1)
        elif head == "number":
            expected = (scores[:, 0] - labels) ** 2
        else:
            ends = [optax.softmax_cross_entropy_with_integer_labels(scores[..., i], labels[:, i]) for i in range(2)]
            expected = sum(ends) / 2
        np.testing.assert_allclose(loss / weight, (expected * weights).sum() / weights.sum(), rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "head", "symmetric"),
    [
        ("bert", "tags", False),
        ("openai-gpt", "label", False),
        pytest.param("bert", "labels", False, marks=pytest.mark.slow),
        pytest.param("bert", "choice", False, marks=pytest.mark.slow),
        pytest.param("openai-gpt", "number", True, marks=pytest.mark.slow),
    ],
)
def test_packed_examples_have_the_losses_that_they_have_alone(family, head, symmetric):
    """And the same gradients: two rows of all four examples, the texts of which are of several lengths."""
    config = task(family, head, lm_coefficient=0.5 if family == "openai-gpt" else 0.0)
    model, params = config.build(), random_params(config)
    kind, found = examples(head)
    frame = tiny.frame(family, symmetric=symmetric)
    rows = frame_examples(frame, found, kind, ("a", "b"))[0]
    texts, words = max(len(row.texts) for row in rows), kind == "tags"
    assert texts == (2 if head == "choice" or symmetric else 1) and len({row.length for row in rows}) > 2
    alone = frame.batch([[row] for row in rows], slice(None), 32, texts, 32 if words else 1)
    packed = frame.batch([[rows[2]], [rows[3], rows[0], rows[1]]], slice(None), 80, texts, 80 if words else 4)

    @jax.jit
    def losses_and_gradients(params, batch):
        def loss(params):
            sums, metrics, _ = model.loss(params, {}, batch, jax.random.key(0), False)
            return sum(total for total, _ in sums.values()), (sums, metrics)

        return jax.grad(loss, has_aux=True)(params)

    (gradients, found), (expected_gradients, expected) = (
        losses_and_gradients(params, batch) for batch in (packed, alone)
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), found, expected)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5), gradients, expected_gradients)
    assert float(expected[0]["label_loss"][1]) > 0


def test_the_loss_of_next_tokens_is_a_mean_over_rows():
    """GPT-1's: every row weighs the same, whatever its length; all its tokens but the first are predicted."""
    config = task("openai-gpt", "label", lm_coefficient=0.5)
    model, params = config.build(), random_params(config)
    batch, _ = make_batch("openai-gpt", "label")
    losses, _, _ = jax.jit(lambda p, b: model.loss(p, {}, b, jax.random.key(0), False))(params, batch)
    assert model.coefficients == {"label_loss": 1.0, "lm_loss": 0.5}
    rows = {name: x[:, 0] for name, x in batch.items() if x.ndim == 3}

    @jax.jit
    def next_tokens(params, rows):
        last = config.encoder.encoder().apply({"params": params}, rows, method="hidden_states")[-1]
        return encoder("openai-gpt").build().apply({"params": params}, last, method="logits")

    logits = np.asarray(next_tokens(params, rows))[..., :64]
    means = []
    for row in range(4):
        length = int((rows["segments"][row] != 0).sum())
        targets = rows["tokens"][row, 1:length]
        means.append(optax.softmax_cross_entropy_with_integer_labels(logits[row, : length - 1], targets).mean())
    np.testing.assert_allclose(losses["lm_loss"], (sum(means), 4), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "head"), [("elmo", "pair"), ("bert", "label")])
def test_eight_devices_do_as_one(family, head):
    """The first step: rows over devices, a BERT's of two examples each, ELMo's characters on all, the same dropout."""
    config = task(family, head)
    model, optimizer, parts = config.build(), AdamW(1e-3, 0, 10), []
    for devices in (1, 8):
        mesh = MeshConfig(devices=devices).build()
        packed = {"width": 48, "copies": 4, "group": 2} if family == "bert" else {"width": 32, "copies": 2}
        batch, frame = make_batch(family, head, rows=slice(0, 8), **packed)
        layout = frame.layout(batch)
        with jax.set_mesh(mesh):
            abstract = abstract_state(model, optimizer, 8, mesh, "replicated")
            state = new_state(model, optimizer, 8, 0, abstract, lambda fresh: random_params(config))
            step = make_train_step(model, optimizer, 1, layout, abstract)
            _, metrics = step(state, shard_batch(batch, layout, mesh), jax.random.key(0))
        parts.append({name: np.asarray(x) for name, x in metrics.items()})
    np.testing.assert_allclose(parts[0]["loss"], parts[1]["loss"], rtol=1e-6)
    np.testing.assert_allclose(parts[0]["grad_norm"], parts[1]["grad_norm"], rtol=1e-5)
    assert parts[0]["tokens"].tolist() == parts[1]["tokens"].tolist()


def test_only_a_gpt_that_is_tuned_has_a_loss_of_next_tokens():
    for family, tune in (("bert", "all"), ("elmo", "all"), ("openai-gpt", "head")):
        with pytest.raises(OutOfBounds, match="lm_coefficient"):
            task(family, "label", tune=tune, lm_coefficient=0.5).check_together()
    task("openai-gpt", "label", lm_coefficient=0.5).check_together()


def test_a_head_alone_has_all_gradients_moments_and_decay():
    config = task("bert", "label", tune="head")
    model, params, batch = config.build(), random_params(config), make_batch("bert", "label")[0]
    key = jax.random.key(0)
    gradients = jax.jit(jax.grad(lambda p: model.loss(p, {}, batch, key, True)[0]["label_loss"][0]))(params)
    optimizer = AdamW(1e-2, 0, 10, weight_decay=0.1, clip_norm=1e-3)
    update = transformation(model, optimizer, params)
    updates, state = jax.jit(update.update)(gradients, update.init(params), params)
    for (path, gradient), x in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(updates), strict=True
    ):
        inside = path_name(path).startswith("head/")
        assert bool((gradient != 0).any()) == inside and bool((x != 0).any()) == inside
    assert all("head/" in name for name in names(state) if "/mu/" in name or "/nu/" in name)


def test_a_layer_below_learns_more_slowly():
    """The updates of AdamW, times the decay to the power of the depth."""
    config = dataclasses.replace(task("bert", "label"), encoder=dataclasses.replace(encoder("bert"), num_layers=2))
    slower, params = dataclasses.replace(config, layer_decay=0.5), random_params(config)
    gradients = random_params(config, seed=1)
    optimizer = AdamW(1e-2, 0, 10, weight_decay=0.1)

    def updates(config):
        update = transformation(config.build(), optimizer, params)
        return jax.jit(update.update)(gradients, update.init(params), params)[0]

    depths = {"head/classifier/kernel": 0, "pooler/kernel": 0, "encoder/layer_1/output/kernel": 1}
    depths |= {"encoder/layer_0/attention/query/bias": 2, "position_embeddings/embedding": 3}
    found, plain = (dict(zip(names(params), jax.tree.leaves(updates(each)), strict=True)) for each in (slower, config))
    for name, depth in depths.items():
        np.testing.assert_allclose(found[name], plain[name] * 0.5**depth, rtol=1e-6)
