"""TPU slices to compile for without renting one, and the speed of their links."""

import os

import jax

from prelm_jax.errors import InputError
from prelm_jax.planning.hlo import Collective
from prelm_jax.training.chips import Chip

_TWO_AXES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_THREE_AXES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
TOPOLOGIES = {"v4": _THREE_AXES, "v5e": _TWO_AXES, "v5p": _THREE_AXES, "v6e": _TWO_AXES}


def compile_only_devices(topology: str, slices: int) -> list[jax.Device]:
    """The chips of `slices` slices such as "v5e:4x4", each one device; XLA's compiler for TPUs needs no TPU.

    Raises InputError for an unknown slice, and where the compiler is not installed.
    """
    version, _, shape = topology.partition(":")
    if shape not in TOPOLOGIES.get(version, ()):
        known = ", ".join(f"{version}:{{{','.join(shapes)}}}" for version, shapes in TOPOLOGIES.items())
        raise InputError(f"--topology {topology}: not one of {known}, local")
    # Without these variables libtpu asks the network for the type of this machine.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # The lock protects chips; compiling uses none.

    from jax.experimental import topologies

    options: dict[str, object] = {} if slices == 1 else {"num_slices": slices}
    if version == "v4":
        options["chip_config_name"] = "megacore"  # One device of both cores, as newer versions have by default.
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except RuntimeError as error:
        if "TPU support not installed" not in str(error):
            raise
        raise InputError('--topology needs the compiler for TPUs: pip install "prelm_jax[tpu]"') from None


def shape_of(topology: str) -> tuple[int, ...]:
    """The chips along each axis of a slice: (4, 4) for "v5e:4x4"."""
    return tuple(map(int, topology.partition(":")[2].split("x")))


def link_bandwidth(chip: Chip, shape: tuple[int, ...]) -> float:
    """Bytes per second that each chip of a slice can send in a ring while all chips send.

    Both directions of every axis carry a part of the data. On an axis without wraparound links, the data that reaches
    the end returns over the same links: half the bandwidth.
    """
    if not chip.torus:
        return chip.links / 2
    axis = chip.links / 2 / chip.torus
    return sum(axis if length % chip.ring == 0 else axis / 2 for length in shape if length > 1)


def collective_seconds(collective: Collective, chip: Chip, shape: tuple[int, ...]) -> float:
    """Lower bound on the time of a collective in a slice of this shape, or between slices over their network.

    In a ring (Patarasuk & Yuan 2009), each of n devices sends (n - 1) / n of the data; an all-reduce sends it twice.
    """
    devices = collective.devices
    if devices == 1:
        return 0.0
    size = collective.bytes * (devices if collective.kind == "reduce-scatter" else 1)
    passes = {"all-reduce": 2, "all-to-all": 1 / 4}.get(collective.kind, 1)
    bandwidth = chip.network if collective.between_slices else link_bandwidth(chip, shape)
    return passes * size * (devices - 1) / devices / bandwidth
