"""The building blocks of the models: random numbers, initializers, dense, norm, embedding, GELU, dropout.

The letters that name the axes of an array, in suffixes (`x_BTD`) and einsums, everywhere in the models:

    B batch        T time (queries)   S source time (keys)   D model width    F feed-forward width
    N heads        H head width       V vocabulary           L layers         M masked positions
    C characters   U distinct words   P LSTM projection      K pairs packed into a row
    A heads of all rows, B · N          G tokens of a whole batch, with its rows flattened
    E LSTM cell width                   Z its gates, 4 · E

    In ELMo, S also names the negatives of a sampled softmax, D the width of a character's vector, F the filters.

Parameters are fp32; a layer computes in the dtype of its input. Norms, softmax and losses compute in fp32. On a CPU a
model in bf16 has fp32 activations: only `product` rounds.
"""

import contextlib
import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint

from prelm_jax.errors import InputError
from prelm_jax.training.contract import HostBatch

MASKED = -1e9  # Finite, so that a row with nothing to attend to (all padding) averages its values instead of NaN.


def backend() -> str:
    """The platform that a program is traced for: that of the mesh, which this machine may only compile for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def padded_vocabulary(vocab_size: int) -> int:
    """The rows of a vocabulary table: a multiple of 128, the width of a TPU lane and of a GPU's matmul tile."""
    return math.ceil(vocab_size / 128) * 128


def check_rows(batch: HostBatch, **rows: tuple[int, str]) -> None:
    """Raises InputError where a batch asks for rows that a table lacks: on a device, the lookup would not fail.

    rows: for a key of the batch, the number of rows of its table and the option that sets it, as in
    `check_rows(batch, tokens=(30522, "vocab_size"))`.
    """
    for key, (number, option) in rows.items():
        if batch[key].max() >= number:
            raise InputError(f"{key} go up to {batch[key].max()}, but the model's {option} is {number}: raise it")


def mix(h: Array) -> Array:
    """The finalizer of a 32-bit hash: every bit of the result depends on every bit of h."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x7FEB352D)
    h = (h ^ (h >> 15)) * jnp.uint32(0x846CA68B)
    return h ^ (h >> 16)


def hash_words(key: Array) -> tuple[Array, Array]:
    """The two words of a key that `random_bits` hashes: with the index within a row, and with the index of the row."""
    key0, key1 = jax.random.key_data(key)
    key1 = mix(key1 + jnp.uint32(0x9E3779B9))  # Keys of small seeds are small numbers that differ in few bits.
    return mix(key0 ^ key1), key1


def random_bits(key: Array, shape: tuple[int, ...]) -> Array:
    """uint32 random bits, each a hash of (key, index of its row, index within the row).

    A plain function of the indices, so that the bits are the same on any mesh and every device computes only its own;
    it fuses into its consumer, and compiles fast on every backend. Row and column are hashed separately, so that arrays
    of more than 2^32 elements do not repeat (a single row must stay below that).
    """
    key0, key1 = hash_words(key)
    # For the shape (2, 3, 4), row is [[[0]], [[1]]] and column [[[0 1 2 3], [4 5 6 7], [8 9 10 11]]].
    row = jax.lax.broadcasted_iota(jnp.uint32, (shape[0],) + (1,) * (len(shape) - 1), 0)
    column = jnp.zeros((1, *shape[1:]), jnp.uint32)
    for axis in range(1, len(shape)):
        column = column * jnp.uint32(shape[axis]) + jax.lax.broadcasted_iota(jnp.uint32, column.shape, axis)
    return mix(mix(column + key0) ^ mix(row ^ key1))


def truncated_normal(stddev: float) -> nn.initializers.Initializer:
    """A normal distribution cut at two standard deviations, as tf.truncated_normal; its own deviation is 0.88 stddev.

    Drawn from `random_bits`: compiling threefry for each shape took as long as compiling the rest of a small model.
    """
    return _normal(stddev, math.erf(math.sqrt(2)))


def normal(stddev: float) -> nn.initializers.Initializer:
    """A normal distribution, drawn like `truncated_normal`; its tails end at 5.4 standard deviations."""
    return _normal(stddev, 1 - 2.0**-24)


def _normal(stddev: float, within: float) -> nn.initializers.Initializer:
    """The middle of a normal distribution that holds the fraction `within` of its mass."""

    def initializer(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
        normal = math.sqrt(2) * jax.lax.erf_inv(within * (2 * _unit(key, shape) - 1))
        return (stddev * normal).astype(dtype)

    return initializer


def _unit(key: Array, shape: tuple[int, ...]) -> Array:
    """Uniform between 0 and 1, both excluded."""
    return ((random_bits(key, shape) >> 8).astype(jnp.float32) + 0.5) * 2.0**-24


def uniform(limit: float) -> nn.initializers.Initializer:
    """Uniform between -limit and limit, drawn like `truncated_normal`."""

    def initializer(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
        return (limit * (2 * _unit(key, shape) - 1)).astype(dtype)

    return initializer


def glorot_uniform(key: Array, shape: tuple[int, int], dtype: jnp.dtype = jnp.float32) -> Array:
    """TensorFlow's default for a matrix (Glorot & Bengio 2010): uniform within sqrt(6 / (rows + columns))."""
    return uniform(math.sqrt(6 / sum(shape)))(key, shape, dtype)


def activation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of activations in a model that computes in `dtype`: on a CPU, where bf16 is slow elementwise, fp32."""
    return jnp.dtype(jnp.float32) if dtype == jnp.bfloat16 and backend() == "cpu" else dtype


def products_in(dtype: jnp.dtype) -> contextlib.AbstractContextManager[object]:
    """The context in which a model that computes in `dtype` is traced. On a CPU, bf16 is then that of `product`."""
    rounded = dtype == jnp.bfloat16 and backend() == "cpu"
    return jax.default_matmul_precision("bfloat16") if rounded else contextlib.nullcontext()


def product_dtype(x: Array) -> jnp.dtype:
    """The dtype to which `product` rounds operands like x: its own, but within `products_in(bfloat16)`."""
    rounded = x.dtype == jnp.float32 and jax.default_matmul_precision.value == "bfloat16" and backend() == "cpu"
    return jnp.dtype(jnp.bfloat16) if rounded else x.dtype


def product(x: Array, y: Array, transposed: bool = False) -> Array:
    """x y, or x yᵀ, of matrices in the dtype of x; axes before the last two are a batch.

    On a CPU within `products_in(bfloat16)`, fp32 operands are rounded to bf16 and multiplied with fp32 sums, in the
    gradients too. CPUs with instructions for bf16 (AVX512-BF16, AMX) take half the time for it or less.
    """
    y = y.astype(x.dtype)
    if backend() == "cpu":
        return _product_on_cpu(x, y, transposed, product_dtype(x))
    return jax.lax.dot_general(x, y, _axes(x, -1, -1 if transposed else -2))


def product_over_rows(x: Array, y: Array) -> Array:
    """xᵀ y, the gradient of a weight, with sums in fp32 or more; axes before the last two are a batch."""
    if x.dtype == jnp.bfloat16 and backend() == "cpu" and _one_device():
        # XLA's CPU backend multiplies in bf16 only along the last axis of the first operand.
        return _wide_product(_written_in_order(x.swapaxes(-1, -2)), y, -1, -2)
    return _wide_product(x, y, -2, -2)


def _wide_product(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jax.lax.dot_general(x, y, _axes(x, x_axis, y_axis), preferred_element_type=wide)


def _axes(x: Array, x_axis: int, y_axis: int) -> tuple:
    """The axes of a dot_general: one of each operand, counted from the end, and all before the last two as a batch."""
    batch = tuple(range(x.ndim - 2))
    return ((x.ndim + x_axis,), (x.ndim + y_axis,)), (batch, batch)


def _one_device() -> bool:
    """Whether the program runs on a single device: XLA would gather an array from all of them to write it in order."""
    return jax.sharding.get_abstract_mesh().size <= 1  # It is 0 where no mesh is set.


def _written_in_order(x: Array) -> Array:
    """x, with its elements in memory in the order of its axes: left alone, XLA transposes without moving anything."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product_on_cpu(x: Array, y: Array, transposed: bool, dtype: jnp.dtype) -> Array:
    return _product_forward(x, y, transposed, dtype)[0]


def _product_forward(x: Array, y: Array, transposed: bool, dtype: jnp.dtype) -> tuple[Array, tuple[Array, Array]]:
    rounded_x, rounded_y = x.astype(dtype), y.astype(dtype)
    result = _wide_product(rounded_x, rounded_y, -1, -1 if transposed else -2).astype(x.dtype)
    return result, (rounded_x, rounded_y)


def _product_backward(transposed: bool, dtype: jnp.dtype, operands: tuple[Array, Array], g: Array) -> tuple:
    x, y = operands
    result, g = g.dtype, g.astype(dtype)
    dx = _wide_product(g, y, -1, -2 if transposed else -1)
    if transposed:
        dy = product_over_rows(g, x)
    elif dtype == jnp.float32 and x.ndim == 2 and x.shape[1] > y.shape[1] and _one_device():
        dy = _written_in_order(product_over_rows(g, x)).T  # xᵀ g itself takes half as long again.
    else:
        dy = product_over_rows(x, g)
    return dx.astype(result), dy.astype(result)


_product_on_cpu.defvjp(_product_forward, _product_backward)


def add_bias(x: Array, bias: Array) -> Array:
    """x + bias for a 2-D x."""
    return _add_bias_on_cpu(x, bias) if backend() == "cpu" else x + bias[None]


@jax.custom_vjp
def _add_bias_on_cpu(x: Array, bias: Array) -> Array:
    return x + bias[None]


# The gradient of the bias is a product with ones: XLA's CPU backend sums columns slowly.
_add_bias_on_cpu.defvjp(
    lambda x, bias: (_add_bias_on_cpu(x, bias), None),
    lambda _, g: (g, jnp.matmul(jnp.ones((1, g.shape[0]), g.dtype), g, precision="highest")[0]),
)


class Dense(nn.Module):
    """x W + b over the last axis.

    The leading axes are flattened first: XLA's CPU backend computes the weight gradient of a 3-D product at half the
    speed of a 2-D one; elsewhere the reshape is free.
    """

    features: int
    initializer: nn.initializers.Initializer
    initial_bias: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", self.initializer, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.constant(self.initial_bias), (self.features,))
        return affine(x, kernel, bias)


def affine(x: Array, kernel: Array, bias: Array) -> Array:
    """x W + b over the last axis, in the dtype of x."""
    y = add_bias(product(x.reshape(-1, x.shape[-1]), kernel), bias.astype(x.dtype))
    return y.reshape(*x.shape[:-1], -1)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis; biased variance, in two passes."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        centered = x32 - x32.mean(-1, keepdims=True)
        normed = centered * jax.lax.rsqrt(jnp.square(centered).mean(-1, keepdims=True) + self.epsilon)
        shape = (1,) * (x.ndim - 1) + scale.shape
        return (normed * scale.reshape(shape) + bias.reshape(shape)).astype(x.dtype)


class Embedding(nn.Module):
    """A table of `rows` vectors of width `features`; `table` is the whole of it, for a softmax tied to it."""

    rows: int
    features: int
    initializer: nn.initializers.Initializer

    def setup(self):
        self.table = self.param("embedding", self.initializer, (self.rows, self.features))

    def __call__(self, ids: Array) -> Array:
        return jnp.take(self.table, ids, axis=0)


def gelu(x: Array) -> Array:
    """x Φ(x), the exact form (Hendrycks & Gimpel 2016), by erf: the erfc of jax.nn.gelu costs more."""
    return _gelu_from_x(x) if backend() == "tpu" else 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


@jax.custom_vjp
def _gelu_from_x(x: Array) -> Array:
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def _gelu_gradient(x: Array, g: Array) -> tuple[Array]:
    # Autodiff would keep erf and exp in memory for the backward pass; without the barrier, XLA would keep this erf.
    x32 = jax.lax.optimization_barrier(x).astype(jnp.float32)
    density = jnp.exp(-0.5 * jnp.square(x32)) * math.sqrt(0.5 / math.pi)
    return (((0.5 * (1 + jax.lax.erf(x32 * math.sqrt(0.5))) + x32 * density) * g).astype(x.dtype),)


_gelu_from_x.defvjp(lambda x: (_gelu_from_x(x), x), _gelu_gradient)


def gelu_tanh(x: Array) -> Array:
    """x Φ(x) with Φ approximated by tanh, as in GPT-1; up to 5e-4 from the exact form."""
    return jax.nn.gelu(x, approximate=True)


def kept(bits: Array, rate: float) -> Array:
    """Which elements dropout keeps, given the random bits of each."""
    return bits >= jnp.uint32(round(rate * 2**32))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def dropout(x: Array, rate: float, key: Array) -> Array:
    """Zeroes elements with probability `rate` and scales the others by 1 / (1 - rate)."""
    return jnp.where(kept(random_bits(key, x.shape), rate), x / (1 - rate), jnp.zeros((), x.dtype))


# The backward pass draws the mask again, which is cheaper than keeping it in memory.
dropout.defvjp(lambda x, rate, key: (dropout(x, rate, key), key), lambda rate, key, g: (dropout(g, rate, key), None))


class Dropout(nn.Module):
    """`dropout` in training, with a key of its own."""

    rate: float

    def key(self, train: bool) -> Array | None:
        """The key of the next call; None if nothing is dropped."""
        return self.make_rng("dropout") if train and self.rate > 0 else None

    def __call__(self, x: Array, train: bool) -> Array:
        key = self.key(train)
        return x if key is None else dropout(x, self.rate, key)
