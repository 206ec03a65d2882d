"""Optimizers and learning rate schedules: configurations that build an optax transformation."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, Self

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from prelm_jax.bounds import Epsilon, FractionBelow1, NotNegative, NotNegativeFloat, Positive, PositiveFloat
from prelm_jax.training.contract import Params
from prelm_jax.training.parameters import SMALL, first_match, path_name

# Whether weight decay applies, by the last name of a parameter's path: to everything but biases, norms and the scalars
# of heads, so to embeddings too (google-research/bert, optimization.py). A path without a rule is an error.
DECAY = (
    (r"(^|/)(kernel|embedding)$", True),
    (rf"(^|/)({SMALL})$", False),
)

# The fraction of the learning rate, from the fraction of the steps that is left.
DECAYS: dict[str, Callable[[Array], Array]] = {
    "linear": lambda left: left,
    "cosine": lambda left: (1 - jnp.cos(jnp.pi * left)) / 2,
    "trapezoid": lambda left: jnp.minimum(1, 5 * left),
    "none": jnp.ones_like,
}


def decays(params: Params) -> object:
    """A tree like `params` that tells for each parameter whether weight decay applies, by the table DECAY."""
    return jax.tree_util.tree_map_with_path(lambda path, _: first_match(DECAY, path_name(path)), params)


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019), clipping, and the schedules of BERT and GPT-1.

    The learning rate decays from `learning_rate` at step 0 to zero at `decay_steps`. While the step is below
    `warmup_steps`, it is learning_rate · step / warmup_steps instead: step 0 changes nothing, and at the end of the
    warm-up a linear or cosine rate drops a little to the decaying curve.
    """

    learning_rate: NotNegativeFloat  # The highest learning rate, which the schedule scales.
    warmup_steps: NotNegative  # Steps in which the learning rate rises linearly from zero.
    decay_steps: Positive  # The step at which the learning rate reaches zero; usually --steps.
    b1: FractionBelow1 = 0.9  # Decay rate of the first moment.
    b2: FractionBelow1 = 0.999  # Decay rate of the second moment; lower it if the loss has spikes.
    eps: Epsilon = 1e-8  # Added to the denominator.
    weight_decay: NotNegativeFloat = 0.0  # Decay per step as a multiple of the learning rate; not for biases and norms.
    clip_norm: PositiveFloat = 1.0  # Largest global norm of the gradient, after accumulation and over all devices.
    # Where Adam's bias correction goes: "moments", as published; "rate", which then scales weight decay too and leaves
    # eps uncorrected (GPT-1: openai/finetune-transformer-lm, opt.py); "none" (BERT: google-research/bert,
    # optimization.py, AdamWeightDecayOptimizer).
    bias_correction: Literal["moments", "rate", "none"] = "moments"
    # Shape of the decay to zero: linear (BERT); cosine, half a period (GPT-1); trapezoid, constant but for a line over
    # the last fifth of decay_steps (Hägele et al. 2024); none, a constant rate while the length is open.
    decay: Literal["linear", "cosine", "trapezoid", "none"] = "linear"

    def schedule(self, step: ArrayLike) -> Array:
        """The learning rate of a step (counted from 0)."""
        step = jnp.asarray(step, jnp.float32)
        fraction = DECAYS[self.decay](jnp.clip(1 - step / self.decay_steps, 0))
        warming = self.learning_rate * step / max(1, self.warmup_steps)
        return jnp.where(step < self.warmup_steps, warming, self.learning_rate * fraction)

    def ending_at(self, step: int) -> Self:
        """The same optimizer with `step` as its `decay_steps`."""
        return dataclasses.replace(self, decay_steps=step)

    def _rate(self, step: ArrayLike) -> Array:
        rate = self.schedule(step)
        if self.bias_correction != "rate":
            return rate
        return rate * jnp.sqrt(1 - self.b2 ** (step + 1)) / (1 - self.b1 ** (step + 1))

    def adam(self) -> tuple[optax.GradientTransformation, ...]:
        """The transformations that make clipped gradients into updates."""
        adam = optax.scale_by_adam if self.bias_correction == "moments" else scale_by_uncorrected_adam
        return (
            adam(b1=self.b1, b2=self.b2, eps=self.eps),
            optax.add_decayed_weights(self.weight_decay, mask=decays),
            optax.scale_by_learning_rate(self._rate),
        )

    def build(self, matrices: Sequence[str]) -> optax.GradientTransformation:
        """The transformation of gradients into updates, the same for all parameters."""
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), *self.adam())

    def flops(self, params: Params, matrices: Sequence[str], devices: int) -> float:
        """Matmul FLOPs of an update on a device: none."""
        return 0.0


@dataclasses.dataclass(frozen=True)
class Adagrad:
    """Adagrad (Duchi et al. 2011) as ELMo was trained with it: a constant rate, no epsilon, no weight decay.

    The gradient is that of `unroll_steps` times the mean loss of a token (bilm-tf, training.py: `loss * unroll_steps`),
    because `initial_accumulator` has a meaning only relative to the size of the gradients.
    """

    learning_rate: NotNegativeFloat  # The constant learning rate.
    unroll_steps: Positive = 1  # The gradient is multiplied by this; usually the length of a row.
    # Where the sums of squared gradients start; higher values slow the first steps.
    initial_accumulator: PositiveFloat = 1.0
    clip_norm: PositiveFloat = 10.0  # Largest global norm of that gradient, after accumulation and over all devices.

    def schedule(self, step: ArrayLike) -> Array:
        """The learning rate of a step (counted from 0)."""
        return jnp.full(jnp.shape(step), self.learning_rate, jnp.float32)

    def ending_at(self, step: int) -> Self:
        """This optimizer: a constant rate has no end."""
        return self

    def build(self, matrices: Sequence[str]) -> optax.GradientTransformation:
        """The transformation of gradients into updates, the same for all parameters."""
        return optax.chain(
            optax.scale(self.unroll_steps),
            optax.clip_by_global_norm(self.clip_norm),
            optax.scale_by_rss(self.initial_accumulator, eps=0.0),
            optax.scale_by_learning_rate(self.learning_rate),
        )

    def flops(self, params: Params, matrices: Sequence[str], devices: int) -> float:
        """Matmul FLOPs of an update on a device: none."""
        return 0.0


def scale_by_uncorrected_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """m / (sqrt(v) + eps) with uncorrected moments: the first steps are 3 × larger than Adam's."""
    init = optax.scale_by_adam(b1, b2, eps).init

    def update(updates, state, params=None):
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(state.count + 1, mu, nu)

    return optax.GradientTransformation(init, update)
