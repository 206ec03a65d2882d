"""Data sheets of the chips that training runs on."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Chip:
    """The data sheet of one chip; rates are per second."""

    flops: float  # Dense bf16 FLOP.
    fp32_flops: float  # FLOP in products of fp32 matrices at full precision.
    memory: float  # Bytes of HBM that a program may use.
    bandwidth: float  # Bytes to and from HBM.
    links: float  # Bytes over the links to all neighbors, both directions together.
    vector: float  # Operations on 32-bit numbers, outside of matrix products.
    latency: float  # Seconds that the next product waits for the result of a small one, at least.
    network: float = math.inf  # Bytes into the data-center network: the chip's part of its host's bandwidth.
    torus: int = 0  # Axes of the links; 0 for a switch.
    ring: int = 0  # An axis is a ring if its length is a multiple of this.
    tile: int = 1  # Rows and columns of the matrix unit: smaller products take as long; 1 if not counted.


def _tpu(
    flops: float,
    memory: float,
    bandwidth: float,
    links: float,
    network: float,
    *,
    cores: int,
    matrix_units: int,
    tile: int,
    alus: int,
    torus: int,
    ring: int,
) -> Chip:
    """A TPU: each core has `matrix_units` of `tile` × `tile`, and a vector unit of 8 × 128 lanes with `alus` each."""
    clock = flops / (2 * cores * matrix_units * tile**2)
    vector = cores * alus * 8 * 128 * clock
    # Rows enter a matrix unit one by one, and pass all its rows and columns.
    latency = 3 * tile / clock
    return Chip(flops, flops / 6, memory, bandwidth, links, vector, latency, network, torus, ring, tile)


GiB = 2**30

# By the beginning of JAX's `device_kind`; the first match counts. Sources: docs.cloud.google.com/tpu/docs/v4, v5e, v5p
# and v6e, "System architecture", "How to Scale Your Model" (Austin et al. 2025), chapter 2 and appendix C, for the
# units of TPUs, and NVIDIA's data sheets of the SXM modules. Assumptions: a program may use all of a TPU's HBM but a
# quarter GiB (as v5e's compiler reports), v4's part of the network equals v5p's, v6e has as many ALUs as v5, and a GPU
# starts a kernel every microsecond. TPUs multiply fp32 matrices in six passes over their parts in bf16.
CHIPS = {
    "NVIDIA A100": Chip(312e12, 19.5e12, 80e9, 2.039e12, 600e9, 9.75e12, 1e-6),
    "NVIDIA H100": Chip(989e12, 67e12, 80e9, 3.35e12, 900e9, 33.5e12, 1e-6),
    "NVIDIA H200": Chip(989e12, 67e12, 141e9, 4.8e12, 900e9, 33.5e12, 1e-6),
    "TPU v4": _tpu(
        275e12, 31.75 * GiB, 1.2e12, 600e9, 6.25e9, cores=2, matrix_units=4, alus=2, tile=128, torus=3, ring=4
    ),
    "TPU v5 lite": _tpu(
        197e12, 15.75 * GiB, 819e9, 400e9, 3.125e9, cores=1, matrix_units=4, alus=4, tile=128, torus=2, ring=16
    ),
    "TPU v5": _tpu(
        459e12, 95.74 * GiB, 2.765e12, 1200e9, 6.25e9, cores=2, matrix_units=4, alus=4, tile=128, torus=3, ring=4
    ),
    "TPU v6 lite": _tpu(
        918e12, 31.25 * GiB, 1.638e12, 800e9, 12.5e9, cores=1, matrix_units=4, alus=4, tile=256, torus=2, ring=16
    ),
}


def find_chip(device_kind: str) -> Chip | None:
    """The data sheet of JAX's `device_kind`; None if the table has none."""
    return next((chip for kind, chip in CHIPS.items() if device_kind.startswith(kind)), None)
