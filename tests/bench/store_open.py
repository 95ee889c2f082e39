"""How long a store of many entries takes to open: closed cleanly before, and not. Prints JSON.

    python -m tests.bench.store_open [--entries 1000000] [--folder FOLDER]

The entries' files are of one block and never read. Page cache warm; medians of three.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from ragkv.store import ChunkStore
from ragkv.store.index import Index
from ragkv.store.rows import Row
from tests.stress.store_faults import environment

BLOCK = 4096


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--folder", help="where to put the store (4 KiB an entry) while it is measured")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(dir=options.folder)) / "kv"
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    try:
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
