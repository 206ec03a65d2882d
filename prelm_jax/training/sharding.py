"""Where arrays live: batches are sharded by rows over all devices; the train state is replicated or sharded.

The mesh has two axes: `slice`, devices connected over the data-center network, and `data`, devices connected by fast
links. Only gradients travel between slices: the train state is sharded over the devices of one slice.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from prelm_jax.bounds import Size
from prelm_jax.errors import InputError
from prelm_jax.training.contract import HostBatch, Layout
from prelm_jax.training.parameters import SMALL, first_match, matches, path_name

Tree = TypeVar("Tree")

ROWS = P(("slice", "data"))

# Whether an array of the train state may be sharded, by the last name of its path (a moment has the path of its
# parameter). A path without a rule is an error, so that no array stays replicated by oversight.
RULES = (
    (r"(^|/)(kernel|embedding)$", True),
    (rf"(^|/)({SMALL}|count|step)$", False),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The devices to train on, and how the train state is spread over them."""

    devices: Size | None = None  # Number of devices; all of them if unset.
    # Where parameters and optimizer moments live: "replicated", a copy of both on every device; "zero1", sharded
    # moments (ZeRO stage 1, Rajbhandari et al. 2020); "fsdp", both sharded, for models too large for one device.
    parameters: Literal["replicated", "zero1", "fsdp"] = "replicated"
    slices: Size = 1  # Number of TPU slices; parameters are replicated across slices.

    def build(self, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
        """The mesh over the first `devices` of the given devices, by default of all there are.

        Devices are sorted by slice, then process, so that each process owns contiguous rows of a batch.
        """
        devices = sorted(
            jax.devices() if devices is None else devices,
            key=lambda device: (_slice(device) or 0, device.process_index, device.id),
        )
        if self.devices is not None and self.devices > len(devices):
            raise InputError(f"--mesh.devices {self.devices}: there are {len(devices)} devices")
        if jax.process_count() > 1 and self.devices not in (None, len(devices)):
            raise InputError(f"--mesh.devices {self.devices}: several processes use all of their {len(devices)}")
        devices = devices[: self.devices]
        slices = {_slice(device) for device in devices}
        if slices != {None} and len(slices) != self.slices:
            raise InputError(f"--mesh.slices {self.slices}: the devices are in {len(slices)} slices")
        if len(devices) % self.slices:
            raise InputError(f"--mesh.slices {self.slices}: does not divide {len(devices)} devices")
        # Auto axes: Flax Linen does not work with the Explicit axes that make_mesh would choose.
        grid, axes = np.array(devices).reshape(self.slices, -1), ("slice", "data")
        return jax.sharding.Mesh(grid, axes, axis_types=(AxisType.Auto,) * 2)


def _slice(device: jax.Device) -> int | None:
    """The TPU slice of a device; None on other hardware."""
    return getattr(device, "slice_index", None)


def partition(name: str, shape: tuple[int, ...], shards: int, replicated: Sequence[str] = ()) -> P:
    """How the array `name` is sharded: along its largest dimension that `shards` divides, if the rules allow it.

    `replicated`: regular expressions of paths that are never sharded, whatever the rules say.

        partition("pooler/kernel", (768, 512), 8)  ->  P("data")
    """
    if not first_match(RULES, name) or matches(replicated, name):
        return P()
    axes = [axis for axis in range(len(shape)) if shape[axis] % shards == 0]
    if not axes:
        raise InputError(f"--mesh.parameters: {shards} devices divide no dimension of {name} {shape}")
    largest = max(axes, key=lambda axis: shape[axis])
    return P(*(("data" if axis == largest else None) for axis in range(largest + 1)))


def state_sharding(
    state: Tree,
    mesh: jax.sharding.Mesh,
    parameters: str,
    replicated: Sequence[str] = (),
    tables: Sequence[str] = (),
) -> Tree:
    """The NamedSharding of every array of a train state; the carry is sharded by rows, like the batch.

    `tables`: regular expressions of paths that are sharded by rows in any mode, if the devices divide the rows.
    """
    shards = mesh.shape["data"]

    def sharding(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        name = path_name(path)
        if re.match("(progress/)?carry/", name):  # The carry gates of ELMo's highways are parameters.
            return NamedSharding(mesh, ROWS)
        first_match(RULES, name)  # Even if nothing is sharded: a missing rule shows at once.
        if matches(tables, name) and leaf.shape[0] % shards == 0:
            return NamedSharding(mesh, P("data"))
        sharded = parameters == "fsdp" or (parameters == "zero1" and name.startswith("opt_state/"))
        spec = partition(name, leaf.shape, shards, replicated) if sharded else P()
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, state)


def batch_sharding(layout: Layout, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> NamedSharding:
    """The sharding of one key of a batch; `shared` keys are sharded only if the devices divide their first axis."""
    sharded = layout == "rows" or (layout == "shared" and shape[0] % mesh.size == 0)
    return NamedSharding(mesh, ROWS if sharded else P())


def abstract_batch(
    batch: HostBatch, layout: Mapping[str, Layout], mesh: jax.sharding.Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """A global batch as jax.ShapeDtypeStructs, sharded as on the devices."""
    return {
        key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(layout[key], x.shape, mesh))
        for key, x in batch.items()
    }


def shard_batch(batch: HostBatch, layout: Mapping[str, Layout], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Puts a batch on the devices of all processes.

    Of the `rows` keys each process passes its own rows, of the others the whole array (see contract.Layout).
    """

    def put(key: str, array: np.ndarray) -> jax.Array:
        sharding = batch_sharding(layout[key], array.shape, mesh)
        if layout[key] == "rows":
            return jax.make_array_from_process_local_data(sharding, array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    with jax.transfer_guard("allow"):  # The one intended transfer; with several processes JAX cannot tell.
        return {key: put(key, array) for key, array in batch.items()}
