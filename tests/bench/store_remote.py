"""How fast layers are read from a Redis server on this machine, beside its plain client. Prints JSON.

    python -m tests.bench.store_remote [--passes 7]

4 chunks of 16 layers of 2 MiB: read by the client library one after the other, or by four threads, and by the store,
in the order of layers and verified, without and with keeping them (promotion, whose write to the
disk is not waited for). Interleaved; medians, and ratios to the plain client's of one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from redis import Redis

from ragkv.store import ChunkStore, Geometry
from tests.remote_kit import Server, started
from tests.store_kit import key_for

CHUNKS, TOKENS, GEOMETRY = 4, 512, Geometry(16, 8, 128, "bfloat16")
KEYS = [key_for(i) for i in range(CHUNKS)]
NBYTES = CHUNKS * GEOMETRY.layers * GEOMETRY.slab_bytes(TOKENS)


def fill(folder: Path, url: str) -> None:
    slab = np.random.default_rng(0).integers(0, 256, GEOMETRY.slab_bytes(TOKENS), dtype=np.uint8)
    with ChunkStore(folder, capacity_bytes=1 << 30, ram_bytes=0, remote=url, remote_timeout_ms=2000) as store:
        for key in KEYS:
            store.put(key, GEOMETRY, [slab] * GEOMETRY.layers, tokens=TOKENS, model="bench")
        if not store.drain(60):
            raise SystemExit("the server did not take the entries")


def plain(server: Server, threads: int) -> Callable[[], None]:
    client = Redis(port=server.port, protocol=2, socket_read_size=1 << 20)
    fields = {name: sorted(server.client.hkeys(name), key=int)[1:] for name in server.entries()}
    jobs = [(name, fields[name][layer]) for layer in range(GEOMETRY.layers) for name in fields]

    def read() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda job: len(client.hget(*job) or b""), jobs))

    return read


def ours(store: ChunkStore) -> Callable[[], None]:
    def read() -> None:
        with contextlib.ExitStack() as leases:
            entries = [leases.enter_context(entry) for entry in store.open(KEYS)]  # type: ignore[arg-type]
            for slabs in store.open_layers(entries):  # type: ignore[arg-type]
                if any(not isinstance(slab, np.ndarray) for slab in slabs):
                    raise SystemExit(f"a layer did not come: {slabs}")

    return read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, default=7)
    passes = parser.parse_args().passes
    shared_memory = Path("/dev/shm")
    with (
        tempfile.TemporaryDirectory(dir=shared_memory if shared_memory.is_dir() else None) as folder,
        contextlib.ExitStack() as open_until_then,
    ):
        root = Path(folder)
        server = started(root)
        open_until_then.callback(server.kill)
        fill(root / "filler", server.url)
        options = {"capacity_bytes": 1 << 30, "remote": server.url, "remote_timeout_ms": 2000}
        ChunkStore(root / "reading", capacity_bytes=1 << 30, ram_bytes=0).close()
        reading = ChunkStore(root / "reading", ram_bytes=0, read_only=True, **options)
        keeping = ChunkStore(root / "keeping", ram_bytes=1 << 28, **options)
        open_until_then.callback(keeping.close)
        open_until_then.callback(reading.close)
        contenders = {
            "client_1_thread": plain(server, 1),
            "client_4_threads": plain(server, 4),
            "ragkv": ours(reading),
            "ragkv_keeping": ours(keeping),
        }
        speeds: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(passes + 1):
            for name, read in contenders.items():
                start = time.perf_counter()
                read()
                if turn:  # the first one connects
                    speeds[name].append(NBYTES / (time.perf_counter() - start) / 1e9)
                keeping.drain(60)
                keeping.clear()
    medians = {name: statistics.median(of) for name, of in speeds.items()}
    print(
        json.dumps(
            {
                "gb_per_s": {name: round(median, 3) for name, median in medians.items()},
                "ratio": {name: round(median / medians["client_1_thread"], 2) for name, median in medians.items()},
                "passes": {name: [round(speed, 2) for speed in of] for name, of in speeds.items()},
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
