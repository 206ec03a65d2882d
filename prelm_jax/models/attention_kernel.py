"""Self-attention with dropout as a kernel for TPUs (Pallas): scores and weights never leave the chip.

The keys and values of a row fit on the chip, so the softmax needs no running maximum (as in flash attention), and the
backward pass computes the weights again. Dropout draws the bits of `layers.random_bits`.

Axes, besides those of `layers`: W lanes of D, as many as a vector register has, that hold one head or more; Q queries
whose weights are computed at a time. The kernel reads [B, T, D] as dense layers write it. A product over W lanes, where
one operand is zero outside the lanes of a head, takes a TPU as long as one over the 64 lanes of the head, and moves
nothing between lanes.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from prelm_jax.models.layers import MASKED, backend, hash_words, kept, mix

LANES = 128
LONGEST = 1024  # Tokens of a row.
QUERIES = 256  # The largest Q; causal attention skips the keys after them.
TOKENS = 512  # Of the rows of a grid step, unless a single row is longer.


class Settings(NamedTuple):
    """What a kernel is compiled for: the sizes of one device, mask and dropout."""

    B: int
    T: int
    D: int
    itemsize: int  # Bytes of an element of the arrays [B, T, D].
    num_heads: int
    causal: bool
    rate: float  # Of dropout.

    @property
    def head_size(self) -> int:
        """H."""
        return self.D // self.num_heads

    @property
    def width(self) -> int:
        """W."""
        return max(self.head_size, min(LANES, self.D))

    @property
    def heads(self) -> int:
        """Heads in W lanes."""
        return self.width // self.head_size

    @property
    def rows(self) -> int:
        """Rows of a grid step."""
        return max(r for r in range(1, max(1, TOKENS // self.T) + 1) if self.B % r == 0)

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Queries, and the keys among which they find theirs."""
        for start in range(0, self.T, QUERIES):
            stop = min(start + QUERIES, self.T)
            yield slice(start, stop), slice(0, stop if self.causal else self.T)

    @property
    def vmem(self) -> int:
        """Bytes on the chip that the backward pass may use; it needs more than the forward pass.

        The compiler keeps the results of other operations in the rest, so this is not all that a chip has.
        """
        width, length = (math.ceil(size / LANES) * LANES for size in (self.width, self.T))
        copied = self.rows * self.T * (7 * width * self.itemsize + 8 * 4)
        hashes = self.heads * self.T * length * 4
        sums = 2 * self.T * width * 4
        return 2 * copied + hashes + sums + 10 * min(self.T, QUERIES) * length * 4 + 2**20


class Cost(NamedTuple):
    """The work of a call on one device."""

    flops: int  # Of products over all W lanes, which take as long as over those of one head.
    bytes: int  # To and from memory.
    transcendentals: int
    vector_operations: int  # On fp32 or 32-bit integers, one for each weight; an exponential is one as well.


def cost(s: Settings, backward: bool) -> Cost:
    """The work of a call. Elementwise work per token, not per weight, is left out."""
    weights = s.B * s.num_heads * sum((queries.stop - queries.start) * keys.stop for queries, keys in s.blocks())
    operations = 6 + 2 * s.causal  # Mask: comparison and selection; maximum, difference, exponential, sum.
    operations += 4 * backward  # Gradient of the softmax: two products, sum, difference.
    operations += (1 + backward) * (s.itemsize < 4)  # Weights and their gradients to bf16.
    once = 0
    if s.rate:
        operations += 11  # Second round of the hash, comparison, selection.
        once = 9 * s.num_heads * s.T**2  # Index and first round.
    words = s.B * s.T * s.D // s.width + s.B + 1  # Segments, again for each group of heads; words of the dropout.
    return Cost(
        flops=2 * (5 if backward else 2) * weights * s.width,
        bytes=(7 if backward else 4) * s.B * s.T * s.D * s.itemsize + 4 * words,
        transcendentals=weights,
        vector_operations=operations * weights + once,
    )


def vmem_capacity() -> int:
    """Bytes of vector memory of a core of the TPU that a program is traced for."""
    return pltpu.get_tpu_info().vmem_capacity_bytes


def make_settings(x_BTD: Array, num_heads: int, causal: bool, rate: float) -> Settings | None:
    """The kernel for q, k and v like x; None if there is none for its shape, or if the chip has not enough memory."""
    devices = max(1, jax.sharding.get_abstract_mesh().size)  # It is 0 where no mesh is set.
    if not all(isinstance(n, int) for n in x_BTD.shape) or x_BTD.shape[0] % devices:  # Symbolic sizes are not integers.
        return None
    B, T, D = x_BTD.shape
    s = Settings(B // devices, T, D, x_BTD.dtype.itemsize, num_heads, causal, rate)
    whole = s.width % s.head_size == D % s.width == 0 and (s.width % LANES == 0 or s.width == D)
    fits = backend() != "tpu" or s.vmem <= vmem_capacity()
    return s if whole and T % 8 == 0 and T <= LONGEST and fits else None


def kernel_attention(
    s: Settings, q_BTD: Array, k_BTD: Array, v_BTD: Array, segments_BT: Array, dropout_key: Array | None
) -> Array:
    """The attention of `s`, [B, T, D]; q is scaled already, and padding attends to padding.

    dropout_key: None if `s.rate` is 0.
    """
    word, rows_B = jnp.uint32(0), jnp.zeros(q_BTD.shape[0], jnp.uint32)
    if dropout_key is not None:
        word, row_word = hash_words(dropout_key)
        rows_B = mix(jnp.arange(q_BTD.shape[0], dtype=jnp.uint32) ^ row_word)  # Of all devices: sharded like q.
    return _attention(s, word[None], rows_B, segments_BT[:, None], q_BTD, k_BTD, v_BTD)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(s: Settings, word_1: Array, rows_B: Array, segments_B1T: Array, *qkv: Array) -> Array:
    return _call(s, False, word_1, rows_B, segments_B1T, *qkv)[0]


def _attention_gradients(s: Settings, inputs: tuple[Array, ...], g_BTD: Array) -> tuple[Array | None, ...]:
    return (None, None, None, *_call(s, True, *inputs, g_BTD))


_attention.defvjp(lambda s, *inputs: (_attention(s, *inputs), inputs), _attention_gradients)


def _call(s: Settings, backward: bool, *inputs: Array) -> tuple[Array, ...]:
    """Runs a kernel over rows and groups of heads; each device computes its own rows, for XLA cannot partition it."""
    block = pl.BlockSpec((s.rows, s.T, s.width), lambda group, step: (step, 0, group))
    words = pl.BlockSpec(memory_space=pltpu.SMEM)
    segments = pl.BlockSpec((s.rows, 1, s.T), lambda group, step: (step, 0, 0))
    arrays, results = (4, 3) if backward else (3, 1)
    scratch = [pltpu.VMEM((s.heads, s.T, s.T), jnp.uint32)]
    scratch += [pltpu.VMEM((s.T, s.width), jnp.float32)] * 2 * backward
    work = cost(s, backward)
    on_tpu = backend() == "tpu"

    def local(*inputs: Array) -> tuple[Array, ...]:
        call = pl.pallas_call(
            functools.partial(_backward if backward else _forward, s),
            grid=(s.D // s.width, s.B // s.rows),
            in_specs=[words, words, segments] + [block] * arrays,
            out_specs=[block] * results,
            out_shape=[jax.ShapeDtypeStruct(inputs[-1].shape, inputs[-1].dtype)] * results,
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=s.vmem
            ),
            cost_estimate=pl.CostEstimate(work.flops, work.transcendentals, work.bytes),
            metadata={"vector_operations": str(work.vector_operations)},
            name="attention_backward" if backward else "attention_forward",
            interpret=not on_tpu,
        )
        return tuple(cast("list[Array]", call(*inputs)))

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1:
        rows = P(mesh.axis_names)
        specs = (P(), *[rows] * (len(inputs) - 1))
        local = jax.shard_map(local, in_specs=specs, out_specs=(rows,) * results, check_vma=False)
    return local(*inputs)


def _forward(s: Settings, word_ref, rows_ref, segments_ref, q_ref, k_ref, v_ref, out_ref, hashes_ref) -> None:
    @_for_each_row(s, word_ref, rows_ref, hashes_ref)
    def row(r: Array, keep: Callable[[int, slice, slice], Array]) -> None:
        for queries, keys in s.blocks():
            k_SW, v_SW = k_ref[r, keys], v_ref[r, keys]
            out_QW = jnp.zeros((queries.stop - queries.start, s.width), jnp.float32)
            for head, lanes_1W in _heads(s):
                q_QW = jnp.where(lanes_1W, q_ref[r, queries], 0)
                weights_QS, scale_Q1 = _weights(s, q_QW, k_SW, segments_ref[r], queries, keys)
                if s.rate:
                    weights_QS = jnp.where(keep(head, queries, keys), weights_QS, 0)
                sums_QW = _product(weights_QS.astype(v_SW.dtype), v_SW, 1, 0)
                out_QW = jnp.where(lanes_1W, sums_QW * (scale_Q1 / (1 - s.rate)), out_QW)
            out_ref[r, queries] = out_QW.astype(out_ref.dtype)


def _backward(
    s: Settings,
    word_ref,
    rows_ref,
    segments_ref,
    q_ref,
    k_ref,
    v_ref,
    g_ref,
    dq_ref,
    dk_ref,
    dv_ref,
    hashes_ref,
    dk_sum,
    dv_sum,
) -> None:
    @_for_each_row(s, word_ref, rows_ref, hashes_ref)
    def row(r: Array, keep: Callable[[int, slice, slice], Array]) -> None:
        dk_sum[...] = jnp.zeros(dk_sum.shape, dk_sum.dtype)
        dv_sum[...] = jnp.zeros(dv_sum.shape, dv_sum.dtype)
        for queries, keys in s.blocks():
            k_SW, v_SW = k_ref[r, keys], v_ref[r, keys]
            dq_QW = jnp.zeros((queries.stop - queries.start, s.width), jnp.float32)
            for head, lanes_1W in _heads(s):
                q_QW, g_QW = (jnp.where(lanes_1W, ref[r, queries], 0) for ref in (q_ref, g_ref))
                weights_QS, scale_Q1 = _weights(s, q_QW, k_SW, segments_ref[r], queries, keys)
                kept_QS = jnp.where(keep(head, queries, keys), weights_QS, 0) if s.rate else weights_QS
                # With w = scale · weights, and g vᵀ the gradient of the dropped-out w: the gradient of the scores is
                # w (x - Σ w x), where x = keep · g vᵀ / (1 - rate). Both factors per query are applied after products.
                both_QS = kept_QS * _product(g_QW, v_SW, 1, 1)
                ds_QS = both_QS - weights_QS * (scale_Q1 * both_QS.sum(1, keepdims=True))
                ds_QS, kept_QS = ds_QS.astype(k_SW.dtype), kept_QS.astype(k_SW.dtype)
                scale_Q1 = scale_Q1 / (1 - s.rate)
                dq_QW = jnp.where(lanes_1W, _product(ds_QS, k_SW, 1, 0) * scale_Q1, dq_QW)
                dk_sum[keys] += _product(ds_QS, (q_QW * scale_Q1).astype(k_SW.dtype), 0, 0)
                dv_sum[keys] += _product(kept_QS, (g_QW * scale_Q1).astype(k_SW.dtype), 0, 0)
            dq_ref[r, queries] = dq_QW.astype(dq_ref.dtype)
        dk_ref[r] = dk_sum[...].astype(dk_ref.dtype)
        dv_ref[r] = dv_sum[...].astype(dv_ref.dtype)


def _for_each_row(s: Settings, word_ref, rows_ref, hashes_ref) -> Callable[[Callable], None]:
    """Runs the decorated function for each row of a grid step; `keep` is the dropout mask of a block of a head."""
    group, step = pl.program_id(0), pl.program_id(1)

    @pl.when(step == 0)
    def hash_columns() -> None:
        """The hash of the index within a row, the same for all rows."""
        if not s.rate:
            return
        query_T1 = jax.lax.broadcasted_iota(jnp.uint32, (s.T, 1), 0)
        key_1T = jax.lax.broadcasted_iota(jnp.uint32, (1, s.T), 1)
        for head in range(s.heads):
            head_T1 = (group * s.heads + head).astype(jnp.uint32) * jnp.uint32(s.T) + query_T1
            hashes_ref[head] = mix(word_ref[0] + head_T1 * jnp.uint32(s.T) + key_1T)

    def run(row: Callable) -> None:
        @pl.loop(0, s.rows)
        def each(r: Array) -> None:
            row_hash = rows_ref[step * s.rows + r]
            row(r, lambda head, queries, keys: kept(mix(hashes_ref[head, queries, keys] ^ row_hash), s.rate))

    return run


def _heads(s: Settings) -> Iterator[tuple[int, Array]]:
    """The heads in W lanes, and which lanes are theirs."""
    head_1W = jax.lax.broadcasted_iota(jnp.int32, (1, s.width), 1) // s.head_size
    for head in range(s.heads):
        yield head, head_1W == head


def _weights(
    s: Settings, q_QW: Array, k_SW: Array, segments_1T: Array, queries: slice, keys: slice
) -> tuple[Array, Array]:
    """Attention weights [Q, S] before they are scaled to a sum of 1, and the scale [Q, 1]."""
    allowed_QS = segments_1T[:, queries].reshape(-1, 1) == segments_1T[:, keys]
    if s.causal:
        Q, S = allowed_QS.shape
        query_Q1 = queries.start + jax.lax.broadcasted_iota(jnp.int32, (Q, 1), 0)
        allowed_QS &= jax.lax.broadcasted_iota(jnp.int32, (1, S), 1) <= query_Q1
    scores_QS = jnp.where(allowed_QS, _product(q_QW, k_SW, 1, 1), MASKED)
    weights_QS = jnp.exp(scores_QS - scores_QS.max(1, keepdims=True))
    return weights_QS, 1 / weights_QS.sum(1, keepdims=True)


def _product(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    """A product of matrices along an axis of each, with sums in fp32."""
    return jax.lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=jnp.float32)
