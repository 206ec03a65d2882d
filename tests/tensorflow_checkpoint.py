"""Writes TensorFlow checkpoints as TensorFlow does, byte for byte, or with fields forged under valid checksums."""

import re
import struct
from pathlib import Path

import numpy as np

DTYPES = {"float32": 1, "float64": 2, "int64": 9, "bfloat16": 14, "float16": 19}
MAGIC = bytes.fromhex("57fb808b247547db")


def crc32c(data: bytes) -> int:
    """The definition of CRC-32C, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value % 128 + 128]) + varint(value // 128)


def number(field: int, value: int) -> bytes:
    """A number in a message; the default, 0, is left out."""
    return varint(field << 3) + varint(value) if value else b""


def nested(field: int, message: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(message)) + message


def entry(dtype: int, shape: tuple[int, ...], shard: int, offset: int, size: int, checksum: int, more=b"") -> bytes:
    """A BundleEntryProto."""
    dimensions = b"".join(nested(2, number(1, dimension)) for dimension in shape)
    message = number(1, dtype) + nested(2, dimensions) + number(3, shard) + number(4, offset) + number(5, size)
    return message + varint(6 << 3 | 5) + struct.pack("<I", checksum) + more


def header(num_shards: int, endianness: int = 0) -> bytes:
    """A BundleHeaderProto."""
    return number(1, num_shards) + number(2, endianness) + nested(3, number(1, 1))


def block(items: list[tuple[bytes, bytes]], restart_interval: int = 16, compression: int = 0) -> bytes:
    """A block and its trailer."""
    content, restarts, last = b"", [], b""
    for i, (key, value) in enumerate(items):
        shared = 0
        if i % restart_interval == 0:
            restarts.append(len(content))
        else:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        content += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    content += struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))
    return checksummed(content, compression)


def checksummed(content: bytes, compression: int = 0) -> bytes:
    content += bytes([compression])
    return content + struct.pack("<I", masked(content))


def table(blocks: list[bytes], last_keys: list[bytes]) -> bytes:
    """An index file of data blocks; `last_keys` are at or after the last key of each."""
    content, handles = b"", []
    for each in blocks:
        handles.append(varint(len(content)) + varint(len(each) - 5))
        content += each
    footer = b""
    for each in (checksummed(struct.pack("<II", 0, 1)), block(list(zip(last_keys, handles, strict=True)), 1)):
        footer += varint(len(content)) + varint(len(each) - 5)
        content += each
    return content + footer.ljust(40, b"\0") + MAGIC


def index(entries: dict[bytes, bytes], per_block: int = 1 << 20) -> bytes:
    """An index file; the entries are sorted."""
    items = sorted(entries.items())
    parts = [items[i : i + per_block] for i in range(0, len(items), per_block)]
    # TensorFlow shortens the key of the last block.
    last_keys = [part[-1][0] for part in parts[:-1]] + [bytes([parts[-1][-1][0][0] + 1])]
    return table([block(part) for part in parts], last_keys)


def write(prefix: Path, variables: dict[str, np.ndarray], num_shards: int = 1, per_block: int = 1 << 20) -> None:
    """Writes the checkpoint `prefix`; variables are dealt to the shards in turn."""
    data = [b""] * num_shards
    entries = {b"": header(num_shards)}
    for i, (name, array) in enumerate(sorted(variables.items())):
        shard, content = i % num_shards, array.tobytes()
        entries[name.encode()] = entry(
            DTYPES[array.dtype.name], array.shape, shard, len(data[shard]), len(content), masked(content)
        )
        data[shard] += content
    for shard, content in enumerate(data):
        prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{num_shards:05d}").write_bytes(content)
    prefix.with_name(f"{prefix.name}.index").write_bytes(index(entries, per_block))


# BERT

KERNELS = re.compile(r"(dense|query|key|value)\.weight$")


def original_name(name: str) -> str:
    """The name in google-research/bert of a tensor of transformers."""
    name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    name = name.replace("_embeddings.weight", "_embeddings").replace("encoder.layer.", "encoder.layer_")
    name = name.replace("predictions.bias", "predictions.output_bias").replace("ship.weight", "ship.output_weights")
    return KERNELS.sub(r"\1.kernel", name.replace("ship.bias", "ship.output_bias")).replace(".", "/")


def original_variables(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a BertForPreTraining of transformers as a checkpoint of google-research/bert has them."""
    return {
        original_name(name): np.ascontiguousarray(array.T if KERNELS.search(name) else array)
        for name, array in tensors.items()
        if not name.startswith("cls.predictions.decoder")
    }
