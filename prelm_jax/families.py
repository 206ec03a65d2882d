"""The families of models."""

import types

from prelm_jax.formats.model import family

EXAMPLES = {
    "fill": 'prelm fill {} "The [MASK] is returned."',
    "generate": 'prelm generate {} --prompt "The"',
    "embed": "prelm embed {} LINES.txt VECTORS.hdf5",
}


def find_family(model_type, source):
    """The row of a model_type."""
    command = next(command for command in EXAMPLES if hasattr(family(model_type, source), command))
    return types.SimpleNamespace(example=EXAMPLES[command])
