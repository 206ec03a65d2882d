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
    network: float = math.inf  # Bytes into the data-center network: the chip's part of its host's bandwidth.
    torus: int = 0  # Axes of the links; 0 for a switch.
    ring: int = 0  # An axis is a ring if its length is a multiple of this.


GiB = 2**30

# By the beginning of JAX's `device_kind`; the first match counts. Sources: docs.cloud.google.com/tpu/docs/v4, v5e, v5p
# and v6e, "System architecture", and NVIDIA's data sheets of the SXM modules. Two assumptions: a program may use all of
# a TPU's HBM but a quarter GiB (as v5e's compiler reports), and v4's part of the network equals v5p's. TPUs multiply
# fp32 matrices in six passes over their parts in bf16.
CHIPS = {
    "NVIDIA A100": Chip(312e12, 19.5e12, 80e9, 2.039e12, 600e9),
    "NVIDIA H100": Chip(989e12, 67e12, 80e9, 3.35e12, 900e9),
    "NVIDIA H200": Chip(989e12, 67e12, 141e9, 4.8e12, 900e9),
    "TPU v4": Chip(275e12, 275e12 / 6, 31.75 * GiB, 1.2e12, 600e9, 6.25e9, torus=3, ring=4),
    "TPU v5 lite": Chip(197e12, 197e12 / 6, 15.75 * GiB, 819e9, 400e9, 3.125e9, torus=2, ring=16),
    "TPU v5": Chip(459e12, 459e12 / 6, 95.74 * GiB, 2.765e12, 1200e9, 6.25e9, torus=3, ring=4),
    "TPU v6 lite": Chip(918e12, 918e12 / 6, 31.25 * GiB, 1.638e12, 800e9, 12.5e9, torus=2, ring=16),
}


def find_chip(device_kind: str) -> Chip | None:
    """The data sheet of JAX's `device_kind`; None if the table has none."""
    return next((chip for kind, chip in CHIPS.items() if device_kind.startswith(kind)), None)
