"""Directories of transformers' models, made and spoilt; and parameters compared."""

import json
import re

import jax
import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from prelm_jax.training.parameters import path_name

NORM_WEIGHT = re.compile(r"(LayerNorm|ln_\d)\.weight$")


def randomize(model):
    """Every parameter random, biases and norms too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = NORM_WEIGHT.search(name) is not None
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + norm)
    return model.eval()


def change(directory, rename=lambda name: name, **replaced):
    """Rewrites model.safetensors: names renamed (None drops a tensor), values replaced or added."""
    file = directory / "model.safetensors"
    tensors = {rename(name): value for name, value in load_file(file).items()} | replaced
    save_file({name: value for name, value in tensors.items() if name is not None}, file)


def configure(directory, **settings):
    """Replaces or adds settings in config.json."""
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def assert_params_equal(found, expected, but=frozenset()):
    """Bit for bit, except at the paths `but`."""
    for (path, value), other in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        if path_name(path) not in but:
            np.testing.assert_array_equal(value, other, err_msg=path_name(path))
