from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from ragkv.errors import CorruptEntryError, StoreError, StoreFormatError, StoreFullError, StoreReadOnlyError
from ragkv.store import ChunkStore, EntryInfo, Geometry, OpenEntry
from tests.store_kit import (
    FILE,
    GEOMETRY,
    SLAB,
    TOKENS,
    disk_usage,
    entry_file,
    holds,
    key_for,
    open_one,
    put,
    read,
    slabs_for,
)

MIB = 1 << 20


@pytest.fixture
def store(tmp_path):
    with ChunkStore(tmp_path / "kv", capacity_bytes=MIB, ram_bytes=MIB) as opened:
        yield opened


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "kv"


def test_round_trip(store):
    assert put(store, 1, source="int8", context_tokens=9, context_policy="document")
    with open_one(store, 1) as entry:
        assert entry.tier == "ssd"
        header = entry.header
        assert (header.key, header.geometry, header.tokens, header.model) == (
            key_for(1),
            GEOMETRY,
            TOKENS,
            "m",
        )
        assert (header.source, header.context_tokens, header.context_policy) == ("int8", 9, "document")
        layers = [slab for [slab] in store.open_layers([entry])]
    for got, want in zip(layers, slabs_for(1), strict=True):
        assert np.array_equal(got, want)
        assert got.ctypes.data % 4096 == 0


def test_putting_again_is_refused_politely(store):
    assert put(store, 1)
    assert not put(store, 1)
    assert store.stats().entries == 1


def test_slabs_may_come_as_parts_and_as_model_arrays(store):
    rng = np.random.default_rng(0)
    shape = (GEOMETRY.layers, 2, TOKENS, GEOMETRY.kv_heads, GEOMETRY.head_dim)
    kv = rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
    parts = ((k, v.tobytes()) for k, v in kv)
    assert store.put(key_for(1), GEOMETRY, parts, tokens=TOKENS, model="m")
    for got, want in zip(read(store, 1), kv, strict=True):
        assert np.array_equal(got.view(ml_dtypes.bfloat16).reshape(want.shape), want)


@pytest.mark.parametrize("slabs", [slabs_for(0)[:2], [*slabs_for(0), b"x" * SLAB], [b"x" * (SLAB - 1)] * 3])
def test_slabs_that_do_not_fit_the_geometry_leave_nothing(store, root, slabs):
    with pytest.raises(StoreFormatError, match="slab"):
        store.put(key_for(1), GEOMETRY, slabs, tokens=TOKENS, model="m")
    assert key_for(1) not in store
    assert disk_usage(root) == 0


def test_a_producer_that_fails_leaves_nothing(store, root):
    def slabs():
        yield slabs_for(1)[0]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.put(key_for(1), GEOMETRY, slabs(), tokens=TOKENS, model="m")
    assert disk_usage(root) == 0
    assert put(store, 1)


def test_lookup_names_the_tier(store):
    put(store, 1)
    put(store, 2)
    assert store.lookup([key_for(1), key_for(9)]) == [EntryInfo("ssd", TOKENS, FILE), None]
    assert holds(store, 1)
    assert [info and info.tier for info in store.lookup([key_for(2), key_for(1)])] == ["ssd", "ram"]
    stats = store.stats()
    assert (stats.hits_ssd, stats.hits_ram, stats.misses) == (1, 0, 0)
    assert (stats.ram_entries, stats.ram_bytes) == (1, 3 * SLAB)
    assert holds(store, 1)
    assert key_for(1) in store
    assert key_for(9) not in store


def test_open_answers_each_key(store):
    put(store, 1)
    missing, entry = store.open([key_for(9), key_for(1)])
    assert isinstance(missing, StoreError)
    assert isinstance(entry, OpenEntry)
    entry.close()
    entry.close()
    with pytest.raises(StoreError, match="closed"):
        store.open_layers([entry])


def test_layers_of_many_entries_come_in_order(store):
    for i in range(8):
        put(store, i)
    for i in (1, 4):
        read(store, i)  # into RAM
    wanted = [5, 1, 0, 7, 4, 5]
    entries = store.open([key_for(i) for i in wanted])
    for depth in (1, 2, 9):
        for layer, slabs in enumerate(store.open_layers(entries, depth=depth)):
            assert all(np.array_equal(slabs[n], slabs_for(i)[layer]) for n, i in enumerate(wanted))
        assert layer == GEOMETRY.layers - 1
    for entry in entries:
        entry.close()
    assert list(store.open_layers([])) == []


def test_an_entry_may_be_closed_while_it_is_read(store):
    put(store, 1)
    entry = open_one(store, 1)
    layers = store.open_layers([entry], depth=1)
    entry.close()
    assert all(np.array_equal(a, b) for [a], b in zip(layers, slabs_for(1), strict=True))


def test_entries_of_different_depth_cannot_be_mixed(store):
    put(store, 1)
    shallow = Geometry(1, 2, 16, "bfloat16")
    store.put(key_for(2), shallow, [slabs_for(2)[0]], tokens=TOKENS, model="m")
    with open_one(store, 1) as one, open_one(store, 2) as two, pytest.raises(StoreError, match="depth"):
        store.open_layers([one, two])


def test_the_callers_buffers_are_used_and_not_kept(store):
    put(store, 1)
    pool = np.zeros((GEOMETRY.layers, SLAB), np.uint8)
    free = list(pool)
    with open_one(store, 1) as entry:
        for [slab], want in zip(store.open_layers([entry], allocate=lambda n: free.pop()), slabs_for(1), strict=True):
            assert np.shares_memory(slab, pool)
            assert np.array_equal(slab, want)
    pool[:] = 0
    assert holds(store, 1)  # from RAM, which has its own copy
    assert store.stats().ram_entries == 1


def test_a_bad_allocator_is_the_callers_error(store):
    put(store, 1)
    with open_one(store, 1) as entry, pytest.raises(StoreError, match="allocate"):
        list(store.open_layers([entry], allocate=lambda n: np.empty(n - 1, np.uint8)))
    assert store.stats().corrupt == 0
    assert holds(store, 1)


@pytest.mark.parametrize("ram_bytes", [0, MIB])
def test_a_buffer_handed_out_twice_harms_no_entry(root, ram_bytes):
    big = Geometry(24, 4, 64, "bfloat16")
    rng = np.random.default_rng(0)
    slabs = list(rng.integers(0, 256, (24, big.slab_bytes(40)), dtype=np.uint8))
    with ChunkStore(root, capacity_bytes=8 * MIB, ram_bytes=ram_bytes) as store:
        for i in range(4):
            store.put(key_for(i), big, slabs[i:] + slabs[:i], tokens=40, model="m")
        one = np.empty(big.slab_bytes(40), np.uint8)
        entries = store.open([key_for(i) for i in range(4)])
        with contextlib.suppress(StoreError):
            list(store.open_layers(entries, depth=8, allocate=lambda n: one))
        assert store.stats().corrupt == 0
        for n, got in enumerate(store.open_layers(entries)):
            assert all(np.array_equal(got[i], (slabs[i:] + slabs[:i])[n]) for i in range(4))
        for entry in entries:
            entry.close()


def test_closing_early_stops_reading_and_leaks_nothing(store):
    put(store, 1)
    before = len(os.listdir("/proc/self/fd"))
    calls = []

    def allocate(nbytes: int) -> np.ndarray:
        calls.append(nbytes)
        return np.empty(nbytes, np.uint8)

    with open_one(store, 1) as entry, store.open_layers([entry], depth=1, allocate=allocate) as layers:
        next(layers)
    seen = len(calls)
    assert seen <= 2
    assert list(layers) == []
    assert len(calls) == seen
    assert len(os.listdir("/proc/self/fd")) == before
    assert holds(store, 1)
    assert store.stats().ram_bytes == 3 * SLAB


def test_the_ram_tier_keeps_its_cap(tmp_path):
    with ChunkStore(tmp_path / "kv", capacity_bytes=MIB, ram_bytes=7 * SLAB) as store:
        for i in range(4):
            put(store, i)
            read(store, i)
        assert store.stats().ram_bytes == 6 * SLAB
        assert [info and info.tier for info in store.lookup([key_for(i) for i in range(4)])] == [
            "ssd",
            "ssd",
            "ram",
            "ram",
        ]
        entries = store.open([key_for(i) for i in range(4)])
        assert len(list(store.open_layers(entries))) == GEOMETRY.layers
        for entry in entries:
            entry.close()
        assert store.stats().ram_bytes <= 7 * SLAB


def test_the_least_recently_used_entry_leaves_the_disk(tmp_path, root):
    with ChunkStore(root, capacity_bytes=3 * FILE + 4096, ram_bytes=0) as store:
        for i in range(3):
            put(store, i)
        assert holds(store, 0)
        put(store, 3)
        assert [key_for(i) in store for i in range(4)] == [True, False, True, True]
        assert store.stats().evictions == 1
        assert disk_usage(root) == store.stats().bytes == 3 * FILE


def test_the_order_of_use_survives_closing(root):
    with ChunkStore(root, capacity_bytes=3 * FILE + 4096, ram_bytes=0) as store:
        for i in range(3):
            put(store, i)
        assert holds(store, 0)
    with ChunkStore(root, capacity_bytes=3 * FILE + 4096, ram_bytes=0) as store:
        put(store, 3)
        assert [key_for(i) in store for i in range(4)] == [True, False, True, True]


def test_a_smaller_cap_holds_from_the_start(root):
    with ChunkStore(root, capacity_bytes=MIB, ram_bytes=0) as store:
        for i in range(10):
            put(store, i)
    with ChunkStore(root, capacity_bytes=2 * FILE, ram_bytes=0) as store:
        assert store.stats().entries == 2
        assert disk_usage(root) == 2 * FILE
        assert holds(store, 9)


def test_open_entries_are_neither_evicted_nor_deleted(root):
    with ChunkStore(root, capacity_bytes=2 * FILE + 4096, ram_bytes=0) as store:
        put(store, 0)
        put(store, 1)
        with open_one(store, 0), open_one(store, 1):
            with pytest.raises(StoreFullError, match="open"):
                put(store, 2)
            assert store.delete([key_for(0)]) == 0
            assert store.clear() == 0
            assert disk_usage(root) == 2 * FILE
            assert holds(store, 0)
        put(store, 2)
        assert key_for(1) not in store
        assert store.delete([key_for(0), key_for(0), key_for(9)]) == 1
        assert store.clear() == 1
        assert store.stats().bytes == disk_usage(root) == 0


def test_what_never_fits_evicts_nothing(root):
    with ChunkStore(root, capacity_bytes=2 * FILE, ram_bytes=0) as store:
        put(store, 0)
        with pytest.raises(StoreFullError, match="capacity"):
            store.put(key_for(1), GEOMETRY, [], tokens=1000, model="m")
        assert holds(store, 0)


def test_the_cap_holds_at_every_moment_of_concurrent_puts(root):
    capacity = 5 * FILE
    above: list[int] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def write(store: ChunkStore, start: int) -> None:
        try:
            for i in range(start, start + 12):
                try:
                    put(store, i)
                except StoreFullError:  # the other writers have reserved all of it
                    continue
        except BaseException as error:
            errors.append(error)

    def watch() -> None:
        while not done.is_set():
            used = disk_usage(root)
            if used > capacity:
                above.append(used)

    with ChunkStore(root, capacity_bytes=capacity, ram_bytes=0) as store:
        watcher = threading.Thread(target=watch)
        watcher.start()
        writers = [threading.Thread(target=write, args=(store, 100 * n)) for n in range(4)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        done.set()
        watcher.join()
        assert not errors
        assert not above
        assert store.check().clean
        assert store.stats().bytes == disk_usage(root)


def test_racing_writers_of_one_key_store_it_once(store, root):
    results: list[bool] = []
    threads = [threading.Thread(target=lambda: results.append(put(store, 1))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [False, False, False, True]
    assert holds(store, 1)
    assert disk_usage(root) == FILE


def test_threads_may_do_everything_at_once(root):
    errors: list[BaseException] = []

    def work(store: ChunkStore, seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for i in rng.integers(0, 12, 40).tolist():
                with_error = store.open([key_for(i)])[0]
                if isinstance(with_error, OpenEntry):
                    with with_error as entry:
                        got = [slab for [slab] in store.open_layers([entry])]
                    if not all(np.array_equal(a, b) for a, b in zip(got, slabs_for(i), strict=True)):
                        raise ValueError(i)
                else:
                    put(store, i)
                if rng.random() < 0.1:
                    store.delete([key_for(i)])
        except BaseException as error:
            errors.append(error)

    with ChunkStore(root, capacity_bytes=10 * FILE, ram_bytes=12 * SLAB) as store:
        threads = [threading.Thread(target=work, args=(store, seed)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert store.check().clean
        assert disk_usage(root) <= 10 * FILE


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_nothing_behind(store, root, monkeypatch, code):
    put(store, 0)
    calls = iter(range(100))
    real = os.pwrite

    def pwrite(fd, data, offset):
        if next(calls) == 1:
            raise OSError(code, os.strerror(code))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(StoreFullError, match="free some space"):
        put(store, 1)
    monkeypatch.undo()
    assert disk_usage(root) == FILE
    assert holds(store, 0)
    assert put(store, 1)
    assert store.check().clean


def test_a_disk_that_cannot_preallocate_is_full(store, root, monkeypatch):
    def fallocate(fd, offset, length):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    with pytest.raises(StoreFullError):
        put(store, 1)
    assert not list((root / "tmp").iterdir())


def test_short_writes_are_finished(store, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:1000], offset))
    put(store, 1)
    assert holds(store, 1)


def test_a_disk_that_turns_read_only_is_named(store, monkeypatch):
    def fsync(fd):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StoreReadOnlyError):
        put(store, 1)
    monkeypatch.undo()
    assert put(store, 1)


def test_file_systems_without_hard_links(store, root, monkeypatch):
    def link(*args):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    put(store, 1)
    assert holds(store, 1)
    assert disk_usage(root) == FILE


def test_read_only(root):
    with pytest.raises(StoreFormatError, match="not a ragkv store"):
        ChunkStore(root, capacity_bytes=MIB, ram_bytes=0, read_only=True)
    with ChunkStore(root, capacity_bytes=MIB, ram_bytes=0) as store:
        put(store, 1)
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.name != "lock.mdb"}
    with ChunkStore(root, capacity_bytes=1, ram_bytes=MIB, read_only=True) as store:
        assert store.lookup([key_for(1)])[0] is not None
        assert holds(store, 1)
        assert store.check().clean
        for refused in (lambda: put(store, 2), lambda: store.delete([key_for(1)]), store.clear):
            with pytest.raises(StoreReadOnlyError, match="read_only"):
                refused()
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.name != "lock.mdb"} == before


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="file"):
        ChunkStore(tmp_path / "file" / "kv", capacity_bytes=MIB, ram_bytes=0)


def test_a_folder_that_cannot_be_written_points_to_read_only(root, monkeypatch):
    ChunkStore(root, capacity_bytes=MIB, ram_bytes=0).close()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(StoreReadOnlyError, match="read_only=True"):
        ChunkStore(root, capacity_bytes=MIB, ram_bytes=0)


def test_foreign_folders_are_left_alone(tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(StoreFormatError, match="not empty"):
        ChunkStore(tmp_path, capacity_bytes=MIB, ram_bytes=0)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(("text", "match"), [('{"format": 99}', "99"), ("{", "damaged"), ("[]", "damaged")])
def test_other_formats_are_refused(root, text, match):
    ChunkStore(root, capacity_bytes=MIB, ram_bytes=0).close()
    (root / "ragkv-store.json").write_text(text)
    with pytest.raises(StoreFormatError, match=match):
        ChunkStore(root, capacity_bytes=MIB, ram_bytes=0)


@pytest.mark.parametrize("setting", [{"capacity_bytes": 0}, {"ram_bytes": -1}, {"threads": 0}])
def test_bad_settings_are_named(root, setting):
    with pytest.raises(StoreError, match=next(iter(setting))):
        ChunkStore(root, **{"capacity_bytes": MIB, "ram_bytes": 0, **setting})


def test_everything_is_private_to_the_user(store, root):
    put(store, 1)
    for path in [root, *root.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode & 0o077 == 0, f"{path} {mode:o}"


def test_other_models_never_match_and_are_counted(store):
    put(store, 1, model="one")
    put(store, 2, model="one")
    put(store, 1, model="two")
    assert store.stats().models == {"one": 2, "two": 1}
    assert store.lookup([key_for(1, model="three"), key_for(1, model="two", salt=b"x")]) == [None, None]


def test_two_stores_of_one_process_share_the_folder(root):
    with ChunkStore(root, capacity_bytes=MIB, ram_bytes=0) as one:
        with ChunkStore(root, capacity_bytes=MIB, ram_bytes=0) as two:
            put(one, 1)
            assert holds(two, 1)
        assert holds(one, 1)
        put(one, 2)
    with ChunkStore(root, capacity_bytes=MIB, ram_bytes=0) as again:
        assert again.stats().entries == 2


def test_a_closed_store_says_so(root):
    store = ChunkStore(root, capacity_bytes=MIB, ram_bytes=0)
    put(store, 1)
    entry = open_one(store, 1)
    layers = store.open_layers([entry], depth=1)
    next(layers)
    store.close()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        list(layers)
    for use in (lambda: store.lookup([key_for(1)]), lambda: put(store, 2), store.stats):
        with pytest.raises(StoreError, match="closed"):
            use()
    entry.close()


def test_a_file_removed_by_hand_is_a_miss(store, root):
    put(store, 1)
    entry_file(root, 1).unlink()
    [answer] = store.open([key_for(1)])
    assert isinstance(answer, StoreError)
    assert not isinstance(answer, CorruptEntryError)
    assert key_for(1) not in store
    assert put(store, 1)
    assert holds(store, 1)


def test_a_file_where_the_folder_should_be_is_told(tmp_path):
    (tmp_path / "file").write_text("mine")
    for root in (tmp_path / "file", tmp_path / "file" / "store"):
        with pytest.raises(StoreError, match="a file is where the store needs a folder"):
            ChunkStore(root, capacity_bytes=2**20, ram_bytes=0)
    assert (tmp_path / "file").read_text() == "mine"
