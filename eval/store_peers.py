"""What people would keep chunk KV in otherwise, each used as its documentation recommends.

Everybody reads and writes the same chunks with the same number of threads, and everybody's writes are on the
disk when the clock stops; where a library would not see to that itself, we do it for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import pickle
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import lmdb
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from ragkv.errors import StoreError
from ragkv.eval.store_load import Load, sync


class Contender(ABC):
    """One way to keep ``load``'s chunks under ``root``.

    Timed are ``write`` and ``read`` (by whoever calls them, unless they return the seconds themselves); around each
    stand ``start`` and ``stop``, after which no file may be mapped any more. ``read`` hands every layer to
    ``load.arrived``, an entry's layers in order.
    """

    name: ClassVar[str]
    durable: ClassVar[str]
    """What makes its writes durable."""
    verified: ClassVar[str] = "no"
    """Whether it compares what it reads with a checksum."""

    def __init__(self, root: Path, load: Load, threads: int) -> None:
        self.root = root
        self.load = load
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads)

    def start(self) -> None:  # noqa: B027 - most have nothing to open
        """Get ready to read or write."""

    @abstractmethod
    def write(self) -> float | None:
        """Write every entry; on return all of it is durable."""

    @abstractmethod
    def read(self) -> float | None:
        """Read every entry."""

    def stop(self) -> None:  # noqa: B027
        """Let go of what was written or read."""

    def close(self) -> None:
        """Give everything back."""
        self.pool.shutdown(cancel_futures=True)

    def figures(self) -> dict[str, float]:
        """What else it measured on the way."""
        return {}

    def each(self, work: Callable[[int], None]) -> None:
        """Run ``work`` for every entry, on all threads."""
        for _ in self.pool.map(work, range(self.load.entries)):
            pass


class FilePerChunk(Contender):
    """Entries written and read each by itself, on all threads."""

    durable = "fsync of each file and of the folder"

    def write(self) -> None:
        self.each(self._write)

    def read(self) -> None:
        self.each(self._read)

    @abstractmethod
    def _write(self, entry: int) -> None: ...

    @abstractmethod
    def _read(self, entry: int) -> None: ...


class Pickles(FilePerChunk):
    """One pickle per chunk, protocol 5: a list of arrays."""

    name = "pickle"

    def _write(self, entry: int) -> None:
        with open(self.root / f"{entry}.pickle", "wb") as file:
            pickle.dump(self.load.arrays(entry), file, protocol=5)
            file.flush()
            os.fsync(file.fileno())
        sync(self.root)

    def _read(self, entry: int) -> None:
        with open(self.root / f"{entry}.pickle", "rb") as file:
            arrays = pickle.load(file)  # noqa: S301 - written by ourselves a moment ago
        for layer, array in enumerate(arrays):
            self.load.arrived(entry, layer, array)


class Safetensors(FilePerChunk):
    """One safetensors file per chunk, a tensor per layer, read tensor by tensor."""

    name = "safetensors"

    def _write(self, entry: int) -> None:
        path = self.root / f"{entry}.safetensors"
        save_file({str(layer): array for layer, array in enumerate(self.load.arrays(entry))}, path)
        sync(path)
        sync(self.root)

    def _read(self, entry: int) -> None:
        with safe_open(self.root / f"{entry}.safetensors", framework="np") as file:
            for layer in range(self.load.geometry.layers):
                self.load.arrived(entry, layer, file.get_tensor(str(layer)))


class Lmdb(Contender):
    """The whole payload in LMDB: a value per layer, a transaction per chunk, read without copying."""

    name = "lmdb"
    durable = "its own: each transaction is synced"

    def start(self) -> None:
        room = 2 * self.load.nbytes + (64 << 20)
        self._env = lmdb.open(str(self.root / "payload"), map_size=room)

    def write(self) -> None:
        for entry in range(self.load.entries):  # it has one writer at a time anyway
            with self._env.begin(write=True) as txn:
                for layer, slab in enumerate(self.load.slabs(entry)):
                    txn.put(self._key(entry, layer), slab.data)

    def read(self) -> None:
        self.each(self._read)

    def stop(self) -> None:
        self._env.close()

    def _read(self, entry: int) -> None:
        with self._env.begin(buffers=True) as txn:
            for layer in range(self.load.geometry.layers):
                value = np.frombuffer(txn.get(self._key(entry, layer), b""), np.uint8)
                self.load.arrived(entry, layer, value)

    def _key(self, entry: int, layer: int) -> bytes:
        return entry.to_bytes(4, "big") + layer.to_bytes(4, "big")


class Diskcache(Contender):
    """diskcache: a value per chunk, streamed in and out (``read=True``)."""

    name = "diskcache"
    durable = "synchronous=FULL for its SQLite rows; fsync of each value's file and its folders"

    def start(self) -> None:
        from diskcache import Cache

        self._cache = Cache(
            str(self.root), size_limit=1 << 60, eviction_policy="none", cull_limit=0, sqlite_synchronous=2
        )
        self._buffers = threading.local()

    def write(self) -> None:
        self.each(self._write)

    def read(self) -> None:
        self.each(self._read)

    def stop(self) -> None:
        self.pool.shutdown()  # its connections belong to threads
        self.pool = ThreadPoolExecutor(self.threads)
        self._cache.close()

    def _write(self, entry: int) -> None:
        self._cache.set(entry, _Stream(self.load.slabs(entry)), read=True)
        with self._cache.get(entry, read=True) as file:
            os.fsync(file.fileno())
            folder = Path(file.name).parent
        for path in (folder, folder.parent, self.root):
            sync(path)

    def _read(self, entry: int) -> None:
        buffer = np.empty(self.load.slab_bytes, np.uint8)
        with self._cache.get(entry, read=True) as file:
            for layer in range(self.load.geometry.layers):
                file.readinto(buffer)
                self.load.arrived(entry, layer, buffer)


class _Stream:
    """A file-like object that gives one slab after the other, without copying."""

    def __init__(self, slabs: Iterable[Any]) -> None:
        self._slabs = iter(slabs)

    def read(self, _size: int) -> Any:
        slab = next(self._slabs, None)
        return b"" if slab is None else slab.data


class LMCache(Contender):
    """LMCache's local-disk backend with O_DIRECT, a file per chunk, its own threads and memory pool.

    Its index lives in the process, so nothing is closed between writing and reading. What a serving engine
    would copy into its pool from the device is copied there before the clock starts.
    """

    name = "lmcache"
    durable = "it syncs nothing: fsync of every file and of the folder at the end"

    def __init__(self, root: Path, load: Load, threads: int) -> None:
        super().__init__(root, load, threads)
        # It reports its use to its makers otherwise, and logs every chunk.
        os.environ.update(LMCACHE_TRACK_USAGE="false", DO_NOT_TRACK="1", LMCACHE_LOG_LEVEL="ERROR")
        import torch
        from lmcache.utils import CacheEngineKey
        from lmcache.v1.config import LMCacheEngineConfig
        from lmcache.v1.memory_management import MemoryFormat
        from lmcache.v1.metadata import LMCacheMetadata
        from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
        from lmcache.v1.storage_backend.local_disk_backend import LocalDiskBackend

        shape = load.geometry
        slab = torch.Size((2, shape.layers, load.tokens, shape.kv_heads * shape.head_dim))
        self._format = (slab, torch.bfloat16, MemoryFormat.KV_2LTD)
        self._keys = [CacheEngineKey("chunks", 1, 0, entry, torch.bfloat16) for entry in range(load.entries)]
        gib = (load.nbytes + (64 << 20)) / 2**30
        config = LMCacheEngineConfig.from_defaults(
            chunk_size=load.tokens,
            local_cpu=False,
            max_local_cpu_size=gib,
            local_disk=str(root),
            max_local_disk_size=2 * gib,
            extra_config={"use_odirect": True, "disk_io_threads": threads},
        )
        kv_shape = (shape.layers, 2, load.tokens, shape.kv_heads, shape.head_dim)
        metadata = LMCacheMetadata("chunks", 1, 1, 0, 0, torch.bfloat16, kv_shape, chunk_size=load.tokens)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._cpu: Any = LocalCPUBackend(config, metadata, "cpu")
        self._disk: Any = LocalDiskBackend(config, self._loop, self._cpu, "cpu")
        self._filled = [self._fill(entry) for entry in range(load.entries)]

    def write(self) -> None:
        done = threading.Semaphore(0)
        for key, memory in zip(self._keys, self._filled, strict=True):
            self._disk.submit_put_task(key, memory, on_complete_callback=lambda key: done.release())
        for _ in self._keys:
            if not done.acquire(timeout=600):
                raise StoreError("lmcache did not finish writing within ten minutes")
        for path in [*self.root.iterdir(), self.root]:
            sync(path)

    def read(self) -> None:
        for start in range(0, len(self._keys), 2 * self.threads):
            memories = self._disk.batched_get_blocking(self._keys[start : start + 2 * self.threads])
            for entry, memory in enumerate(memories, start):
                kv = self._bytes(memory)
                for layer in range(self.load.geometry.layers):
                    self.load.arrived(entry, layer, kv[0, layer], kv[1, layer])
                memory.ref_count_down()

    def stop(self) -> None:
        while self._filled:
            self._filled.pop().ref_count_down()

    def close(self) -> None:
        with contextlib.closing(self._cpu):
            self._disk.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        super().close()

    def _fill(self, entry: int) -> Any:
        memory = self._cpu.allocate(*self._format)
        kv = self._bytes(memory)
        for layer, slab in enumerate(self.load.slabs(entry)):
            kv[:, layer] = slab.reshape(kv[:, layer].shape)
        return memory

    def _bytes(self, memory: Any) -> Any:
        import torch

        return memory.tensor.view(torch.uint8).numpy()  # (2, layers, tokens, 2 * heads * head_dim)


PEERS: tuple[type[Contender], ...] = (Safetensors, Pickles, Lmdb, Diskcache, LMCache)
_PACKAGES = {
    Diskcache: ("diskcache", "pip install 'ragkv[bench]'"),
    LMCache: ("lmcache", "it needs CUDA packages unless installed with --no-deps, see docs/store.md"),
}


def available() -> tuple[list[type[Contender]], dict[str, str]]:
    """The peers that can run here, and why the others cannot."""
    missing = {
        peer.name: f"{package} is not installed: {advice}"
        for peer, (package, advice) in _PACKAGES.items()
        if importlib.util.find_spec(package) is None
    }
    return [peer for peer in PEERS if peer.name not in missing], missing
