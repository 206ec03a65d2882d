"""What the models are built from: dense, norm, embedding, dropout, attention, cross-entropy.

The letters that name the axes of an array, in suffixes (`x_BTD`) and einsums, everywhere in the package:

    B batch        T time (queries)   S source time (keys)   D model width    F feed-forward width
    N heads        H head width       V vocabulary           L layers         M masked positions
    C characters   U distinct words   P LSTM projection      K pairs packed into a row
    A heads of all rows, B · N     G tokens of a batch taken together, whatever rows they are of
    E LSTM cell width                   Z its gates, 4 · E

    With ELMo S are the negatives of a sampled softmax too, D the width of a character's vector, F the filters.

Parameters are fp32; a layer computes in the dtype of its input. Norms, softmax and losses compute in fp32.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec as P

from prelm_jax.errors import InputError

MASKED = -1e9  # Finite, so that a row with nothing to attend to (all padding) gives a mean and not a NaN.

SPLASH_BLOCK = 128  # Tokens: the TPU's attention kernel takes multiples of it.

# So many tokens on a device have their logits in memory at once, where the cross-entropy goes by chunks. On a CPU few,
# whose logits stay in its cache; elsewhere many, because every chunk reads and writes the gradient of the table.
CHUNK_TOKENS, CHUNK_TOKENS_ON_CPU = 4096, 512
CHUNK_LOGITS = 2**28  # And no more logits than that, 1 GB, however large the vocabulary.


def backend() -> str:
    """The platform that a program is traced for: that of the mesh, which may be there to compile for only."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def padded_vocabulary(vocab_size: int) -> int:
    """The rows of a vocabulary table: a multiple of 128, the width of a TPU lane and of a GPU's matmul tile."""
    return math.ceil(vocab_size / 128) * 128


def check_rows(batch: dict[str, np.ndarray], **rows: tuple[int, str]) -> None:
    """Raises InputError where a batch asks for rows that a table lacks (a lookup would not notice).

    For each key of the batch: the number of rows, and the option that sets it.
    """
    for key, (number, option) in rows.items():
        if batch[key].max() >= number:
            raise InputError(f"{key} go up to {batch[key].max()}, but the model's {option} is {number}: raise it")


def _mix(h: Array) -> Array:
    """The finalizer of a 32-bit hash: every bit of the result depends on every bit of h."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x7FEB352D)
    h = (h ^ (h >> 15)) * jnp.uint32(0x846CA68B)
    return h ^ (h >> 16)


def random_bits(key: Array, shape: tuple[int, ...]) -> Array:
    """uint32 random bits, each a hash of (key, index of its row, index in the row).

    As a plain function of the indices it gives the same bits on any mesh and every device computes only its own; it
    fuses into what uses it, and compiles in no time on every backend. Row and column are hashed apart, so that arrays
    of more than 2^32 elements do not repeat themselves (a single row must stay below that).
    """
    key0, key1 = jax.random.key_data(key)
    key1 = _mix(key1 + jnp.uint32(0x9E3779B9))  # The keys of small seeds are small numbers, and differ in few bits.
    key0 = _mix(key0 ^ key1)
    row = jax.lax.broadcasted_iota(jnp.uint32, (shape[0],) + (1,) * (len(shape) - 1), 0)
    column = jnp.zeros((1, *shape[1:]), jnp.uint32)
    for axis in range(1, len(shape)):
        column = column * jnp.uint32(shape[axis]) + jax.lax.broadcasted_iota(jnp.uint32, column.shape, axis)
    return _mix(_mix(column + key0) ^ _mix(row ^ key1))


def truncated_normal(stddev: float) -> nn.initializers.Initializer:
    """A normal distribution cut at two standard deviations, as tf.truncated_normal; its own deviation is 0.88 stddev.

    Drawn from `random_bits`: to compile threefry for each shape took as long as to compile the rest of a small model.
    """
    return _normal(stddev, math.erf(math.sqrt(2)))


def normal(stddev: float) -> nn.initializers.Initializer:
    """A normal distribution, drawn like `truncated_normal`; its tails end at 5.4 standard deviations."""
    return _normal(stddev, 1 - 2.0**-24)


def _normal(stddev: float, within: float) -> nn.initializers.Initializer:
    """The middle of a normal distribution that holds the share `within` of it."""

    def initializer(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
        normal = math.sqrt(2) * jax.lax.erf_inv(within * (2 * _unit(key, shape) - 1))
        return (stddev * normal).astype(dtype)

    return initializer


def _unit(key: Array, shape: tuple[int, ...]) -> Array:
    """Uniform between 0 and 1, neither of them included."""
    return ((random_bits(key, shape) >> 8).astype(jnp.float32) + 0.5) * 2.0**-24


def uniform(limit: float) -> nn.initializers.Initializer:
    """Between -limit and limit, drawn like `truncated_normal`."""

    def initializer(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
        return (limit * (2 * _unit(key, shape) - 1)).astype(dtype)

    return initializer


def add_bias(x: Array, bias: Array) -> Array:
    """x + bias for a 2-D x."""
    return _add_bias_on_cpu(x, bias) if backend() == "cpu" else x + bias[None]


@jax.custom_vjp
def _add_bias_on_cpu(x: Array, bias: Array) -> Array:
    return x + bias[None]


# The gradient of the bias is a product with ones: XLA's CPU backend sums columns slowly.
_add_bias_on_cpu.defvjp(
    lambda x, bias: (_add_bias_on_cpu(x, bias), None),
    lambda _, g: (g, jnp.matmul(jnp.ones((1, len(g)), g.dtype), g, precision="highest")[0]),
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
    y = add_bias(x.reshape(-1, x.shape[-1]) @ kernel.astype(x.dtype), bias.astype(x.dtype))
    return y.reshape(*x.shape[:-1], -1)


class SplitHeads(nn.Module):
    """[B, N, T, H]: a dense layer over [B, T, D] whose output is cut into heads; the parameters are those of Dense."""

    num_heads: int
    head_size: int
    initializer: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        N, H = self.num_heads, self.head_size
        kernel = self.param("kernel", self.initializer, (x_BTD.shape[-1], N * H))
        bias = self.param("bias", nn.initializers.zeros, (N * H,))
        if backend() != "tpu":
            return affine(x_BTD, kernel, bias).reshape(*x_BTD.shape[:2], N, H).swapaxes(1, 2)
        # One product that writes where the attention kernel reads: a transposition would go through memory again.
        kernel_DNH, bias_N1H = (w.astype(x_BTD.dtype).reshape(*w.shape[:-1], N, H) for w in (kernel, bias))
        return jnp.einsum("BTD,DNH->BNTH", x_BTD, kernel_DNH) + bias_N1H.reshape(1, N, 1, H)


class MergeHeads(nn.Module):
    """[B, T, D]: a dense layer over what all heads [B, N, T, H] say of a token; the parameters are those of Dense."""

    features: int
    initializer: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x_BNTH: Array) -> Array:
        B, N, T, H = x_BNTH.shape
        kernel = self.param("kernel", self.initializer, (N * H, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        if backend() != "tpu":
            return affine(x_BNTH.swapaxes(1, 2).reshape(B, T, N * H), kernel, bias)
        kernel_NHD = kernel.astype(x_BNTH.dtype).reshape(N, H, -1)
        return jnp.einsum("BNTH,NHD->BTD", x_BNTH, kernel_NHD) + bias.astype(x_BNTH.dtype)[None, None]


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis; biased variance, in two passes."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        centred = x32 - x32.mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.epsilon)
        shape = (1,) * (x.ndim - 1) + scale.shape
        return (normed * scale.reshape(shape) + bias.reshape(shape)).astype(x.dtype)


class Embedding(nn.Module):
    """A table of `rows` vectors of width `features`; the whole table is `table`, for a softmax tied to it."""

    rows: int
    features: int
    initializer: nn.initializers.Initializer

    def setup(self):
        self.table = self.param("embedding", self.initializer, (self.rows, self.features))

    def __call__(self, ids: Array) -> Array:
        return jnp.take(self.table, ids, axis=0)


def gelu(x: Array) -> Array:
    """x Φ(x), the exact form (Hendrycks & Gimpel 2016). By erf, which is cheaper than the erfc of jax.nn.gelu."""
    return _gelu_from_x(x) if backend() == "tpu" else 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


@jax.custom_vjp
def _gelu_from_x(x: Array) -> Array:
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def _gelu_gradient(x: Array, g: Array) -> tuple[Array]:
    # Left to autodiff, erf and exp are written to memory for the backward pass; without the barrier, so is this erf.
    x32 = jax.lax.optimization_barrier(x).astype(jnp.float32)
    density = jnp.exp(-0.5 * jnp.square(x32)) * math.sqrt(0.5 / math.pi)
    return (((0.5 * (1 + jax.lax.erf(x32 * math.sqrt(0.5))) + x32 * density) * g).astype(x.dtype),)


_gelu_from_x.defvjp(lambda x: (_gelu_from_x(x), x), _gelu_gradient)


def gelu_tanh(x: Array) -> Array:
    """x Φ(x) with Φ approximated by tanh, as GPT-1 has it; up to 5e-4 from the exact form."""
    return jax.nn.gelu(x, approximate=True)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _dropout(x: Array, rate: float, key: Array) -> Array:
    keep = random_bits(key, x.shape) >= jnp.uint32(round(rate * 2**32))
    return jnp.where(keep, x / (1 - rate), jnp.zeros((), x.dtype))


# The backward pass draws the mask again, which is cheaper than keeping it in memory.
_dropout.defvjp(
    lambda x, rate, key: (_dropout(x, rate, key), key),
    lambda rate, key, g: (_dropout(g, rate, key), None),
)


class Dropout(nn.Module):
    """Zeroes elements with probability `rate` and scales the others by 1 / (1 - rate); without an rng, the identity."""

    rate: float

    @property
    def drops(self) -> bool:
        """Whether it does anything."""
        return self.rate > 0 and self.has_rng("dropout")

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if not self.drops:
            return x
        return _dropout(x, self.rate, self.make_rng("dropout"))


def over_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, called on each device of the mesh with its own rows of all arguments and results."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:  # 0 where no mesh is set.
        return function
    rows = P(mesh.axis_names)
    return jax.shard_map(function, in_specs=rows, out_specs=rows, check_vma=False)


class Mask(NamedTuple):
    """Who attends to whom: `allowed` [B or 1, 1, T, S]; and what it was made of, if a kernel is to make it anew."""

    allowed_B1TS: Array
    segments_BT: Array | None = None
    causal: bool = False


def attention_mask(segments_BT: Array, causal: bool = False) -> Mask:
    """A token attends to the tokens of its own segment, with `causal` to itself and those before it in the row.

    Segment 0 is padding and takes no part.
    """
    same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
    allowed_B1TS = (same_BTS & (segments_BT != 0)[:, None, :])[:, None]
    if causal:
        length = segments_BT.shape[1]
        allowed_B1TS &= jnp.tril(jnp.ones((length, length), bool))[None, None]
    return Mask(allowed_B1TS, segments_BT, causal)


def attention(q_BNTH: Array, k_BNSH: Array, v_BNSH: Array, mask: Mask, dropout: Dropout) -> Array:
    """Scaled dot-product attention (Vaswani et al. 2017, 3.2.1), [B, N, T, H]; softmax in fp32.

    On a TPU the scores stay in the memory of the core, unless they have dropout, which its kernel has not.
    """
    B, N, T, H = q_BNTH.shape
    q_BNTH = q_BNTH / math.sqrt(H)
    if backend() == "tpu" and mask.segments_BT is not None and T % SPLASH_BLOCK == 0 and not dropout.drops:
        return splash_attention(q_BNTH, k_BNSH, v_BNSH, mask.segments_BT, mask.causal)
    # One batch axis, and that first: left to itself, XLA's CPU backend transposes more.
    q_ATH, k_ASH, v_ASH = (x.reshape(B * N, -1, H) for x in (q_BNTH, k_BNSH, v_BNSH))
    scores_BNTS = jnp.einsum("ATH,ASH->ATS", q_ATH, k_ASH).reshape(B, N, T, -1)
    scores_BNTS = jnp.where(mask.allowed_B1TS, scores_BNTS.astype(jnp.float32), MASKED)
    weights_BNTS = dropout(jax.nn.softmax(scores_BNTS).astype(v_BNSH.dtype))
    return jnp.einsum("ATS,ASH->ATH", weights_BNTS.reshape(B * N, T, -1), v_ASH).reshape(B, N, T, H)


def splash_attention(q_BNTH: Array, k_BNTH: Array, v_BNTH: Array, segments_BT: Array, causal: bool) -> Array:
    """Attention by blocks, in a kernel for TPUs that comes with JAX; q is scaled already. As `attention`, but padding
    attends to padding.
    """
    # Imported here, for it takes half a second that no other backend has a use for.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, N, T, _ = q_BNTH.shape
    block = max(size for size in range(SPLASH_BLOCK, 512 + 1, SPLASH_BLOCK) if T % size == 0)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((T, T)) if causal else masks.FullMask((T, T))] * N),
        block_sizes=splash.BlockSizes(
            **dict.fromkeys(("block_q", "block_kv", "block_q_dkv", "block_kv_dkv"), block), use_fused_bwd_kernel=True
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=backend() != "tpu",
    )

    def local(q_BNTH: Array, k_BNTH: Array, v_BNTH: Array, segments_BT: Array) -> Array:
        return jax.vmap(kernel)(q_BNTH, k_BNTH, v_BNTH, splash.SegmentIds(segments_BT, segments_BT))

    # Each device its own rows: what a kernel does is nothing that XLA could cut.
    return over_rows(local)(q_BNTH, k_BNTH, v_BNTH, segments_BT)


def cross_entropy(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Negative log-likelihood in nats, and whether the target has the highest logit (fp32), both [...] for [..., V]."""
    logits = logits.astype(jnp.float32)
    highest = jax.lax.stop_gradient(logits.max(-1))  # Cancels out of the value, and so of the gradient.
    picked = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    log_normalizer = highest + jnp.log(jnp.exp(logits - highest[..., None]).sum(-1))
    return log_normalizer - picked, (picked == highest).astype(jnp.float32)


def tied_logits(x_GD: Array, table_VD: Array, vocab_size: int, bias_V: Array | None = None) -> Array:
    """[G, V], fp32: products with a vocabulary table; the rows past `vocab_size` are padding and never win."""
    logits_GV = jax.lax.dot_general(
        x_GD, table_VD.astype(x_GD.dtype), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    if bias_V is not None:
        return add_bias(logits_GV, jnp.where(jnp.arange(len(table_VD)) < vocab_size, bias_V, MASKED))
    # An update is written where the products are; a condition on the column would write all of them a second time.
    padding_GV = jnp.full((len(x_GD), len(table_VD) - vocab_size), MASKED)
    return jax.lax.dynamic_update_slice(logits_GV, padding_GV, (0, vocab_size))


def tied_cross_entropy(
    x_BTD: Array,
    table_VD: Array,
    targets_BT: Array,
    weights_BT: Array,
    vocab_size: int,
    bias_V: Array | None = None,
) -> tuple[Array, Array]:
    """`cross_entropy` of `tied_logits`, summed with weights: (nats, targets that have the highest logit), scalars.

    The logits exist for a few tokens of a device at a time (CHUNK_TOKENS), and in the forward pass alone: where a
    gradient is asked for, it is computed there, by chunks too. There is none for the weights.
    """
    return _tied_cross_entropy(vocab_size, x_BTD, table_VD, bias_V, targets_BT, weights_BT)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tied_cross_entropy(vocab_size: int, *arguments: Array) -> tuple[Array, Array]:
    return _by_chunks(arguments, vocab_size, gradients=False)[0]


def _tied_cross_entropy_forward(vocab_size: int, *arguments: Array):
    return _by_chunks(arguments, vocab_size, gradients=True)


def _tied_cross_entropy_backward(vocab_size: int, gradients: tuple[Array, ...], cotangents: tuple[Array, Array]):
    return *jax.tree.map(lambda gradient: (cotangents[0] * gradient).astype(gradient.dtype), gradients), None, None


_tied_cross_entropy.defvjp(_tied_cross_entropy_forward, _tied_cross_entropy_backward)


def _by_chunks(arguments: tuple, vocab_size: int, gradients: bool):
    """As `_local_chunks`, on all devices."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1 or len(arguments[0]) % mesh.size:  # 0 where no mesh is set.
        return _local_chunks(*arguments, vocab_size, gradients)

    # Each device goes through its own rows: chunks of the global batch would each be on a few devices only, and the
    # gradient of the table would be summed over the devices after every chunk instead of once.
    def local(*arguments):
        sums, found = _local_chunks(*arguments, vocab_size, gradients)
        sums = jax.lax.psum(sums, mesh.axis_names)
        return sums, (found[0], *jax.lax.psum(found[1:], mesh.axis_names)) if gradients else None

    rows = P(mesh.axis_names)
    out_specs = ((P(), P()), (rows, P(), P()) if gradients else None)
    sharded = jax.shard_map(local, in_specs=(rows, P(), P(), rows, rows), out_specs=out_specs, check_vma=False)
    return sharded(*arguments)


def _local_chunks(
    x_BTD: Array,
    table_VD: Array,
    bias_V: Array | None,
    targets_BT: Array,
    weights_BT: Array,
    vocab_size: int,
    gradients: bool,
) -> tuple[tuple[Array, Array], tuple[Array, Array, Array | None] | None]:
    """The sums of `tied_cross_entropy`, and their gradients by x, by the table and by the bias."""
    tokens = targets_BT.size
    at_once = CHUNK_TOKENS_ON_CPU if backend() == "cpu" else CHUNK_TOKENS
    chunks = math.ceil(tokens / min(at_once, max(1, CHUNK_LOGITS // len(table_VD))))
    padding = -tokens % chunks  # Tokens of weight zero.
    table = table_VD.astype(x_BTD.dtype)

    def split(values: Array) -> Array:
        flat = values.reshape(tokens, *values.shape[2:])
        return jnp.pad(flat, [(0, padding)] + [(0, 0)] * (flat.ndim - 1)).reshape(chunks, -1, *flat.shape[1:])

    def chunk(totals: tuple, values: tuple[Array, Array, Array]) -> tuple[tuple, Array | None]:
        (loss, correct), found = totals
        x_GD, targets_G, weights_G = values
        logits_GV = tied_logits(x_GD, table, vocab_size, bias_V)
        # As in `cross_entropy`, but with one exponential of each logit for the loss and the gradient.
        highest_G = logits_GV.max(-1)
        exp_GV = jnp.exp(logits_GV - highest_G[:, None])
        total_G = exp_GV.sum(-1)
        picked_G = jnp.take_along_axis(logits_GV, targets_G[:, None], 1)[:, 0]
        nll_G, correct_G = highest_G + jnp.log(total_G) - picked_G, (picked_G == highest_G).astype(jnp.float32)
        sums = (loss + (nll_G * weights_G).sum(), correct + (correct_G * weights_G).sum())
        if not gradients:
            return (sums, None), None
        # The gradient by a logit is weight · (exp / total - hit). Here it is without its factor weight / total, which
        # is of a whole row, and is taken in where there are D columns and not V.
        hit_G = jnp.exp(picked_G - highest_G) - total_G
        dlogits_GV = exp_GV.astype(x_GD.dtype).at[jnp.arange(len(hit_G)), targets_G].set(hit_G.astype(x_GD.dtype))
        factor_G1 = (weights_G / total_G)[:, None]
        product = partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
        dtable_VD = product(dlogits_GV, (factor_G1 * x_GD).astype(x_GD.dtype), (((0,), (0,)), ((), ())))
        dx_GD = factor_G1 * product(dlogits_GV, table, (((1,), (0,)), ((), ())))
        dbias_V = None
        if bias_V is not None:  # As a product, see `add_bias`.
            dbias_V = jnp.matmul(factor_G1.T, dlogits_GV.astype(jnp.float32), precision="highest")[0]
        return (sums, jax.tree.map(jnp.add, found, (dtable_VD, dbias_V))), dx_GD.astype(x_GD.dtype)

    zero = jnp.zeros(())
    start = ((zero, zero), jax.tree.map(lambda x: jnp.zeros(x.shape), (table_VD, bias_V)) if gradients else None)
    (sums, found), dx = jax.lax.scan(chunk, start, (split(x_BTD), split(targets_BT), split(weights_BT)))
    if not gradients:
        return sums, None
    return sums, (dx.reshape(-1, x_BTD.shape[-1])[:tokens].reshape(x_BTD.shape), *found)
