from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ragkv.errors import CorruptEntryError, StoreError
from ragkv.store import ChunkStore, Geometry, OpenEntry, source
from ragkv.store.lease import leased
from ragkv.store.ram import RamTier
from ragkv.store.reader import LayerReader
from tests.store_kit import GEOMETRY, entry_file, key_for, open_one, put, slabs_for

BIG = Geometry(layers=6, kv_heads=8, head_dim=64, dtype="bfloat16")
TOKENS = 37  # slabs of 75,776 bytes: read past the page cache, and no whole number of blocks
SLAB = BIG.slab_bytes(TOKENS)
COUNT = 3


def bytes_for(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (BIG.layers, SLAB), dtype=np.uint8)


@pytest.fixture
def root(tmp_path) -> Path:
    with opened(tmp_path / "kv") as store:
        for i in range(COUNT):
            store.put(key_for(i), BIG, list(bytes_for(i)), tokens=TOKENS, model="m")
    return tmp_path / "kv"


def opened(root: Path, **options: object) -> ChunkStore:
    return ChunkStore(root, **{"capacity_bytes": 64 << 20, "ram_bytes": 0, **options})


def read_all(store: ChunkStore, **options: object) -> None:
    """Read all entries together, and compare every byte."""
    entries = store.open([key_for(i) for i in range(COUNT)])
    try:
        for layer, slabs in enumerate(store.open_layers(entries, **options)):
            for i, slab in enumerate(slabs):
                assert isinstance(slab, np.ndarray), slab
                assert np.array_equal(slab, bytes_for(i)[layer])
    finally:
        for entry in entries:
            entry.close()


def offset(by: int):
    """An allocator of arrays that begin ``by`` bytes behind a page."""

    def allocate(nbytes: int) -> np.ndarray:
        raw = np.empty(nbytes + 8192, np.uint8)
        start = -raw.ctypes.data % 4096 + by
        return raw[start : start + nbytes]

    return allocate


def refuse_flag(monkeypatch) -> None:
    monkeypatch.setattr(source, "go_direct", lambda fd: False)


def refuse_reads(monkeypatch) -> None:
    """As a file system that takes the flag and then refuses to read so."""
    real = os.preadv

    def preadv(fd, views, at):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, views, at)

    monkeypatch.setattr(os, "preadv", preadv)


def short_reads(monkeypatch) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: min(real(fd, views, at), 5000))


@pytest.mark.parametrize("trouble", [None, refuse_flag, refuse_reads, short_reads])
@pytest.mark.parametrize("allocate", [None, offset(0), offset(512), offset(16), offset(1)])
@pytest.mark.parametrize("ram_bytes", [0, 1 << 20])
def test_every_way_of_reading_gives_the_same_bytes(root, monkeypatch, trouble, allocate, ram_bytes):
    with opened(root, ram_bytes=ram_bytes) as store:
        if trouble:
            trouble(monkeypatch)
        read_all(store, allocate=allocate)
        read_all(store, allocate=allocate)


def test_large_slabs_go_past_the_page_cache_where_that_is_possible(root, monkeypatch):
    asked = []
    real = source.go_direct
    monkeypatch.setattr(source, "go_direct", lambda fd: asked.append(real(fd)) or asked[-1])
    with opened(root) as store:
        put(store, 50)
        open_one(store, 50).close()
        assert not asked  # small ones are worth the kernel's reading ahead
        read_all(store)
        assert asked


def test_a_file_that_shrinks_while_it_is_read_is_corrupt_from_there_on(root):
    with opened(root) as store:
        entries = store.open([key_for(0), key_for(1)])
        layers = store.open_layers(entries, depth=1)
        next(layers)
        path = root / "entries" / key_for(1).hex()[:2] / f"{key_for(1).hex()}.kv"
        os.truncate(path, path.stat().st_size - SLAB - 1000)
        rest = list(layers)
        assert all(np.array_equal(rest[n][0], bytes_for(0)[n + 1]) for n in range(5))
        assert isinstance(rest[-1][1], CorruptEntryError)
        for entry in entries:
            entry.close()
        assert store.stats().corrupt == 1
        assert key_for(1) not in store


@pytest.mark.parametrize("allocate", [None, offset(0)])
def test_a_disk_that_fails_costs_one_entry(root, monkeypatch, allocate):
    real = os.preadv
    with opened(root) as store:
        entries = store.open([key_for(i) for i in range(COUNT)])
        bad = os.stat(root / "entries" / key_for(1).hex()[:2] / f"{key_for(1).hex()}.kv").st_ino

        def preadv(fd, views, at):
            if os.fstat(fd).st_ino == bad and at > SLAB:
                raise OSError(errno.EIO, "Input/output error")
            return real(fd, views, at)

        monkeypatch.setattr(os, "preadv", preadv)
        layers = list(store.open_layers(entries, allocate=allocate))
        assert isinstance(layers[-1][1], CorruptEntryError)
        assert "Input/output error" in str(layers[-1][1])
        assert all(np.array_equal(layers[n][2], bytes_for(2)[n]) for n in range(6))
        for entry in entries:
            entry.close()
        assert store.stats().corrupt == 1
        files = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        assert not [file for file in files if file.startswith(str(root)) and file.endswith(".kv")], "held by an error"


def test_signals_in_mid_read_do_no_harm(root):
    hits = []
    before = signal.signal(signal.SIGALRM, lambda *_: hits.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        with opened(root) as store:
            for _ in range(20):
                read_all(store)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert hits


def test_nothing_leaks(root):
    with opened(root, ram_bytes=1 << 20) as store:
        read_all(store)
        fds, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
        memory = store._ram.buffers.nbytes
        for _ in range(20):
            read_all(store)
            entries = store.open([key_for(i) for i in range(COUNT)])
            with store.open_layers(entries) as layers:
                next(layers)
            for entry in entries:
                entry.close()
        assert len(os.listdir("/proc/self/fd")) == fds
        assert threading.active_count() <= threads + 4  # readers, started as needed
        assert store._ram.buffers.nbytes <= memory + 4 * SLAB * COUNT
    del entries, entry, layers


def test_the_ram_tier_lies_in_the_callers_memory(root):
    pages = []

    def allocate(nbytes: int) -> np.ndarray:
        pages.append(offset(0)(nbytes))
        return pages[-1]

    with opened(root, ram_bytes=1 << 20, ram_allocate=allocate) as store:
        read_all(store)
        entries = store.open([key_for(0)])
        assert entries[0].tier == "ram"
        with store.open_layers(entries) as layers:
            for [slab] in layers:
                assert any(np.shares_memory(slab, page) for page in pages)
        entries[0].close()


# Any tier


class Afar:
    """A source on a lane of its own, which answers when told to."""

    tier = "afar"

    def __init__(self, like: OpenEntry, slabs: list[np.ndarray], error: StoreError | None = None) -> None:
        self.header = like.header
        self.lane = ThreadPoolExecutor(1)
        self.go = threading.Event()
        self.asked: list[int] = []
        self.rejected = self.closed = 0
        self._slabs, self._error = slabs, error

    def slab(self, layer: int, buffer: np.ndarray | None) -> np.ndarray:
        self.asked.append(layer)
        self.go.wait(10)
        if self._error is not None and layer >= 1:
            raise self._error
        buffer = np.empty_like(self._slabs[layer]) if buffer is None else buffer
        buffer[:] = self._slabs[layer]
        return buffer

    def reject(self) -> None:
        self.rejected += 1

    def share(self) -> Afar:
        return self

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def near(tmp_path):
    with ChunkStore(tmp_path / "near", capacity_bytes=1 << 20, ram_bytes=0) as store:
        put(store, 1)
        with open_one(store, 1) as entry:
            yield entry


def test_a_slow_tier_holds_up_its_own_chunks_only(near):
    slow = Afar(near, slabs_for(1))
    entry, source = OpenEntry(slow), near.source()
    with LayerReader([near, entry], depth=2, allocate=None, ram=RamTier(0)) as layers, contextlib.closing(source):
        source.lane.submit(lambda: None).result(10)  # the disk has read what it was asked for before
        assert slow.asked == [0]
        slow.go.set()
        for layer, slabs in enumerate(layers):
            assert all(np.array_equal(slab, slabs_for(1)[layer]) for slab in slabs)
    assert slow.closed == 1
    entry.close()
    slow.lane.shutdown()


def test_a_tier_out_of_reach_is_an_error_and_no_corruption(near):
    gone = Afar(near, slabs_for(1), StoreError("the remote tier does not answer"))
    gone.go.set()
    with LayerReader([near, OpenEntry(gone)], depth=1, allocate=None, ram=RamTier(1 << 20)) as layers:
        got = list(layers)
    assert np.array_equal(got[0][1], slabs_for(1)[0])
    assert all(isinstance(slabs[1], StoreError) and slabs[1].context["key"] for slabs in got[1:])
    assert gone.asked == [0, 1]
    assert gone.rejected == 0
    gone.lane.shutdown()


def test_wrong_bytes_of_any_tier_are_never_served(near):
    wrong = Afar(near, [slabs_for(1)[0], slabs_for(1)[0], slabs_for(1)[2]])
    wrong.go.set()
    ram = RamTier(1 << 20)
    with LayerReader([OpenEntry(wrong)], depth=3, allocate=None, ram=ram) as layers:
        got = [slab for [slab] in layers]
    assert np.array_equal(got[0], slabs_for(1)[0])
    assert all(isinstance(slab, CorruptEntryError) for slab in got[1:])
    assert wrong.rejected == 1
    assert len(ram) == 0
    assert ram.reserve(1 << 20)
    wrong.lane.shutdown()


def test_layers_are_asked_for_in_order_of_all_chunks_and_no_further_than_the_depth(near):
    slow = Afar(near, slabs_for(1))
    slow.go.set()
    other = Afar(near, slabs_for(1))
    other.lane, other.asked = slow.lane, slow.asked
    other.go.set()
    with LayerReader([OpenEntry(slow), OpenEntry(other)], depth=1, allocate=None, ram=RamTier(0)) as layers:
        slow.lane.submit(lambda: None).result(10)
        assert slow.asked == [0, 0]
        next(layers)
        slow.lane.submit(lambda: None).result(10)
        assert slow.asked == [0, 0, 1, 1]
        list(layers)
    assert slow.asked == [layer for layer in range(GEOMETRY.layers) for _ in range(2)]
    slow.lane.shutdown()


ORDER = (3, 4, 0, 1, 2, 5)


def test_layers_come_in_the_order_asked_for(root):
    with opened(root, ram_bytes=COUNT * BIG.layers * SLAB + (1 << 20)) as store:
        for _ in range(2):  # from the disk, then from RAM
            entries = store.open([key_for(i) for i in range(COUNT)])
            with contextlib.ExitStack() as leases:
                for entry in entries:
                    leases.enter_context(entry)
                for layer, slabs in zip(ORDER, store.open_layers(entries, order=ORDER), strict=True):
                    for i, slab in enumerate(slabs):
                        assert np.array_equal(slab, bytes_for(i)[layer])
        assert [entry.tier for entry in entries] == ["ram"] * COUNT


def test_an_entry_answers_its_error_from_the_turn_of_the_bad_layer_on(root):
    path = entry_file(root, 1)
    with opened(root) as store:
        [entry] = store.open([key_for(1)])
        with entry:
            with path.open("r+b") as file:
                file.seek(entry.header.offsets[4] + 100)
                file.write(b"\x00\x01\x02\x03")
            with store.open_layers([entry], order=ORDER) as layers:
                found = [slab for [slab] in layers]
    assert isinstance(found[0], np.ndarray)
    assert all(isinstance(slab, CorruptEntryError) for slab in found[1:])


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 1, 2, 3, 4, 4), (1, 2, 3, 4, 5, 6)])
def test_an_order_that_does_not_name_each_layer_once_is_refused(root, order):
    with opened(root) as store:
        [entry] = store.open([key_for(0)])
        with entry, pytest.raises(StoreError, match="each of 6 layers once"):
            store.open_layers([entry], order=order)
        with store.open_layers([], order=order) as layers:
            assert list(layers) == []


def test_where_slabs_lie_is_told_of_what_is_all_in_ram(root):
    with opened(root, ram_bytes=8 << 20) as store:
        keys = [key_for(i) for i in range(2)]
        with contextlib.ExitStack() as leases:
            entries = [leases.enter_context(entry) for entry in store.open(keys)]
            with store.open_layers(entries) as layers:
                assert layers.lying([SLAB] * 2) is None  # on the SSD
                list(layers)
        with contextlib.ExitStack() as leases:
            entries = [leases.enter_context(entry) for entry in store.open(keys)]
            with store.open_layers(entries, order=range(BIG.layers)[::-1]) as layers:
                found = [entry.addresses for entry in layers.lying([SLAB] * 2)]
                expected = [[slab.ctypes.data for slab in slabs] for slabs in reversed([*layers])]
                assert [list(each) for each in zip(*found, strict=True)] == expected
            with store.open_layers(entries) as layers:
                assert layers.lying([SLAB, SLAB + 1]) is None
            with store.open_layers([]) as layers:
                assert layers.lying([]) is None


def test_a_lease_ends_with_the_last_who_shares_it(root):
    with opened(root) as store:
        [entry] = store.open([key_for(0)])
        one, other = store.open_layers([entry]), store.open_layers([entry])
        entry.close()
        one.close()
        one.close()
        assert leased(store.folder.entry_path(key_for(0)))
        assert len(list(other)) == BIG.layers
        other.close()
        assert not leased(store.folder.entry_path(key_for(0)))
        with pytest.raises(StoreError, match="closed"):
            entry.source()
