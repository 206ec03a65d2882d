"""Optimizers and learning rate schedules: configurations that build an optax transformation."""

import dataclasses
from typing import Literal, Self

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from prelm_jax.training.contract import Params
from prelm_jax.training.parameters import first_match, path_name

# Whether weight decay applies, by the last name of a parameter's path: to everything but biases, norms and the scalars
# of heads, so to embeddings too (google-research/bert, optimization.py). A path without a rule is an error.
DECAY = (
    (r"(^|/)(kernel|embedding)$", True),
    (r"(^|/)(\w*bias|scale|weights|gamma|transitions)$", False),
)


def decays(params: Params) -> object:
    """A tree like `params` that tells for each parameter whether weight decay applies, by the table DECAY."""
    return jax.tree_util.tree_map_with_path(lambda path, _: first_match(DECAY, path_name(path)), params)


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019), clipping, and the schedules of BERT and GPT-1.

    The learning rate decays from `learning_rate` at step 0 to zero at `decay_steps`. While the step is below
    `warmup_steps`, it is learning_rate · step / warmup_steps instead: step 0 changes nothing, and at the end of the
    warm-up the rate drops a little to the decaying curve.
    """

    learning_rate: float  # The highest learning rate, which the schedule scales.
    warmup_steps: int  # Steps in which the learning rate rises linearly from zero.
    decay_steps: int  # The step at which the learning rate reaches zero; usually --steps.
    b1: float = 0.9  # Decay rate of the first moment.
    b2: float = 0.999  # Decay rate of the second moment; lower it if the loss has spikes.
    eps: float = 1e-8  # Added to the denominator.
    weight_decay: float = 0.0  # Decay per step as a multiple of the learning rate; not for biases and norms.
    clip_norm: float = 1.0  # Largest global norm of the gradient, after accumulation and over all devices.
    # Where Adam's bias correction goes: "moments", as published; "rate", which then scales weight decay too and leaves
    # eps uncorrected (GPT-1: openai/finetune-transformer-lm, opt.py); "none" (BERT: google-research/bert,
    # optimization.py, AdamWeightDecayOptimizer).
    bias_correction: Literal["moments", "rate", "none"] = "moments"
    decay: Literal["linear", "cosine"] = "linear"  # Shape of the decay: a line (BERT) or half a cosine (GPT-1).

    def schedule(self, step: ArrayLike) -> jax.Array:
        """The learning rate of a step (counted from 0)."""
        step = jnp.asarray(step, jnp.float32)
        left = jnp.clip(1 - step / self.decay_steps, 0)
        if self.decay == "cosine":
            left = (1 - jnp.cos(jnp.pi * left)) / 2
        warming = self.learning_rate * step / max(1, self.warmup_steps)
        return jnp.where(step < self.warmup_steps, warming, self.learning_rate * left)

    def ending_at(self, step: int) -> Self:
        """The same optimizer with a learning rate that reaches zero at a step."""
        return dataclasses.replace(self, decay_steps=step)

    def _rate(self, step: ArrayLike) -> jax.Array:
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
    """Adagrad (Duchi et al. 2011) as ELMo was trained with it: a constant rate, no epsilon, no weight decay.

    The gradient is that of `unroll_steps` times the mean loss of a token (bilm-tf, training.py: `loss * unroll_steps`),
    because `initial_accumulator` has a meaning only relative to the size of the gradients.
    """

    learning_rate: float  # The constant learning rate.
    unroll_steps: int = 1  # The gradient is multiplied by this; usually the length of a row.
    initial_accumulator: float = 1.0  # Where the sums of squared gradients start; higher values slow the first steps.
    clip_norm: float = 10.0  # Largest global norm of that gradient, after accumulation and over all devices.

    def schedule(self, step: ArrayLike) -> jax.Array:
        """The learning rate of a step (counted from 0)."""
        return jnp.full(jnp.shape(step), self.learning_rate, jnp.float32)

    def ending_at(self, step: int) -> Self:
        """This optimizer: a constant rate has no end."""
        return self

    def build(self) -> optax.GradientTransformation:
        """The transformation of gradients into updates."""
        return optax.chain(
            optax.scale(self.unroll_steps),
            optax.clip_by_global_norm(self.clip_norm),
            optax.scale_by_rss(self.initial_accumulator, eps=0.0),
            optax.scale_by_learning_rate(self.learning_rate),
        )


def scale_by_uncorrected_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """m / (sqrt(v) + eps) with uncorrected moments: the first steps are 3 × larger than Adam's."""
    init = optax.scale_by_adam(b1, b2, eps).init

    def update(updates, state, params=None):
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(state.count + 1, mu, nu)

    return optax.GradientTransformation(init, update)
