"""Reads entry files; written from the page docs/store.md alone, without looking at the store's code."""

import json
import math
import re
import struct
from typing import Any

import ml_dtypes
import numpy as np
import xxhash
from numpy.typing import NDArray

MAGIC = bytes.fromhex("52 41 47 4b 56 00 4b 56")
BLOCK, VERSION = 4096, 1
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype("<f2"), "float32": np.dtype("<f4")}
STRINGS = ("key", "dtype", "codec", "model", "source", "context_policy")
INTEGERS = {"layers": 1, "kv_heads": 1, "head_dim": 1, "tokens": 1, "context_tokens": 0}  # and their least values


class ForeignError(Exception):
    """Sound, but of another version, codec or dtype."""


class DamagedError(Exception):
    """Not an entry, or not as it was written."""


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _fp8(byte: int) -> float:
    """The value of a float8_e4m3fn: sign, four bits of exponent (bias 7), three of mantissa."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    size = (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6
    return math.copysign(math.nan if byte & 127 == 127 else size, -(byte >> 7) or 1)


NUMBERS = {
    "int8": np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32),
    "fp8": np.array([_fp8(byte) for byte in range(256)], np.float32),
}


def _rounded(values: NDArray[np.float32], dtype: np.dtype[Any]) -> NDArray[Any]:
    """To the nearest of dtype, ties to even; a bfloat16 is the upper half of a float32."""
    if dtype != DTYPES["bfloat16"]:
        return values.astype(dtype)
    bits = values.view(np.uint32)
    upper: NDArray[np.uint16] = ((bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return upper.view(dtype)


def _read_header(data: bytes) -> tuple[dict[str, Any], list[tuple[int, int, int]], int]:
    """The description, the table of slabs and header_bytes."""
    if len(data) < BLOCK or data[:8] != MAGIC:
        raise DamagedError("not an entry")
    checksum, version, header_bytes = struct.unpack_from("<QII", data, 8)
    if header_bytes % BLOCK or not BLOCK <= header_bytes <= 1 << 20 or header_bytes > len(data):
        raise DamagedError(f"a header of {header_bytes} bytes")
    if xxhash.xxh3_64_intdigest(data[16:header_bytes]) != checksum:
        raise DamagedError("the header's checksum")
    if version != VERSION:
        raise ForeignError(f"version {version}")
    n, j = struct.unpack_from("<II", data, 24)
    if 32 + 24 * n + j > header_bytes:
        raise DamagedError("the tables do not fit in the header")
    table = [struct.unpack_from("<QQQ", data, 32 + 24 * i) for i in range(n)]
    try:
        found = json.loads(data[32 + 24 * n : 32 + 24 * n + j].decode())
    except (ValueError, RecursionError) as error:
        raise DamagedError("the description is no JSON") from error
    if not isinstance(found, dict) or not found.keys() >= {*STRINGS, *INTEGERS, "created"}:
        raise DamagedError("the description lacks a field")
    if any(type(found[name]) is not str for name in STRINGS) or type(found["created"]) not in (int, float):
        raise DamagedError("a field of another type")
    return found, table, header_bytes


def _layout(found: dict[str, Any]) -> tuple[list[tuple[int, tuple[int, int, int], np.dtype[Any]]], int]:
    """Where in a slab each field begins, its shape and its element; and the slab's length."""
    tokens, heads, dim, raw = found["tokens"], found["kv_heads"], found["head_dim"], found["codec"] == "raw"
    fields = [((tokens, heads, dim), DTYPES[found["dtype"]] if raw else np.dtype(np.uint8))] * 2
    if not raw:
        fields += [((1, heads, dim), np.dtype("<f4")), ((tokens, heads, 1), np.dtype("<f4"))]
    placed, end = [], 0
    for shape, dtype in fields:
        begin = end if raw else _up(end, 64)
        placed.append((begin, shape, dtype))
        end = begin + math.prod(shape) * dtype.itemsize
    return placed, end


@np.errstate(all="ignore")
def read_entry(data: bytes) -> tuple[dict[str, object], list[tuple[NDArray[Any], NDArray[Any]]]]:
    """The description, and K and V of every layer as (tokens, kv_heads, head_dim) in the entry's dtype."""
    found, table, header_bytes = _read_header(data)
    if found["codec"] not in {"raw", *NUMBERS} or found["dtype"] not in DTYPES:
        raise ForeignError(f"codec {found['codec']}, dtype {found['dtype']}")
    for name, least in INTEGERS.items():
        if type(found[name]) is not int or found[name] < least or ("tokens" in name and found[name] >= 1 << 32):
            raise DamagedError(f"{name}: out of range or of another type")
    fields, length = _layout(found)
    step = _up(length, BLOCK)
    right = [(header_bytes + i * step, length) for i in range(len(table))]
    sound = found["layers"] == len(table) and [row[:2] for row in table] == right
    if not sound or len(data) != header_bytes + len(table) * step or not re.fullmatch("[0-9a-f]{64}", found["key"]):
        raise DamagedError("the table of slabs, the file's length, or its key")
    layers = []
    for offset, _, checksum in table:
        slab = data[offset : offset + length]
        if xxhash.xxh3_64_intdigest(slab) != checksum:
            raise DamagedError(f"the slab at {offset}")
        arrays = [np.frombuffer(slab, dtype, math.prod(shape), at).reshape(shape) for at, shape, dtype in fields]
        if found["codec"] != "raw":
            numbers, dtype = NUMBERS[found["codec"]], DTYPES[found["dtype"]]
            arrays = [_rounded(numbers[arrays[i]] * arrays[i + 2], dtype) for i in (0, 1)]
        layers.append((arrays[0], arrays[1]))
    return found, layers
