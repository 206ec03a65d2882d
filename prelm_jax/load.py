"""Loads a pretrained model from a model directory or a work directory."""

from prelm_jax.formats import model


def load(path, step="newest"):
    """The model at a path."""
    return model.load(path)
