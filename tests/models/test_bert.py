"""BERT against transformers' PyTorch BERT: outputs and gradients; sizes, packing, attention, dropout."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from model_directories import randomize
from scipy import stats
from tiny_pairs import batches_of, corpus, random_sizes

from prelm_jax.formats.base import abstract_params
from prelm_jax.formats.huggingface_bert import LAYOUT
from prelm_jax.models import attention, layers
from prelm_jax.models.bert import BertConfig
from prelm_jax.models.layers import Dropout, random_bits, truncated_normal
from prelm_jax.training.parameters import path_name

CONFIG = BertConfig(
    vocab_size=37, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, max_position_embeddings=16
)
BERT, ENCODER = CONFIG.build(), CONFIG.encoder()
LENGTHS = [16, 11, 5]  # Real tokens in each row.
TOLERANCE = 2e-5
INPUTS = ("tokens", "token_types", "positions", "segments")


def torch_bert():
    """A BertForPreTraining of the same sizes; every parameter random, biases and norms too."""
    model = transformers.BertForPreTraining(
        transformers.BertConfig(
            vocab_size=CONFIG.vocab_size,
            hidden_size=CONFIG.hidden_size,
            num_hidden_layers=CONFIG.num_layers,
            num_attention_heads=CONFIG.num_heads,
            intermediate_size=CONFIG.intermediate_size,
            max_position_embeddings=CONFIG.max_position_embeddings,
        )
    ).eval()
    return randomize(model)


def theirs(state, path, shape):
    """The value of our parameter in a PyTorch state dict (or its gradient), in our orientation, padded with zeros."""
    value = state[LAYOUT.tensor_name(path)].numpy()
    value = value.T if path.endswith("kernel") else value
    return np.pad(value, [(0, want - have) for want, have in zip(shape, value.shape, strict=True)])


def ours(state):
    """A PyTorch state dict as our parameters."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(theirs(state, path_name(path), leaf.shape)), abstract_params(CONFIG)
    )


def make_batch():
    """Rows of 16, 11 and 5 tokens of two types; three masked positions a row, one of them not counted in the last."""
    rng = np.random.default_rng(0)
    shape = (len(LENGTHS), CONFIG.max_position_embeddings)
    columns = np.broadcast_to(np.arange(shape[1]), shape)
    real = columns < np.array(LENGTHS)[:, None]
    return {
        "tokens": np.where(real, rng.integers(1, CONFIG.vocab_size, shape), 0),
        "token_types": np.where(real, columns > 2, 0).astype(np.int32),
        "positions": columns,
        "segments": real.astype(np.int32),
        "masked_positions": np.array([[1, 7, 15], [2, 3, 10], [1, 4, 0]]),
        "masked_targets": rng.integers(0, CONFIG.vocab_size, (3, 3)),
        "masked_weights": np.array([[1, 1, 1], [1, 1, 1], [1, 1, 0]], np.float32),
        "next_sentence_positions": np.zeros((3, 1), np.int32),
        "next_sentence_labels": np.array([[0], [1], [1]]),
        "next_sentence_weights": np.ones((3, 1), np.float32),
    }


@pytest.fixture(scope="module")
def reference():
    """The PyTorch model, its outputs on the batch and the gradients of its own loss."""
    model, batch = torch_bert(), make_batch()
    labels = np.full(batch["tokens"].shape, -100)
    for row in range(len(LENGTHS)):
        counted = batch["masked_weights"][row] == 1
        labels[row, batch["masked_positions"][row][counted]] = batch["masked_targets"][row][counted]
    output = model(
        input_ids=torch.tensor(batch["tokens"]),
        token_type_ids=torch.tensor(batch["token_types"]),
        attention_mask=torch.tensor(batch["segments"]),
        labels=torch.tensor(labels),
        next_sentence_label=torch.tensor(batch["next_sentence_labels"][:, 0]),
        output_hidden_states=True,
    )
    output.loss.backward()
    return model, output, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def params(reference):
    return ours(reference[0].state_dict())


@jax.jit
def forward(params, batch):
    """(hidden states, pooled [B, D], MLM logits at every position, NSP logits [B, 2])."""
    with jax.default_matmul_precision("highest"):
        hidden = ENCODER.apply({"params": params}, batch, method="hidden_states")
        pooled = BERT.apply({"params": params}, hidden[-1], batch["next_sentence_positions"], method="pooled")
        logits = BERT.apply({"params": params}, hidden[-1], method="masked_lm_logits")
        relation = BERT.apply({"params": params}, pooled, method="next_sentence_logits")
        return hidden, pooled[:, 0], logits, relation[:, 0]


def objective(params, batch, key=None):
    """Trains with `key`; None: evaluates."""
    with jax.default_matmul_precision("highest"):
        losses, _, _ = BERT.loss(params, {}, batch, jax.random.key(0) if key is None else key, key is not None)
    weights = BERT.weights(batch)
    return sum(BERT.coefficients[name] * losses[name][0] / weights[name] for name in losses)


loss_and_gradients = jax.jit(jax.value_and_grad(objective))


# Parity


def test_outputs_equal_transformers(params, reference):
    batch, (model, output, _) = make_batch(), reference
    hidden, pooled, logits, relation = forward(params, batch)
    assert len(hidden) == len(output.hidden_states) == CONFIG.num_layers + 1
    real = batch["segments"] != 0
    for state, expected in zip(hidden, output.hidden_states, strict=True):
        np.testing.assert_allclose(state[real], expected.detach().numpy()[real], atol=TOLERANCE, rtol=0)
    expected = model.bert.pooler(output.hidden_states[-1]).detach()
    np.testing.assert_allclose(pooled, expected, atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(relation, output.seq_relationship_logits.detach(), atol=TOLERANCE, rtol=0)
    expected = output.prediction_logits.detach().numpy()[real]
    np.testing.assert_allclose(logits[real][:, : CONFIG.vocab_size], expected, atol=TOLERANCE, rtol=0)
    # The padding of the vocabulary never wins.
    assert (jax.nn.softmax(logits)[..., CONFIG.vocab_size :] == 0).all()


def test_loss_and_gradients_equal_transformers(params, reference):
    _, output, gradients = reference
    loss, grads = loss_and_gradients(params, make_batch())
    assert abs(float(loss) - output.loss.item()) < TOLERANCE
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    assert len(leaves) == len(gradients)
    for path, grad in leaves:
        name = path_name(path)
        expected = theirs(gradients, name, grad.shape)
        np.testing.assert_allclose(grad, expected, atol=TOLERANCE, rtol=0, err_msg=name)


# Sizes


@pytest.mark.parametrize(
    ("layers", "width", "encoder_and_pooler", "encoder", "pretraining", "masked_lm"),
    [
        (2, 128, 4_385_920, 4_369_408, 4_433_468, 4_416_698),
        (4, 256, 11_170_560, 11_104_768, 11_267_900, 11_201_594),
        (4, 512, 28_763_648, 28_500_992, 29_058_876, 28_795_194),
        (8, 512, 41_373_184, 41_110_528, 41_668_412, 41_404_730),
        (12, 768, 109_482_240, 108_891_648, 110_106_428, 109_514_298),
        (24, 1024, 335_141_888, 334_092_288, 336_226_108, 335_174_458),
    ],
    ids=["tiny", "mini", "small", "medium", "base", "large"],
)
def test_parameter_counts_of_the_published_sizes(layers, width, encoder_and_pooler, encoder, pretraining, masked_lm):
    config = BertConfig(30522, width, layers, width // 64, intermediate_size=4 * width)
    sizes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config)):
        rows = config.vocab_size if path_name(path) in LAYOUT.vocabulary_tables else leaf.shape[0]
        sizes[path_name(path)] = rows * math.prod(leaf.shape[1:])
    heads = {"pooler": 0, "masked_lm": 0, "next_sentence": 0}
    for head in heads:
        heads[head] = sum(size for name, size in sizes.items() if name.startswith(head))
    total = sum(sizes.values())
    assert total == pretraining
    assert total - heads["masked_lm"] - heads["next_sentence"] == encoder_and_pooler
    assert total - sum(heads.values()) == encoder
    assert total - heads["pooler"] - heads["next_sentence"] == masked_lm


# Attention


@jax.jit
def influence(params, segments_T):
    """[T, T] of one row: the largest derivative of an element of output t by an element of the input at s."""
    row = jnp.arange(CONFIG.max_position_embeddings)[None]

    def outputs(table):  # The input at s is varied through the embedding of its position.
        varied = params | {"position_embeddings": {"embedding": table}}
        batch = dict(zip(INPUTS, (row + 1, jnp.zeros_like(row), row, segments_T[None]), strict=True))
        return ENCODER.apply({"params": varied}, batch, method="hidden_states")[-1][0]

    out_TD, vjp = jax.vjp(outputs, params["position_embeddings"]["embedding"])
    # One output at a time: for this many at once, vmapped, XLA:CPU (jaxlib 0.10.2) computes wrong derivatives.
    derivatives = jax.lax.map(lambda one: vjp(one.reshape(out_TD.shape))[0], jnp.eye(out_TD.size))
    return jnp.abs(derivatives).max(-1).reshape(*out_TD.shape, -1).max(1)


def test_every_token_sees_every_other_of_its_segment_and_nothing_else(params):
    assert (influence(params, jnp.ones(16, jnp.int32)) > 1e-6).all()
    segments = np.array([1] * 5 + [2] * 7 + [0] * 4)
    packed = np.asarray(influence(params, jnp.asarray(segments)))
    same, real = segments[:, None] == segments[None], segments != 0
    assert (packed[real][same[real]] > 1e-6).all()
    assert (packed[real][~same[real]] == 0).all()


def test_packed_rows_give_the_states_of_separate_rows(params):
    rng = np.random.default_rng(1)
    tokens, types = rng.integers(1, CONFIG.vocab_size, 16), rng.integers(0, 2, 16)
    separate, packed = make_batch(), make_batch()
    for batch in (separate, packed):
        for key in INPUTS:
            batch[key] = np.zeros_like(batch[key])
    for segment, (start, end) in enumerate([(0, 6), (6, 15)], 1):
        ids, length = (tokens[start:end], types[start:end]), end - start
        for key, value in zip(INPUTS, (*ids, np.arange(length), np.ones(length)), strict=True):
            separate[key][segment, :length] = value
            packed[key][0, start:end] = value * (segment if key == "segments" else 1)
    apart, together = forward(params, separate)[0], forward(params, packed)[0]
    for a, b in zip(apart, together, strict=True):
        np.testing.assert_allclose(b[0, :6], a[1, :6], atol=1e-5, rtol=0)
        np.testing.assert_allclose(b[0, 6:15], a[2, :9], atol=1e-5, rtol=0)
        assert np.isfinite(a[0]).all()  # A row of nothing but padding.


def test_packed_examples_have_the_losses_of_unpacked_ones(monkeypatch):
    """Sums and weights of losses and metrics, and gradients, without dropout."""
    monkeypatch.setattr("prelm_jax.data.pairs._PACKED_TOGETHER", 16)
    documents = corpus(random_sizes(np.random.default_rng(0), 60, 3, median=6))
    batches = batches_of(documents, 16, max_length=64, max_predictions=12, packing=True)
    N = batches.packing.num_examples
    step, packed = next((i, batches[i]) for i in range(20) if batches[i]["next_sentence_weights"].sum() == N)
    unpacked = batches.unpacked(step * N + np.arange(N))
    assert packed["segments"].max() > 2 and len(packed["tokens"]) == 16 < N
    model = dataclasses.replace(
        CONFIG,
        vocab_size=batches.vocab_size,
        num_layers=1,
        max_position_embeddings=64,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    ).build()

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradients(params, batch):
        with jax.default_matmul_precision("highest"):
            losses, metrics, _ = model.loss(params, {}, batch, jax.random.key(0), train=True)
        weights = model.weights(batch)
        return sum(losses[name][0] / weights[name] for name in losses), (losses | metrics, weights)

    params = jax.jit(model.init_params)(jax.random.key(1))
    (expected, sums), (found, packed_sums) = gradients(params, unpacked), gradients(params, packed)
    assert sums[1] == packed_sums[1] and sums[1]["next_sentence_loss"] == N
    for whole, part in zip(jax.tree.leaves(sums), jax.tree.leaves(packed_sums), strict=True):
        np.testing.assert_allclose(part, whole, rtol=1e-6)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    for whole, part in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(part, whole, atol=1e-6 * largest, rtol=0)


# Dropout


@partial(jax.jit, static_argnums=1)
def dropped(x, rate=0.1, seed=0):
    return Dropout(rate).apply({}, x, True, rngs={"dropout": jax.random.key(seed)})


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_zeroes_its_rate_and_scales_the_rest(rate):
    y = np.asarray(dropped(jnp.ones((512, 16, 64)), rate))
    deviation = math.sqrt(rate * (1 - rate) / y.size)
    assert abs((y == 0).mean() - rate) < 4 * deviation
    np.testing.assert_allclose(y[y != 0], 1 / (1 - rate), rtol=1e-6)


def test_dropout_masks_are_uncorrelated():
    n = 1024
    first, second = ((np.asarray(dropped(jnp.ones((n, n)), 0.5, seed)) == 0) * 2.0 - 1 for seed in (0, 1))
    # Products of two independent sign vectors of length n are about normal with deviation sqrt(n).
    for products in (first @ first.T, first.T @ first):
        assert np.abs(products - np.diag(products.diagonal())).max() < 6 * math.sqrt(n)
    assert np.abs(first @ second.T).max() < 6 * math.sqrt(n)
    assert np.abs(first.T @ second).max() < 6 * math.sqrt(n)
    flat = first.ravel()
    for lag in (1, 2, n - 1, n, n + 1):
        assert abs(flat[:-lag] @ flat[lag:]) < 6 * math.sqrt(flat.size)


def test_every_random_bit_is_set_half_of_the_time():
    bits = np.asarray(random_bits(jax.random.key(0), (256, 8, 64)))
    rates = [(bits >> i & 1).mean() for i in range(32)]
    np.testing.assert_allclose(rates, 0.5, atol=4 * 0.5 / math.sqrt(bits.size))


def test_initial_values_are_of_a_truncated_normal():
    """The largest gap between the distribution functions (Kolmogorov and Smirnov); two parameters share nothing."""
    first, second = (np.asarray(truncated_normal(0.5)(jax.random.key(seed), (1000, 1000))) for seed in (0, 1))
    values = np.sort(first, axis=None)
    gap = np.abs(stats.truncnorm.cdf(values, -2, 2, scale=0.5) - np.arange(values.size) / values.size).max()
    assert gap < 2 / math.sqrt(values.size)
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 5 / math.sqrt(values.size)
    assert abs(np.corrcoef(first[:, :-1].ravel(), first[:, 1:].ravel())[0, 1]) < 5 / math.sqrt(values.size)


@pytest.mark.parametrize("spec", [P("a"), P(None, "a"), P("b", "a"), P(None, None, ("a", "b"))])
def test_dropout_is_the_same_under_any_sharding(spec):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    x = jax.random.normal(jax.random.key(1), (8, 16, 24))
    sharded = dropped(jax.device_put(x, NamedSharding(mesh, spec)))
    assert len(sharded.sharding.device_set) == 8
    np.testing.assert_array_equal(sharded, dropped(x))


def test_the_gradient_of_dropout_has_the_mask_of_the_forward_pass():
    x, cotangent = jax.random.normal(jax.random.key(1), (2, 8, 16, 24))
    y, vjp = jax.vjp(dropped, x)
    (gradient,) = vjp(cotangent)
    np.testing.assert_array_equal(gradient == 0, y == 0)
    np.testing.assert_allclose(gradient, np.where(y == 0, 0, cotangent / 0.9), rtol=1e-6)


def test_no_two_dropouts_of_the_model_share_a_key(params, monkeypatch):
    @jax.jit
    def keys():
        collected = []
        for module in (layers, attention):
            monkeypatch.setattr(
                module, "dropout", lambda x, rate, key: (collected.append(jax.random.key_data(key)), x)[1]
            )
        BERT.loss(params, {}, make_batch(), jax.random.key(0), True)
        return collected

    distinct = {tuple(np.asarray(key)) for key in keys()}
    assert len(distinct) == 1 + 3 * CONFIG.num_layers


def test_only_training_has_dropout(params):
    batch, loss = make_batch(), jax.jit(objective)
    expected, _ = loss_and_gradients(params, batch)
    with_key = {float(loss(params, batch, jax.random.key(seed))) for seed in (0, 0, 1)}
    assert len(with_key) == 2
    assert float(expected) not in with_key
