"""Chunks from page-locked RAM into a request's KV on CUDA: what slabs copied one by one make of the link, and what
placing them makes of the device's memory.

    python -m tests.bench.loading --out loading.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ragkv.kernels import slabs as kernel
from ragkv.kv import KvShape, RequestKV
from ragkv.pinned import PageLocking
from ragkv.rope import Rope
from ragkv.store import CODECS
from ragkv.uploading import copy_each, copy_over

SHAPE = KvShape(32, 8, 128, torch.bfloat16)
TOKENS = 8192
_SLOT = 2 << 20


def seconds(work: Callable[[], object], repeats: int = 7) -> float:
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times[1:])


class Bench:
    def __init__(self) -> None:
        self.device = torch.device("cuda")
        self.memory = PageLocking(self.device)(TOKENS // 64 * _SLOT)
        self.memory[:] = 3
        self.near = torch.zeros(self.memory.nbytes, dtype=torch.uint8, device=self.device)
        self.kv = RequestKV(SHAPE, TOKENS, self.device)

    def link(self) -> float:
        source = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
        return source.nbytes / seconds(lambda: self.near[: source.nbytes].copy_(source, non_blocking=True))

    def copying(self) -> Iterator[dict[str, Any]]:
        """Slabs of a layer, copied one by one."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        for nbytes in (64 << 10, 128 << 10, 256 << 10, 1 << 20, 2 << 20):
            count = min(64, self.memory.nbytes // _SLOT)
            slots = [i * _SLOT for i in range(count)]
            targets, sources = (np.array(slots) + base for base in (self.near.data_ptr(), self.memory.ctypes.data))
            sizes, ways = np.array(nbytes), {"batch": copy_over, "each": copy_each}
            for name, way in ways.items():

                def work(way: Any = way, t: Any = targets, s: Any = sources, n: Any = sizes) -> None:
                    with torch.cuda.stream(stream):
                        way(t, s, n, stream)

                work()
                took = statistics.median(self.copied(stream, work) for _ in range(5))
                began = time.perf_counter()
                work()
                host = time.perf_counter() - began
                speed = count * nbytes / took / 1e9
                yield {"way": name, "slab_bytes": nbytes, "copied_gb_s": speed, "host_us": 1e6 * host / count}

    def copied(self, stream: torch.cuda.Stream, work: Callable[[], None]) -> float:
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            took = seconds(work, 2)
        torch.cuda.synchronize()
        return took

    def placing(self) -> Iterator[dict[str, Any]]:
        """A layer's slabs, from the device's memory into the KV."""
        frequencies = 1.0 / 500000 ** (torch.arange(64, device=self.device) / 64)
        angles = Rope(frequencies, (True,), None).table(TOKENS)
        k, v = self.kv.read(0, TOKENS)
        for codec in ("raw", "int8", "fp8"):
            for tokens in (64, 512):
                for block, warps in ((16, 4), (32, 4), (64, 4), (64, 8), (128, 8)):
                    kernel.BLOCK_PAIRS, kernel.WARPS = block, warps
                    count = TOKENS // tokens
                    places = [i * tokens for i in range(count)]
                    table = kernel.span_table(codec, SHAPE, [tokens] * count, places, places).to(self.device)
                    placer = kernel.SlabPlacer(codec, SHAPE, table, tokens, angles)
                    sources = torch.tensor([[self.near.data_ptr() + i * _SLOT for i in range(count)]]).to(self.device)
                    took = seconds(lambda p=placer, s=sources: p.place(s, k, v, rotated=True), 9)  # type: ignore[misc]
                    moved = count * CODECS[codec].slab_bytes(SHAPE.geometry, tokens) + 2 * k.nbytes
                    yield {
                        "codec": codec, "tokens": tokens, "block": block, "warps": warps, "us": 1e6 * took,
                        "moved_gb_s": moved / took / 1e9,
                    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    bench = Bench()
    found = {"gpu": torch.cuda.get_device_name(), "link_gb_s": bench.link() / 1e9, "rows": list[dict[str, Any]]()}
    print(found)
    for rows in (bench.copying(), bench.placing()):
        for row in rows:
            found["rows"].append(row)
            print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
    if out:
        out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
