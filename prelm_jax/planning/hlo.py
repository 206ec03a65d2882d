"""What a compiled program does, read off its text (XLA's HLO): collectives, and loops as often as they run.

XLA's cost analysis counts the body of a loop once, however often it runs; `repetition` is the factor it leaves out.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator
from operator import attrgetter

NETWORK = "network "  # What the kind of a collective between slices begins with; its devices are slices.
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([a-z][a-z0-9-]*)\(([^)]*)\)?(.*)$")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"(?:calls|body|condition|to_apply)=%?([\w.-]+)")
# What the compiler for TPUs makes of a collective between slices: hosts send to the hosts of other slices.
_SENT = re.compile(r'_xla_megascale_target="\{([\d,:]*)\}.*_xla_megascale_transfer_type="(\w+)"')
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')

# These move nothing: they name what is there already, or the work is counted where they begin or in what they call.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}

_SLICES = {"dynamic-slice", "slice", "gather"}


@dataclasses.dataclass(frozen=True)
class Collective:
    """Those of a kind and group of devices (or slices): how often one runs in a step, the bytes they all result in."""

    kind: str
    devices: int
    count: int
    bytes: int

    @property
    def between_slices(self) -> bool:
        """Whether it goes over the network between slices."""
        return self.kind.startswith(NETWORK)


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


class Program:
    """A compiled program, from `compiled.as_text()`; of the part that each device runs."""

    def __init__(self, text: str):
        self._computations: dict[str, dict[str, _Instruction]] = {}
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
        """The largest first."""
        found = collections.Counter()
        for computation, times in self._runs().items():
            for instruction in self._computations[computation].values():
                kind = instruction.opcode.removesuffix("-start")
                if sent := _SENT.search(instruction.attributes):
                    if kind == "send":
                        key = NETWORK + sent[2].lower().replace("_", "-"), _count(sent[1])
                        found[*key, "count"] += times
                        found[*key, "bytes"] += times * self._computations[computation][instruction.operands[0]].bytes
                elif kind in COLLECTIVES:
                    result = instruction.bytes
                    if instruction.opcode.endswith("-start") and kind != "all-reduce":  # With what goes in.
                        result -= sum(self._computations[computation][name].bytes for name in instruction.operands)
                    devices = _group_size(instruction.attributes)
                    found[kind, devices, "count"] += times
                    found[kind, devices, "bytes"] += times * result
        groups = {key[:2] for key in found}
        each = [Collective(*key, found[*key, "count"], found[*key, "bytes"]) for key in groups]
        return sorted(each, key=lambda collective: -collective.bytes)

    def repetition(self) -> tuple[float, float]:
        """How many times as many operations of products, and bytes, there are when loops count as often as they run."""
        flops, bytes_ = [0.0, 0.0], [0.0, 0.0]  # Each once; as often as it runs.
        for computation, times in self._runs(fusions=False).items():
            for instruction in self._computations[computation].values():
                for total, one in (
                    (flops, self._flops(computation, instruction)),
                    (bytes_, self._bytes(computation, instruction, attrgetter("bytes"))),
                ):
                    total[0] += one
                    total[1] += times * one
        return tuple(often / once if once else 1.0 for once, often in (flops, bytes_))

    def memory_bytes(self) -> int:
        """What goes to and from the device's memory, without what the compiler keeps on the chip from use to use."""
        size = attrgetter("bytes_in_memory")
        return sum(
            times * self._bytes(computation, instruction, size)
            for computation, times in self._runs(fusions=False).items()
            for instruction in self._computations[computation].values()
        )

    def _runs(self, fusions: bool = True) -> dict[str, int]:
        """How often each computation runs that is reached from the entry; `fusions` too, which are one instruction."""
        runs = collections.Counter()

        def visit(computation: str, times: int) -> None:
            runs[computation] += times
            for instruction in self._computations[computation].values():
                opaque = instruction.opcode not in ("while", "call", "conditional", "async-start")
                if opaque and not (fusions and instruction.opcode == "fusion"):
                    continue
                trips = self._trips(instruction) if instruction.opcode == "while" else 1
                for called in instruction.called:
                    visit(called, times * trips)

        visit(self._entry, 1)
        return runs

    def _trips(self, loop: _Instruction) -> int:
        """How often a loop runs, 1 if that is not known: as the compiler says, or else what it counts to, by ones."""
        if known := _TRIPS.search(loop.attributes):
            return int(known[1])
        condition = self._computations[_CONDITION.search(loop.attributes)[1]]
        (root,) = (each for each in condition.values() if each.is_root)
        if root.opcode != "compare" or "direction=LT" not in root.attributes:
            return 1
        limit = condition[root.operands[1]]
        return int(limit.arguments) if limit.opcode == "constant" else 1

    def _bytes(self, computation: str, instruction: _Instruction, size: Callable[[_Instruction], int]) -> int:
        """What an instruction reads and writes; of an operand that it only takes slices of, the slices."""
        if (
            instruction.opcode in _FREE
            or instruction.opcode.endswith("-done")
            or "ConcatBitcast" in instruction.attributes
        ):
            return 0
        operands = [self._computations[computation][name] for name in instruction.operands]
        sizes, result = [size(operand) for operand in operands], size(instruction)
        if instruction.opcode == "dynamic-update-slice":
            return sizes[1] + operands[1].bytes * (result > 0)
        if instruction.opcode in _SLICES:
            return instruction.bytes * (sizes[0] > 0) + result
        if instruction.opcode.endswith("-start"):  # The type has what goes in, too.
            moved = instruction.bytes - sum(operand.bytes for operand in operands)
            return moved * any(sizes) + result - sum(sizes)
        if instruction.opcode == "fusion":
            inside = self._computations[instruction.called[0]]
            sizes = [_read(inside, number, size) for number, size in enumerate(sizes)]
            for update in _updates(inside):  # Of which it writes the new part only.
                result -= update.bytes - inside[update.operands[1]].bytes
        return sum(sizes) + max(0, result)

    def _flops(self, computation: str, instruction: _Instruction) -> float:
        """2 · multiplications of the products that an instruction is, or is a fusion of."""
        if instruction.opcode == "fusion":
            name = instruction.called[0]
            return sum(self._flops(name, each) for each in self._computations[name].values())
        if instruction.opcode not in ("dot", "convolution"):
            return 0.0
        values = self._computations[computation]
        ((_, result, _),) = _shapes(instruction.type)
        left, right = (next(_shapes(values[name].type))[1] for name in instruction.operands[:2])
        if instruction.opcode == "dot":
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)[1]
            return 2.0 * math.prod(result) * math.prod(left[int(axis)] for axis in contracted.split(",") if axis)
        kernel = re.search(r"dim_labels=\w+_(\w+)->", instruction.attributes)[1]
        dilated = re.search(r"lhs_dilate=([\dx]+)", instruction.attributes)
        # The TPU's products of batches are convolutions with zeros between, one place of which counts.
        batches = (
            right[kernel.index(str(axis))]
            for axis, dilation in enumerate(dilated[1].split("x") if dilated else ())
            if dilation != "1"
        )
        return 2.0 * math.prod(result) * math.prod(right) / right[kernel.index("o")] / math.prod(batches)


def _shapes(type_: str) -> Iterator[tuple[int, tuple[int, ...], bool]]:
    """(bytes of an element, dimensions, whether it is in a memory of the chip itself) of each array of a type."""
    for dtype, dimensions, layout in _SHAPE.findall(type_):
        bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
        yield max(1, bits // 8), tuple(int(n) for n in dimensions.split(",") if n), "S(" in layout


def _updates(inside: dict[str, _Instruction]) -> list[_Instruction]:
    """The updates in place that a fused computation results in."""
    (root,) = (each for each in inside.values() if each.is_root)
    results = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
    return [each for each in (_named(inside, result) for result in results) if each.opcode == "dynamic-update-slice"]


def _read(inside: dict[str, _Instruction], number: int, size: int) -> int:
    """The bytes that a fused computation reads of its parameter of that number, which has `size`."""
    (parameter,) = (each for each in inside.values() if each.opcode == "parameter" and each.arguments == str(number))
    updated = {_named(inside, inside[each.operands[0]]).name for each in _updates(inside)}
    users = [each for each in inside.values() if parameter.name in _operands(inside, each)]
    if all(each.opcode in _SLICES for each in users):
        return min(size, sum(each.bytes for each in users))
    return 0 if parameter.name in updated and len(users) == 1 else size


def _operands(inside: dict[str, _Instruction], instruction: _Instruction) -> list[str]:
    """What an instruction works on, bitcasts seen through; a bitcast itself works on nothing."""
    if instruction.opcode == "bitcast":
        return []
    return [_named(inside, inside[name]).name for name in instruction.operands]


def _named(inside: dict[str, _Instruction], instruction: _Instruction) -> _Instruction:
    """What a bitcast is another name of."""
    while instruction.opcode == "bitcast":
        instruction = inside[instruction.operands[0]]
    return instruction


def _group_size(attributes: str) -> int:
    """The devices of a group, of the three ways to write replica groups; of pairs (collective-permute) two."""
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(match[1].split(","))
    return 2


def _count(ranges: str) -> int:
    """How many numbers "1,4:6" has: four."""
    ends = ([int(end) for end in part.split(":")] for part in ranges.split(","))
    return sum(end[-1] - end[0] + 1 for end in ends)
