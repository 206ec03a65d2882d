"""Pretraining of ELMo, GPT-1 and BERT in JAX and Flax."""

__version__ = "0.1.0"


def load(path):
    """The model in a model directory (of ours or anybody's) or a work directory; see exchange/model.py."""
    from prelm_jax.load import load

    return load(path)
