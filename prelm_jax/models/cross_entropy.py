"""The softmax over a vocabulary and its loss, by chunks where all logits at once would take much memory."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from prelm_jax.models.layers import MASKED, add_bias, backend

# So many tokens on a device have their logits in memory at once, where the cross-entropy goes by chunks. On a CPU few,
# whose logits stay in its cache; elsewhere many, because every chunk reads and writes the gradient of the table.
CHUNK_TOKENS, CHUNK_TOKENS_ON_CPU = 4096, 512
CHUNK_LOGITS = 2**28  # And no more logits than that, 1 GB, however large the vocabulary.


def cross_entropy(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Negative log-likelihood in nats, and whether the target has the highest logit (fp32), both [...] for [..., V]."""
    logits = logits.astype(jnp.float32)
    highest = jax.lax.stop_gradient(logits.max(-1))  # Cancels out of the value, and so of the gradient.
    picked = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    log_normalizer = highest + jnp.log(jnp.exp(logits - highest[..., None]).sum(-1))
    return log_normalizer - picked, (picked == highest).astype(jnp.float32)


def tied_logits(x: Array, table_VD: Array, vocab_size: int, bias_V: Array | None = None) -> Array:
    """[..., V], fp32: products of [..., D] with a vocabulary table, whose rows past `vocab_size` never win."""
    x_GD, rows = x.reshape(-1, x.shape[-1]), table_VD.shape[0]
    logits_GV = jax.lax.dot_general(
        x_GD, table_VD.astype(x.dtype), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    if bias_V is not None:
        logits_GV = add_bias(logits_GV, jnp.where(jnp.arange(rows) < vocab_size, bias_V, MASKED))
    else:
        # An update in place of what the product wrote; a condition on the column would write all logits a second time.
        padding_GV = jnp.full((x_GD.shape[0], rows - vocab_size), MASKED)
        logits_GV = jax.lax.dynamic_update_slice(logits_GV, padding_GV, (0, vocab_size))
    return logits_GV.reshape(*x.shape[:-1], rows)


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
