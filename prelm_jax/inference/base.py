"""A pretrained model."""

from prelm_jax.formats.model import Model as Pretrained
from prelm_jax.formats.model import write_embeddings

__all__ = ["Pretrained", "write_embeddings"]
