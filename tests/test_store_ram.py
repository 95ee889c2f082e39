from __future__ import annotations

import threading

import numpy as np
import pytest

from ragkv.store import EntryHeader
from ragkv.store.ram import RamEntry, RamTier, read_only
from tests.store_kit import GEOMETRY, TOKENS, key_for


def add(ram: RamTier, i: int, nbytes: int = 100) -> bool:
    if not ram.reserve(nbytes):
        return False
    slabs = (read_only(np.full(nbytes, i, np.uint8)),)
    ram.commit(key_for(i), RamEntry(EntryHeader(key_for(i), GEOMETRY, TOKENS, "m"), slabs))
    return True


def removed(key: bytes) -> bool:
    return True


def test_the_least_recently_used_leaves():
    ram = RamTier(300)
    assert all(add(ram, i) for i in range(3))
    assert ram.open([key_for(0)]) != [None]
    assert add(ram, 3)
    assert [key_for(i) in ram for i in range(4)] == [True, False, True, True]
    assert ram.nbytes == 300


def test_many_new_entries_do_not_wash_out_what_is_used():
    ram = RamTier(600)
    for i in range(3):
        add(ram, i)
        assert all(ram.open([key_for(i)]) != [None] for _ in range(3))
    for i in range(10, 30):
        assert add(ram, i)
        assert ram.nbytes <= 600
    assert [key_for(i) in ram for i in range(3)] == [True] * 3


def test_every_use_counts():
    ram = RamTier(200)
    for i in (0, 1):
        add(ram, i)
    ram.open([key_for(0)] * 3)
    ram.open([key_for(1)])
    assert add(ram, 2)
    assert [key_for(i) in ram for i in range(3)] == [True, False, True]


def test_what_is_open_is_not_let_go_even_when_it_has_left():
    ram = RamTier(100)
    add(ram, 0)
    entries = ram.open([key_for(0), key_for(1), key_for(0)])
    assert entries[1] is None
    while any(entries):
        assert not ram.let_go(key_for(0), removed)
        entries.pop()
    assert ram.let_go(key_for(0), removed)
    assert add(ram, 2)
    held = ram.open([key_for(2)])
    assert add(ram, 3)
    assert key_for(2) not in ram
    assert not ram.let_go(key_for(2), removed)
    assert ram.let_go(key_for(3), removed)
    assert len(ram) == ram.nbytes == 0
    assert held


def test_what_is_open_stays_open_however_often_it_leaves_and_comes_back():
    ram = RamTier(100)
    add(ram, 0)
    first = ram.open([key_for(0)])
    for _ in range(3):
        ram.clear()
        add(ram, 0)
        assert ram.open([key_for(0)])
        assert not ram.let_go(key_for(0), removed)
    assert first.pop()
    assert ram.let_go(key_for(0), removed)


def test_what_is_being_removed_does_not_come_back_before_it_is_gone():
    ram = RamTier(100)

    def remove(key: bytes) -> bool:
        assert add(ram, 0)
        return ram.open([key_for(0)]) == [None]

    assert ram.let_go(key_for(0), remove)
    assert ram.reserve(100)  # nothing of the refused one is left
    ram.release(100)
    assert add(ram, 0)
    assert ram.open([key_for(0)]) != [None]


def test_of_what_was_open_once_nothing_is_kept():
    ram = RamTier(1000)
    for i in range(10):
        add(ram, i)
        ram.open([key_for(i)])
    ram.settle()
    assert not ram._held


def test_what_never_fits_does_not_wash_out_the_rest():
    ram = RamTier(300)
    add(ram, 0)
    assert not add(ram, 1, nbytes=301)
    assert key_for(0) in ram


def test_reservations_count():
    ram = RamTier(300)
    assert ram.reserve(250)
    assert not add(ram, 0)
    ram.release(250)
    assert add(ram, 0)


def test_a_reservation_comes_back_in_the_middle_of_something_else():
    ram = RamTier(100)
    assert ram.reserve(100)

    def collected() -> None:
        with ram._lock:
            ram.release(100)

    thread = threading.Thread(target=collected, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert ram.reserve(100)


def test_arrays_cannot_be_written_and_outlive_their_entry():
    ram = RamTier(100)
    add(ram, 5)
    [found] = ram.open([key_for(5)])
    assert found is not None
    entry, _ = found
    with pytest.raises(ValueError, match="read-only"):
        entry.slabs[0][0] = 1
    ram.clear()
    assert len(ram) == ram.nbytes == 0
    assert (entry.slabs[0] == 5).all()


def test_many_threads_never_exceed_the_cap():
    ram = RamTier(1000)
    above: list[int] = []

    def work(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, 30, 300):
            add(ram, int(i), nbytes=100)
            ram.open([key_for(int(i))])
            if ram.nbytes > 1000:
                above.append(ram.nbytes)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not above
    assert ram.nbytes == 100 * len(ram) <= 1000
    assert ram.reserve(1000)  # nothing of the reservations leaked
