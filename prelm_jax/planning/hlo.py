"""Collectives, memory traffic, work of the vector unit and loops of a compiled program, read from its text (XLA's HLO).

XLA's cost analysis counts the body of a loop once; `Program.repetition` gives the factors that it leaves out. It does
not count what the vector unit does, nor how a product of few rows fills the matrix unit.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import NamedTuple

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

# The vector unit computes an element of their result in one operation, or more.
_ELEMENTWISE = re.compile(
    "abs|add|and|atan2|cbrt|ceil|clamp|compare|cosine|count-leading-zeros|divide|erf|exponential(-minus-one)?|floor"
    "|is-finite|log(-plus-one)?|logistic|maximum|minimum|multiply|negate|not|or|popcnt|power|remainder"
    "|round-nearest-(afz|even)|rsqrt|select|shift-(left|right-arithmetic|right-logical)|sign|sine|sqrt|subtract|tan|tanh"
    "|xor"
)

# Kernels say how many operations they take: pallas_call(metadata={"vector_operations": "12"}), which XLA writes over
# several lines.
_METADATA = re.compile(r"kernel_metadata=\{\s*([^{}]*?)\s*\}")
_OPERATIONS = re.compile(r'kernel_metadata=.*"vector_operations":"(\d+)"')


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
    def elements(self) -> int:
        """Of the first array of the type."""
        return math.prod(next(_shapes(self.type))[1])

    @property
    def bytes(self) -> int:
        return sum(math.prod(dimensions) * size for size, dimensions, _ in _shapes(self.type))

    @property
    def bytes_in_memory(self) -> int:
        return sum(math.prod(dimensions) * size for size, dimensions, on_chip in _shapes(self.type) if not on_chip)

    @property
    def called(self) -> list[str]:
        return _CALLED.findall(self.attributes)


class _Product(NamedTuple):
    """A batch of matrix products [M, K] × [K, N]."""

    batch: float
    M: float
    N: float
    K: float

    def flops(self, tile: int = 1) -> float:
        """2 · multiplications, on a unit for matrices of `tile` rows and columns, which takes smaller ones as long."""
        return 2.0 * self.batch * max(self.M, tile) * max(self.N, tile) * max(self.K, tile)


_Computation = dict[str, _Instruction]
_Size = Callable[[_Instruction], int]


class Program:
    """The program of one device, parsed from `compiled.as_text()`."""

    def __init__(self, text: str):
        self._computations: dict[str, _Computation] = {}
        self._entry = name = ""
        for line in _METADATA.sub(r"kernel_metadata={\1}", text).splitlines():
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

    def padding(self, tile: int) -> float:
        """FLOPs that a unit for products of `tile` × `tile` matrices spends on axes shorter than `tile`.

        The larger part of a recurrent step for 24 rows: 128 of them would take as long.
        """
        return sum(
            times * (product.flops(tile) - product.flops())
            for computation, instruction, times in self._executed()
            if (product := _product(computation, instruction))
        )

    def vector_operations(self) -> int:
        """Operations of the vector unit: one for each element of an elementwise instruction or a sum.

        Where kernels say how many they take, these are included. Conversions and moves are not counted.
        """
        total = 0
        for computation, instruction, times in self._executed():
            if _ELEMENTWISE.fullmatch(instruction.opcode):
                total += times * instruction.elements
            elif instruction.opcode == "reduce":
                total += times * computation[instruction.operands[0]].elements
            elif instruction.opcode == "reduce-window":
                window = _found(r"window=\{size=([\dx]+)", instruction.attributes)[1]
                total += times * instruction.elements * math.prod(map(int, window.split("x")))
            elif stated := _OPERATIONS.search(instruction.attributes):
                total += times * int(stated[1])
        return total

    def serial_products(self) -> int:
        """Dependent products in loops: the longest chain of an iteration times the number of iterations."""
        return self._serial(self._entry)

    def _serial(self, name: str) -> int:
        total = 0
        for instruction in self._computations[name].values():
            if instruction.opcode == "while":
                total += self._chain_of(instruction)
            elif instruction.opcode in ("call", "conditional", "async-start"):
                total += sum(map(self._serial, instruction.called))
        return total

    def _chain_of(self, instruction: _Instruction) -> int:
        """Products that wait for each other inside an instruction."""
        if instruction.opcode in ("dot", "convolution") or _OPERATIONS.search(instruction.attributes):
            return 1
        if instruction.opcode not in ("while", "fusion", "call", "conditional", "async-start"):
            return 0
        trips = self._trips(instruction) if instruction.opcode == "while" else 1
        return trips * max(map(self._chain, instruction.called), default=0)

    def _chain(self, name: str) -> int:
        """The most products of a computation that wait for each other."""
        lengths: dict[str, int] = {}  # Up to each instruction; operands come before it.
        for instruction in self._computations[name].values():
            before = max((lengths.get(operand, 0) for operand in instruction.operands), default=0)
            lengths[instruction.name] = before + self._chain_of(instruction)
        return max(lengths.values(), default=0)

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
        product = _product(computation, instruction)
        return product.flops() if product else 0.0


def _product(computation: _Computation, instruction: _Instruction) -> _Product | None:
    """The matrix product that an instruction is; a convolution over an axis is one for each shift."""
    if instruction.opcode not in ("dot", "convolution"):
        return None
    ((_, result, _),) = _shapes(instruction.type)
    left, right = (next(_shapes(computation[name].type))[1] for name in instruction.operands[:2])
    if instruction.opcode == "dot":
        contracted, batch = (
            math.prod(left[int(axis)] for axis in axes[1].split(",") if axis) if axes else 1
            for axes in (
                re.search(rf"lhs_{kind}_dims=\{{([\d,]*)\}}", instruction.attributes)
                for kind in ("contracting", "batch")
            )
        )
        columns = math.prod(right) / contracted / batch
        return _Product(batch, math.prod(result) / batch / columns, columns, contracted)
    kernel = _found(r"dim_labels=\w+_(\w+)->", instruction.attributes)[1]
    dilated = re.search(r"lhs_dilate=([\dx]+)", instruction.attributes)
    # The compiler for TPUs writes a batched product as a convolution over the batch, dilated with zeros: only one
    # entry of a dilated axis is multiplied.
    batch = math.prod(
        right[kernel.index(str(axis))]
        for axis, dilation in enumerate(dilated[1].split("x") if dilated else ())
        if dilation != "1"
    )
    columns = right[kernel.index("o")]
    return _Product(batch, math.prod(result) / batch / columns, columns, math.prod(right) / columns / batch)


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
