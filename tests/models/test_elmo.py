"""ELMo against a NumPy reference: values and gradients; the LSTM's own VJP; causality; the train step."""

import dataclasses
import math
import re
from functools import partial

import elmo_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from prelm_jax.errors import InputError
from prelm_jax.formats.base import abstract_params
from prelm_jax.models import layers
from prelm_jax.models.elmo import ELMoConfig, log_expected_count
from prelm_jax.models.lstm import lstm
from prelm_jax.training.optimizer import Adagrad
from prelm_jax.training.parameters import path_name
from prelm_jax.training.sharding import MeshConfig, shard_batch
from prelm_jax.training.step import Keys, abstract_state, make_train_step, new_state
from prelm_jax.validation import check, read

pytestmark = pytest.mark.usefixtures("shared_programs")
CONFIG = ELMoConfig(
    vocab_size=41,
    character_embedding_size=4,
    filters=((1, 4), (2, 8), (7, 12)),
    num_highways=2,
    projection_size=8,
    hidden_size=16,
    cell_clip=0.4,
    projection_clip=0.25,
)
ONE_LAYER = dataclasses.replace(CONFIG, num_layers=1, num_highways=1)
NEGATIVES = 12
DIRECTIONS = ("forward", "backward")
ROWS, LENGTH, WORDS = 8, 5, 16
LAYOUT = {"characters": "shared"} | {
    f"{d}_{key}": "replicated" if key in ("negatives", "tries") else "rows"
    for d in DIRECTIONS
    for key in ("words", "targets", "weights", "negatives", "tries")
}


def make_batch(seed=0, config=CONFIG, rows=ROWS, length=LENGTH, negatives=NEGATIVES):
    """Words of 1 to 48 bytes; some targets are among the negatives; some positions have no weight."""
    rng = np.random.default_rng(seed)
    characters = np.full((WORDS, 50), 260)
    for row, size in zip(characters, [48, 1, 47, *rng.integers(1, 12, WORDS - 3)], strict=True):
        row[: size + 2] = [258, *rng.integers(0, 256, size), 259]
    batch = {"characters": characters}
    for d in DIRECTIONS:
        batch |= {
            f"{d}_words": rng.integers(0, WORDS, (rows, length)),
            f"{d}_targets": rng.integers(0, config.vocab_size, (rows, length)),
            f"{d}_weights": (rng.random((rows, length)) < 0.8).astype(np.float32),
            f"{d}_negatives": rng.permutation(config.vocab_size)[:negatives],
            f"{d}_tries": np.array(19 if d == "forward" else negatives),
        }
    return {name: x.astype(np.int32) if x.dtype == np.int64 else x for name, x in batch.items()}


def random_like(tree, scale, seed=0):
    """Of every array of a tree random values, float64."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: scale * rng.normal(size=leaf.shape), tree)


def fp32(tree):
    return jax.tree.map(partial(jnp.asarray, dtype=jnp.float32), tree)


def close(found, expected, rtol=2e-5, atol=2e-6):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=atol), found, expected)


@pytest.fixture(scope="module")
def params():
    """Random values, biases too, large enough for both clips to bite."""
    return random_like(abstract_params(CONFIG), 0.5)


@pytest.fixture(scope="module")
def carry():
    return random_like(jax.eval_shape(lambda: CONFIG.build().init_carry(ROWS)), 0.1, seed=1)


@pytest.fixture
def masks(monkeypatch):
    """Dropout with masks of our own instead of drawn ones; gives the function `drop` of the reference the same."""
    rng = np.random.default_rng(5)
    drawn = [rng.integers(0, 2, (ROWS, LENGTH, CONFIG.projection_size)) * 2.0 for _ in range(6)]
    left = iter(list(drawn))
    monkeypatch.setattr(layers, "dropout", lambda x, rate, key: x * next(left))
    # In the order of the model: both directions of each layer, then both before the softmax.
    return lambda: {d: iter(drawn[i::2]) for i, d in enumerate(DIRECTIONS)}


def objective(model, params, carry, batch, key):
    """Trains with `key`; None: evaluates."""
    with jax.default_matmul_precision("highest"):
        key_or_any = jax.random.key(0) if key is None else key
        losses, metrics, carry = model.loss(params, carry, batch, key_or_any, key is not None)
    assert metrics == {}
    total = sum(model.coefficients[name] * loss / weight for name, (loss, weight) in losses.items())
    return total, (losses, carry)


def referenced(params, config, carry, batch, drop):
    sums, states = reference.losses(params, config, batch, carry, drop)
    return sum(0.5 * sums[f"{d}_loss"] / batch[f"{d}_weights"].sum() for d in DIRECTIONS), (sums, states)


# Values and gradients


@partial(jax.jit, static_argnums=0)
def encode(config, params, characters):
    return config.encoder().apply({"params": params}, characters, method="encode")


@pytest.mark.parametrize("change", [{}, {"activation": "tanh", "num_highways": 1}])
def test_words_are_encoded_as_by_the_reference(params, change):
    config, characters = dataclasses.replace(CONFIG, **change), make_batch()["characters"]
    encoded = encode(config, fp32(params), characters)
    close(encoded, reference.encode(params, config, characters), atol=2e-5)
    assert len(np.unique(np.round(encoded, 4), axis=0)) == WORDS


@pytest.mark.parametrize("longest", [4, 24, 48, 50])
def test_words_are_encoded_alike_without_their_padding(params, longest):
    characters = make_batch()["characters"]
    characters = characters[(characters[:, longest:] == 260).all(1)]
    encoded = encode(CONFIG, fp32(params), characters[:, :longest])
    close(encoded, reference.encode(params, CONFIG, characters), atol=2e-5)


@pytest.mark.parametrize("skip", [True, False])
def test_evaluation_is_without_dropout_and_over_the_whole_vocabulary(params, carry, skip):
    config, batch = dataclasses.replace(CONFIG, use_skip_connections=skip), make_batch()
    total, (losses, states) = jax.jit(partial(objective, config.build(), key=None))(fp32(params), fp32(carry), batch)
    expected, (sums, expected_states) = referenced(params, config, carry, batch, None)
    close(total, expected)
    close({name: loss for name, (loss, _) in losses.items()}, sums)
    close({name: weight for name, (_, weight) in losses.items()}, config.build().weights(batch))
    close(states, expected_states, atol=1e-5)  # Rounding: half an ulp of the parameters moves a state by up to 2e-6.
    # Both clips were at work, and not everywhere.
    for name, bound in (("cell", CONFIG.cell_clip), ("hidden", CONFIG.projection_clip)):
        clipped = np.abs(expected_states["forward"]["layer_0"][name]) == bound
        assert 0.02 < clipped.mean() < 0.9


def without_negatives(batch):
    return {name: x for name, x in batch.items() if not name.endswith(("negatives", "tries"))}


@pytest.mark.parametrize("sampled", [True, False])
def test_training_loss_and_gradients_equal_the_reference(params, carry, masks, monkeypatch, sampled):
    """Dropout by given masks; the gradient of every parameter along a random direction, by finite differences."""
    monkeypatch.setattr("prelm_jax.models.cross_entropy.CHUNK_TOKENS_ON_CPU", 7)
    config, batch = CONFIG, make_batch() if sampled else without_negatives(make_batch())
    step = jax.jit(jax.value_and_grad(partial(objective, config.build()), has_aux=True))
    (total, (_, states)), gradients = step(fp32(params), fp32(carry), batch, jax.random.key(0))

    def loss(params):
        left = masks()
        return referenced(params, config, carry, batch, lambda d, x: x * next(left[d]))

    expected, (_, expected_states) = loss(params)
    close(total, expected)
    close(states, expected_states)
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    values = jax.tree.leaves(params)
    along, step = jax.tree.leaves(random_like(params, 1.0, seed=2)), 1e-6
    for n, (path, gradient) in enumerate(leaves):
        moved = [
            jax.tree.unflatten(
                jax.tree.structure(params), [x + sign * step * along[n] if i == n else x for i, x in enumerate(values)]
            )
            for sign in (1, -1)
        ]
        slope = (loss(moved[0])[0] - loss(moved[1])[0]) / (2 * step)
        found = (np.asarray(gradient, np.float64) * along[n]).sum()
        scale = np.sqrt(np.square(gradient).sum())
        assert scale > 1e-5, path_name(path)
        assert abs(found - slope) < 2e-4 * scale + 1e-7, path_name(path)
    table = np.asarray(gradients["softmax"]["embedding"])
    assert (table[config.vocab_size :] == 0).all()


def test_a_negative_that_is_the_target_does_not_count_twice(params, carry):
    """With every word a negative and equal expected counts it is the full softmax."""
    config = dataclasses.replace(CONFIG, dropout=0.0)
    batch = make_batch(negatives=config.vocab_size) | {f"{d}_tries": np.int32(10**9) for d in DIRECTIONS}
    run = jax.jit(partial(objective, config.build()))
    sampled, full = (run(fp32(params), fp32(carry), batch, key=key)[0] for key in (jax.random.key(0), None))
    close(sampled, full)


def test_expected_counts_are_exact_for_the_rarest_words():
    """In float64 from the definition; P of word 793,470 is 9e-8, below what 1 - P can show in fp32."""
    ids, vocabulary, sampled = np.array([0, 1, 1000, 100_000, 793_470]), 793_471, 8192
    probabilities = (np.log(ids + 2.0) - np.log(ids + 1.0)) / np.log(vocabulary + 1.0)
    for tries, expected in (
        (16_052, 1 - np.exp(16_052 * np.log1p(-probabilities))),
        (sampled, sampled * probabilities),
    ):
        found = log_expected_count(jnp.asarray(ids), jnp.asarray(tries), sampled, vocabulary)
        np.testing.assert_allclose(found, np.log(expected), rtol=1e-5, atol=1e-5)


def test_the_full_softmax_holds_few_logits_at_once(params, carry, monkeypatch):
    monkeypatch.setattr("prelm_jax.models.cross_entropy.CHUNK_LOGITS", 10 * 128)
    batch = make_batch()
    text = str(jax.make_jaxpr(partial(objective, CONFIG.build(), key=None))(fp32(params), fp32(carry), batch))
    assert "f32[10,128]" in text
    assert f"f32[{ROWS * LENGTH},128]" not in text


# The LSTM


def plain_lstm(weights, inputs, states, cell_clip, projection_clip):
    """The same, a scan without a VJP of its own."""

    def one(w, x_BTP, state):
        def step(state, x):
            z = jnp.concatenate([x, state["hidden"]], 1) @ w["kernel"] + w["bias"][None]
            i, j, f, o = jnp.split(z, 4, 1)
            cell = jax.nn.sigmoid(f + 1) * state["cell"] + jax.nn.sigmoid(i) * jnp.tanh(j)
            cell = jnp.clip(cell, -cell_clip, cell_clip)
            hidden = (jax.nn.sigmoid(o) * jnp.tanh(cell)) @ w["projection"]
            hidden = jnp.clip(hidden, -projection_clip, projection_clip)
            return {"cell": cell, "hidden": hidden}, hidden

        last, hidden = jax.lax.scan(step, state, x_BTP.swapaxes(0, 1))
        return hidden.swapaxes(0, 1), last

    hidden, last = zip(*map(one, weights, inputs, states), strict=True)
    return list(hidden), list(last)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_vjp_of_the_lstm_equals_autodiff_of_a_plain_scan(dtype):
    rows, length, P, E = 3, 6, 4, 10
    shapes = (
        {"kernel": (2 * P, 4 * E), "bias": (4 * E,), "projection": (E, P)},
        (rows, length, P),
        {"cell": (rows, E), "hidden": (rows, P)},
    )
    rng = np.random.default_rng(0)
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):

        def is_shape(x):
            return isinstance(x, tuple) and isinstance(x[0], int)

        def draw(shape):
            return jnp.asarray(rng.normal(size=shape), dtype)

        arguments = [[jax.tree.map(draw, shape, is_leaf=is_shape) for _ in range(2)] for shape in shapes]
        towards = jax.tree.map(lambda x: draw(x.shape), plain_lstm(*arguments, 0.5, 0.4))

        def objective(function, arguments):  # Through the outputs and through the last states.
            outputs = function(*arguments, 0.5, 0.4)[:2]
            return sum(jax.tree.leaves(jax.tree.map(lambda x, y: (x * y).sum(), outputs, towards))), outputs

        def run(function):
            return jax.jit(jax.value_and_grad(partial(objective, function), has_aux=True))(arguments)

        (_, outputs), found = run(lstm)
        (_, expected_outputs), expected = run(plain_lstm)
    for x in jax.tree.leaves(found):
        assert x.dtype == dtype
    tolerance = {"float32": 2e-5, "float64": 1e-12}[dtype]
    close(outputs, expected_outputs, rtol=tolerance, atol=tolerance)
    close(found, expected, rtol=tolerance, atol=tolerance)
    assert 0.05 < np.mean(np.abs(outputs[0][0]) == np.asarray(0.4, dtype)) < 0.95


def test_values_on_a_bound_pass_gradient_and_values_beyond_do_not():
    """With the input gate shut and the forget gate open, a cell keeps its value."""
    weights = {"kernel": jnp.zeros((2, 4)), "bias": jnp.array([-1e4, 0, 1e4, 1e4]), "projection": jnp.ones((1, 1))}

    def last_cell(cell, clip):
        state = {"cell": cell.reshape(1, 1), "hidden": jnp.zeros((1, 1))}
        return lstm([weights], [jnp.zeros((1, 1, 1))], [state], clip, 9.0)[1][0]["cell"][0, 0]

    assert jax.grad(last_cell)(jnp.array(3.0), 3.0) == 1
    assert jax.grad(last_cell)(jnp.array(3.001), 3.0) == 0


def test_in_half_precision_the_state_is_kept_in_full(params, carry):
    model, batch = CONFIG.build(jnp.bfloat16), make_batch()
    run = jax.jit(jax.value_and_grad(partial(objective, model), has_aux=True))
    (total, (_, states)), gradients = run(fp32(params), fp32(carry), batch, jax.random.key(0))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((total, states, gradients)))
    exact, _ = jax.jit(partial(objective, CONFIG.build()))(fp32(params), fp32(carry), batch, jax.random.key(0))
    assert abs(total - exact) < 0.05 * exact


# Inference


@jax.jit
def run(params, words_BTP, lengths_B, carry):
    with jax.default_matmul_precision("highest"):
        return CONFIG.encoder().apply({"params": params}, words_BTP, lengths_B, carry, method="apply_layers")


def test_rows_of_any_length_are_read_from_both_ends(params, carry):
    lengths = [5, 3, 0, 1, 5, 4, 2, 5]
    words = np.random.default_rng(3).normal(size=(ROWS, LENGTH, CONFIG.projection_size))
    outputs, states = run(fp32(params), words, np.array(lengths), fp32(carry))
    for d in DIRECTIONS:
        assert outputs[d].shape == (CONFIG.num_layers, ROWS, LENGTH, CONFIG.projection_size)
        order = slice(None, None, 1 if d == "forward" else -1)
        for row, length in enumerate(lengths):
            before = jax.tree.map(lambda x, row=row: x[row : row + 1], carry[d])
            expected, after = (
                reference.direction(params[d], CONFIG, words[row : row + 1, :length][:, order], before)
                if length
                else ([], before)
            )
            close(jax.tree.map(lambda x, row=row: x[row : row + 1], states[d]), after)
            for layer, output in enumerate(expected):
                close(outputs[d][layer, row, :length], output[0][order])
            assert (outputs[d][:, row, length:] == 0).all()
    words[np.arange(LENGTH) >= np.array(lengths)[:, None]] = 7.0
    again = run(fp32(params), words, np.array(lengths), fp32(carry))
    jax.tree.map(np.testing.assert_array_equal, again, (outputs, states))


def test_a_row_in_two_batches_equals_one_row(params, carry):
    """A batch starts from the states at the end of the batch before."""
    model, batch = CONFIG.build(), make_batch(length=2 * LENGTH)
    step = jax.jit(partial(objective, model, key=None))
    _, (whole, expected) = step(fp32(params), fp32(carry), batch)
    sums, states = [], fp32(carry)
    for part in (slice(0, LENGTH), slice(LENGTH, None)):
        half = {name: x[:, part] if LAYOUT[name] == "rows" else x for name, x in batch.items()}
        _, (losses, states) = step(fp32(params), states, half)
        sums.append(losses)
    close(states, expected)
    close(jax.tree.map(jnp.add, *sums), whole)


def test_each_direction_sees_what_it_has_read_and_nothing_else(params, carry):
    """By gradient, exactly: [T, T], the largest derivative of an output at t by an input at s."""
    lengths, words = np.full(1, LENGTH), np.random.default_rng(4).normal(size=(1, LENGTH, CONFIG.projection_size))
    before = jax.tree.map(lambda x: jnp.asarray(x[:1], jnp.float32), carry)
    derivatives = jax.jit(
        jax.jacrev(lambda words: {d: x[-1, 0] for d, x in run(fp32(params), words, lengths, before)[0].items()})
    )(jnp.asarray(words, jnp.float32))
    for d in DIRECTIONS:
        found = np.abs(derivatives[d][:, :, 0]).max((1, 3))
        seen = np.tri(LENGTH, dtype=bool) if d == "forward" else np.tri(LENGTH, dtype=bool).T
        assert (found[seen] > 1e-7).all()
        assert (found[~seen] == 0).all()


def test_logits_are_of_the_softmax(params):
    hidden = np.random.default_rng(6).normal(size=(2, 3, CONFIG.projection_size))
    logits = CONFIG.build().apply({"params": fp32(params)}, jnp.asarray(hidden, jnp.float32), method="logits")
    table, bias = params["softmax"]["embedding"], params["softmax"]["bias"]
    close(logits[..., : CONFIG.vocab_size], (hidden @ table.T + bias)[..., : CONFIG.vocab_size], atol=1e-5)
    assert (jax.nn.softmax(logits)[..., CONFIG.vocab_size :] == 0).all()


# Dropout


def test_every_dropout_has_a_key_of_its_own(params, carry, monkeypatch):
    """Before each layer and before the softmax, in each direction; none in the encoder, none without a key."""
    shapes = []

    @partial(jax.jit, static_argnums=0)
    def keys(training):
        collected = []
        monkeypatch.setattr(
            layers,
            "dropout",
            lambda x, rate, key: (collected.append(jax.random.key_data(key)), shapes.append(x.shape), x)[2],
        )
        CONFIG.build().loss(fp32(params), fp32(carry), make_batch(), jax.random.key(0), training)
        return collected

    assert len({tuple(np.asarray(key)) for key in keys(True)}) == len(shapes) == 2 * (CONFIG.num_layers + 1)
    assert set(shapes) == {(ROWS, LENGTH, CONFIG.projection_size)}
    assert keys(False) == []


# Sizes


@pytest.mark.parametrize(
    ("sizes", "encoder_and_lstm"),
    [((1024, 128, 1), 13_593_296), ((2048, 256, 1), 28_027_728), ((4096, 512, 2), 93_600_848)],
)
def test_published_sizes_have_their_parameters(sizes, encoder_and_lstm):
    hidden, projection, highways = sizes
    config = ELMoConfig(vocab_size=793_471, hidden_size=hidden, projection_size=projection, num_highways=highways)
    params = abstract_params(config)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    counts = {name: sum(math.prod(x.shape) for x in jax.tree.leaves(tree)) for name, tree in params.items()}
    assert counts.pop("softmax") == 793_472 * (projection + 1)
    assert sum(counts.values()) == encoder_and_lstm
    assert counts["characters"] == 4_176


def test_a_step_of_the_original_has_its_operations():
    """The published arithmetic, forward, MFLOP for a word in one direction: 17.6 + 33.6 + 2.1, 75.5, 8.4."""
    batch = {"characters": np.zeros((1, 50)), "forward_words": np.zeros((0, 20)), "forward_negatives": np.zeros(8192)}
    model = ELMoConfig(vocab_size=793_471).build()
    np.testing.assert_allclose(model.flops(batch) / 3e6, 17.6 + 33.6 + 2.1, rtol=0.002)
    one = model.flops(batch | {"forward_words": np.zeros((1, 1))}) - model.flops(batch)
    np.testing.assert_allclose(one / 3e6, 2 * (75.5 + 8.4), rtol=0.002)


def test_initial_values_equal_the_reference():
    params = ELMoConfig(vocab_size=1000, projection_size=128, hidden_size=256, filters=((1, 32), (3, 480))).build()
    params = jax.jit(params.init_params)(jax.random.key(0))
    encoder, layer = params["encoder"], params["backward"]["layer_1"]

    def gap(values, distribution):
        values = np.sort(np.asarray(values), axis=None)
        return np.abs(distribution.cdf(values) - np.arange(values.size) / values.size).max() * math.sqrt(values.size)

    def uniform(limit):
        return stats.uniform(-limit, 2 * limit)

    for values, distribution in (
        (params["characters"]["embedding"], uniform(1.0)),
        (encoder["convolution_1"]["kernel"], uniform(0.05)),
        (encoder["highway_0"]["carry"]["kernel"], stats.norm(0, 512**-0.5)),
        (encoder["projection"]["kernel"], stats.norm(0, 512**-0.5)),
        (layer["kernel"], uniform(math.sqrt(6 / (256 + 1024)))),
        (layer["projection"]["kernel"], uniform(math.sqrt(6 / (256 + 128)))),
        (params["softmax"]["embedding"], stats.norm(0, 128**-0.5)),
    ):
        assert gap(values, distribution) < 2
    biases = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(params) if path_name(p).endswith("bias")}
    for name, bias in biases.items():
        assert (bias == (-2 if "carry" in name else 0)).all(), name
    tanh = dataclasses.replace(CONFIG, activation="tanh", filters=((7, 400),), num_highways=0).build()
    tanh = jax.jit(tanh.init_params)(jax.random.key(0))
    assert gap(tanh["encoder"]["convolution_0"]["kernel"], stats.norm(0, (7 * 4) ** -0.5)) < 2


def test_a_batch_that_does_not_fit_the_model_is_refused():
    model = CONFIG.build()
    model.check(make_batch())
    with pytest.raises(InputError, match="backward_targets go up to 41, but the model's vocab_size is 41"):
        model.check(make_batch() | {"backward_targets": np.full((1, 1), 41)})


def test_filters_are_tuples_and_fit_into_a_word():
    assert read(ELMoConfig, {"filters": [[1, 32], [7, 8]]}, "x") == ELMoConfig(filters=((1, 32), (7, 8)))
    with pytest.raises(InputError, match=r"filters\.1\.0 is 51: must be at most 50"):
        check(ELMoConfig(filters=((3, 4), (51, 4))))
    with pytest.raises(InputError, match=r"^filters is "):
        check(ELMoConfig(filters=()))


def test_words_are_counted_once_for_both_directions():
    batch = make_batch()
    assert CONFIG.build().tokens(batch).tolist() == [(batch["forward_weights"] > 0).sum(), ROWS * LENGTH]


# Training


def test_a_shared_array_is_cut_over_the_devices_where_they_divide_it():
    batch, mesh = make_batch(), MeshConfig(8).build()
    characters = shard_batch(batch, LAYOUT, mesh)["characters"]
    assert characters.addressable_shards[0].data.shape == (WORDS // 8, 50)
    np.testing.assert_array_equal(characters, batch["characters"])
    fewer = shard_batch({"characters": batch["characters"][:12]}, LAYOUT, mesh)["characters"]
    assert fewer.addressable_shards[0].data.shape == (12, 50)


def train(
    steps,
    devices=1,
    parameters="replicated",
    slices=1,
    accumulate=1,
    config=ONE_LAYER,
    batch=make_batch,
    learning_rate=0.2,
):
    """(losses, final state)."""
    model, mesh = config.build(), MeshConfig(devices, slices=slices).build()
    optimizer = Adagrad(learning_rate, unroll_steps=LENGTH)
    with jax.set_mesh(mesh):
        abstract = abstract_state(model, optimizer, ROWS, mesh, parameters)
        state = new_state(model, optimizer, ROWS, 0, abstract)
        step_function = make_train_step(model, optimizer, accumulate, LAYOUT, abstract)
        losses = []
        for step in range(steps):
            state, metrics = step_function(state, shard_batch(batch(step), LAYOUT, mesh), Keys.from_seed(0).dropout)
            losses.append(float(metrics["loss"]))
    for leaf, expected in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)
    return np.array(losses), state


@pytest.fixture(scope="module")
def one_device():
    return train(5)


@pytest.mark.parametrize(
    ("parameters", "slices"), [("replicated", 1), ("fsdp", 1), pytest.param("replicated", 2, marks=pytest.mark.slow)]
)
def test_a_mesh_gives_the_losses_of_one_device(one_device, parameters, slices):
    """fp32, dropout on. Eight rows and sixteen words on eight devices; the states are equal too."""
    losses, state = train(5, 8, parameters, slices)
    np.testing.assert_allclose(losses[0], one_device[0][0], rtol=1e-6)
    np.testing.assert_allclose(losses, one_device[0], rtol=1e-4)
    close(state.carry, one_device[1].carry, atol=1e-4)
    cell, kernel = state.carry["forward"]["layer_0"]["cell"], state.params["forward"]["layer_0"]["kernel"]
    assert cell.addressable_shards[0].data.shape == (1, CONFIG.hidden_size)
    assert kernel.addressable_shards[0].data.size * (8 if parameters == "fsdp" else 1) == kernel.size
    tables = [
        (leaf, single)
        for (path, leaf), single in zip(
            jax.tree_util.tree_leaves_with_path((state.params, state.opt_state)),
            jax.tree.leaves((one_device[1].params, one_device[1].opt_state)),
            strict=True,
        )
        if path_name(path).endswith("softmax/embedding")
    ]
    assert len(tables) == 2  # And its accumulator.
    for table, single in tables:
        assert table.addressable_shards[0].data.shape == (128 * slices // 8, 8)
        close(table, single, atol=1e-4)


@pytest.mark.slow
def test_a_softmax_over_all_words_does_not_depend_on_the_mesh():
    """It needs the whole of a sharded table."""
    losses, state = train(2, 8, batch=lambda step: without_negatives(make_batch(step)))
    expected, single = train(2, batch=lambda step: without_negatives(make_batch(step)))
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    close(state.params["softmax"], single.params["softmax"], atol=1e-5)


def test_a_table_whose_rows_the_devices_do_not_divide_is_replicated():
    mesh = MeshConfig(3).build()
    state = abstract_state(ONE_LAYER.build(), Adagrad(0.2), 3, mesh, "replicated")
    assert state.params["softmax"]["embedding"].sharding.is_fully_replicated


@pytest.mark.parametrize("slices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_devices_exchange_words_and_not_vocabularies(slices):
    """Each has a part of the softmax's table, and of its gradient; only the rows that are read travel."""
    config, mesh = dataclasses.replace(ONE_LAYER, vocab_size=200), MeshConfig(8, slices=slices).build()
    model, rows = config.build(), 256
    optimizer = Adagrad(0.2, unroll_steps=LENGTH)
    with jax.set_mesh(mesh):
        state = abstract_state(model, optimizer, ROWS, mesh, "replicated")
        batch = shard_batch(make_batch(config=config), LAYOUT, mesh)
        step = make_train_step(model, optimizer, 1, LAYOUT, state)
        text = step.lower(state, batch, Keys.from_seed(0).dropout).compile().as_text()
    collectives = [line for line in text.splitlines() if re.search(r" all-(reduce|gather|to-all)(-start)?\(", line)]
    part = f"f32[{rows * slices // 8},8]"
    assert part in text and f"f32[{rows},8]" not in text
    assert collectives
    assert not [line for line in collectives if part in line]


def test_accumulated_micro_batches_equal_one_batch():
    """Rows have unequal weights; each keeps its state."""
    without_dropout = dataclasses.replace(ONE_LAYER, dropout=0.0)
    losses, state = train(3, config=without_dropout)
    cut, accumulated = train(3, accumulate=4, config=without_dropout)
    np.testing.assert_allclose(cut, losses, rtol=1e-5)
    close((accumulated.params, accumulated.carry), (state.params, state.carry), atol=2e-5)


def test_one_batch_is_learned():
    config = dataclasses.replace(ONE_LAYER, dropout=0.0, cell_clip=3.0, projection_clip=3.0)
    batch = without_negatives(make_batch())
    losses, _ = train(150, config=config, batch=lambda step: batch, learning_rate=0.5)
    assert abs(losses[0] - math.log(41)) < 0.3
    assert losses[-1] < 0.5
