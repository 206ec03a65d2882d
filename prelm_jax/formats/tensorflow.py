"""TensorFlow checkpoints (NAME.index, NAME.data-00000-of-00001, …), read without TensorFlow.

The index is a table in LevelDB's format: blocks of sorted keys, each block with a checksum, and a footer that locates
them. A value describes a variable: its type, shape, place in the data files and checksum (tensorflow,
core/lib/io/table_format.txt and core/protobuf/tensor_bundle.proto).

All checksums are verified. Sizes are compared with the lengths of the files before anything is read, so that a damaged
size never allocates memory. Not supported: compressed indexes, which TensorFlow does not write; partitioned variables;
the single-file format that TensorFlow wrote before version 0.12.
"""

import contextlib
import dataclasses
import functools
import io
import math
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from prelm_jax.errors import InputError
from prelm_jax.storage import opened, prefix_errors

MAGIC = struct.pack("<Q", 0xDB4775248B80FB57)
FOOTER_BYTES = 48  # Two handles, padding, the magic number.
TRAILER_BYTES = 5  # After each block: its compression, and the checksum of both.
MAX_KEY_BYTES = 1 << 26  # Of all keys together, which take less space in the file than in memory.
MAX_DIMENSIONS = 32

# Numbers of tensorflow.DataType.
DTYPES = {1: np.dtype("<f4"), 2: np.dtype("<f8"), 14: np.dtype(ml_dtypes.bfloat16), 19: np.dtype("<f2")}


def open_checkpoint(index: Path) -> dict[str, Callable[[], np.ndarray]]:
    """By name, a function that reads the variable; `index` is the path of NAME.index.

    Raises InputError, as the functions do, for a damaged, incomplete or unsupported checkpoint, and for a variable that
    is not of floating point.
    """
    with opened(index) as file, _refused(index):
        table = dict(_entries(file.read()))
        if b"" not in table:
            raise ValueError("no header")
        header = _message(table.pop(b""))
        if _integer(header, 2):
            raise InputError("big-endian checkpoints are not supported")
        # The names of parts of partitioned variables are not text.
        variables = {name.decode(errors="backslashreplace"): _Variable.parse(entry) for name, entry in table.items()}
    stem, num_shards = index.name.removesuffix(".index"), _integer(header, 1)

    def read(name: str) -> np.ndarray:
        variable = variables[name]
        path = index.with_name(f"{stem}.data-{variable.shard:05d}-of-{num_shards:05d}")
        with opened(path) as file, _refused(f"{path}: variable {name}"):
            return variable.read(file)

    return {name: functools.partial(read, name) for name in variables}


@dataclasses.dataclass(frozen=True)
class _Variable:
    dtype: int
    shape: tuple[int, ...]
    shard: int  # Number of the data file.
    offset: int
    size: int  # In bytes.
    checksum: int
    partitioned: bool

    @classmethod
    def parse(cls, entry: bytes) -> "_Variable":
        """From a BundleEntryProto, with the numbers of its fields."""
        fields = _message(entry)
        dimensions = [dimension for shape in _messages(fields, 2) for dimension in _messages(shape, 2)]
        shape = tuple(_integer(dimension, 1) for dimension in dimensions)
        dtype, shard, offset, size, checksum = (_integer(fields, number) for number in (1, 3, 4, 5, 6))
        return cls(dtype, shape, shard, offset, size, checksum, partitioned=7 in fields)

    def read(self, file: io.BufferedReader) -> np.ndarray:
        """The array, from the file of its shard; ValueError for damage."""
        if self.partitioned:
            raise InputError("partitioned variables are not supported; save it in one part")
        if self.dtype not in DTYPES:
            raise InputError(f"type number {self.dtype} of TensorFlow is not a supported type of floating point")
        dtype = DTYPES[self.dtype]
        if len(self.shape) > MAX_DIMENSIONS or not self.size or math.prod(self.shape) * dtype.itemsize != self.size:
            raise ValueError(f"{self.size} bytes are not an array of its shape")
        if self.offset + self.size > os.fstat(file.fileno()).st_size:
            raise ValueError("the file is too short")
        file.seek(self.offset)
        content = file.read(self.size)
        if masked_crc32c(content) != self.checksum:
            raise ValueError("wrong checksum")
        return np.frombuffer(content, dtype).reshape(self.shape)


@contextlib.contextmanager
def _refused(where: object) -> Iterator[None]:
    """Errors of parsing in the block become InputErrors; all say where."""
    with prefix_errors(str(where)):
        try:
            yield
        except (IndexError, struct.error, ValueError) as error:
            raise InputError(f"damaged or no TensorFlow checkpoint ({error}): copy or download it again") from None


# ---- The table -------------------------------------------------------------------------------------------------------


def _entries(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a table, in the order of keys."""
    footer = content[-FOOTER_BYTES:]
    if not footer.endswith(MAGIC):
        raise ValueError("no footer of a table at its end")
    # Two handles, each an offset and a size: of a block for properties, which has none, and of the index of blocks.
    _, _, offset, size, _ = _varints(footer, 0, 4)
    last, key_bytes = None, 0
    for _, value in _block(content, offset, size):
        offset, size, _ = _varints(value, 0, 2)
        for key, value in _block(content, offset, size):
            key_bytes += len(key)
            if (last is not None and key <= last) or key_bytes > MAX_KEY_BYTES:
                raise ValueError("keys out of order, or too long")
            last = key
            yield key, value


def _block(content: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a block. A key is stored without the prefix that it shares with the key before."""
    end = offset + size
    if end + TRAILER_BYTES > len(content):
        raise ValueError("the file is too short")
    compression, checksum = struct.unpack_from("<BI", content, end)
    if masked_crc32c(content[offset : end + 1]) != checksum:
        raise ValueError(f"wrong checksum of the block at byte {offset}")
    if compression:
        raise InputError("compressed indexes are not supported")
    block = content[offset:end]
    (num_restarts,) = struct.unpack_from("<I", block, size - 4)
    end = size - 4 - 4 * num_restarts  # Positions where a search may start, which are not needed here.
    if end < 0:
        raise ValueError("a block that is too short")
    at, key = 0, b""
    while at < end:
        shared, added, length, at = _varints(block, at, 3)
        if shared > len(key) or at + added + length > end:
            raise ValueError("a key or value is longer than its block")
        key = key[:shared] + block[at : at + added]
        at += added + length
        yield key, block[at - length : at]


# ---- Protocol buffers ------------------------------------------------------------------------------------------------


def _varints(content: bytes, at: int, count: int) -> list[int]:
    """Unsigned numbers from a position on, seven bits a byte, and the position after them."""
    values, value, shift = [], 0, 0
    while len(values) < count:
        value |= (content[at] & 0x7F) << shift
        shift += 7
        if content[at] < 0x80:
            values.append(value)
            value = shift = 0
        elif shift > 63:
            raise ValueError("a number of more than 64 bits")
        at += 1
    return [*values, at]


Fields = dict[int, list[int | bytes]]


def _message(content: bytes) -> Fields:
    """The values of each field of a message, by its number: numbers, or the bytes of strings and messages."""
    fields: Fields = {}
    at = 0
    while at < len(content):
        tag, at = _varints(content, at, 1)
        kind = tag & 7
        if kind == 0:
            value, at = _varints(content, at, 1)
        elif kind in (1, 5):
            (value,) = struct.unpack_from("<Q" if kind == 1 else "<I", content, at)
            at += 8 if kind == 1 else 4
        elif kind == 2:
            size, at = _varints(content, at, 1)
            value = content[at : at + size]
            at += size
        else:
            raise ValueError("a message of another form")
        if at > len(content):
            raise ValueError("a message that is too short")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _integer(fields: Fields, number: int) -> int:
    """The last value of a field, which is a number; 0 if absent."""
    value = fields.get(number, [0])[-1]
    if isinstance(value, bytes):
        raise ValueError("a message of another form")
    return value


def _messages(fields: Fields, number: int) -> list[Fields]:
    """The values of a field, which are messages."""
    values = fields.get(number, [])
    if not all(isinstance(value, bytes) for value in values):
        raise ValueError("a message of another form")
    return [_message(value) for value in values if isinstance(value, bytes)]


# ---- The checksum ----------------------------------------------------------------------------------------------------


def masked_crc32c(data: bytes) -> int:
    """The checksum of TensorFlow and LevelDB: the bits of CRC-32C rotated, plus a constant."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


# CRC-32C (Castagnoli), bits reversed, and the word that takes its register from 0 to the initial value, all ones.
POLYNOMIAL = 0x82F63B78
INITIAL_WORD = struct.pack("<I", 0x641F6454)
BLOCK_LEVEL = 16  # Blocks of 2^16 words stay in the processor's cache.


def crc32c(data: bytes) -> int:
    """The CRC-32C of bytes, 500 MB a second.

    The register after a and b is that after a and as many zeros as b has bytes, xor that after b: neighbors are
    joined pairwise, all pairs of an array at once. Zeros in front of the data do not change a register of 0.
    """
    level = min(BLOCK_LEVEL, (len(data) // 4).bit_length())
    padding = -(len(INITIAL_WORD) + len(data)) % (4 << level)
    words = np.frombuffer(b"".join((bytes(padding), INITIAL_WORD, data)), "<u4")
    register = np.zeros(1, "<u4")
    for block in words.reshape(-1, 1 << level):
        for k in range(level):
            block = _append_zeros(block[0::2], k) ^ block[1::2]
        register = _append_zeros(register, level) ^ block
    return int(_append_zeros(register, 0)[0]) ^ 0xFFFFFFFF


def _append_zeros(registers: np.ndarray, level: int) -> np.ndarray:
    """The registers, uint32 [N], after 4 · 2^level zero bytes more."""
    low, high = _zeros_tables(level)
    halves = np.ascontiguousarray(registers).view("<u2").reshape(-1, 2)
    return low.take(halves[:, 0]) ^ high.take(halves[:, 1])


@functools.cache
def _zeros_tables(level: int) -> np.ndarray:
    """uint32 [2, 65536]: the register after 4 · 2^level zero bytes, for each low half and each high half of it."""
    bits = np.uint32(1) << np.arange(32, dtype="<u4")
    if level == 0:
        for _ in range(32):
            bits = bits >> 1 ^ (bits & 1) * np.uint32(POLYNOMIAL)
    else:
        bits = _append_zeros(_append_zeros(bits, level - 1), level - 1)
    tables = np.zeros((2, 1), "<u4")
    for low, high in zip(bits[:16], bits[16:], strict=True):
        tables = np.concatenate([tables, tables ^ np.array([[low], [high]])], axis=1)
    return tables
