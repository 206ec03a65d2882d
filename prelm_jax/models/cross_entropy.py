"""The softmax over a vocabulary and its loss: whole, sampled, or in chunks where all logits take too much memory."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from prelm_jax.models.layers import MASKED, add_bias, backend, product, product_dtype, product_over_rows

# Tokens of a device whose logits are in memory at once. On a CPU few, so that the logits stay in its cache; elsewhere
# many, because every chunk reads and writes the gradient of the whole table.
CHUNK_TOKENS, CHUNK_TOKENS_ON_CPU = 4096, 512
CHUNK_LOGITS = 2**28  # Logits of a chunk at most, 1 GB: fewer tokens where the vocabulary is large.

Arguments = tuple[Array, Array, Array | None, Array, Array]  # x, table, bias, targets, weights
Gradients = tuple[Array | None, ...]  # of x, the table and the bias (None without a bias); () if none are needed


def cross_entropy(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Negative log-likelihoods in nats, and 1.0 where the target has the highest logit; both [...], fp32, for [..., V].

    Example: `nll_G, correct_G = cross_entropy(logits_GV, targets_G)`.
    """
    logits = logits.astype(jnp.float32)
    highest = jax.lax.stop_gradient(logits.max(-1))  # Cancels out of the value, and so of the gradient.
    picked = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    log_normalizer = highest + jnp.log(jnp.exp(logits - highest[..., None]).sum(-1))
    return log_normalizer - picked, (picked == highest).astype(jnp.float32)


def accurate_sum(x: Array) -> Array:
    """The sum of all elements, fp32, as if it were rounded once.

    A plain sum of thousands of losses differs in the seventh digit with their number; evaluations add these sums up in
    float64, so that a text has one perplexity, however it is cut into batches. Halves are added to each other with
    their rounding errors, which are exact (Knuth's TwoSum).
    """
    total = x.reshape(-1)
    total = jnp.pad(total, (0, (1 << (total.size - 1).bit_length()) - total.size))
    error = jnp.zeros_like(total)
    while total.size > 1:
        (a, b), (error_a, error_b) = jnp.split(total, 2), jnp.split(error, 2)
        total = a + b
        added = total - a
        error = error_a + error_b + ((a - (total - added)) + (b - added))
    return (total + error)[0]


def log_expected_count(ids: Array, tries: Array, sampled: int, vocab_size: int) -> Array:
    """The logarithm of each id's expected count among `sampled` distinct ids, found by `tries` log-uniform draws.

    See tensorflow/core/kernels/range_sampler.cc, `ExpectedCountHelper` with the probabilities of a LogUniformSampler.
    """
    probabilities = jnp.log1p(1 / (ids.astype(jnp.float32) + 1)) / math.log1p(vocab_size)
    distinct = -jnp.expm1(tries.astype(jnp.float32) * jnp.log1p(-probabilities))
    return jnp.log(jnp.where(tries == sampled, sampled * probabilities, distinct))


def sampled_nll(
    x_GP: Array, true_GP: Array, true_bias_G: Array, sampled_SP: Array, sampled_bias_S: Array, hits_GS: Array
) -> Array:
    """[G], fp32: negative log-likelihood of each target in a softmax over itself and the negatives (Jean et al. 2015).

    As tf.nn.sampled_softmax_loss: takes the vectors of targets and negatives, and their biases minus the logarithms of
    their expected counts. `hits_GS`: negatives that equal the target, which are left out.
    """
    true_G = jnp.einsum("GP,GP->G", x_GP, true_GP, preferred_element_type=jnp.float32) + true_bias_G
    sampled_GS = jnp.where(hits_GS, MASKED, add_bias(_logits(x_GP, sampled_SP), sampled_bias_S))
    nll_G, _ = cross_entropy(jnp.concatenate([true_G[:, None], sampled_GS], 1), jnp.zeros(x_GP.shape[0], jnp.int32))
    return nll_G


def _logits(x_GD: Array, table_VD: Array) -> Array:
    """[G, V], fp32 or wider: each vector times each row of a table of the same dtype."""
    if backend() == "cpu":
        return product(x_GD.astype(jnp.promote_types(x_GD.dtype, jnp.float32)), table_VD, transposed=True)
    transposed = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x_GD, table_VD, transposed, preferred_element_type=jnp.float32)


def tied_logits(x: Array, table_VD: Array, vocab_size: int, bias_V: Array | None = None) -> Array:
    """[..., V], fp32: products of [..., D] with a vocabulary table, whose rows past `vocab_size` never win."""
    rows = table_VD.shape[0]
    logits_GV = _logits(x.reshape(-1, x.shape[-1]), table_VD.astype(x.dtype))
    if bias_V is not None:
        logits_GV = add_bias(logits_GV, jnp.where(jnp.arange(rows) < vocab_size, bias_V, MASKED))
    else:
        # Updates the product in place; a condition on the column would write all logits a second time.
        padding_GV = jnp.full((logits_GV.shape[0], rows - vocab_size), MASKED)
        logits_GV = jax.lax.dynamic_update_slice(logits_GV, padding_GV, (0, vocab_size))
    return logits_GV.reshape(*x.shape[:-1], rows)


def tied_cross_entropy(
    x_BTD: Array, table_VD: Array, targets_BT: Array, weights_BT: Array, vocab_size: int, bias_V: Array | None = None
) -> tuple[Array, Array]:
    """`cross_entropy` of `tied_logits`, summed with weights: (nats, number of targets with the highest logit), scalars.

    The logits exist for a few tokens of a device at a time (CHUNK_TOKENS), and only in the forward pass: if a gradient
    is needed, the same loop over chunks computes it. The weights get none.
    """
    return _tied_cross_entropy(vocab_size, (x_BTD, table_VD, bias_V, targets_BT, weights_BT))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tied_cross_entropy(vocab_size: int, arguments: Arguments) -> tuple[Array, Array]:
    return _in_chunks(vocab_size, arguments, differentiate=False)[0]


def _backward(vocab_size: int, gradients: Gradients, cotangents: tuple[Array, Array]) -> tuple[Gradients]:
    scaled = jax.tree.map(lambda gradient: (cotangents[0] * gradient).astype(gradient.dtype), gradients)
    return ((*scaled, None, None),)


def _in_chunks(vocab_size: int, arguments: Arguments, differentiate: bool) -> tuple[tuple[Array, Array], Gradients]:
    """`_local_chunks` on all devices, each with its own rows.

    Chunks of the global batch would each be on a few devices only, and the gradient of the table would be summed over
    the devices after every chunk instead of once.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rows = P(mesh.axis_names)
    function = partial(_local_chunks, vocab_size, differentiate=differentiate)
    if mesh.size <= 1 or arguments[0].shape[0] % mesh.size:  # The size is 0 where no mesh is set.
        return function(arguments)

    def local(arguments: Arguments) -> tuple[tuple[Array, Array], Gradients]:
        sums, gradients = function(arguments)
        return jax.lax.psum(sums, mesh.axis_names), (*gradients[:1], *jax.lax.psum(gradients[1:], mesh.axis_names))

    out_specs = ((P(), P()), (rows, P(), P()) if differentiate else ())
    in_specs = (rows, P(), P(), rows, rows)
    return jax.shard_map(local, in_specs=(in_specs,), out_specs=out_specs, check_vma=False)(arguments)


_tied_cross_entropy.defvjp(partial(_in_chunks, differentiate=True), _backward)


def _local_chunks(vocab_size: int, arguments: Arguments, differentiate: bool) -> tuple[tuple[Array, Array], Gradients]:
    """The sums of `tied_cross_entropy`, and with `differentiate` the gradients of x, the table and the bias."""
    x_BTD, table_VD, bias_V, targets_BT, weights_BT = arguments
    tokens = targets_BT.size
    at_once = CHUNK_TOKENS_ON_CPU if backend() == "cpu" else CHUNK_TOKENS
    # 1000 tokens, 512 at once: two chunks of 500. 1001: two of 501, the last token of the second being padding.
    chunks = math.ceil(tokens / min(at_once, max(1, CHUNK_LOGITS // table_VD.shape[0])))
    padding = -tokens % chunks  # Tokens of weight 0.
    dtype = product_dtype(x_BTD)
    table = table_VD.astype(dtype)

    def split(values: Array) -> Array:
        flat = values.reshape(tokens, *values.shape[2:])
        return jnp.pad(flat, [(0, padding)] + [(0, 0)] * (flat.ndim - 1)).reshape(chunks, -1, *flat.shape[1:])

    values = (split(x_BTD), split(targets_BT), split(weights_BT))
    if not differentiate:

        def weighted(values: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            x_GD, targets_G, weights_G = values
            nll_G, correct_G = cross_entropy(tied_logits(x_GD, table, vocab_size, bias_V), targets_G)
            return nll_G * weights_G, correct_G * weights_G

        nll, correct = jax.lax.map(weighted, values)
        return (accurate_sum(nll), accurate_sum(correct)), ()

    def chunk(totals: tuple, values: tuple[Array, Array, Array]) -> tuple[tuple, Array]:
        (loss, correct), gradients = totals
        x_GD, targets_G, weights_G = values
        logits_GV = tied_logits(x_GD, table, vocab_size, bias_V)
        # As in `cross_entropy`, but with one exponential of each logit for the loss and the gradient.
        highest_G = logits_GV.max(-1)
        exp_GV = jnp.exp(logits_GV - highest_G[:, None])
        total_G = exp_GV.sum(-1)
        picked_G = jnp.take_along_axis(logits_GV, targets_G[:, None], 1)[:, 0]
        nll_G, correct_G = highest_G + jnp.log(total_G) - picked_G, (picked_G == highest_G).astype(jnp.float32)
        sums = (loss + (nll_G * weights_G).sum(), correct + (correct_G * weights_G).sum())
        # The gradient of a logit is weight · (exp / total - hit). Its factor weight / total belongs to a whole row, so
        # it is left out here and multiplied in where a row has D columns instead of V.
        hit_G = jnp.exp(picked_G - highest_G) - total_G
        hits_GV = jnp.arange(table.shape[0])[None] == targets_G[:, None]
        dlogits_GV = jnp.where(hits_GV, hit_G[:, None], exp_GV).astype(dtype)
        factor_G1 = (weights_G / total_G)[:, None]
        dtable_VD = product_over_rows(dlogits_GV, (factor_G1 * x_GD).astype(dtype))
        dx_GD = factor_G1 * jax.lax.dot_general(
            dlogits_GV, table, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        dbias_V = None
        if bias_V is not None:  # As a product: see `add_bias`.
            dbias_V = jnp.matmul(factor_G1.T, dlogits_GV.astype(jnp.float32), precision="highest")[0]
        return (sums, jax.tree.map(jnp.add, gradients, (dtable_VD, dbias_V))), dx_GD.astype(x_GD.dtype)

    zero = jnp.zeros(())
    start = jax.tree.map(lambda x: jnp.zeros(x.shape), (table_VD, bias_V))
    (sums, gradients), dx = jax.lax.scan(chunk, ((zero, zero), start), values)
    return sums, (dx.reshape(-1, x_BTD.shape[-1])[:tokens].reshape(x_BTD.shape), *gradients)
