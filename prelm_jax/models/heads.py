"""The scalar mix (Peters et al. 2018, 3.2): the weighted sum of a pretrained model's layers that a task learns.

Reference: allennlp, modules/scalar_mix.py; bilm-tf, bilm/elmo.py.
Divergence: none from AllenNLP. bilm-tf's layer norm has epsilon 1e-12 for 1e-13, and it adds λ Σ w² to the task's loss.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array


class ScalarMix(nn.Module):
    """γ Σ softmax(w)_l h_l over the leading axis; at first the mean of the layers.

    layer_norm: normalize each h_l first by a single mean and variance, over all elements of all tokens that are not
    padding, without parameters; the result for a text then depends on the rest of its batch.

    Example: `ScalarMix().apply({"params": params}, jnp.stack(hidden_states), batch["segments"] != 0)`.
    """

    layer_norm: bool = False

    @nn.compact
    def __call__(self, hidden_LBTD: Array, mask_BT: Array) -> Array:
        """[B, T, D]; `mask_BT` is true where there is a token."""
        weights_L = self.param("weights", nn.initializers.zeros, hidden_LBTD.shape[:1])
        gamma = self.param("gamma", nn.initializers.ones, ())
        if self.layer_norm:
            hidden_LBTD = _normalize(hidden_LBTD, mask_BT)
        return gamma * jnp.einsum("L,LBTD->BTD", jax.nn.softmax(weights_L), hidden_LBTD)


def _normalize(hidden_LBTD: Array, mask_BT: Array) -> Array:
    mask_1BT1 = mask_BT.astype(hidden_LBTD.dtype)[None, :, :, None]
    elements = mask_1BT1.sum() * hidden_LBTD.shape[-1]

    def mean(values_LBTD: Array) -> Array:
        return (values_LBTD * mask_1BT1).sum((1, 2, 3), keepdims=True) / elements

    centered_LBTD = hidden_LBTD - mean(hidden_LBTD)
    return centered_LBTD * jax.lax.rsqrt(mean(jnp.square(centered_LBTD)) + 1e-13)
