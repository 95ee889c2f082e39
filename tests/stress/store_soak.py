"""The chunk store at its cap under several processes for a long time: is it flat? Prints JSON, draws a plot.

    python -m tests.stress.store_soak [--minutes 10] [--out FILE] [--plot FILE]

Two writers, two readers and a deleter share a folder. Popular chunks are asked for more often (Zipf), and what is
missing is put, so that the store always evicts. Each process samples itself: resident memory, open files, and the
latencies since its last sample.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import defaultdict
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import numpy as np

from ragkv.errors import StoreError, StoreFullError
from ragkv.store import ChunkStore, Geometry, OpenEntry
from tests.store_kit import disk_usage, key_for
from tests.stress.store_faults import environment

GEOMETRY = Geometry(layers=4, kv_heads=2, head_dim=64, dtype="bfloat16")
TOKENS = 64
SLAB = GEOMETRY.slab_bytes(TOKENS)
FILE = 4096 + GEOMETRY.layers * SLAB
CAPACITY = 1000 * FILE
RAM = 100 * GEOMETRY.layers * SLAB
CHUNKS = 20_000
SAMPLE_SECONDS = 10.0
ROLES = ("writer", "writer", "reader", "reader", "deleter")


def content(i: int) -> np.ndarray:
    """The bytes of chunk ``i``: cheap to make, and no two alike."""
    words = np.arange(i, i + GEOMETRY.layers * SLAB // 8, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return words.view(np.uint8).reshape(GEOMETRY.layers, SLAB)


class Worker:
    """One process's part: a loop of operations, each timed, and a sample of itself now and then."""

    def __init__(self, root: str, role: str, number: int, until: float, samples: Queue[Any]) -> None:
        self._role = role
        self._number = number
        self._until = until
        self._samples = samples
        self._rng = np.random.default_rng(number)
        self._store = ChunkStore(root, capacity_bytes=CAPACITY, ram_bytes=RAM, threads=2)
        self._seconds: defaultdict[str, list[float]] = defaultdict(list)
        self._counts: defaultdict[str, int] = defaultdict(int)

    def run(self) -> None:
        began = sampled = time.monotonic()
        while time.monotonic() < self._until:
            # Paced, so that a shared machine is loaded and not flooded.
            time.sleep(0.002 if self._role != "deleter" else 0.2)
            i = int(self._rng.zipf(1.2)) % CHUNKS
            try:
                self._step(i)
            except StoreFullError:
                self._counts["refused"] += 1
            if time.monotonic() - sampled > SAMPLE_SECONDS:
                sampled = time.monotonic()
                self._sample(sampled - began)
        self._store.close()

    def _step(self, i: int) -> None:
        if self._role == "writer":
            with self._timed("put"):
                self._store.put(key_for(i), GEOMETRY, content(i), tokens=TOKENS, model="m")
        elif self._role == "reader":
            self._read(i)
        else:
            self._counts["deleted"] += self._store.delete([key_for(i)])

    def _read(self, i: int) -> None:
        with self._timed("open"):
            [entry] = self._store.open([key_for(i)])
        if not isinstance(entry, OpenEntry):
            self._counts["missed"] += 1
            return
        with entry, self._timed("read"):
            slabs = [slab for [slab] in self._store.open_layers([entry])]
        if any(isinstance(slab, StoreError) for slab in slabs) or not np.array_equal(np.stack(slabs), content(i)):
            self._counts["wrong"] += 1

    def _timed(self, operation: str) -> _Stopwatch:
        return _Stopwatch(self._seconds[operation])

    def _sample(self, at: float) -> None:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        latency = {name: _percentiles(seconds) for name, seconds in self._seconds.items() if seconds}
        self._seconds.clear()
        sample = {
            "at_s": round(at, 1),
            "process": f"{self._role} {self._number}",
            "rss_mb": round(int(status["VmRSS"].split()[0]) / 1024, 1),
            "fds": len(os.listdir("/proc/self/fd")),
            "threads": threading.active_count(),
            "latency": latency,
            "counts": dict(self._counts),
        }
        self._samples.put(sample)


def _percentiles(seconds: list[float]) -> dict[str, float]:
    median, tail = np.percentile(seconds, (50, 99)).tolist()
    return {"count": len(seconds), "p50_ms": round(1000 * median, 3), "p99_ms": round(1000 * tail, 3)}


class _Stopwatch:
    def __init__(self, seconds: list[float]) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        self._seconds.append(time.perf_counter() - self._began)


def work(root: str, role: str, number: int, until: float, samples: Queue[Any]) -> None:
    Worker(root, role, number, until, samples).run()


def soak(minutes: float, root: str) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    samples: Queue[Any] = context.Queue()
    until = time.monotonic() + 60 * minutes
    arguments = [(root, role, number, until, samples) for number, role in enumerate(ROLES)]
    processes = [context.Process(target=work, args=some) for some in arguments]
    for process in processes:
        process.start()
    taken, most = [], 0
    while any(process.is_alive() for process in processes):
        time.sleep(1)
        used = disk_usage(Path(root))
        if used > CAPACITY:  # files that came and went while they were counted
            used = _standing_still([process.pid for process in processes if process.pid], root)
        most = max(most, used)
        while not samples.empty():
            taken.append(samples.get())
    with ChunkStore(root, capacity_bytes=CAPACITY, ram_bytes=0) as store:
        report = store.check()
        stats = store.stats()
    return {
        "environment": environment(Path(root)),
        "minutes": minutes,
        "capacity_bytes": CAPACITY,
        "most_bytes_on_disk": most,
        "ended_with": [process.exitcode for process in processes],
        "check_clean": report.clean,
        "entries": stats.entries,
        "bytes": stats.bytes,
        "trend": trend(taken),
        "samples": sorted(taken, key=lambda sample: sample["at_s"]),
    }


def _standing_still(pids: list[int], root: str) -> int:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(0.05)
    try:
        return disk_usage(Path(root))
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def trend(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the second and of the last quarter of the time, by process and by operation."""
    end = max(sample["at_s"] for sample in samples)
    series: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for sample in samples:
        for name in ("rss_mb", "fds", "threads"):
            series[f"{sample['process']} {name}"].append((sample["at_s"], sample[name]))
        for operation, figures in sample["latency"].items():
            for name in ("p50_ms", "p99_ms"):
                series[f"{operation} {name}"].append((sample["at_s"], figures[name]))

    def median(points: list[tuple[float, float]], start: float, stop: float) -> float:
        return round(float(np.median([value for at, value in points if start * end <= at <= stop * end])), 3)

    return {
        name: {"second_quarter": median(points, 0.25, 0.5), "last_quarter": median(points, 0.75, 1.0)}
        for name, points in series.items()
    }


def draw(report: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (memory, files, latency) = plt.subplots(3, 1, figsize=(8, 8), sharex=True, layout="constrained")
    for process in sorted({sample["process"] for sample in report["samples"]}):
        own = [sample for sample in report["samples"] if sample["process"] == process]
        minutes = [sample["at_s"] / 60 for sample in own]
        memory.plot(minutes, [sample["rss_mb"] for sample in own], label=process)
        files.plot(minutes, [sample["fds"] for sample in own], label=process)
    for operation, colour in (("put", "tab:red"), ("open", "tab:blue"), ("read", "tab:green")):
        for name, style in (("p50_ms", "-"), ("p99_ms", ":")):
            points = [
                (sample["at_s"] / 60, sample["latency"][operation][name])
                for sample in report["samples"]
                if operation in sample["latency"]
            ]
            latency.plot(*zip(*points, strict=True), style, color=colour, label=f"{operation} {name[:3].upper()}", lw=1)
    memory.set(ylabel="resident memory, MB", ylim=(0, None))
    files.set(ylabel="open files", ylim=(0, None))
    latency.set(ylabel="latency, ms", yscale="log", xlabel="minutes")
    for axes in (memory, latency):
        axes.legend(fontsize="x-small", ncols=3)
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="store-soak-")
    try:
        report = soak(options.minutes, f"{folder}/kv")
    finally:
        shutil.rmtree(folder)
    report["command"] = "python -m tests.stress.store_soak " + " ".join(sys.argv[1:])
    text = json.dumps(report, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    if options.plot:
        draw(report, options.plot)
    print(json.dumps({name: value for name, value in report.items() if name != "samples"}, indent=1))
    wrong = any(sample["counts"].get("wrong") for sample in report["samples"])
    over = report["most_bytes_on_disk"] > CAPACITY
    return int(wrong or over or not report["check_clean"] or any(report["ended_with"]))


if __name__ == "__main__":
    sys.exit(main())
