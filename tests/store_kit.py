"""What the store's tests share: small entries with seeded bytes, and ways to damage files."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ragkv.store import ChunkStore, Geometry, OpenEntry, chunk_key

GEOMETRY = Geometry(layers=3, kv_heads=2, head_dim=16, dtype="bfloat16")
TOKENS = 50
SLAB = GEOMETRY.slab_bytes(TOKENS)
PATIENCE_S = 20.0  # until a test gives up; nothing takes that long
FILE = 4096 + 3 * 8192  # header, and three slabs of 6400 bytes in whole blocks


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)


def key_for(i: int, *, model: str = "m", salt: bytes = b"") -> bytes:
    return chunk_key(
        model=model,
        tokenizer="t",
        dtype="bfloat16",
        codec="raw",
        context_policy="document",
        context=[1, 2],
        tokens=[i],
        salt=salt,
    )


def slabs_for(i: int) -> list[np.ndarray]:
    return list(np.random.default_rng(i).integers(0, 256, (GEOMETRY.layers, SLAB), dtype=np.uint8))


def put(store: ChunkStore, i: int, **fields: object) -> bool:
    model = str(fields.pop("model", "m"))
    return store.put(key_for(i, model=model), GEOMETRY, slabs_for(i), tokens=TOKENS, model=model, **fields)


def open_one(store: ChunkStore, i: int) -> OpenEntry:
    [entry] = store.open([key_for(i)])
    assert isinstance(entry, OpenEntry), entry
    return entry


def read(store: ChunkStore, i: int) -> list[np.ndarray]:
    with open_one(store, i) as entry:
        return [slab for [slab] in store.open_layers([entry])]


def holds(store: ChunkStore, i: int) -> bool:
    """Whether entry ``i`` can be read and every byte of it is right."""
    return all(np.array_equal(a, b) for a, b in zip(read(store, i), slabs_for(i), strict=True))


def entry_file(root: Path, i: int) -> Path:
    name = key_for(i).hex()
    return root / "entries" / name[:2] / f"{name}.kv"


def flip(path: Path, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


def retold(raw: bytes, change: Callable[[dict[str, Any]], object] | None = None, **spelling: Any) -> bytes:
    """An entry file as another writer might have made it: its description changed, and spelt in another way."""
    layers, length = struct.unpack_from("<II", raw, 24)
    slabs = [struct.unpack_from("<QQQ", raw, 32 + 24 * n) for n in range(layers)]
    [old_size] = struct.unpack_from("<I", raw, 20)
    about = json.loads(raw[32 + 24 * layers :][:length])
    if change is not None:
        change(about)
    description = json.dumps(about, **spelling).encode()
    size = -(-(32 + 24 * layers + len(description)) // 4096) * 4096
    body = struct.pack("<IIII", 1, size, layers, len(description))
    body += b"".join(struct.pack("<QQQ", start - old_size + size, *rest) for start, *rest in slabs) + description
    return sealed(raw[:16] + body.ljust(size - 16, b"\0")) + raw[old_size:]


def sealed(header: bytes) -> bytes:
    """A header with the checksum that belongs to it."""
    return header[:8] + xxhash.xxh3_64_intdigest(header[16:]).to_bytes(8, "little") + header[16:]


def disk_usage(root: Path) -> int:
    """What the disk counts for everything but the index, each file once.

    Where a file is written, what made room for it has gone before: so what is being written is looked at first.
    """
    files = {}
    for folder in ("tmp", "entries", "quarantine"):
        for path in (root / folder).rglob("*"):
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            if path.is_file():
                files[stat.st_ino] = stat.st_blocks * 512
    return sum(files.values())


def python(script: str, *args: object) -> subprocess.Popen[str]:
    """Another process that finds the same packages."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    command = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
