"""The chunk store's speed, beside the raw device's and beside what people would use instead, in one run.

Pass after pass each contender writes the same chunks into an empty folder, has the page cache dropped, and reads
them back; a figure is the median over the passes.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ragkv.errors import ConfigError, StoreFullError
from ragkv.eval.store_codec import measure_codecs
from ragkv.eval.store_index import ROW_BYTES, measure_index
from ragkv.eval.store_load import Load, device_reads, drop_cached
from ragkv.eval.store_ours import PROMPT, Ours, Raw, RawWhole
from ragkv.eval.store_peers import Contender, available
from ragkv.store import Geometry

SIZES = {
    "8b": Geometry(layers=32, kv_heads=8, head_dim=128, dtype="bfloat16"),
    "1b": Geometry(layers=16, kv_heads=8, head_dim=64, dtype="bfloat16"),
    "tiny": Geometry(layers=2, kv_heads=2, head_dim=32, dtype="bfloat16"),
}
Say = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """What to measure: ``entries`` chunks of ``tokens`` of a model of ``size``, an index of ``rows`` rows."""

    size: str = "8b"
    entries: int = 16
    tokens: int = 512
    passes: int = 5
    rows: int = 1_000_000
    threads: int = 4
    path: Path = Path()

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ConfigError(f"--size: {self.size!r} is not one of {', '.join(SIZES)}", size=self.size)

    def check_space(self) -> None:
        """
        Raises:
            StoreFullError: the disk of ``path`` has no room for it.
        """
        load = self.entries * SIZES[self.size].slab_bytes(self.tokens) * SIZES[self.size].layers
        need = 2 * load + 3 * self.rows * ROW_BYTES + (64 << 20)
        free = shutil.disk_usage(self.path).free
        if free < need:
            raise StoreFullError(
                f"measuring takes {need / 1e9:.1f} GB and the disk of {self.path} has {free / 1e9:.1f} GB free; "
                "choose another disk with --path, or fewer --entries",
                need=need,
                free=free,
            )


Pass = dict[str, dict[str, float]]
"""One pass: contender → figure → value."""


def measure_store(plan: Plan, *, say: Say) -> dict[str, Any]:
    """Everything ``ragkv eval store`` shows, as JSON-able values; docs/store.md says what each means.

    Raises:
        StoreFullError: the disk has too little room.
        StoreError: a contender gave other bytes back than it was given.
    """
    plan.path.mkdir(parents=True, exist_ok=True)
    plan.check_space()
    peers, skipped = available()
    contenders: list[type[Contender]] = [Raw, RawWhole, Ours, *peers]
    with tempfile.TemporaryDirectory(prefix="ragkv-eval-store-", dir=plan.path) as folder:
        passes = race(contenders, plan, Path(folder), say)
        index = measure_index(Path(folder) / "index", rows=plan.rows, passes=plan.passes, say=say)
    speeds = {c.name: {way: _median(passes, c.name, f"{way}_gbps") for way in ("read", "write")} for c in contenders}
    raw, ours = speeds.pop(Raw.name), speeds.pop(Ours.name)
    whole = speeds.pop(RawWhole.name)
    return {
        **{way: _against(ours[way], raw[way]) for way in ours},
        "lookups_per_s": index.pop("lookups_per_s"),
        "open_ms_at_1m_entries": index.pop("open_ms"),
        "peers": [{"name": n, **{f"{way}_ratio": s[way] / raw[way] for way in s}} for n, s in speeds.items()],
        "first_layer_ms": _median(passes, Ours.name, "first_layer_ms"),
        "codec": measure_codecs(SIZES[plan.size], plan.tokens, passes=plan.passes),
        "raw_device_whole_chunks": {f"{way}_gbps": gbps for way, gbps in whole.items()},
        "index": index,
        "skipped": skipped,
        "passes": passes,
        "method": _method(plan, contenders),
        "environment": _environment(plan.path),
    }


def tables(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The figures for people: title → rows of a table."""
    raw = {way: result[way]["raw_device_gbps"] for way in ("read", "write")}
    ours = {"name": "ragkv", **{f"{way}_ratio": result[way]["ratio"] for way in raw}}
    device = {"name": "raw device", "read_ratio": 1.0, "write_ratio": 1.0}
    speeds = [
        {
            "": one["name"],
            **{f"{way} GB/s": one[f"{way}_ratio"] * raw[way] for way in raw},
            **{f"{way} ÷ device": one[f"{way}_ratio"] for way in raw},
        }
        for one in [device, ours, *result["peers"]]
    ]
    index = {"look-ups per second": result["lookups_per_s"], "opening, ms": result["open_ms_at_1m_entries"]}
    index |= {"page cache warm, ms": result["index"]["open_warm_ms"]}
    index |= {"after a crash, ms": result["index"]["open_unclean_ms"]}
    codecs = [{"": name, **figures} for name, figures in result["codec"].items()]
    return {
        "Durable writes, and layerwise reads past the page cache": speeds,
        f"First layer of {PROMPT} chunks: {result['first_layer_ms']:.1f} ms": [],
        f"Index of {result['method']['plan']['rows']:,} entries": [index],
        "Codecs": codecs,
        **{f"{name} is missing: {why}": [] for name, why in result["skipped"].items()},
    }


def race(contenders: Sequence[type[Contender]], plan: Plan, root: Path, say: Say) -> list[Pass]:
    """Let everybody write and read, pass after pass; who begins changes, so that nobody always follows the same."""
    load = Load(SIZES[plan.size], plan.tokens, plan.entries)
    done: list[Pass] = []
    for turn in range(plan.passes):
        begins = turn % len(contenders)
        figures: Pass = {}
        for contender in [*contenders[begins:], *contenders[:begins]]:
            figures[contender.name] = run(contender, root / contender.name, load, plan.threads)
            say("writing and reading", turn * len(contenders) + len(figures), plan.passes * len(contenders))
        done.append(figures)
    return done


def run(kind: type[Contender], root: Path, load: Load, threads: int) -> dict[str, float]:
    root.mkdir()
    contender = kind(root, load, threads)
    try:
        write = _timed(contender, contender.write)
        cached = drop_cached(root)
        before = device_reads()
        read = _timed(contender, contender.read)
        fetched = device_reads() - before
    finally:
        contender.close()
        shutil.rmtree(root)
        os.sync()  # the next one must not pay for the clearing up
    return {
        **{f"read_{name}": value for name, value in read.items()},
        **{f"write_{name}": value for name, value in write.items()},
        "cached_bytes_before_read": cached,
        "read_from_device": fetched / load.nbytes,
        **contender.figures(),
    }


def _timed(contender: Contender, work: Callable[[], float | None]) -> dict[str, float]:
    """GB/s (10⁹ bytes) and CPU seconds of all threads, in the kernel too, per GB."""
    gb = contender.load.nbytes / 1e9
    contender.start()
    try:
        cpu, clock = time.process_time(), time.perf_counter()
        own = work()
        seconds, cpu = time.perf_counter() - clock, time.process_time() - cpu
    finally:
        contender.stop()
    return {"gbps": gb / (own or seconds), "cpu_s_per_gb": cpu / gb}


def _median(passes: list[Pass], name: str, figure: str) -> float:
    return statistics.median(one[name][figure] for one in passes)


def _against(gbps: float, raw: float) -> dict[str, float]:
    return {"gbps": gbps, "raw_device_gbps": raw, "ratio": gbps / raw}


def _method(plan: Plan, contenders: Sequence[type[Contender]]) -> dict[str, Any]:
    geometry = SIZES[plan.size]
    return {
        "plan": {name: getattr(plan, name) for name in ("size", "entries", "tokens", "passes", "rows", "threads")},
        "entry_bytes": geometry.layers * geometry.slab_bytes(plan.tokens),
        "chunks_per_prompt": PROMPT,
        "ratio": "a contender's median speed over the passes, divided by the raw device's",
        "page_cache": "before reading, fsync and posix_fadvise(DONTNEED) of every file; what mincore still finds is "
        "cached_bytes_before_read; read_from_device is read_bytes of /proc/self/io over the bytes asked for",
        "durable": {c.name: c.durable for c in contenders},
        "checksums_verified": {c.name: c.verified for c in contenders},
    }


def _environment(path: Path) -> dict[str, Any]:
    return {
        "device": f"CPU, {os.cpu_count()} cores",
        "file_system": _mount(path),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "versions": {p: _version(p) for p in ("numpy", "lmdb", "safetensors", "diskcache", "lmcache")},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _mount(path: Path) -> str:
    """Type and device of the file system that ``path`` lies on."""
    device = os.stat(path).st_dev
    with open("/proc/self/mountinfo", encoding="utf-8") as lines:
        for line in lines:
            fields, _, rest = line.partition(" - ")
            if fields.split()[2] == f"{os.major(device)}:{os.minor(device)}":
                return " on ".join(rest.split()[:2])
    return "unknown"
