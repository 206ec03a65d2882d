"""Multi-head attention: masks, heads and scores."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from prelm_jax.models.layers import MASKED, backend, dropout, product


class Mask(NamedTuple):
    """Which tokens attend to which.

    allowed_B1TS: bool [B or 1, 1, T, S]. segments_BT and causal: the arguments of `attention_mask`, for a kernel that
    computes the mask itself; segments_BT is None for a mask of another origin.
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
    q_BTD: Array,
    k_BSD: Array,
    v_BSD: Array,
    num_heads: int,
    mask: Mask,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
) -> Array:
    """Scaled dot-product attention (Vaswani et al. 2017, 3.2.1), [B, T, D], heads side by side; softmax in fp32.

    dropout_key: for the dropout of the attention weights; None: without. On a TPU a kernel computes the same, with the
    same dropout, and never writes the scores to memory; see `attention_kernel.make_settings` for its shapes.
    """
    B, T, D = q_BTD.shape
    H = D // num_heads
    if backend() == "tpu" and mask.segments_BT is not None:
        # Imported here: the import takes half a second, and only TPUs need it.
        from prelm_jax.models.attention_kernel import kernel_attention, make_settings

        rate = 0.0 if dropout_key is None else dropout_rate
        settings = make_settings(q_BTD, num_heads, mask.causal, rate)
        if settings is not None:
            return kernel_attention(settings, q_BTD / math.sqrt(H), k_BSD, v_BSD, mask.segments_BT, dropout_key)
    q_BNTH, k_BNSH, v_BNSH = (x.reshape(B, -1, num_heads, H).swapaxes(1, 2) for x in (q_BTD, k_BSD, v_BSD))
    # A single leading batch axis: with two, XLA's CPU backend transposes more.
    q_ATH, k_ASH, v_ASH = (x.reshape(B * num_heads, -1, H) for x in (q_BNTH / math.sqrt(H), k_BNSH, v_BNSH))
    scores_BNTS = product(q_ATH, k_ASH, transposed=True).reshape(B, num_heads, T, -1)
    scores_BNTS = jnp.where(mask.allowed_B1TS, scores_BNTS.astype(jnp.float32), MASKED)
    weights_BNTS = jax.nn.softmax(scores_BNTS).astype(v_BSD.dtype)
    if dropout_key is not None:
        weights_BNTS = dropout(weights_BNTS, dropout_rate, dropout_key)
    y_BNTH = product(weights_BNTS.reshape(B * num_heads, T, -1), v_ASH).reshape(B, num_heads, T, H)
    return y_BNTH.swapaxes(1, 2).reshape(B, T, D)
