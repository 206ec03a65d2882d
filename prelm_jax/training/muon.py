"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): momentum, made orthogonal matrix by matrix.

Where the momentum of a matrix is U S V^T, its update is nearly U V^T: every direction of the momentum moves the weights
equally far, the rare ones too. `newton_schulz` approximates U V^T by products of matrices.

The models declare which parameters are matrices of layers; AdamW takes the rest. Divergences from the original: the
iterations run in fp32, because in bfloat16 another order of sums changes an update by 1e-2; and the matrices of all
layers that have one shape are iterated together.
"""

import collections
import dataclasses
import math
from collections.abc import Hashable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import PartitionSpec as P

from prelm_jax.bounds import FractionBelow1, NotNegativeFloat
from prelm_jax.training.contract import Params
from prelm_jax.training.optimizer import AdamW, decays
from prelm_jax.training.parameters import SMALL, first_match, path_name

Group = Literal["muon", "adamw"]

# The parameters of AdamW: tables, small parameters, and the kernels outside of numbered layers (heads, poolers,
# convolutions). A kernel of a layer that its model does not declare as a matrix is an error.
ADAMW = (
    rf"(^|/)(embedding|{SMALL})$",
    r"^(?!(.*/)?layer_\d+/).*kernel$",
)

ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's: they lift small singular values fastest, to between 0.7 and 1.2.


def groups(params: Params, matrices: Sequence[str]) -> object:
    """A tree like `params` that tells which optimizer takes each parameter.

    matrices: regular expressions of the paths that Muon takes, as a model declares them. Raises ValueError for a
    parameter without a rule, a rule without a parameter, and a matrix that has not two dimensions.
    """
    table: tuple[tuple[str, Group], ...] = (*((rule, "muon") for rule in matrices), *((r, "adamw") for r in ADAMW))
    found = jax.tree_util.tree_map_with_path(lambda path, _: first_match(table, path_name(path)), params)
    leaves = [(path_name(path), leaf.ndim) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    for rule in matrices:
        dimensions = [ndim for name, ndim in leaves if first_match(((rule, True), ("", False)), name)]
        if set(dimensions) != {2}:
            raise ValueError(f"{rule}: Muon takes matrices, but this finds arrays of dimensions {dimensions}")
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon(AdamW):
    """Muon for the matrices of the layers; AdamW, with the options of that class, for all other parameters.

    Both share schedule, clipping and weight decay. A matrix of `rows` inputs and `columns` outputs moves by
    `matrix_learning_rate` · sqrt(max(1, columns / rows)) along each of its directions (Jordan), so that a step changes
    the outputs of a layer equally much at any width.
    """

    matrix_learning_rate: NotNegativeFloat  # The highest learning rate of the matrices, of the same schedule.
    momentum: FractionBelow1 = 0.95  # Decay rate of the matrices' momentum (Nesterov).

    def build(self, matrices: Sequence[str]) -> optax.GradientTransformation:
        """The transformation of gradients into updates; `matrices` as in `groups`."""
        matrix_schedule = dataclasses.replace(self, learning_rate=self.matrix_learning_rate).schedule
        muon = optax.chain(
            optax.trace(self.momentum, nesterov=True),
            orthogonalize(),
            optax.add_decayed_weights(self.weight_decay, mask=decays),
            optax.scale_by_learning_rate(matrix_schedule),
        )
        by_group: dict[Hashable, optax.GradientTransformation] = {"muon": muon, "adamw": optax.chain(*self.adam())}
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.partition(by_group, lambda params: groups(params, matrices)),
        )

    def flops(self, params: Params, matrices: Sequence[str], devices: int) -> float:
        """Matmul FLOPs of an update on the busiest device of a slice: the FLOPs of the iterations."""
        taken = jax.tree.map(lambda leaf, group: leaf if group == "muon" else None, params, groups(params, matrices))
        stacks = _stacks([leaf.shape for leaf in jax.tree.leaves(taken)])
        return float(sum(math.ceil(len(members) / devices) * _flops(*shape) for shape, members in stacks.items()))


def orthogonalize() -> optax.GradientTransformation:
    """Replaces every matrix by its nearest orthogonal one, times sqrt(max(1, columns / rows)).

    The matrices of one shape are stacked, and the stack is sharded over the devices of a slice: each device iterates
    some whole matrices, and all of them get all results. Between slices nothing is sent.
    """

    def update(updates, state, params=None):
        leaves, structure = jax.tree.flatten(updates)
        for members in _stacks([leaf.shape for leaf in leaves]).values():
            # The sharding of the stack is that of its matrices; then each device gets whole ones.
            stack = jnp.stack([_wide(leaves[i]) for i in members])
            stack = _constrain(_constrain(stack, P(None, P.UNCONSTRAINED, P.UNCONSTRAINED)), P("data"))
            results = _constrain(newton_schulz(stack), P())
            for i, result in zip(members, results, strict=True):
                rows, columns = leaves[i].shape
                leaves[i] = math.sqrt(max(1, columns / rows)) * (result if rows <= columns else result.T)
        return jax.tree.unflatten(structure, leaves), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def newton_schulz(x: Array) -> Array:
    """U V^T, nearly, of each matrix U S V^T of a stack [K, M, N] of M ≤ N; an odd polynomial of the singular values.

    One iteration is X ← a X + b (X X^T) X + c (X X^T)^2 X. It starts at singular values of at most 1, X / |X|, and ends
    with those between 0.7 and 1.2, but for values that were below 1e-3 of |X|, which grow 480-fold.
    """
    a, b, c = COEFFICIENTS
    x /= jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + 1e-7
    for _ in range(ITERATIONS):
        gram = _product(x, x.swapaxes(1, 2))
        x = a * x + _product(b * gram + c * _product(gram, gram), x)
    return x


def _product(x: Array, y: Array) -> Array:
    # In fp32 also where the backend's default is less: TF32 on GPUs, bfloat16 on TPUs.
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def _flops(rows: int, columns: int) -> int:
    """Matmul FLOPs of the iterations of one matrix, rows ≤ columns."""
    return ITERATIONS * (4 * rows**2 * columns + 2 * rows**3)


def _wide(x: Array) -> Array:
    return x if x.shape[0] <= x.shape[1] else x.T


def _stacks(shapes: list[tuple[int, ...]]) -> dict[tuple[int, int], list[int]]:
    """(rows, columns), rows ≤ columns -> the indices of the matrices of that shape, transposed where needed."""
    found = collections.defaultdict(list)
    for i, shape in enumerate(shapes):
        found[min(shape), max(shape)].append(i)
    return found


def _constrain(x: Array, spec: P) -> Array:
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec)
