"""Children in which faults happen, so that a crash is seen and counted, and the judgement over what they leave."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ragkv.errors import StoreError
from ragkv.store import ChunkStore, Geometry, OpenEntry
from tests.store_kit import disk_usage, key_for

GEOMETRY = Geometry(layers=2, kv_heads=1, head_dim=8, dtype="bfloat16")
TOKENS = 128
SLAB = GEOMETRY.slab_bytes(TOKENS)
FILE = 4096 + 2 * SLAB  # whole blocks: no flipped bit falls into padding
MIB = 1 << 20
PATIENCE_SECONDS = 60

FAIL_ONCE, FAIL_ON, KILL_BEFORE, KILL_AFTER, KILL_TORN = range(5)


class ViolationError(Exception):
    """A promise that was not kept."""


def slabs_for(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (GEOMETRY.layers, SLAB), dtype=np.uint8)


def opened(root: Path, capacity: int = 64 * MIB, **options: Any) -> ChunkStore:
    return ChunkStore(root, capacity_bytes=capacity, ram_bytes=options.pop("ram_bytes", 0), threads=2, **options)


def put(store: ChunkStore, i: int) -> bool:
    return store.put(key_for(i), GEOMETRY, slabs_for(i), tokens=TOKENS, model="m")


def read(store: ChunkStore, i: int) -> bool | None:
    """Whether entry ``i`` can be read; None if something of it is damaged or it is not there.

    Raises:
        ViolationError: a wrong byte was returned.
    """
    [entry] = store.open([key_for(i)])
    if not isinstance(entry, OpenEntry):
        return None
    with entry:
        slabs = [slab for [slab] in store.open_layers([entry])]
    for slab, want in zip(slabs, slabs_for(i), strict=True):
        if isinstance(slab, StoreError):
            return None
        if not np.array_equal(slab, want):
            raise ViolationError(f"entry {i}: wrong bytes")
    return True


def require(holds: object, message: str) -> None:
    if not holds:
        raise ViolationError(message)


def judge(
    root: Path,
    committed: Iterable[int],
    *,
    seen: Iterable[int] = (),
    capacity: int = 64 * MIB,
    look_first: bool = False,
    empty: bool = False,
) -> dict[str, int]:
    """Open what a fault has left, and hold it to every promise. Run it in a child.

    ``committed`` must all be there; ``seen`` may be, and must be right if so. With ``look_first`` they are read
    before anything can have been repaired. ``empty`` removes everything in the end, which nobody's lease may prevent.
    """
    fds, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    wanted = set(committed)
    counts = {"repaired": 0}
    with opened(root, capacity) as store:
        for i in set(seen) if look_first else ():
            read(store, i)
        report = store.check()
        if not report.clean:
            counts["repaired"] = 1
            store.check(fix=True)
            again = store.check()
            require(again.clean, f"check is not clean after its repair: {again}")
        lost = [i for i in wanted if read(store, i) is None]
        require(not lost, f"lost {lost}")
        for i in set(seen) - wanted:
            read(store, i)
        require(not list((root / "tmp").iterdir()), "temporary files were left")
        used = disk_usage(root)
        require(used <= capacity, f"{used} bytes of {capacity}")
        quarantined = sum(path.stat().st_blocks * 512 for path in (root / "quarantine").iterdir())
        require(store.stats().bytes == used - quarantined, "the bytes are not counted as the disk counts them")
        require(put(store, 999_999_999) and read(store, 999_999_999), "nothing can be put any more")
        if empty:
            count = store.stats().entries
            require(store.clear() == count, "a dead process has kept a lease")
        else:
            store.delete([key_for(999_999_999)])
    require(threading.active_count() == threads, "threads were left")
    require(len(os.listdir("/proc/self/fd")) == fds, "file descriptors were left")
    return counts


def start(work: Callable[..., Any], *args: Any, **named: Any) -> tuple[int, int]:
    """Fork; the child's process id, and where its answer is read."""
    answer, own = os.pipe()
    pid = os.fork()
    if pid:
        os.close(own)
        return pid, answer
    os.close(answer)
    signal.alarm(PATIENCE_SECONDS)
    try:
        reply: dict[str, Any] = {"result": work(*args, **named)}
    except ViolationError as error:
        reply = {"violation": str(error)}
    except BaseException:
        reply = {"violation": traceback.format_exc(limit=-4)}
    os.write(own, json.dumps(reply).encode()[:60000])
    os._exit(0)


def finish(child: tuple[int, int]) -> tuple[int, dict[str, Any]]:
    """Wait; how the child ended (negative: by which signal), and its answer."""
    pid, answer = child
    with os.fdopen(answer, "rb") as pipe:
        raw = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, json.loads(raw) if raw else {}


class Tally:
    """Counts what was done to the store, and what was wrong afterwards."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, int]] = {}
        self.violations: list[str] = []

    def add(self, kind: str, **events: int) -> None:
        counts = self.counts.setdefault(kind, {})
        for name, count in events.items():
            counts[name] = counts.get(name, 0) + count

    def child(self, kind: str, what: object, work: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Run ``work`` in a child, in which nothing may crash; its result, None if it has broken a promise."""
        status, reply = finish(start(work, *args, **named))
        if status or "result" not in reply:
            ended = f"ended with {status}" if status else ""
            self.violations.append(f"{kind}, {what}: {ended}{reply.get('violation', '')}")
            self.add(kind, crashes=int(status < 0), violations=1)
            return None
        return reply["result"]


def faultline() -> ctypes.CDLL:
    library = ctypes.CDLL(None)  # preloaded
    library.faultline_seen.restype = ctypes.c_long
    library.faultline_first.restype = ctypes.c_char_p
    library.faultline_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    return library


def preload() -> bool:
    """Build the library that makes file operations fail, and run this program again with it. False: no compiler."""
    if "RAGKV_FAULTLINE" in os.environ:
        shutil.rmtree(os.environ["RAGKV_FAULTLINE"])  # loaded
        return True
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return False
    folder = tempfile.mkdtemp(prefix="store-faults-")
    built, source = f"{folder}/faultline.so", str(Path(__file__).with_name("faultline.c"))
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", built, source, "-ldl"], check=True)
    environment = {**os.environ, "LD_PRELOAD": built, "RAGKV_FAULTLINE": folder}
    command = [sys.executable, "-m", "tests.stress.store_faults", *sys.argv[1:]]
    return os.execve(sys.executable, command, environment)
