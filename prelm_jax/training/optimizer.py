"""Optimizers and schedules, as configurations that build an optax transformation."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from prelm_jax.training.parameters import first_match, path_name

# The last name on the path of every parameter, and whether its weight decays (google-research/bert,
# optimization.py: everything but LayerNorm and biases, so embeddings too). Exhaustive.
DECAY = (
    (r"(^|/)(kernel|embedding)$", True),
    (r"(^|/)(\w*bias|scale|weights|gamma|transitions)$", False),
)


def decays(params: Any) -> Any:
    """For every parameter whether weight decay applies, by the table DECAY."""

    return jax.tree_util.tree_map_with_path(lambda path, _: first_match(DECAY, path_name(path)), params)


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019), clipping, and the schedules of BERT and GPT-1.

    The rate falls from `learning_rate` at step 0 to zero at `decay_steps`, along a line or half a cosine; while the
    step is below `warmup_steps` it is learning_rate · step / warmup_steps instead (so it jumps a little where the two
    meet, and step 0 changes nothing).

    `bias_correction`: of the moments, as published; of the rate, which then scales weight decay too and leaves eps
    uncorrected (GPT-1: openai/finetune-transformer-lm, opt.py); or none (BERT: google-research/bert, optimization.py,
    AdamWeightDecayOptimizer).

    Gradients are clipped to a global norm of `clip_norm`, after accumulation and over all devices.
    """

    learning_rate: float
    warmup_steps: int
    decay_steps: int
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    bias_correction: Literal["moments", "rate", "none"] = "moments"
    decay: Literal["linear", "cosine"] = "linear"

    def schedule(self, step: jax.Array | int) -> jax.Array:
        """The learning rate of a step."""
        step = jnp.asarray(step, jnp.float32)
        left = jnp.clip(1 - step / self.decay_steps, 0)
        if self.decay == "cosine":
            left = (1 - jnp.cos(jnp.pi * left)) / 2
        warming = self.learning_rate * step / max(1, self.warmup_steps)
        return jnp.where(step < self.warmup_steps, warming, self.learning_rate * left)

    def _rate(self, step: jax.Array) -> jax.Array:
        rate = self.schedule(step)
        if self.bias_correction != "rate":
            return rate
        return rate * jnp.sqrt(1 - self.b2 ** (step + 1)) / (1 - self.b1 ** (step + 1))

    def build(self) -> optax.GradientTransformation:
        """The transformation of gradients into updates."""
        adam = optax.scale_by_adam if self.bias_correction == "moments" else scale_by_uncorrected_adam
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            adam(b1=self.b1, b2=self.b2, eps=self.eps),
            optax.add_decayed_weights(self.weight_decay, mask=decays),
            optax.scale_by_learning_rate(self._rate),
        )


@dataclasses.dataclass(frozen=True)
class Adagrad:
    """Adagrad (Duchi et al. 2011) as ELMo was trained with it; a constant rate, no epsilon, no weight decay.

    The sums of squares start at `initial_accumulator`, which only means something beside the size of the gradients:
    these are of `unroll_steps` times the mean loss of a token (bilm-tf, training.py, which takes the gradient of
    `loss * unroll_steps`). Then they are clipped to a global norm of `clip_norm`, after accumulation and over all
    devices.
    """

    learning_rate: float
    unroll_steps: int = 1
    initial_accumulator: float = 1.0
    clip_norm: float = 10.0

    def schedule(self, step: jax.Array | int) -> jax.Array:
        """The learning rate of a step."""
        return jnp.full(jnp.shape(step), self.learning_rate, jnp.float32)

    def build(self) -> optax.GradientTransformation:
        """The transformation of gradients into updates."""
        return optax.chain(
            optax.scale(self.unroll_steps),
            optax.clip_by_global_norm(self.clip_norm),
            optax.scale_by_rss(self.initial_accumulator, eps=0.0),
            optax.scale_by_learning_rate(self.learning_rate),
        )


def scale_by_uncorrected_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """m / (sqrt(v) + eps), the moments as they are: the first steps are 3 × larger than Adam's."""
    init = optax.scale_by_adam(b1, b2, eps).init

    def update(updates, state, params=None):
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(state.count + 1, mu, nu)

    return optax.GradientTransformation(init, update)
