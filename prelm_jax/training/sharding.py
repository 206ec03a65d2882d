"""Where arrays live: batches by rows over all devices; the train state whole on each of them, or in shares.

The mesh has two axes: `slice`, devices that a data-centre network joins, and `data`, those that fast links join. Only
gradients go from slice to slice: shares of the state are of the devices of a slice.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from prelm_jax.errors import InputError
from prelm_jax.training.parameters import first_match, path_name

Tree = Any

ROWS = P(("slice", "data"))

# The last name on the path of every array of the train state, and whether it may be cut into shares. Moments carry the
# path of their parameter. Exhaustive: a path that no rule knows is an error, so that nothing stays whole by oversight.
RULES = (
    (r"(^|/)(characters|convolution_\d+)/", False),  # ELMo's: small, and of sizes that many devices do not divide.
    (r"(^|/)(kernel|embedding)$", True),
    (r"(^|/)(\w*bias|scale|count|step)$", False),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """`devices` None: all there are.

    parameters: "replicated", a copy of parameters and moments on every device; "zero1", a copy of the parameters and a
    share of the moments (ZeRO stage 1, Rajbhandari et al. 2020); "fsdp", a share of both.
    slices: so many groups of devices, joined by a data-centre network, each with a copy or shares of everything.
    """

    devices: int | None = None
    parameters: Literal["replicated", "zero1", "fsdp"] = "replicated"
    slices: int = 1

    def build(self, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
        """The mesh over the first `devices` of some, by default of all there are.

        Those of a slice stand side by side, and in it those of a process: so do its rows of a batch.
        """
        devices = sorted(
            jax.devices() if devices is None else devices,
            key=lambda device: (_slice(device) or 0, device.process_index, device.id),
        )
        if self.devices is not None and not 1 <= self.devices <= len(devices):
            raise InputError(f"--mesh.devices {self.devices}: there are {len(devices)}")
        if jax.process_count() > 1 and self.devices not in (None, len(devices)):
            raise InputError(
                f"--mesh.devices {self.devices}: several processes use all of their {len(devices)} devices"
            )
        devices = devices[: self.devices]
        slices = {_slice(device) for device in devices}
        if slices != {None} and len(slices) != self.slices:
            raise InputError(f"--mesh.slices {self.slices}: the devices are in {len(slices)}")
        if self.slices < 1 or len(devices) % self.slices:
            raise InputError(f"--mesh.slices {self.slices}: does not divide {len(devices)} devices")
        # Auto axes: Flax Linen does not work with the Explicit ones that make_mesh would choose.
        return jax.sharding.Mesh(
            np.array(devices).reshape(self.slices, -1), ("slice", "data"), axis_types=(AxisType.Auto,) * 2
        )


def _slice(device: jax.Device) -> int | None:
    """The slice of a TPU pod; None where there is no such thing."""
    return getattr(device, "slice_index", None)


def partition(name: str, shape: tuple[int, ...], shards: int) -> P:
    """How an array is cut into shares: along the largest dimension that `shards` divides, where the rules say so."""
    if not first_match(RULES, name):
        return P()
    axes = [axis for axis in range(len(shape)) if shape[axis] % shards == 0]
    if not axes:
        raise InputError(f"--mesh.parameters: {shards} devices divide no dimension of {name} {shape}")
    largest = max(axes, key=lambda axis: shape[axis])
    return P(*(("data" if axis == largest else None) for axis in range(largest + 1)))


def state_sharding(state: Tree, mesh: jax.sharding.Mesh, parameters: str) -> Tree:
    """A NamedSharding for every array of a train state; the carry is sharded with its rows."""

    def sharding(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        name = path_name(path)
        if name.startswith("carry/"):
            return NamedSharding(mesh, ROWS)
        first_match(RULES, name)  # Also where nothing is cut: a forgotten rule shows at once.
        cut = parameters == "fsdp" or (parameters == "zero1" and name.startswith("opt_state/"))
        return NamedSharding(mesh, partition(name, leaf.shape, mesh.shape["data"]) if cut else P())

    return jax.tree_util.tree_map_with_path(sharding, state)


def batch_sharding(layout: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> NamedSharding:
    """Of a key of a batch, by its layout: `rows` are cut, and `shared` where the devices divide its first axis."""
    cut = layout == "rows" or (layout == "shared" and shape[0] % mesh.size == 0)
    return NamedSharding(mesh, ROWS if cut else P())


def place(batch: dict[str, np.ndarray], layout: dict[str, str], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """A batch on the devices, from what this process has of it.

    Of keys laid out as `rows` that is its own rows; of those `replicated` and `shared` it is everything, and each
    device gets all of it, or (`shared`) an equal part of its first axis where the devices divide that.
    """

    def placed(key: str, array: np.ndarray) -> jax.Array:
        sharding = batch_sharding(layout[key], array.shape, mesh)
        if layout[key] == "rows":
            return jax.make_array_from_process_local_data(sharding, array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    with jax.transfer_guard("allow"):  # This is the one transfer that is meant; with several processes JAX cannot tell.
        return {key: placed(key, array) for key, array in batch.items()}
