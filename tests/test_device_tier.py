"""The device tier: a byte cap that holds, entries that are whole or not there, nothing kept that the store gave up."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch

from ragkv import device_tier
from ragkv.device_tier import DeviceTier, device_capacity
from ragkv.store import ChunkStore, EntryHeader, Geometry
from tests.store_kit import FILE, entry_file, flip, key_for, open_one, put

CPU = torch.device("cpu")
GEOMETRY = Geometry(layers=2, kv_heads=1, head_dim=16, dtype="float32")
ENTRY = 2 * 512  # four tokens fill a row: 4 tokens x 16 x 4 bytes, K and V


def header(i: int, tokens: int = 4) -> EntryHeader:
    return EntryHeader(key_for(i), GEOMETRY, tokens, "m")


def tier(entries: int) -> DeviceTier:
    return DeviceTier(entries * ENTRY, CPU)


def fill(tier: DeviceTier, *numbers: int) -> list[bytes]:
    """A blend over these entries that completes; says which were taken in."""
    with closing(tier.lease(header(i) for i in numbers)) as lease:
        for i in numbers:
            if (memory := lease.fills.get(key_for(i))) is not None:
                memory.fill_(i)
        taken = list(lease.fills)
        lease.commit()
    return taken


def test_what_one_blend_brought_the_next_finds():
    kept = tier(2)
    assert fill(kept, 1, 2) == [key_for(1), key_for(2)]
    with closing(kept.lease([header(1), header(2), header(3)])) as lease:
        assert {key: int(rows[1, 7]) for key, rows in lease.hits.items()} == {key_for(1): 1, key_for(2): 2}
        assert not lease.fills  # full, and what is held makes no room
    assert (len(kept), kept.nbytes, kept.hits) == (2, 2 * ENTRY, 2)


def test_rows_hold_a_slab_each_and_begin_aligned():
    odd = EntryHeader(key_for(1), GEOMETRY, 5, "m")
    with closing(tier(4).lease([odd])) as lease:
        memory = lease.fills[key_for(1)]
        assert memory.shape == (2, 1024)
        assert memory.dtype == torch.uint8
        assert odd.slab_bytes == 640


def test_a_prefill_that_fails_leaves_nothing():
    kept = tier(2)
    lease = kept.lease([header(1)])
    assert kept.nbytes == ENTRY
    lease.close()
    lease.close()
    assert (len(kept), kept.nbytes) == (0, 0)
    assert fill(kept, 1, 2)


def test_the_cap_holds_and_the_least_used_leaves():
    kept = tier(3)
    fill(kept, 1, 2, 3)
    fill(kept, 1, 3)
    fill(kept, 4)
    assert [key_for(i) in kept for i in (1, 2, 3, 4)] == [True, False, True, True]
    assert kept.nbytes == 3 * ENTRY


def test_a_prompt_larger_than_the_tier_does_not_wash_itself_out():
    kept = tier(2)
    assert fill(kept, 1, 2, 3) == [key_for(1), key_for(2)]
    for _ in range(3):
        assert fill(kept, 1, 2, 3) == []
    assert kept.hits == 6


def test_what_is_used_stays_while_one_hit_entries_pass():
    kept = tier(4)
    fill(kept, 1, 2)
    for _ in range(3):
        fill(kept, 1, 2)
    for i in range(10, 40):
        fill(kept, i)
        assert kept.nbytes <= kept.capacity
    assert key_for(1) in kept
    assert key_for(2) in kept


def test_a_dropped_entry_is_given_to_nobody():
    kept = tier(2)
    fill(kept, 1, 2)
    kept.drop(key_for(1))
    kept.drop(key_for(9))
    assert (len(kept), kept.nbytes) == (1, ENTRY)
    with closing(kept.lease([header(1)])) as lease:
        assert not lease.hits


def test_an_entry_dropped_while_it_is_filled_in_is_not_kept():
    kept = tier(2)
    lease = kept.lease([header(1), header(2)])
    kept.drop(key_for(1))
    lease.commit()
    assert key_for(1) not in kept
    assert key_for(2) in kept
    assert kept.nbytes == ENTRY


def test_what_a_lease_holds_outlives_its_entry():
    kept = tier(1)
    fill(kept, 7)
    with closing(kept.lease([header(7)])) as lease:
        kept.clear()
        assert int(lease.hits[key_for(7)][0, 0]) == 7
    assert fill(kept, 8)


def test_two_leases_share_the_cap_and_a_key_is_kept_once():
    kept = tier(2)
    one, other = kept.lease([header(1)]), kept.lease([header(1), header(2)])
    assert list(one.fills) == list(other.fills) == [key_for(1)]
    one.commit()
    other.commit()
    assert (len(kept), kept.nbytes) == (1, ENTRY)


def test_without_capacity_nothing_is_kept():
    off = DeviceTier(0, CPU)
    with closing(off.lease([header(1)])) as lease:
        assert not lease.fills
        lease.commit()
    assert len(off) == 0


def test_a_full_device_only_keeps_the_tier_small(monkeypatch: pytest.MonkeyPatch):
    def no_memory(*shape, **options):
        raise torch.OutOfMemoryError("no memory")

    kept = tier(2)
    with monkeypatch.context() as patched:
        patched.setattr(device_tier.torch, "empty", no_memory)
        assert fill(kept, 1) == []
    assert kept.nbytes == 0
    assert fill(kept, 1)


def test_capacity_is_off_on_a_cpu_unless_asked_for(monkeypatch: pytest.MonkeyPatch):
    assert device_capacity(None, CPU) == 0
    assert device_capacity(123, CPU) == 123
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    assert device_capacity(None, torch.device("cuda")) == 100
    assert device_capacity(0, torch.device("cuda")) == 0


def test_the_store_says_what_it_gave_up(tmp_path: Path):
    gone: list[bytes] = []
    with ChunkStore(tmp_path, capacity_bytes=8 * FILE, ram_bytes=0, on_gone=gone.append) as store:
        for i in range(12):
            put(store, i)
        evicted = [i for i in range(12) if key_for(i) in gone]
        kept = [i for i in range(12) if i not in evicted]
        assert evicted
        assert len(kept) >= 3
        gone.clear()
        store.delete([key_for(kept[0])])
        flip(entry_file(tmp_path, kept[1]), 8 * 5000)
        with open_one(store, kept[1]) as entry:
            list(store.open_layers([entry]))
        open_one(store, kept[2]).reject()
        assert gone == [key_for(i) for i in kept[:3]]
