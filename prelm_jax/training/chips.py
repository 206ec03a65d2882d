"""The chips that training runs on, and slices of them to compile for that nobody needs to have rented."""

import dataclasses
import os
from typing import Any

from prelm_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a data sheet says of one chip.

    flops: dense bf16 operations a second. memory, bandwidth: of its HBM, in bytes, for a program, and bytes a second.
    links: bytes a second to its neighbours, all links and both directions together. network: bytes a second into the
    data-centre network, a chip's share of its host's; None if that is of no concern.
    torus: the axes of the links, 0 for a switch; the length from which on, and by multiples of it, an axis is a ring.
    """

    flops: float
    memory: float
    bandwidth: float
    links: float
    network: float | None = None
    torus: int = 0
    ring: int = 0


GiB = 2**30

# By the beginning of JAX's `device_kind`; the first that fits. Sources: docs.cloud.google.com/tpu/docs/v4, v5e, v5p and
# v6e, "System architecture", and NVIDIA's data sheets of the SXM modules. What these do not tell is assumed: that a
# program has all of a TPU's HBM but a quarter GiB, as v5e's compiler says, and that v4's share of the network is v5p's.
CHIPS = {
    "NVIDIA A100": Chip(312e12, 80e9, 2.039e12, 600e9),
    "NVIDIA H100": Chip(989e12, 80e9, 3.35e12, 900e9),
    "NVIDIA H200": Chip(989e12, 141e9, 4.8e12, 900e9),
    "TPU v4": Chip(275e12, 31.75 * GiB, 1.2e12, 600e9, 6.25e9, torus=3, ring=4),
    "TPU v5 lite": Chip(197e12, 15.75 * GiB, 819e9, 400e9, 3.125e9, torus=2, ring=16),
    "TPU v5": Chip(459e12, 95.74 * GiB, 2.765e12, 1200e9, 6.25e9, torus=3, ring=4),
    "TPU v6 lite": Chip(918e12, 31.25 * GiB, 1.638e12, 800e9, 12.5e9, torus=2, ring=16),
}

_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
TOPOLOGIES = {"v4": _DEEP, "v5e": _FLAT, "v5p": _DEEP, "v6e": _FLAT}


def find_chip(device_kind: str) -> Chip | None:
    """The chip that JAX calls so, if the table has it."""
    return next((chip for kind, chip in CHIPS.items() if device_kind.startswith(kind)), None)


def compile_only_devices(topology: str, slices: int) -> list[Any]:
    """Devices of a slice `v5e:4x4`, or of several, to compile for: XLA's compiler for TPUs works without one."""
    version, _, shape = topology.partition(":")
    if shape not in TOPOLOGIES.get(version, ()):
        known = ", ".join(f"{version}:{{{','.join(shapes)}}}" for version, shapes in TOPOLOGIES.items())
        raise InputError(f"--topology {topology}: not one of {known}, local")
    # Without these libtpu asks the network what machine this is.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # Its lock is for chips, of which none is used.

    from jax.experimental import topologies

    several = {} if slices == 1 else {"num_slices": slices}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **several).devices
    except RuntimeError as error:
        if "TPU support not installed" not in str(error):
            raise
        raise InputError('--topology needs the compiler for TPUs: pip install "prelm_jax[tpu]"') from None


def link_bandwidth(chip: Chip, shape: tuple[int, ...]) -> float:
    """Bytes a second that each chip of a slice can send while all do, as in a ring.

    Both directions of every axis are used, each for a part of the data; on an axis that is no ring, what comes to an
    end must come back over the same links.
    """
    if not chip.torus:
        return chip.links / 2
    axis = chip.links / 2 / chip.torus
    return sum(axis if length % chip.ring == 0 else axis / 2 for length in shape if length > 1)


def collective_seconds(kind: str, size: int, devices: int, bandwidth: float) -> float:
    """The least time of a collective over so many devices whose result is of `size` bytes on each of them.

    Around a ring (Patarasuk & Yuan 2009): every device sends (n - 1) / n of what there is, for a reduction to all
    twice.
    """
    whole = size * devices if kind == "reduce-scatter" else size
    times = {"all-reduce": 2, "all-to-all": 1 / 4, "collective-permute": 1}.get(kind, 1)
    return times * whole * (devices - 1) / devices / bandwidth if devices > 1 else 0.0


def shape_of(topology: str) -> tuple[int, ...]:
    """(4, 4) of `v5e:4x4`."""
    return tuple(map(int, topology.partition(":")[2].split("x")))
