"""A Run."""

from prelm_jax.pretrain import Run

__all__ = ["Run"]
