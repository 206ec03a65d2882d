"""Products of matrices: with operands rounded to bf16 against NumPy, and unchanged unless a model asks for bf16."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from prelm_jax.models.bert import BertConfig
from prelm_jax.models.gpt import GPTConfig
from prelm_jax.models.heads import Label
from prelm_jax.models.layers import product, product_over_rows, products_in
from prelm_jax.models.task import TaskModelConfig

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="only a CPU rounds inside products")

# Name: shapes of x and y, whether y is transposed. Rows and columns differ in number, and x is wider and narrower.
SHAPES = {
    "wide": ((40, 24), (24, 16), False),
    "narrow": ((40, 16), (16, 24), False),
    "transposed": ((40, 16), (56, 16), True),
    "batch": ((3, 8, 16), (3, 16, 24), False),
    "batch, transposed": ((3, 8, 16), (3, 24, 16), True),
}
SIZES = dict(vocab_size=200, hidden_size=32, num_layers=2, num_heads=2, max_position_embeddings=16)
ONES = jnp.ones((4, 16), jnp.int32)
BATCH = {
    **dict.fromkeys(("tokens", "token_types", "positions", "segments", "targets"), ONES),
    **dict.fromkeys(("masked_positions", "masked_targets"), ONES[:, :3]),
    **dict.fromkeys(("next_sentence_positions", "next_sentence_labels"), ONES[:, :1]),
    "weights": jnp.ones((4, 16)),
    "masked_weights": jnp.ones((4, 3)),
    "next_sentence_weights": jnp.ones((4, 1)),
}
MODELS = {"bert": BertConfig(intermediate_size=64, **SIZES), "gpt": GPTConfig(**SIZES)}


def rounded(x):
    return np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float64)


def example(name):
    x_shape, y_shape, transposed = SHAPES[name]
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=shape).astype(np.float32) for shape in (x_shape, y_shape))
    g = rng.normal(size=(*x_shape[:-1], y_shape[-2 if transposed else -1])).astype(np.float32)
    return x, y, g, transposed


def product_and_gradients(x, y, g, transposed, dtype):
    def run(x, y, g):
        with products_in(dtype):
            result, backward = jax.vjp(partial(product, transposed=transposed), x, y)
        return result, *backward(g)

    return jax.jit(run)(x, y, g)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_operands_are_rounded_to_bf16_only_if_asked_and_sums_are_fp32(name, dtype):
    x, y, g, transposed = example(name)
    got = product_and_gradients(x, y, g, transposed, dtype)
    exact = np.float64 if dtype == jnp.float32 else rounded
    x, y, g = exact(x), exact(y), exact(g)
    y = y.swapaxes(-1, -2) if transposed else y
    dy = x.swapaxes(-1, -2) @ g
    expected = x @ y, g @ y.swapaxes(-1, -2), dy.swapaxes(-1, -2) if transposed else dy
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)  # Rounding to bf16 moves the results by 1e-2.


def test_sums_over_rows_are_fp32_for_operands_in_bf16():
    x, y, _, _ = example("wide")
    x, y = x.astype(ml_dtypes.bfloat16), np.resize(y, (40, 16)).astype(ml_dtypes.bfloat16)
    got = jax.jit(product_over_rows)(x, y)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, rounded(x).T @ rounded(y), rtol=0, atol=1e-5)


def dots(name, dtype):
    """The element types of the operands of every product in a step, but for sums of biases and token types (fp32)."""
    model = MODELS[name].build(dtype)
    params = jax.eval_shape(model.init_params, jax.random.key(0))

    def loss(params, batch):
        losses, _, _ = model.loss(params, {}, batch, jax.random.key(0), True)
        return sum(total for total, _ in losses.values())

    return [types for *_, types in operands(jax.jit(jax.grad(loss)).lower(params, BATCH).as_text())]


def operands(text):
    """(shape of x, of y, the element types of both) of each product in a program, without those sums."""
    found = re.findall(r"dot_general .*: \(tensor<([\dx]+)x(\w+)>, tensor<([\dx]+)x(\w+)>\)", text)
    assert found
    return [(x, y, (a, b)) for x, a, y, b in found if not x.startswith("1x") and "4x16x2" not in (x, y)]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_bf16_has_every_product_in_bf16_forward_and_backward(name):
    types = dots(name, jnp.bfloat16)
    layers, heads = 2 * 3 * (6 + 2), 3 * (1 + 3 * (name == "bert"))
    assert types.count(("bf16", "bf16")) >= layers + heads
    assert [pair for pair in types if pair != ("bf16", "bf16")] == []


@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_fp32_has_none(name):
    assert set(dots(name, jnp.float32)) == {("f32", "f32")}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_task_computes_in_the_same_dtype_where_it_is_trained_and_where_it_is_evaluated(dtype):
    """All products except the classifier's, which has seven labels and is in fp32."""
    model = TaskModelConfig(MODELS["bert"], Label(7)).build(dtype)
    params = jax.eval_shape(model.init_params, jax.random.key(0))
    texts = dict.fromkeys(("tokens", "token_types", "positions", "segments"), ONES[:, None])
    labels = {"labels": jnp.ones((4, 1), jnp.int32), "label_weights": jnp.ones((4, 1))}
    batch = texts | labels | {"read_positions": jnp.zeros((4, 1, 1), jnp.int32)}

    def loss(params, batch):
        return model.loss(params, {}, batch, jax.random.key(0), True)[0]["label_loss"][0]

    for function in (jax.grad(loss), lambda params, batch: model.predict(params, {}, batch)):
        text = jax.jit(function).lower(params, batch).as_text()
        types = {types for *shapes, types in operands(text) if not any("7" in shape.split("x") for shape in shapes)}
        expected = "bf16" if dtype == jnp.bfloat16 else "f32"
        assert types == {(expected, expected)}
