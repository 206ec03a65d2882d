"""Checksums of arrays, computed where the arrays are."""

from typing import TypeVar

import jax
import jax.numpy as jnp

from prelm_jax.training.parameters import path_name

Tree = TypeVar("Tree")


@jax.jit
def checksums(tree: Tree) -> Tree:
    """A uint32 for each array, which changes if any one bit of the array does; the same on any mesh.

    The sum, modulo 2^32, of the array's 32-bit words, each times an odd number made from its index: a flipped bit
    changes the sum by a power of two times an odd number, which is never zero. Integer sums have no order, so shards
    may be added in any.
    """

    def checksum(x: jax.Array) -> jax.Array:
        words = jax.lax.bitcast_convert_type(x, jnp.uint32).reshape(-1)
        odd = jax.lax.iota(jnp.uint32, words.size) * jnp.uint32(0x9E3779B2) + jnp.uint32(1)
        return (words * odd).sum(dtype=jnp.uint32)

    return jax.tree.map(checksum, tree)


def checksums_by_name(tree: object) -> dict[str, int]:
    """The checksums of a tree's arrays by their paths."""
    sums, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(checksums(tree)))
    return {path_name(path): int(value) for path, value in sums}
