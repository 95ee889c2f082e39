"""Page-locking the RAM tier's memory, with a CUDA runtime that only keeps account."""

from __future__ import annotations

import contextlib
import gc
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ragkv import engine, pinned
from ragkv.engine import Engine
from ragkv.pinned import PageLocking, are_page_locked, is_page_locked
from ragkv.store import ChunkStore
from ragkv.store.ram import RamEntry
from tests.store_kit import holds, put

MIB = 1 << 20


class Runtime:
    """``limit``: bytes that may be locked."""

    def __init__(self, limit: int = 1 << 40) -> None:
        self.limit, self.locked, self.calls = limit, {}, 0

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802 - CUDA's name
        self.calls += 1
        assert flags == 1 | 2  # portable, and mapped: kernels read it
        assert address % 4096 == 0
        assert not any(start < address + nbytes and address < start + size for start, size in self.locked.items())
        if sum(self.locked.values()) + nbytes > self.limit:
            return 2
        self.locked[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802 - CUDA's name
        del self.locked[address]
        return 0


@pytest.fixture
def runtime(monkeypatch):
    runtime, devices = Runtime(), []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext(devices.append(device)))
    yield runtime
    assert set(devices) <= {torch.device("cuda:1")}


@pytest.fixture
def allocate(runtime):
    return PageLocking(torch.device("cuda:1"))


@pytest.mark.parametrize("nbytes", [4096, 5 * 4096, 2 * MIB, 3 * MIB])
def test_exactly_what_is_asked_for_is_locked_and_unlocked_with_its_last_view(allocate, runtime, nbytes):
    memory = allocate(nbytes)
    assert (memory.shape, memory.dtype, memory.flags.writeable) == ((nbytes,), np.uint8, True)
    assert runtime.locked == {memory.ctypes.data: nbytes}
    view = memory[100:200]
    del memory
    gc.collect()
    assert len(runtime.locked) == 1
    del view
    gc.collect()
    assert runtime.locked == {}


def test_a_kernel_may_read_whole_huge_pages_as_long_as_they_are_locked(allocate, runtime):
    memory, small = allocate(4 * MIB), allocate(4096)
    start = memory.ctypes.data
    assert is_page_locked(start, 4 * MIB)
    assert is_page_locked(start + MIB, 2 * MIB)
    assert not is_page_locked(start - 1, 2)
    assert not is_page_locked(start + 3 * MIB, MIB + 1)
    assert not is_page_locked(small.ctypes.data, 4096)  # not known of: it is copied first
    del memory
    gc.collect()
    assert not is_page_locked(start, 1)


def test_memory_that_cannot_be_locked_is_ordinary_and_said_once(allocate, runtime, caplog):
    runtime.limit = 3 * MIB
    with caplog.at_level(logging.WARNING, "ragkv"):
        arrays = [allocate(2 * MIB) for _ in range(4)]
    for i, array in enumerate(arrays):
        array[:] = i
    assert len(runtime.locked) == 1
    assert runtime.calls == 2  # refused once, not asked again
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "ram_bytes" in caplog.text


def test_a_stores_ram_tier_lies_in_it_and_gives_it_back(allocate, runtime, tmp_path):
    with ChunkStore(tmp_path, capacity_bytes=MIB, ram_bytes=MIB, ram_allocate=allocate) as store:
        put(store, 1)
        assert holds(store, 1)
        assert holds(store, 1)
        assert store.stats().hits_ram == 1
        assert sum(runtime.locked.values()) >= store.stats().ram_bytes > 0
    del store
    gc.collect()
    assert runtime.locked == {}


@pytest.mark.parametrize(("device", "kind"), [("cpu", type(None)), ("cuda:1", PageLocking)])
def test_the_engine_locks_the_ram_tiers_memory_on_cuda_only(monkeypatch, tmp_path, device, kind):
    def opened(path, *, ram_allocate, **options):
        assert isinstance(ram_allocate, kind)
        raise InterruptedError

    monkeypatch.setattr(engine, "find_device", lambda wanted: torch.device(device))
    monkeypatch.setattr(engine, "ChunkStore", opened)
    with pytest.raises(InterruptedError):
        Engine(data_dir=tmp_path)


def test_an_entry_is_locked_if_each_of_its_slabs_is(monkeypatch):
    page = 2 * MIB
    monkeypatch.setattr(pinned, "_LOCKED", {3, 4, 6, 7, 8})
    starts = [3 * page, 3 * page + 5, 4 * page - 1, 5 * page - 1, 5 * page, 6 * page, 6 * page + 1, 9 * page - 1]
    for nbytes in (1, 2, 100, page - 1, page, page + 1, 2 * page, 3 * page, 3 * page + 1):
        each = [is_page_locked(start, nbytes) for start in starts]
        assert [are_page_locked(entry_at([start], nbytes).pages) for start in starts] == each
        locked = [start for start, is_locked in zip(starts, each, strict=True) if is_locked]
        assert are_page_locked(entry_at(locked, nbytes).pages)
        assert not are_page_locked(entry_at([*locked, 5 * page], nbytes).pages)


def entry_at(starts, nbytes):
    """An entry whose slabs begin there."""
    slabs = [SimpleNamespace(__array_interface__={"data": (start, True)}, nbytes=nbytes) for start in starts]
    return RamEntry(None, tuple(slabs))
