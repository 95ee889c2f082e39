"""The chunks that the store's measurement moves, and proof of where their bytes came from."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragkv.errors import StoreError
from ragkv.store import Geometry

PAGE = 4096
Bytes = NDArray[np.uint8]


def page_aligned(nbytes: int) -> Bytes:
    """An uninitialised uint8 array that begins on a page, as direct I/O wants it."""
    raw = np.empty(nbytes + PAGE, np.uint8)
    start = -raw.ctypes.data % PAGE
    return raw[start : start + nbytes]


class Load:
    """``entries`` chunks of random bytes, no two alike.

    They are slices of one random buffer, each begun a page after the last, so that RAM holds little more than one.
    """

    def __init__(self, geometry: Geometry, tokens: int, entries: int) -> None:
        self.geometry = geometry
        self.tokens = tokens
        self.entries = entries
        self.slab_bytes = geometry.slab_bytes(tokens)
        self._noise = page_aligned(self.entry_bytes + entries * PAGE)
        self._noise[:] = np.frombuffer(np.random.default_rng(0).bytes(self._noise.nbytes), np.uint8)
        self._noise.flags.writeable = False

    @property
    def entry_bytes(self) -> int:
        return self.geometry.layers * self.slab_bytes

    @property
    def nbytes(self) -> int:
        return self.entries * self.entry_bytes

    def slab(self, entry: int, layer: int) -> Bytes:
        """K, then V, of one layer: (slab_bytes,)."""
        start = entry * PAGE + layer * self.slab_bytes
        return self._noise[start : start + self.slab_bytes]

    def slabs(self, entry: int) -> list[Bytes]:
        return [self.slab(entry, layer) for layer in range(self.geometry.layers)]

    def arrays(self, entry: int) -> list[NDArray[Any]]:
        """Per layer an array of the model's dtype: (2, tokens, kv_heads, head_dim)."""
        shape = (2, self.tokens, self.geometry.kv_heads, self.geometry.head_dim)
        return [slab.view(self.geometry.numpy_dtype).reshape(shape) for slab in self.slabs(entry)]

    def arrived(self, entry: int, layer: int, *parts: NDArray[Any]) -> None:
        """Touch every page of a layer as it came back, and compare the bytes touched with those written.

        Raises:
            StoreError: they differ.
        """
        expected, at = self.slab(entry, layer), 0
        for part in parts:
            raw = part.reshape(-1).view(np.uint8)
            if not np.array_equal(raw[::PAGE], expected[at : at + raw.nbytes : PAGE]):
                raise StoreError("other bytes came back than were written", entry=entry, layer=layer)
            at += raw.nbytes
        if at != self.slab_bytes:
            raise StoreError(f"{at} bytes of {self.slab_bytes} came back", entry=entry, layer=layer)


def sync(path: str | os.PathLike[str]) -> None:
    """Make a file's bytes, or a folder's names, durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def drop_cached(root: Path) -> int:
    """Drop every file under ``root`` from the page cache; says how many bytes of them are in it still."""
    return drop_files(_files(root))


def drop_files(paths: Iterable[str | os.PathLike[str]]) -> int:
    """Drop files from the page cache; says how many bytes of them are in it still."""
    left = 0
    for path in paths:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)  # dirty pages cannot be dropped
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            left += _cached_bytes(fd)
        finally:
            os.close(fd)
    return left


def device_reads() -> int:
    """Bytes that this process has had fetched from block devices so far."""
    with open("/proc/self/io", encoding="ascii") as lines:
        fields = dict(line.split(": ") for line in lines)
    return int(fields["read_bytes"])


def _files(root: Path) -> Iterator[Path]:
    return (path for path in root.rglob("*") if path.is_file())


def _cached_bytes(fd: int) -> int:
    size = os.fstat(fd).st_size
    if not size:
        return 0
    pages = np.zeros(-(-size // PAGE), np.uint8)
    with mmap.mmap(fd, size, prot=mmap.PROT_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        address = ctypes.c_void_p(view.ctypes.data)
        vector = pages.ctypes.data_as(ctypes.c_void_p)
        failed = ctypes.CDLL(None, use_errno=True).mincore(address, ctypes.c_size_t(size), vector)
        del view
    if failed:
        raise StoreError(f"mincore: {os.strerror(ctypes.get_errno())}; the page cache cannot be inspected")
    return int((pages & 1).sum()) * PAGE
