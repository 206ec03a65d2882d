"""Collectives, memory traffic and loop counts of a compiled program, read from its text (XLA's HLO).

XLA's cost analysis counts the body of a loop once; `Program.repetition` gives the factors that it leaves out.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator
from operator import attrgetter

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([a-z][a-z0-9-]*)\(([^)]*)\)?(.*)$")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"(?:calls|body|condition|to_apply)=%?([\w.-]+)")
# The compiler for TPUs turns a collective between slices into sends and receives of their hosts.
_SENT = re.compile(r'_xla_megascale_target="\{([\d,:]*)\}.*_xla_megascale_transfer_type="(\w+)"')
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')

# These move no bytes: they name existing arrays, or their cost is counted elsewhere (in a called computation, say).
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}

_SLICES = {"dynamic-slice", "slice", "gather"}


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind and group size in a step."""

    kind: str  # One of COLLECTIVES.
    devices: int  # Devices in a group; if between slices, the slices.
    count: int  # Executions per step.
    bytes: int  # Total size of the results on one device.
    between_slices: bool = False  # Over the network between slices, not over the links in a slice.


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    arguments: str
    attributes: str
    is_root: bool

    @functools.cached_property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.arguments)

    @property
    def bytes(self) -> int:
        return sum(math.prod(dimensions) * size for size, dimensions, _ in _shapes(self.type))

    @property
    def bytes_in_memory(self) -> int:
        return sum(math.prod(dimensions) * size for size, dimensions, on_chip in _shapes(self.type) if not on_chip)

    @property
    def called(self) -> list[str]:
        return _CALLED.findall(self.attributes)


_Computation = dict[str, _Instruction]
_Size = Callable[[_Instruction], int]


class Program:
    """The program of one device, parsed from `compiled.as_text()`."""

    def __init__(self, text: str):
        self._computations: dict[str, _Computation] = {}
        self._entry = name = ""
        for line in text.splitlines():
            if header := _HEADER.match(line):
                name = header[2]
                self._computations[name] = {}
                if header[1]:
                    self._entry = name
            elif instruction := _INSTRUCTION.match(line):
                root, result, *rest = instruction.groups()
                self._computations[name][result] = _Instruction(result, *rest, is_root=root is not None)

    def collectives(self) -> list[Collective]:
        """The collectives of a step, by kind and group size, most bytes first."""
        counts: collections.Counter[tuple[str, int, bool]] = collections.Counter()
        bytes_ = collections.Counter()

        def add(kind: str, devices: int, between_slices: bool, times: int, size: int) -> None:
            counts[kind, devices, between_slices] += times
            bytes_[kind, devices, between_slices] += times * size

        for computation, instruction, times in self._executed():
            kind = instruction.opcode.removesuffix("-start")
            if sent := _SENT.search(instruction.attributes):
                if kind == "send":
                    size = computation[instruction.operands[0]].bytes
                    add(sent[2].lower().replace("_", "-"), _count(sent[1]), True, times, size)
            elif kind in COLLECTIVES:
                size = instruction.bytes
                if instruction.opcode.endswith("-start") and kind != "all-reduce":  # Its type includes the operands.
                    size -= sum(computation[name].bytes for name in instruction.operands)
                add(kind, _group_size(instruction.attributes), False, times, size)
        found = (Collective(*key[:2], count, bytes_[key], key[2]) for key, count in counts.items())
        return sorted(found, key=lambda collective: -collective.bytes)

    def repetition(self) -> tuple[float, float]:
        """FLOPs of matrix products and bytes accessed: their ratio with every loop iteration counted to each once."""
        flops, bytes_ = [0.0, 0.0], [0.0, 0.0]  # Loop bodies counted once; as often as they run.
        for computation, instruction, times in self._executed(fusions=False):
            for total, once in (
                (flops, self._flops(computation, instruction)),
                (bytes_, self._bytes(computation, instruction, attrgetter("bytes"))),
            ):
                total[0] += once
                total[1] += times * once
        flops_ratio, bytes_ratio = (repeated / once if once else 1.0 for once, repeated in (flops, bytes_))
        return flops_ratio, bytes_ratio

    def memory_traffic(self) -> int:
        """Bytes to and from the device's memory, without arrays that the compiler keeps on the chip between uses."""
        size = attrgetter("bytes_in_memory")
        executed = self._executed(fusions=False)
        return sum(times * self._bytes(computation, instruction, size) for computation, instruction, times in executed)

    def _executed(self, fusions: bool = True) -> Iterator[tuple[_Computation, _Instruction, int]]:
        """(computation, instruction, executions); with `fusions` also the instructions inside fusions."""
        runs = collections.Counter()

        def visit(name: str, times: int) -> None:
            runs[name] += times
            for instruction in self._computations[name].values():
                opaque = instruction.opcode not in ("while", "call", "conditional", "async-start")
                if opaque and not (fusions and instruction.opcode == "fusion"):
                    continue
                trips = self._trips(instruction) if instruction.opcode == "while" else 1
                for called in instruction.called:
                    visit(called, times * trips)

        visit(self._entry, 1)
        for name, times in runs.items():
            computation = self._computations[name]
            for instruction in computation.values():
                yield computation, instruction, times

    def _trips(self, loop: _Instruction) -> int:
        """Iterations of a loop: as the compiler says, or the limit of its counter, or 1 if neither is known."""
        if known := _TRIPS.search(loop.attributes):
            return int(known[1])
        condition = self._computations[_found(_CONDITION, loop.attributes)[1]]
        root = _root(condition)
        if root.opcode != "compare" or "direction=LT" not in root.attributes:
            return 1
        limit = condition[root.operands[1]]
        return int(limit.arguments) if limit.opcode == "constant" else 1

    def _bytes(self, computation: _Computation, instruction: _Instruction, size: _Size) -> int:
        """Bytes that an instruction reads and writes; of an operand that it only slices, the slices."""
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith("-done") or "ConcatBitcast" in instruction.attributes:
            return 0
        operands = [computation[name] for name in instruction.operands]
        sizes, result = [size(operand) for operand in operands], size(instruction)
        if instruction.opcode == "dynamic-update-slice":
            return sizes[1] + operands[1].bytes * (result > 0)
        if instruction.opcode in _SLICES:
            return instruction.bytes * (sizes[0] > 0) + result
        if instruction.opcode.endswith("-start"):  # The type includes the operands.
            moved = instruction.bytes - sum(operand.bytes for operand in operands)
            return moved * any(sizes) + result - sum(sizes)
        if instruction.opcode == "fusion":
            inside = self._computations[instruction.called[0]]
            sizes = [_bytes_read(inside, number, size) for number, size in enumerate(sizes)]
            for update in _updates(inside):  # An update in place writes only the new part.
                result -= update.bytes - inside[update.operands[1]].bytes
        return sum(sizes) + max(0, result)

    def _flops(self, computation: _Computation, instruction: _Instruction) -> float:
        """2 · multiplications of a matrix product, or of all products in a fusion."""
        if instruction.opcode == "fusion":
            inside = self._computations[instruction.called[0]]
            return sum(self._flops(inside, each) for each in inside.values())
        if instruction.opcode not in ("dot", "convolution"):
            return 0.0
        ((_, result, _),) = _shapes(instruction.type)
        left, right = (next(_shapes(computation[name].type))[1] for name in instruction.operands[:2])
        if instruction.opcode == "dot":
            contracted = _found(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)[1]
            return 2.0 * math.prod(result) * math.prod(left[int(axis)] for axis in contracted.split(",") if axis)
        kernel = _found(r"dim_labels=\w+_(\w+)->", instruction.attributes)[1]
        dilated = re.search(r"lhs_dilate=([\dx]+)", instruction.attributes)
        # The compiler for TPUs writes a batched product as a convolution over the batch, dilated with zeros: only one
        # entry of a dilated axis is multiplied.
        batches = (
            right[kernel.index(str(axis))]
            for axis, dilation in enumerate(dilated[1].split("x") if dilated else ())
            if dilation != "1"
        )
        return 2.0 * math.prod(result) * math.prod(right) / right[kernel.index("o")] / math.prod(batches)


def _found(pattern: str | re.Pattern[str], text: str) -> re.Match[str]:
    match = re.search(pattern, text)
    assert match, f"no {pattern} in {text}"
    return match


def _root(computation: _Computation) -> _Instruction:
    return next(each for each in computation.values() if each.is_root)


def _shapes(type_: str) -> Iterator[tuple[int, tuple[int, ...], bool]]:
    """(bytes per element, dimensions, whether it is in a memory on the chip) of each array of a type."""
    for dtype, dimensions, layout in _SHAPE.findall(type_):
        bits = 8 if dtype == "pred" else int(_found(r"\d+", dtype)[0])
        yield max(1, bits // 8), tuple(int(n) for n in dimensions.split(",") if n), "S(" in layout


def _updates(inside: _Computation) -> list[_Instruction]:
    """The updates in place among the results of a fused computation."""
    root = _root(inside)
    results = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
    return [each for each in (_aliased(inside, result) for result in results) if each.opcode == "dynamic-update-slice"]


def _bytes_read(inside: _Computation, number: int, size: int) -> int:
    """Bytes that a fused computation reads of its parameter with this number and size."""
    parameter = next(each for each in inside.values() if each.opcode == "parameter" and each.arguments == str(number))
    updated = {_aliased(inside, inside[each.operands[0]]).name for each in _updates(inside)}
    users = [each for each in inside.values() if parameter.name in _operands(inside, each)]
    if all(each.opcode in _SLICES for each in users):
        return min(size, sum(each.bytes for each in users))
    return 0 if parameter.name in updated and len(users) == 1 else size


def _operands(inside: _Computation, instruction: _Instruction) -> list[str]:
    """Names of an instruction's operands, bitcasts resolved; none for a bitcast."""
    if instruction.opcode == "bitcast":
        return []
    return [_aliased(inside, inside[name]).name for name in instruction.operands]


def _aliased(inside: _Computation, instruction: _Instruction) -> _Instruction:
    """The instruction that a (chain of) bitcasts renames."""
    while instruction.opcode == "bitcast":
        instruction = inside[instruction.operands[0]]
    return instruction


def _group_size(attributes: str) -> int:
    """Devices in a replica group, written in one of three ways; 2 for the pairs of a collective-permute.

    `[2,4]<=[8]`, `mesh['x'=4,'y'=2] {'x'}` and `{{0,1,2,3},{4,5,6,7}}` are all groups of 4.
    """
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(match[1].split(","))
    return 2


def _count(ranges: str) -> int:
    """The length of a list of numbers and ranges: 4 for "1,4:6"."""
    ends = ([int(end) for end in part.split(":")] for part in ranges.split(","))
    return sum(end[-1] - end[0] + 1 for end in ends)
