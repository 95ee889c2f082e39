"""The index of a large store: how long opening it takes, and how many look-ups a second it answers.

Rows are written straight through the index; their entries' files do not exist. Opening looks at no such file; after
a crash the store does so in the background, once it is open.
"""

from __future__ import annotations

import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from ragkv.errors import StoreError
from ragkv.eval.store_load import drop_cached
from ragkv.store import KEY_BYTES, ChunkStore
from ragkv.store.rows import Row
from ragkv.store.txn import IndexTxn

ROW_BYTES = 600
"""What a row may take of the disk, at most."""
ROWS_PER_TRANSACTION = 10_000
KEYS_PER_LOOKUP = 1000
LOOKUPS_PER_PASS = 200_000
CAPACITY = 1 << 60

_ROW = Row(nbytes=64 << 20, tokens=512, layers=32, created=0.0, model="measured")
_OPEN = """
import os, signal, sys, time
from ragkv.store import ChunkStore

root, end, *keys = sys.argv[1:]
started = time.perf_counter()
store = ChunkStore(root, capacity_bytes=1 << 60, ram_bytes=0)
print(1000 * (time.perf_counter() - started), flush=True)
if end == "close":
    store.close()
else:
    store.delete([bytes.fromhex(key) for key in keys])
    os.kill(os.getpid(), signal.SIGKILL)
"""

Say = Callable[[str, int, int], None]


def measure_index(root: Path, *, rows: int, passes: int, say: Say) -> dict[str, float]:
    """Medians over the passes, for an index of ``rows`` rows.

    ``open_ms``: until a fresh process has it open, page cache dropped, cleanly closed before; ``open_warm_ms``: page
    cache left alone; ``open_unclean_ms``: page cache dropped, and its last writer was killed with signal 9.
    ``lookups_per_s``: keys looked up, one thread, all of them present, a thousand at a time in random order.
    """
    sound, crashed = root / "sound", root / "crashed"
    keys = _build(sound, rows, say)
    shutil.copytree(sound, crashed)
    _open_ms(crashed, "kill", keys[0].hex())
    figures: dict[str, list[float]] = {"open_ms": [], "open_warm_ms": [], "open_unclean_ms": [], "lookups_per_s": []}
    for turn in range(passes):
        drop_cached(sound)
        figures["open_ms"].append(_open_ms(sound, "close"))
        figures["open_warm_ms"].append(_open_ms(sound, "close"))
        figures["lookups_per_s"].append(_lookups_per_s(sound, keys, seed=turn))
        figures["open_unclean_ms"].append(_open_crashed_ms(crashed, root / "copy"))
        say("opening the index", turn + 1, passes)
    return {"rows": rows} | {name: statistics.median(values) for name, values in figures.items()}


def _build(root: Path, rows: int, say: Say) -> list[bytes]:
    noise = np.random.default_rng(0).bytes(rows * KEY_BYTES)
    keys = [noise[at : at + KEY_BYTES] for at in range(0, len(noise), KEY_BYTES)]
    with ChunkStore(root, capacity_bytes=CAPACITY, ram_bytes=0) as store:
        store.check()  # waits for the new store to have looked for files, which it must not do while rows have none
    with ChunkStore(root, capacity_bytes=CAPACITY, ram_bytes=0) as store:
        for start in range(0, rows, ROWS_PER_TRANSACTION):
            # Past ``put``, which would want a million files; but the store closes what it opened itself.
            store._index.write(partial(_put_all, keys[start : start + ROWS_PER_TRANSACTION]))
            say("filling the index", min(start + ROWS_PER_TRANSACTION, rows), rows)
    return keys


def _put_all(keys: list[bytes], txn: IndexTxn) -> None:
    for key in keys:
        txn.put(key, _ROW)


def _open_crashed_ms(crashed: Path, copy: Path) -> float:
    """Of a copy: once open, the store looks for the entries' files in the background and drops their rows."""
    shutil.copytree(crashed, copy)
    drop_cached(copy)
    spent = _open_ms(copy, "kill")
    shutil.rmtree(copy)
    return spent


def _open_ms(root: Path, end: str, *delete: str) -> float:
    """Open the store in a process of its own, and ``close`` it, or ``kill`` the process after some deletes."""
    command = [sys.executable, "-c", _OPEN, str(root), end, *delete]
    child = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own interpreter
    if child.returncode != (0 if end == "close" else -signal.SIGKILL):
        raise StoreError(f"the index could not be opened in a process of its own: {child.stderr[-500:]}")
    return float(child.stdout)


def _lookups_per_s(root: Path, keys: list[bytes], *, seed: int) -> float:
    count = min(LOOKUPS_PER_PASS, 10 * len(keys))
    picks = [keys[i] for i in np.random.default_rng(seed).integers(0, len(keys), count)]
    batches = [picks[at : at + KEYS_PER_LOOKUP] for at in range(0, count, KEYS_PER_LOOKUP)]
    found = 0
    with ChunkStore(root, capacity_bytes=CAPACITY, ram_bytes=0) as store:
        started = time.perf_counter()
        for batch in batches:
            found += sum(info is not None for info in store.lookup(batch))
        seconds = time.perf_counter() - started
    if found != count:
        raise StoreError(f"the index found {found} of {count} keys that were put into it", found=found, asked=count)
    return count / seconds
