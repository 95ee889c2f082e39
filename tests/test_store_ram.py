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


def test_the_least_recently_used_leaves():
    ram = RamTier(300)
    assert all(add(ram, i) for i in range(3))
    assert ram.get(key_for(0)) is not None
    assert add(ram, 3)
    assert [key_for(i) in ram for i in range(4)] == [True, False, True, True]
    assert ram.nbytes == 300


def test_many_new_entries_do_not_wash_out_what_is_used():
    ram = RamTier(600)
    for i in range(3):
        add(ram, i)
        assert all(ram.get(key_for(i)) is not None for _ in range(3))
    for i in range(10, 30):
        assert add(ram, i)
        assert ram.nbytes <= 600
    assert [key_for(i) in ram for i in range(3)] == [True] * 3


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


def test_arrays_cannot_be_written_and_outlive_their_entry():
    ram = RamTier(100)
    add(ram, 5)
    entry = ram.get(key_for(5))
    assert entry is not None
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
            ram.get(key_for(int(i)))
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
