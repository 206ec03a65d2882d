"""A pretrained GPT."""

from prelm_jax.formats.huggingface_gpt import GPTModel as GPTPretrained

__all__ = ["GPTPretrained"]
