"""Memory of devices: the bytes that a compiled step needs, the bytes available, and advice where these are too few."""

import bisect
import contextlib
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from prelm_jax.errors import InputError
from prelm_jax.training.chips import GiB

EXHAUSTED = "RESOURCE_EXHAUSTED"  # How XLA's errors begin where memory is too little, at compile time or later.
# Two messages of the compiler for TPUs when the step needs more memory than the chip has: while it places arrays, and
# before it tries.
COMPILER_MESSAGES = (
    r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm",
    r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)",
)
# Files with the memory limit of a container: of Linux's control groups, version 2 and version 1.
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


class TooLarge(Exception):
    """A program needs more memory than a device has (both in bytes)."""

    def __init__(self, needed: float, available: float):
        super().__init__(needed, available)
        self.needed, self.available = needed, available


def too_large(error: jax.errors.JaxRuntimeError) -> Exception:
    """TooLarge for an error of the compiler that reports too little memory; any other error unchanged."""
    found = next((match for form in COMPILER_MESSAGES if (match := re.search(form, str(error)))), None)
    if not found:
        return error
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return TooLarge(float(found[1]) * units[found[2]], float(found[3]) * units[found[4]])


def compile_program(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """The compiled program. Raises TooLarge if the compiler says that a device has too little memory for it."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise too_large(error) from None


def needed(compiled: jax.stages.Compiled) -> int:
    """Bytes that a program takes on a device: arguments, temporary arrays and results."""
    memory = compiled.memory_analysis()
    assert memory, "the compiler tells nothing about its program"
    arguments = memory.argument_size_in_bytes - memory.alias_size_in_bytes  # Without those that become outputs.
    return arguments + memory.temp_size_in_bytes + memory.output_size_in_bytes


def available(mesh: jax.sharding.Mesh) -> float:
    """Bytes that a program may use on each device of a mesh; the devices of a CPU share its memory."""
    limit = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")
    return host_memory() / len(mesh.local_devices) if limit is None else limit


def host_memory() -> int:
    """Bytes of memory of this machine, or of the container that the process runs in."""
    limits = [path.read_text().strip() for path in CGROUP_LIMITS if path.exists()]
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *(int(limit) for limit in limits if limit.isdigit())])


def exhausted(error: BaseException) -> bool:
    """Whether an error says that a device has too little memory."""
    message = isinstance(error, jax.errors.JaxRuntimeError) and str(error).startswith(EXHAUSTED)
    return message or isinstance(error, TooLarge)


@contextlib.contextmanager
def explained(what: str, advice: str) -> Iterator[None]:
    """Turns an error of the block that says that a device has too little memory into an InputError."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not exhausted(error):
            raise
        raise InputError(f"{what} needs more memory than a device has: {advice}") from None


class StepMemory:
    """A train step that explains errors about too little memory.

    The message says what the step needs, what a device has, and the smallest --accumulate with which the step fits,
    found by compiling it. As long as nothing fails, nothing is compiled but the step itself.
    """

    def __init__(
        self,
        make_step: Callable[[int], jax.stages.Wrapped],
        arguments: tuple[object, ...],
        accumulate: int,
        rows: int,
        mesh: jax.sharding.Mesh,
    ):
        """`make_step`: accumulate -> train step. `arguments`: of the step, may be abstract. `rows`: on each device.

        `needed` is the number of bytes that the step takes, NaN until `check` has compiled it.
        """
        self.step = make_step(accumulate)
        self._make_step, self._arguments, self._mesh = make_step, arguments, mesh
        self._accumulate, self._rows, self.needed = accumulate, rows, math.nan

    def check(self) -> None:
        """Compiles the step; raises InputError if it cannot fit."""
        with self.explained():
            self.needed = self._compile(self.step)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turns an error of the block, which runs the step, about too little memory into an InputError."""
        try:
            yield
        except (TooLarge, jax.errors.JaxRuntimeError) as error:
            if not exhausted(error):
                raise
            size, limit = error.args if isinstance(error, TooLarge) else (self.needed, available(self._mesh))
            known = "" if math.isnan(size) else f"{size / GiB:.3g} GiB, "
            # At run time an array may not fit although the step would: the memory is partly in use, or fragmented.
            free = "" if size > limit else "is free of "
            problem = f"a step needs {known}more than {free}the {limit / GiB:.3g} GiB of a device"
            # Where no size is known, a program that compiles fits.
            raise InputError(f"{problem}: {self._advice(math.inf if math.isnan(size) else size)}") from None

    def _compile(self, step: jax.stages.Wrapped) -> int:
        """The bytes that a step needs; raises TooLarge if a device has fewer."""
        size, limit = needed(compile_program(step.lower(*self._arguments))), available(self._mesh)
        if size > limit:
            raise TooLarge(size, limit)
        return size

    def _advice(self, below: float) -> str:
        """The smallest --accumulate with which a step fits and needs fewer bytes than `below`."""

        def fits(accumulate: int) -> bool:
            try:
                return self._compile(self._make_step(accumulate)) < below
            except (TooLarge, jax.errors.JaxRuntimeError) as error:
                if not exhausted(error):
                    raise
                return False

        candidates = [n for n in range(self._accumulate + 1, self._rows + 1) if self._rows % n == 0]
        first = bisect.bisect_left(candidates, True, key=fits)  # More micro-batches need less memory.
        if first < len(candidates):
            return f"--accumulate {candidates[first]} fits"
        return "no --accumulate fits either: try --mesh.parameters fsdp or more devices"
