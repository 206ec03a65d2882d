"""A pretrained BERT."""

from prelm_jax.formats.huggingface_bert import BertModel as BertPretrained

__all__ = ["BertPretrained"]
