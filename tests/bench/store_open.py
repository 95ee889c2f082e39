"""How long a store of many entries takes to open: closed cleanly before, and not. Prints JSON.

    python -m tests.bench.store_open [--entries 1000000] [--folder FOLDER]
    python -m tests.bench.store_open --prompts

The entries' files are of one block and never read. Page cache warm; medians of three.

With ``--prompts``, how long the chunks of a prompt take instead, but for their bytes: those in RAM from ``open`` over
``lying`` until all is closed, those on the SSD opened and closed, in turn: again, and for the first time, which reads
their headers past the page cache. Their sizes do not matter; medians. Calls are those that a profiler sees.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import random
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import ragkv
from ragkv.eval.store_load import drop_files
from ragkv.store import ChunkStore, Geometry, OpenEntry
from ragkv.store.index import Index
from ragkv.store.rows import Row
from tests.stress.store_faults import environment

BLOCK = 4096
SHAPE = Geometry(layers=32, kv_heads=1, head_dim=8, dtype="float16")
TOKENS = 8
CHUNKS = (16, 64)
ROUNDS = 500


def opened(root: Path) -> ChunkStore:
    return ChunkStore(root, capacity_bytes=1 << 50, ram_bytes=0)


def fill(root: Path, entries: int) -> None:
    opened(root).close()
    rng = random.Random(0)
    keys = [rng.randbytes(32) for _ in range(entries)]
    for key in keys:
        path = root / "entries" / key.hex()[:2] / f"{key.hex()}.kv"
        path.parent.mkdir(exist_ok=True)
        with open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, BLOCK)
    index = Index(root / "index", read_only=False)
    row = Row(BLOCK, 512, 32, 1.7e9, "a" * 64)
    for start in range(0, entries, 5000):
        index.write(lambda txn, some=keys[start : start + 5000]: [txn.put(key, row) for key in some])
    index.close()


def measure(root: Path, seconds: dict[str, list[float]], *, clean: bool) -> None:
    if not clean:
        (root / "index" / "clean").unlink(missing_ok=True)
    kind = "clean" if clean else "unclean"
    clock = time.perf_counter
    start = clock()
    store = opened(root)
    seconds[f"{kind}_open"].append(clock() - start)
    if not clean:
        store._session.wait_counted()
        seconds["until_puts_go_on"].append(clock() - start)
        store._session.wait_reconciled()
        seconds["until_all_is_reconciled"].append(clock() - start)
        start = clock()
        store.close()
        seconds["close"].append(clock() - start)
    store.close()


def prompts(root: Path) -> list[dict[str, Any]]:
    """For prompts of each of ``CHUNKS``, from each tier: microseconds and Python calls."""
    rng = random.Random(0)
    keys = [rng.randbytes(32) for _ in range(max(CHUNKS))]
    kv = np.zeros((SHAPE.layers, 2, TOKENS, SHAPE.kv_heads, SHAPE.head_dim), np.float16)
    with (
        ChunkStore(root, capacity_bytes=1 << 40, ram_bytes=1 << 30) as near,
        ChunkStore(root, capacity_bytes=1 << 40, ram_bytes=0) as far,
    ):
        for key in keys:
            near.put(key, SHAPE, kv, tokens=TOKENS, model="m")
        entries = opened_all(near, keys)
        for _ in near.open_layers(entries):
            pass
        close(entries)
        return [row for count in CHUNKS for row in prompt(near, far, keys[:count])]


def prompt(near: ChunkStore, far: ChunkStore, keys: Sequence[bytes]) -> list[dict[str, Any]]:
    trips: dict[str, Callable[[], None]] = {
        "ram": lambda: there_and_back(near, keys),
        "ssd": lambda: close(opened_all(far, keys)),
        "ssd, first": lambda: close(opened_all(far, keys)),
    }
    taken: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(ROUNDS):
        for name in ("ram", "ssd"):
            taken[name].append(timed(trips[name]))
    # By itself: what it reads and parses pushes the others' out of the processor's caches.
    for _ in range(ROUNDS):
        forget(far, keys)
        taken["ssd, first"].append(timed(trips["ssd, first"]))
    called = {name: calls(trips[name]) for name in ("ram", "ssd")}
    forget(far, keys)
    called["ssd, first"] = calls(trips["ssd, first"])
    return [
        {
            "chunks": len(keys),
            "tier": tier,
            "median_us": round(statistics.median(times) * 1e6, 1),
            "python_calls": called[tier],
        }
        for tier, times in taken.items()
    ]


def timed(trip: Callable[[], None]) -> float:
    start = time.perf_counter()
    trip()
    return time.perf_counter() - start


def forget(store: ChunkStore, keys: Sequence[bytes]) -> None:
    drop_files(store.folder.entry_path(key) for key in keys)
    for key in keys:
        store._headers.drop(key)


def there_and_back(store: ChunkStore, keys: Sequence[bytes]) -> None:
    entries = opened_all(store, keys)
    with store.open_layers(entries, order=[*range(1, SHAPE.layers), 0]) as layers:
        if layers.lying([SHAPE.slab_bytes(TOKENS)] * len(keys)) is None:
            raise RuntimeError("not all chunks are in RAM")
    close(entries)


def opened_all(store: ChunkStore, keys: Sequence[bytes]) -> list[OpenEntry]:
    return [entry for entry in store.open(keys) if isinstance(entry, OpenEntry)]


def close(entries: Sequence[OpenEntry]) -> None:
    for entry in entries:
        entry.close()


def calls(trip: Callable[[], None]) -> int:
    with cProfile.Profile() as profile:
        trip()
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


def setting(root: Path) -> dict[str, Any]:
    about = environment(root)
    versions = {"python": about.pop("python"), "numpy": np.__version__, "ragkv": ragkv.__version__}
    return {"date": about.pop("date"), "versions": versions, **about}


def with_rows(report: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """JSON with a row on a line."""
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    return f'{json.dumps(report, indent=1)[:-2]},\n "rows": [\n{lines}\n ]\n}}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--folder", help="where to put the store (4 KiB an entry) while it is measured")
    parser.add_argument("--prompts", action="store_true", help="measure the chunks of a prompt instead")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(dir=options.folder)) / "kv"
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    try:
        if options.prompts:
            print(with_rows({"command": "python -m tests.bench.store_open --prompts", **setting(root)}, prompts(root)))
            return
        fill(root, options.entries)
        for _ in range(3):
            measure(root, seconds, clean=False)
            measure(root, seconds, clean=True)
        report = {
            "command": f"python -m tests.bench.store_open --entries {options.entries}",
            "environment": environment(root),
            "entries": options.entries,
            "index_bytes": (root / "index" / "data.mdb").stat().st_size,
            "median_seconds": {name: round(statistics.median(taken), 3) for name, taken in seconds.items()},
            "seconds": {name: [round(one, 3) for one in taken] for name, taken in seconds.items()},
        }
    finally:
        shutil.rmtree(root.parent)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
