"""Entries opened from RAM: no lease, no descriptor; what becomes of them when their files go, and of their files."""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import numpy as np
import pytest

from ragkv.errors import MissingEntryError, StoreError, StoreFullError
from ragkv.store import ChunkStore, OpenEntry
from tests.store_kit import (
    FILE,
    GEOMETRY,
    SLAB,
    disk_usage,
    entry_file,
    eventually,
    holds,
    key_for,
    open_one,
    put,
    python,
    read,
    slabs_for,
)

COUNT = 4
CAPACITY = 6 * FILE + 4096


def opened(root: Path, **options: object) -> ChunkStore:
    return ChunkStore(root, **{"capacity_bytes": CAPACITY, "ram_bytes": 1 << 20, **options})


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "kv"


@pytest.fixture
def store(root):
    """COUNT entries, all of them in RAM."""
    with opened(root) as store:
        for i in range(COUNT):
            put(store, i)
            read(store, i)
        yield store


def from_ram(store: ChunkStore, i: int) -> OpenEntry:
    entry = open_one(store, i)
    assert entry.tier == "ram"
    return entry


def right(store: ChunkStore, entry: OpenEntry, i: int) -> bool:
    slabs = [slab for [slab] in store.open_layers([entry])]
    return all(np.array_equal(a, b) for a, b in zip(slabs, slabs_for(i), strict=True))


@contextlib.contextmanager
def interrupted(after: int) -> Iterator[Callable[[], bool]]:
    """Ctrl-C at the nth place where Python looks for it. Gives what says whether it did not get that far."""
    places = itertools.count(1)

    def look(frame: FrameType, event: str, arg: object) -> None:
        if event in ("call", "c_return") and next(places) == after:
            raise KeyboardInterrupt

    sys.setprofile(look)
    try:
        yield lambda: next(places) < after
    finally:
        sys.setprofile(None)


def missing(store: ChunkStore, i: int) -> bool:
    return isinstance(store.open([key_for(i)])[0], MissingEntryError)


def elsewhere(root: Path, statements: str) -> str:
    """What another process, with the store open, prints."""
    script = "import sys\nfrom ragkv.store import ChunkStore\nfrom tests.store_kit import *\n"
    script += f"with ChunkStore(sys.argv[1], capacity_bytes={CAPACITY}, ram_bytes=0) as store:\n    {statements}\n"
    with python(script, root) as process:
        printed = process.stdout.read()
        assert process.wait() == 0
    return printed.strip()


def test_opening_and_reading_takes_no_descriptor(store):
    before = sorted(os.listdir("/proc/self/fd"))
    with from_ram(store, 0) as entry, store.open_layers([entry]) as layers:
        next(layers)
        assert sorted(os.listdir("/proc/self/fd")) == before


def test_its_own_store_neither_deletes_nor_evicts_what_is_open(store, root):
    with from_ram(store, 0) as entry:
        assert store.delete([key_for(0), key_for(1)]) == 1
        assert store.clear() == COUNT - 2
        for i in range(10, 22):
            put(store, i)
        assert key_for(0) in store
        assert right(store, entry, 0)
        assert disk_usage(root) <= CAPACITY
    assert store.delete([key_for(0)]) == 1
    assert missing(store, 0)


def test_a_put_is_refused_while_all_is_open_from_ram_and_fits_afterwards(root):
    with opened(root, capacity_bytes=2 * FILE + 4096) as store:
        for i in range(2):
            put(store, i)
            read(store, i)
        with from_ram(store, 0), from_ram(store, 1):
            with pytest.raises(StoreFullError, match="close some"):
                put(store, 2)
            assert all(from_ram(store, i).header.key == key_for(i) for i in range(2))
        assert put(store, 2)
        assert disk_usage(root) <= 2 * FILE + 4096


def test_what_is_opened_while_it_is_being_evicted_stays(root, monkeypatch):
    with opened(root, policy="lru") as store:
        for i in range(6):
            put(store, i)
            read(store, i)
        is_open, entries = store._ram.is_open, []

        def look(key: bytes) -> bool:
            answer = is_open(key)
            if not entries:
                entries.append(from_ram(store, 0))
            return answer

        monkeypatch.setattr(store._ram, "is_open", look)
        assert put(store, 6)
        assert [i for i in range(7) if key_for(i) in store] == [0, 2, 3, 4, 5, 6]
        assert right(store, entries[0], 0)
        assert store.check().clean
        entries[0].close()


@pytest.mark.parametrize("comes_back", [False, True])
def test_what_left_ram_while_it_was_open_stays_on_the_disk(store, comes_back):
    with from_ram(store, 0) as entry:
        store.clear_ram()
        if comes_back:
            assert holds(store, 0)
            from_ram(store, 0).close()
        assert store.delete([key_for(0)]) == 0
        assert right(store, entry, 0)
    assert store.delete([key_for(0)]) == 1


def test_what_came_back_to_ram_and_left_again_stays_while_it_is_open(store):
    with from_ram(store, 0) as entry:
        store.clear_ram()
        assert holds(store, 0)
        store.clear_ram()
        gc.collect()
        assert store.delete([key_for(0)]) == 0
        assert right(store, entry, 0)
    assert store.delete([key_for(0)]) == 1


@pytest.mark.parametrize("evicting", [False, True])
def test_what_is_read_and_opened_just_as_it_is_removed_is_not_open_without_its_file(root, monkeypatch, evicting):
    with opened(root, policy="lru") as store:
        for i in range(6):
            put(store, i)
        remove, entries = store.folder.remove, []

        def meanwhile(key: bytes) -> bool:
            if not entries:
                assert key == key_for(0)
                assert holds(store, 0)  # what is read to the end goes into RAM
                entries.append(open_one(store, 0))
            return remove(key)

        monkeypatch.setattr(store.folder, "remove", meanwhile)
        assert put(store, 6) if evicting else store.delete([key_for(0)]) == 0
        assert key_for(0) in store
        assert entry_file(root, 0).exists()
        assert right(store, entries[0], 0)
        entries[0].close()
        assert holds(store, 0)
        assert from_ram(store, 0).tier == "ram"
        assert store.check().clean


def test_a_failed_removal_leaves_the_entry_free_to_be_opened_from_ram(store, monkeypatch):
    def broken(key: bytes) -> bool:
        raise OSError(errno.EIO, "input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(store.folder, "remove", broken)
        with pytest.raises(StoreError, match="input/output"):
            store.delete([key_for(0)])
    assert holds(store, 0)
    assert right(store, from_ram(store, 0), 0)


def test_a_reader_has_it_open_too(store):
    entry = from_ram(store, 0)
    layers = store.open_layers([entry, entry])
    entry.close()
    assert store.delete([key_for(0)]) == 0
    layers.close()
    layers.close()
    entry.close()
    assert store.delete([key_for(0)]) == 1


@pytest.mark.parametrize("tier", ["ram", "ssd"])
def test_what_nobody_closed_is_given_back_when_it_is_forgotten(store, tier):
    put(store, 8)
    i = 0 if tier == "ram" else 8
    entries: list[object] = [open_one(store, i)]
    assert entries[0].tier == tier
    entries.append(store.open_layers(entries))
    entries.append(entries)
    assert store.delete([key_for(i)]) == 0
    del entries
    # A thread that reads ahead may still hold on to it.
    eventually(lambda: gc.collect() >= 0 and store.delete([key_for(i)]) == 1)


def test_a_collection_amid_opening_gives_back_what_an_unclosed_reader_had_reserved(root):
    store = opened(root, ram_bytes=2 * GEOMETRY.layers * SLAB)
    for i in range(2):
        put(store, i)
    read(store, 1)
    layers = store.open_layers([open_one(store, 0)])
    next(layers)
    cycle: list[object] = [layers]
    cycle.append(cycle)
    del layers, cycle

    class Uses(dict[bytes, int]):
        def pop(self, *args: object) -> int:
            gc.collect()
            return super().pop(*args)

    store._ram._uses = Uses()
    thread = threading.Thread(target=store.open, args=([key_for(1)],), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert store._ram.reserve(2 * GEOMETRY.layers * SLAB)
    store.close()


def test_wherever_an_interrupt_comes_it_leaves_nothing_open(store):
    keys = [key_for(i) for i in range(COUNT)]
    entries: list[object] = []
    for after in itertools.count(1):
        with contextlib.suppress(KeyboardInterrupt), interrupted(after) as left:
            entries += store.open(keys)
        entries.clear()
        assert not any(map(store._ram.is_open, keys)), after
        if left():
            break
    assert store.delete(keys) == COUNT


def test_an_index_that_fails_leaves_nothing_open(store, root):
    data = root / "index" / "data.mdb"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store._index, "_data_bytes", data.stat().st_size + 1)  # as if it had been truncated
        with pytest.raises(StoreError, match="truncated"):
            store.open([key_for(0), key_for(9)])
    gc.collect()
    assert store.delete([key_for(0)]) == 1


def test_another_process_deletes_what_is_open_here_and_it_is_read_to_the_end(store, root):
    with from_ram(store, 0) as entry, store.open_layers([entry], depth=1) as layers:
        first = next(layers)
        assert elsewhere(root, "print(store.delete([key_for(0)]))") == "1"
        assert missing(store, 0)
        rest = list(layers)
        assert all(np.array_equal(a, b) for [a], b in zip([first, *rest], slabs_for(0), strict=True))
        assert right(store, entry, 0)
    assert store.stats().ram_entries == COUNT - 1
    assert disk_usage(root) == store.stats().bytes == (COUNT - 1) * FILE
    assert put(store, 0)
    assert holds(store, 0)
    assert store.check().clean


def test_another_process_makes_room_for_its_own(store, root):
    entries = store.open([key_for(i) for i in range(COUNT)])
    assert [entry.tier for entry in entries] == ["ram"] * COUNT
    elsewhere(root, "[put(store, i) for i in range(10, 20)]")
    assert disk_usage(root) <= CAPACITY
    assert not any(key_for(i) in store for i in range(COUNT))
    assert all(right(store, entry, i) for i, entry in enumerate(entries))
    assert all(missing(store, i) for i in range(COUNT))
    for entry in entries:
        entry.close()
    assert store.stats().ram_entries == 0
    assert store.check().clean


@pytest.mark.parametrize("how", ["gone", "link"])
def test_what_somebody_removed_by_hand_is_missing_from_then_on(store, root, how):
    path = entry_file(root, 0)
    path.unlink()
    if how == "link":
        path.symlink_to(entry_file(root, 1))
    assert missing(store, 0)
    assert key_for(0) not in store
    assert put(store, 0)
    assert holds(store, 0)


def test_one_open_answers_from_ram_and_disk_and_names_what_is_gone(store, root):
    put(store, 8)
    entry_file(root, 2).unlink()
    entries = store.open([key_for(i) for i in (0, 8, 2, 9, 0)])
    assert [getattr(entry, "tier", "none") for entry in entries] == ["ram", "ssd", "none", "none", "ram"]
    kept = [entry for entry in entries if isinstance(entry, OpenEntry)]
    for layer, slabs in enumerate(store.open_layers(kept)):
        assert all(np.array_equal(slab, slabs_for(i)[layer]) for i, slab in zip((0, 8, 0), slabs, strict=True))
    for entry in kept:
        entry.close()
    stats = store.stats()
    assert (stats.hits_ram, stats.misses) == (2, 2)
    assert store.delete([key_for(0), key_for(8)]) == 2


def test_what_is_rejected_goes_into_quarantine_and_nobody_is_given_it_again(store, root):
    before = sorted(os.listdir("/proc/self/fd"))
    other = from_ram(store, 0)
    from_ram(store, 0).reject()
    assert missing(store, 0)
    assert [path.name for path in (root / "quarantine").iterdir()] == [entry_file(root, 0).name]
    assert (store.stats().corrupt, store.stats().ram_entries) == (1, COUNT - 1)
    assert right(store, other, 0)
    other.close()
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert put(store, 0)
    assert holds(store, 0)


def test_rejecting_leaves_alone_what_another_process_has_put_there_since(store, root):
    entry = from_ram(store, 0)
    again = "store.put(key_for(0), GEOMETRY, slabs_for(7), tokens=TOKENS, model='m')"
    assert elsewhere(root, f"store.delete([key_for(0)]); print({again})") == "True"
    entry.reject()
    assert not list((root / "quarantine").iterdir())
    assert (store.stats().corrupt, store.stats().ram_entries) == (1, COUNT - 1)
    with open_one(store, 0) as fresh:
        assert fresh.tier == "ssd"
        assert right(store, fresh, 7)


def test_a_store_for_reading_only_rejects_for_itself(store, root):
    with opened(root, read_only=True) as reader:
        assert holds(reader, 0)
        from_ram(reader, 0).reject()
        assert reader.stats().ram_entries == 0
        assert reader.stats().corrupt == 1
        with open_one(reader, 0) as entry:
            assert entry.tier == "ssd"
    assert entry_file(root, 0).exists()


def test_uses_from_ram_keep_an_entry_on_the_disk_and_in_ram(root):
    ram = 3 * GEOMETRY.layers * SLAB
    with opened(root, policy="lru", ram_bytes=ram) as store:
        for i in range(6):
            put(store, i)
        for i in range(3):
            read(store, i)
        for _ in range(3):
            from_ram(store, 0).close()
        for i in range(3, 6):
            read(store, i)
            assert store.stats().ram_bytes <= ram
        from_ram(store, 0).close()
        for i in range(10, 15):
            put(store, i)
        assert [i for i in range(6) if key_for(i) in store] == [0]


def test_the_cap_of_ram_holds_while_its_entries_are_open(root):
    ram = 2 * GEOMETRY.layers * SLAB
    with opened(root, ram_bytes=ram) as store:
        for i in range(6):
            put(store, i)
        entries = []
        for i in range(6):
            read(store, i)
            entries.append(from_ram(store, i))
            assert store.stats().ram_bytes <= ram
        assert all(right(store, entry, i) for i, entry in enumerate(entries))
        with pytest.raises(StoreFullError):
            put(store, 9)
        for entry in entries:
            entry.close()
        assert put(store, 9)


def test_a_source_closed_twice_gives_back_its_own_lease_alone(store):
    with from_ram(store, 0) as entry:
        source = entry.source()
        source.close()
        source.close()
        assert store.delete([key_for(0)]) == 0
        with pytest.raises(StoreError, match="closed"):
            source.share()
    assert store.delete([key_for(0)]) == 1


def test_a_closed_entry_is_not_shared(store):
    entry = from_ram(store, 0)
    entry.close()
    entry.close()
    with pytest.raises(StoreError, match="closed"):
        entry.source()
    assert store.delete([key_for(0)]) == 1
