"""Where arrays live: one mesh with one axis, `data`; batches by rows, parameters replicated or sharded (FSDP)."""

import dataclasses
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from prelm_jax.errors import InputError
from prelm_jax.paths import look_up, path_name

Tree = Any

# The last name on the path of every array of the train state, and whether FSDP shards it. Moments carry the path of
# their parameter. Exhaustive: a path that no rule knows is an error, so that nothing is replicated by oversight.
RULES = (
    (r"(^|/)(characters|convolution_\d+)/", False),  # ELMo's: small, and of sizes that many devices do not divide.
    (r"(^|/)(kernel|embedding)$", True),
    (r"(^|/)(\w*bias|scale|count|step)$", False),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """`devices` None: all there are. `parameters`: a copy on every device, or a share of each (FSDP)."""

    devices: int | None = None
    parameters: Literal["replicated", "fsdp"] = "replicated"

    def build(self) -> jax.sharding.Mesh:
        """The mesh over the first `devices` devices, those of a process side by side: so are its rows of a batch."""
        devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
        if self.devices is not None and not 1 <= self.devices <= len(devices):
            raise InputError(f"--mesh.devices {self.devices}: there are {len(devices)}")
        if jax.process_count() > 1 and self.devices not in (None, len(devices)):
            raise InputError(
                f"--mesh.devices {self.devices}: several processes use all of their {len(devices)} devices"
            )
        # Auto axes: Flax Linen does not work with the Explicit ones that make_mesh would choose.
        return jax.sharding.Mesh(np.array(devices[: self.devices]), ("data",), axis_types=(AxisType.Auto,))


def partition(name: str, shape: tuple[int, ...], shards: int) -> P:
    """The partition under FSDP: the largest dimension that `shards` divides, where the rules say so."""
    if not look_up(RULES, name):
        return P()
    axes = [axis for axis in range(len(shape)) if shape[axis] % shards == 0]
    if not axes:
        raise InputError(f"--mesh.parameters fsdp: {shards} devices divide no dimension of {name} {shape}")
    largest = max(axes, key=lambda axis: shape[axis])
    return P(*(("data" if axis == largest else None) for axis in range(largest + 1)))


def state_sharding(state: Tree, mesh: jax.sharding.Mesh, parameters: str) -> Tree:
    """A NamedSharding for every array of a train state; the carry is sharded with its rows."""

    def sharding(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        name = path_name(path)
        if name.startswith("carry/"):
            return NamedSharding(mesh, P("data"))
        spec = partition(name, leaf.shape, mesh.size)
        return NamedSharding(mesh, spec if parameters == "fsdp" else P())

    return jax.tree_util.tree_map_with_path(sharding, state)


def place(batch: dict[str, np.ndarray], layout: dict[str, str], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """A batch on the devices, from what this process has of it.

    Of keys laid out as `rows` that is its own rows; of those `replicated` and `shared` it is everything, and each
    device gets all of it, or (`shared`) an equal part of its first axis where the devices divide that.
    """
    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    def placed(key: str, array: np.ndarray) -> jax.Array:
        if layout[key] == "rows":
            return jax.make_array_from_process_local_data(split, array)
        sharding = split if layout[key] == "shared" and len(array) % mesh.size == 0 else whole
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    with jax.transfer_guard("allow"):  # This is the one transfer that is meant; with several processes JAX cannot tell.
        return {key: placed(key, array) for key, array in batch.items()}
