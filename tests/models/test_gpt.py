"""GPT against transformers' PyTorch GPT: outputs and gradients; sizes, attention, the loss in chunks."""

import math
import re
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

from prelm_jax.errors import InputError
from prelm_jax.formats.base import abstract_params
from prelm_jax.formats.huggingface_gpt import LAYOUT
from prelm_jax.models import attention, layers
from prelm_jax.models.cross_entropy import accurate_sum, tied_cross_entropy
from prelm_jax.models.gpt import GPTConfig
from prelm_jax.models.layers import normal
from prelm_jax.training.parameters import path_name

CONFIG = GPTConfig(vocab_size=37, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=16)
GPT, ENCODER = CONFIG.build(), CONFIG.encoder()
LENGTHS = [16, 11, 5]  # Real tokens in each row.
TOLERANCE = 2e-5
INPUTS = ("tokens", "positions", "segments")


def torch_gpt():
    """An OpenAIGPTLMHeadModel of the same sizes; every parameter random, biases and norms too."""
    config = transformers.OpenAIGPTConfig(
        vocab_size=CONFIG.vocab_size,
        n_embd=CONFIG.hidden_size,
        n_layer=CONFIG.num_layers,
        n_head=CONFIG.num_heads,
        n_positions=CONFIG.max_position_embeddings,
    )
    return randomize(transformers.OpenAIGPTLMHeadModel(config))


def theirs(state, path, shape):
    """The value of our parameter in a PyTorch state dict (or its gradient), padded with zeros."""
    value = state[f"transformer.{LAYOUT.tensor_name(path)}"].numpy()
    for third, name in enumerate(("query", "key", "value")):
        if f"/{name}/" in path:
            value = value[..., third * CONFIG.hidden_size : (third + 1) * CONFIG.hidden_size]
    return np.pad(value, [(0, want - have) for want, have in zip(shape, value.shape, strict=True)])


def make_batch():
    """Rows of 16, 11 and 5 tokens; the last target of a row is not counted, nor is one in the middle."""
    rng = np.random.default_rng(0)
    shape = (len(LENGTHS), CONFIG.max_position_embeddings)
    columns = np.broadcast_to(np.arange(shape[1]), shape)
    real = columns < np.array(LENGTHS)[:, None]
    tokens = np.where(real, rng.integers(1, CONFIG.vocab_size, shape), 0)
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, 1),
        "positions": columns,
        "segments": real.astype(np.int32),
        "weights": ((columns < np.array(LENGTHS)[:, None] - 1) & (columns != 3)).astype(np.float32),
    }


@pytest.fixture(scope="module")
def reference():
    """The PyTorch model, its outputs on the batch, the mean loss and its gradients."""
    model, batch = torch_gpt(), make_batch()
    output = model(
        input_ids=torch.tensor(batch["tokens"]),
        attention_mask=torch.tensor(batch["segments"]),
        output_hidden_states=True,
    )
    labels = torch.tensor(np.where(batch["weights"] == 1, batch["targets"], -100))
    loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    loss.backward()
    return output, loss, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def params():
    """The PyTorch model's parameters as ours."""
    state = torch_gpt().state_dict()
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(theirs(state, path_name(path), leaf.shape)), abstract_params(CONFIG)
    )


@jax.jit
def forward(params, batch):
    """(hidden states, logits)."""
    with jax.default_matmul_precision("highest"):
        hidden = ENCODER.apply({"params": params}, batch, method="hidden_states")
        return hidden, GPT.apply({"params": params}, hidden[-1], method="logits")


def objective(params, batch, key=None):
    """Trains with `key`; None: evaluates."""
    with jax.default_matmul_precision("highest"):
        losses, _, _ = GPT.loss(params, {}, batch, jax.random.key(0) if key is None else key, key is not None)
    weights = GPT.weights(batch)
    return sum(GPT.coefficients[name] * losses[name][0] / weights[name] for name in losses)


loss_and_gradients = jax.jit(jax.value_and_grad(objective))


# Parity


def test_outputs_equal_transformers(params, reference):
    batch, (output, _, _) = make_batch(), reference
    hidden, logits = forward(params, batch)
    assert len(hidden) == len(output.hidden_states) == CONFIG.num_layers + 1
    real = batch["segments"] != 0
    for state, expected in zip(hidden, output.hidden_states, strict=True):
        np.testing.assert_allclose(state[real], expected.detach().numpy()[real], atol=TOLERANCE, rtol=0)
    expected = output.logits.detach().numpy()[real]
    np.testing.assert_allclose(logits[real][:, : CONFIG.vocab_size], expected, atol=TOLERANCE, rtol=0)
    # The padding of the vocabulary never wins.
    assert (jax.nn.softmax(logits)[..., CONFIG.vocab_size :] == 0).all()


def test_loss_and_gradients_equal_transformers(params, reference):
    _, expected_loss, gradients = reference
    loss, grads = loss_and_gradients(params, make_batch())
    assert abs(float(loss) - expected_loss.item()) < TOLERANCE
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    assert len(leaves) == len(gradients) + 4 * CONFIG.num_layers  # Theirs has query, key and value in one.
    for path, grad in leaves:
        name = path_name(path)
        expected = theirs(gradients, name, grad.shape)
        np.testing.assert_allclose(grad, expected, atol=TOLERANCE, rtol=0, err_msg=name)


def test_accuracy_counts_the_targets_that_win(params, reference):
    batch, (output, _, _) = make_batch(), reference
    counted = batch["weights"] == 1
    wins = output.logits.detach().numpy().argmax(-1)
    batch["targets"] = np.where(np.arange(16) % 2 == 0, wins, batch["targets"])
    _, metrics, carry = jax.jit(GPT.loss, static_argnums=4)(params, {}, batch, jax.random.key(0), False)
    correct, weight = metrics["lm_accuracy"]
    assert float(correct) == (wins == batch["targets"])[counted].sum() > counted.sum() / 3
    assert float(weight) == counted.sum()
    assert carry == {}


# Sizes


def test_gpt_1_has_its_parameters_and_operations():
    config = GPTConfig(vocab_size=40478)
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(config))
    sizes = {path_name(path): math.prod(leaf.shape) for path, leaf in leaves}
    padding = sizes["token_embeddings/embedding"] - 40478 * 768
    assert padding == (40576 - 40478) * 768
    assert sum(sizes.values()) - padding == 116_534_784
    # 6 operations for each parameter but the positions, 12·L·D·T for attention; biases and norms are not matmuls.
    flops = config.build().flops({"tokens": np.zeros((2, 512))}) / 1024
    assert abs(flops - (6 * (116_534_784 - 512 * 768) + 12 * 12 * 768 * 512)) < 1e-3 * flops


def test_initial_values_are_of_a_normal_distribution():
    """The largest gap between the distribution functions (Kolmogorov and Smirnov)."""
    values = np.sort(np.asarray(normal(0.5)(jax.random.key(0), (1000, 1000))), axis=None)
    gap = np.abs(stats.norm.cdf(values, scale=0.5) - np.arange(values.size) / values.size).max()
    assert gap < 2 / math.sqrt(values.size)
    assert np.abs(values).max() > 4 * 0.5


@pytest.mark.parametrize("bits", [0, 2**32 - 1])
def test_the_rarest_initial_values_are_finite(bits, monkeypatch):
    monkeypatch.setattr(layers, "random_bits", lambda key, shape: jnp.full(shape, bits, jnp.uint32))
    (value,) = normal(0.02)(jax.random.key(0), (1,))
    assert 5 < abs(value) / 0.02 < 6


def test_a_batch_that_asks_for_too_much_is_refused():
    GPT.check(make_batch())
    for key, row, complaint in (
        ("tokens", 37, "tokens go up to 37, but the model's vocab_size is 37"),
        ("targets", 40, "targets go up to 40"),
        ("positions", 16, "positions go up to 16, but the model's max_position_embeddings is 16"),
    ):
        batch = make_batch() | {key: np.full((3, 16), row)}
        with pytest.raises(InputError, match=complaint):
            GPT.check(batch)


# Attention


@jax.jit
def influence(params, segments_T):
    """[T, T] of one row: the largest derivative of an element of output t by an element of the input at s."""
    row = jnp.arange(CONFIG.max_position_embeddings)[None]

    def outputs(table):  # The input at s is varied through the embedding of its position.
        varied = params | {"position_embeddings": {"embedding": table}}
        batch = dict(zip(INPUTS, (row + 1, row, segments_T[None]), strict=True))
        return ENCODER.apply({"params": varied}, batch, method="hidden_states")[-1][0]

    out_TD, vjp = jax.vjp(outputs, params["position_embeddings"]["embedding"])
    derivatives = jax.lax.map(lambda one: vjp(one.reshape(out_TD.shape))[0], jnp.eye(out_TD.size))
    return jnp.abs(derivatives).max(-1).reshape(*out_TD.shape, -1).max(1)


def test_every_token_sees_earlier_tokens_of_its_segment_and_nothing_else(params):
    for segments in (np.ones(16, int), np.array([1] * 5 + [2] * 7 + [0] * 4)):
        found = np.asarray(influence(params, jnp.asarray(segments)))
        same, real = segments[:, None] == segments[None], segments != 0
        seen = same & np.tri(16, dtype=bool)
        assert (found[real][seen[real]] > 1e-6).all()
        assert (found[real][~seen[real]] == 0).all()


def test_packed_rows_give_the_states_of_separate_rows(params):
    tokens = np.random.default_rng(1).integers(1, CONFIG.vocab_size, 16)
    separate, packed = make_batch(), make_batch()
    for batch in (separate, packed):
        for key in INPUTS:
            batch[key] = np.zeros_like(batch[key])
    for segment, (start, end) in enumerate([(0, 6), (6, 15)], 1):
        length = end - start
        for key, value in zip(INPUTS, (tokens[start:end], np.arange(length), np.ones(length)), strict=True):
            separate[key][segment, :length] = value
            packed[key][0, start:end] = value * (segment if key == "segments" else 1)
    apart, together = forward(params, separate)[0], forward(params, packed)[0]
    for a, b in zip(apart, together, strict=True):
        np.testing.assert_allclose(b[0, :6], a[1, :6], atol=1e-5, rtol=0)
        np.testing.assert_allclose(b[0, 6:15], a[2, :9], atol=1e-5, rtol=0)
        assert np.isfinite(a[0]).all()  # A row of nothing but padding.


def test_next_logits_with_a_cache_equal_those_without(params):
    """A text of 16 tokens, appended 4 (one of them padding), 6 and then 1 at a time; two rows at once."""
    tokens = np.random.default_rng(2).integers(1, CONFIG.vocab_size, (2, 16))
    batch = {"tokens": tokens, "positions": np.tile(np.arange(16), (2, 1)), "segments": np.ones((2, 16), int)}
    _, expected = forward(params, batch)

    @jax.jit
    def extend(cache, tokens_BT, length):
        variables = {"params": params, "cache": cache}
        return GPT.apply(variables, tokens_BT, length, method="next_logits", mutable=["cache"])

    cache, start = GPT.init_cache(2), 0
    for end in (3, 9, *range(10, 17)):
        new = tokens[:, start:end]
        new = np.pad(new, ((0, 0), (1, 0)), constant_values=9) if start == 0 else new
        logits, changed = extend(cache, new, end)
        cache, start = changed["cache"], end
        np.testing.assert_allclose(logits, expected[:, end - 1], atol=TOLERANCE, rtol=0)


# Dropout


def test_only_training_has_dropout(params):
    batch, loss = make_batch(), jax.jit(objective)
    expected, _ = loss_and_gradients(params, batch)
    with_key = {float(loss(params, batch, jax.random.key(seed))) for seed in (0, 0, 1)}
    assert len(with_key) == 2
    assert float(expected) not in with_key


def test_dropout_is_where_gpt_1_has_it(params, monkeypatch):
    """On the embeddings, the attention weights and the output of every block, each with its own key."""

    @jax.jit
    def keys():
        collected = []
        for module in (layers, attention):
            monkeypatch.setattr(
                module, "dropout", lambda x, rate, key: (collected.append((jax.random.key_data(key), x)), x)[1]
            )
        GPT.loss(params, {}, make_batch(), jax.random.key(0), True)
        return collected

    collected = keys()
    assert len({tuple(np.asarray(key)) for key, _ in collected}) == len(collected)
    wide, weights = (3, 16, 32), (3, 4, 16, 16)
    assert [x.shape for _, x in collected] == [wide, *[weights, wide, wide] * CONFIG.num_layers]


# The loss in chunks


def example(rows=8, length=5, width=16, vocabulary=128, seed=0):
    rng = np.random.default_rng(seed)
    x_BTD = rng.normal(size=(rows, length, width)).astype(np.float32)
    table_VD = rng.normal(size=(vocabulary, width)).astype(np.float32)
    targets_BT = rng.integers(0, 100, (rows, length))
    weights_BT = rng.integers(0, 3, (rows, length)).astype(np.float32)
    return x_BTD, table_VD, targets_BT, weights_BT


@jax.jit
def plain(x_BTD, table_VD, targets_BT, weights_BT):
    """The same from the logits of all tokens, with library functions."""
    logits = jnp.einsum("BTD,VD->BTV", x_BTD, table_VD[:100], precision="highest")
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets_BT[..., None], 2)[..., 0]
    return (nll * weights_BT).sum(), ((logits.argmax(-1) == targets_BT) * weights_BT).sum()


@pytest.fixture(params=[1, 7, 40, 1000])
def chunked(request, monkeypatch):
    """`tied_cross_entropy` of 40 tokens in chunks of 1, of 7 (with a remainder), of all, and of more."""
    monkeypatch.setattr("prelm_jax.models.cross_entropy.CHUNK_TOKENS_ON_CPU", request.param)
    return lambda x, table, targets, weights: tied_cross_entropy(x, table, targets, weights, 100)


@pytest.mark.parametrize("shape", [(1,), (3, 5), (100, 1000)])
def test_an_accurate_sum_is_rounded_once(shape):
    x = np.random.default_rng(0).lognormal(sigma=2, size=shape).astype(np.float32)
    assert jax.jit(accurate_sum)(x) == np.float32(math.fsum(x.ravel().tolist()))


def test_the_loss_in_chunks_equals_the_plain_one(chunked):
    arguments = example()
    arguments[2][0] = np.argmax(arguments[0][0] @ arguments[1][:100].T, -1)  # Some targets that win.

    def objective(function, *arguments):  # Not the sum itself: its cotangent would be 1.
        loss, correct = function(*arguments)
        return loss**2 / 300, correct

    with jax.default_matmul_precision("highest"):
        loss, correct = jax.jit(chunked)(*arguments)
        (again, _), grads = jax.jit(jax.value_and_grad(partial(objective, chunked), (0, 1), has_aux=True))(*arguments)
    (expected, wins), expected_grads = jax.value_and_grad(partial(objective, plain), (0, 1), has_aux=True)(*arguments)
    np.testing.assert_allclose([loss**2 / 300, again], expected, rtol=1e-6)
    assert float(correct) == float(wins) > 0
    for found, grad in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(found, grad, atol=TOLERANCE, rtol=0)
    assert (np.asarray(grads[1])[100:] == 0).all()


def test_the_gradient_in_chunks_equals_finite_differences(monkeypatch):
    monkeypatch.setattr("prelm_jax.models.cross_entropy.CHUNK_TOKENS_ON_CPU", 7)
    x, table, targets, weights = example()
    gradients = jax.jit(jax.grad(lambda x, table: tied_cross_entropy(x, table, targets, weights, 100)[0], (0, 1)))
    dx, dtable = (np.asarray(gradient, np.float64) for gradient in gradients(x, table))

    def loss(x, table):  # In float64, by NumPy.
        logits = x @ table[:100].T
        nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], 2)[..., 0]
        return (nll * weights).sum()

    x, table = x.astype(np.float64), table.astype(np.float64)
    rng = np.random.default_rng(1)
    for _ in range(5):
        ux, utable, step = rng.normal(size=x.shape), rng.normal(size=table.shape), 1e-5
        slope = (loss(x + step * ux, table + step * utable) - loss(x - step * ux, table - step * utable)) / (2 * step)
        assert abs((dx * ux).sum() + (dtable * utable).sum() - slope) < 1e-4 * abs(slope)


def test_no_array_holds_the_logits_of_all_tokens(monkeypatch):
    monkeypatch.setattr("prelm_jax.models.cross_entropy.CHUNK_TOKENS_ON_CPU", 10)

    def sizes(function):
        text = (
            jax.jit(jax.grad(lambda *arguments: function(*arguments)[0], (0, 1))).lower(*example()).compile().as_text()
        )
        return [math.prod(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", text)]

    assert max(sizes(plain)) >= 40 * 100
    assert max(sizes(lambda *arguments: tied_cross_entropy(*arguments, 100))) <= 16 * 128  # The table is the largest.


def test_in_half_precision_the_sums_are_kept_in_full(monkeypatch):
    monkeypatch.setattr("prelm_jax.models.cross_entropy.CHUNK_TOKENS_ON_CPU", 7)
    x, *rest = example()
    x = jnp.asarray(x, jnp.bfloat16)
    rest[0] = np.asarray(rest[0].astype(jnp.bfloat16), np.float32)  # The table, rounded as the function rounds it.

    def loss(x, table):
        return tied_cross_entropy(x, table, *rest[1:], 100)[0]

    (value, (dx, dtable)) = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, rest[0])
    plain_loss = jax.jit(jax.value_and_grad(lambda x, table: plain(x, table, *rest[1:])[0], (0, 1)))
    expected, grads = plain_loss(x.astype(jnp.float32), rest[0])
    assert value.dtype == dtable.dtype == jnp.float32
    assert dx.dtype == jnp.bfloat16
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(dx.astype(jnp.float32), grads[0], atol=0.05)
    np.testing.assert_allclose(dtable, grads[1], atol=0.05)


def test_on_several_devices_the_gradients_are_summed_once(monkeypatch):
    monkeypatch.setattr("prelm_jax.models.cross_entropy.CHUNK_TOKENS_ON_CPU", 10)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    arguments = example(rows=16)
    placed = [jax.device_put(a, NamedSharding(mesh, P() if i == 1 else P("data"))) for i, a in enumerate(arguments)]
    function = jax.value_and_grad(lambda *arguments: tied_cross_entropy(*arguments, 100), (0, 1), has_aux=True)
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        compiled = jax.jit(function).lower(*placed).compile()
        (loss, correct), grads = compiled(*placed)
    (expected, wins), expected_grads = jax.value_and_grad(plain, (0, 1), has_aux=True)(*arguments)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert float(correct) == float(wins)
    for found, grad in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(found, grad, atol=TOLERANCE, rtol=0)
    computations = re.split(r"\n\n", compiled.as_text())
    assert any("while(" in text for text in computations)
    collectives = [text for text in computations if re.search(r" all-(reduce|gather|to-all)(-start)?\(", text)]
    assert len(collectives) == 1
    assert "ENTRY" in collectives[0]
    assert " all-gather" not in collectives[0]
