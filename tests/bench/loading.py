"""Chunks from page-locked RAM into a request's KV on CUDA: bytes a second beside a plain copy over the link, and what a
matrix product loses meanwhile.

    python -m tests.bench.loading --out loading.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ragkv.kernels import slabs as kernel
from ragkv.kv import KvShape, RequestKV
from ragkv.pinned import PageLocking
from ragkv.rope import Rope

SHAPE = KvShape(32, 8, 128, torch.bfloat16)
CHUNKS, TOKENS = 16, 512


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


def _place(placer: kernel.SlabPlacer, kv: RequestKV, sources: torch.Tensor, workers: int) -> None:
    for layer in range(SHAPE.layers):
        k, v = kv.read(layer, kv.capacity)
        placer.place(sources[layer], k, v, rotated=True, workers=workers)


def measure() -> dict[str, Any]:
    device, rows = torch.device("cuda"), []
    kv = RequestKV(SHAPE, CHUNKS * TOKENS, device)
    frequencies = 1.0 / 500000 ** (torch.arange(64, device=device) / 64)
    angles = Rope(frequencies, (True,), None).angles(torch.arange(CHUNKS * TOKENS, device=device))
    memory = PageLocking(device)(CHUNKS * SHAPE.layers * (2 << 20))
    memory[:] = 3
    link_from = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    link_to = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    link = link_from.nbytes / seconds(lambda: link_to.copy_(link_from, non_blocking=True))
    a, b = (torch.randn(4096, 4096, device=device, dtype=torch.bfloat16) for _ in range(2))

    def product() -> None:
        for _ in range(100):
            torch.mm(a, b)

    alone = seconds(product)
    side = torch.cuda.Stream()
    for codec in ("raw", "int8", "fp8"):
        placer = kernel.SlabPlacer(codec, SHAPE, [TOKENS] * CHUNKS, [i * TOKENS for i in range(CHUNKS)], angles)
        nbytes = sum(placer.slab_bytes) * SHAPE.layers
        start = memory.ctypes.data
        sources = torch.tensor(
            [[start + (i * CHUNKS + c) * (2 << 20) for c in range(CHUNKS)] for i in range(SHAPE.layers)]
        ).pin_memory()
        on_device = torch.zeros(CHUNKS * (2 << 20), dtype=torch.uint8, device=device)
        near = torch.tensor([[on_device.data_ptr() + c * (2 << 20) for c in range(CHUNKS)]] * SHAPE.layers).pin_memory()
        for block, warps in ((64, 8), (128, 8), (128, 16)):
            kernel.BLOCK_PAIRS, kernel.WARPS = block, warps
            placer = kernel.SlabPlacer(codec, SHAPE, [TOKENS] * CHUNKS, [i * TOKENS for i in range(CHUNKS)], angles)
            for workers in (4, 8, 16, 32):
                load = partial(_place, placer, kv, sources, workers)

                def beside(load: Callable[[], None] = load) -> None:
                    with torch.cuda.stream(side):
                        load()
                    product()

                load()
                took = seconds(load, 4)
                both = seconds(beside, 3)
                torch.cuda.synchronize()
                row = {
                    "codec": codec,
                    "block": block,
                    "warps": warps,
                    "workers": workers,
                    "gb_s": nbytes / took / 1e9,
                    "of_link": nbytes / took / link,
                    "product_slower": both / alone,
                    "product_lost_ms": 1000 * (both - alone),
                    "load_ms": 1000 * took,
                    "from_device_gb_s": nbytes / seconds(partial(_place, placer, kv, near, workers), 4) / 1e9,
                }
                rows.append(row)
                print(" ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
    return {"gpu": torch.cuda.get_device_name(), "link_gb_s": link / 1e9, "product_ms": 1000 * alone, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    found = measure()
    print({k: v for k, v in found.items() if k != "rows"})
    if out:
        out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
