"""Multi-head attention: masks, heads and scores. Only this module depends on the layout that a backend prefers."""

import math
from collections.abc import Callable
from typing import NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from prelm_jax.models.layers import MASKED, affine, backend, product

SPLASH_BLOCK = 128  # Tokens; the TPU's attention kernel takes lengths that are multiples of it.


class SplitHeads(nn.Module):
    """[B, N, T, H]: a dense layer over [B, T, D] whose output is split into heads; the parameters of Dense."""

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
        # One product that writes in the layout of the attention kernel: a transposition would go through memory again.
        kernel_DNH, bias_N1H = (w.astype(x_BTD.dtype).reshape(*w.shape[:-1], N, H) for w in (kernel, bias))
        return jnp.einsum("BTD,DNH->BNTH", x_BTD, kernel_DNH) + bias_N1H.reshape(1, N, 1, H)


class MergeHeads(nn.Module):
    """[B, T, D]: the output projection of the concatenated heads [B, N, T, H]; the parameters of Dense."""

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


class Mask(NamedTuple):
    """Which tokens attend to which.

    allowed_B1TS: bool [B or 1, 1, T, S]. segments_BT and causal: the arguments of `attention_mask`, for a kernel that
    computes the mask block by block; segments_BT is None for a mask of another origin.
    """

    allowed_B1TS: Array
    segments_BT: Array | None = None
    causal: bool = False


def attention_mask(segments_BT: Array, causal: bool = False) -> Mask:
    """A token attends to the tokens of its own segment; with `causal` only to itself and earlier ones.

    Segment 0 is padding and takes no part. The row [1, 1, 2, 0] allows, with `causal`:

        [[1 0 0 0]
         [1 1 0 0]
         [0 0 1 0]
         [0 0 0 0]]
    """
    same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
    allowed_B1TS = (same_BTS & (segments_BT != 0)[:, None, :])[:, None]
    if causal:
        position_T = jnp.arange(segments_BT.shape[1])
        allowed_B1TS &= (position_T[None, :] <= position_T[:, None])[None, None]
    return Mask(allowed_B1TS, segments_BT, causal)


def attention(
    q_BNTH: Array, k_BNSH: Array, v_BNSH: Array, mask: Mask, drop: Callable[[Array], Array] | None = None
) -> Array:
    """Scaled dot-product attention (Vaswani et al. 2017, 3.2.1), [B, N, T, H]; softmax in fp32.

    drop: dropout for the attention weights; None: without. Only without does a TPU use its kernel, which has no dropout
    and never writes the scores to memory, and only for static lengths that SPLASH_BLOCK divides.
    """
    B, N, T, H = q_BNTH.shape
    q_BNTH = q_BNTH / math.sqrt(H)
    if backend() == "tpu" and mask.segments_BT is not None and T % SPLASH_BLOCK == 0 and drop is None:
        return splash_attention(q_BNTH, k_BNSH, v_BNSH, mask.segments_BT, mask.causal)
    # A single leading batch axis: with two, XLA's CPU backend transposes more.
    q_ATH, k_ASH, v_ASH = (x.reshape(B * N, -1, H) for x in (q_BNTH, k_BNSH, v_BNSH))
    scores_BNTS = product(q_ATH, k_ASH, transposed=True).reshape(B, N, T, -1)
    scores_BNTS = jnp.where(mask.allowed_B1TS, scores_BNTS.astype(jnp.float32), MASKED)
    weights_BNTS = jax.nn.softmax(scores_BNTS).astype(v_BNSH.dtype)
    if drop is not None:
        weights_BNTS = drop(weights_BNTS)
    return product(weights_BNTS.reshape(B * N, T, -1), v_ASH).reshape(B, N, T, H)


def splash_attention(q_BNTH: Array, k_BNTH: Array, v_BNTH: Array, segments_BT: Array, causal: bool) -> Array:
    """`attention` block by block, by JAX's kernel for TPUs; q is scaled already, and padding attends to padding."""
    # Imported here: the import takes half a second, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, N, T, _ = q_BNTH.shape
    block = max(size for size in range(SPLASH_BLOCK, 512 + 1, SPLASH_BLOCK) if T % size == 0)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((T, T)) if causal else masks.FullMask((T, T))] * N),
        block_sizes=splash.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, use_fused_bwd_kernel=True
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=backend() != "tpu",
    )

    def local(q_BNTH: Array, k_BNTH: Array, v_BNTH: Array, segments_BT: Array) -> Array:
        return cast(Array, jax.vmap(kernel)(q_BNTH, k_BNTH, v_BNTH, splash.SegmentIds(segments_BT, segments_BT)))

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1:  # It is 0 where no mesh is set. Each device computes its own rows: XLA cannot partition a kernel.
        rows = P(mesh.axis_names)
        local = jax.shard_map(local, in_specs=rows, out_specs=rows, check_vma=False)
    return local(q_BNTH, k_BNTH, v_BNTH, segments_BT)
