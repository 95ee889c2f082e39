"""Idle conversations on disk: they sink, come back exact, and damage costs only what it hits."""

from __future__ import annotations

import random
import threading
from pathlib import Path

from ragkv.archive import Archive
from ragkv.lineage import Lineage
from ragkv.pool import KvPool, Table
from tests.pool_kit import CPU, SHAPE, archived, assert_holds, fill, sound, started, sunk


def test_an_idle_conversation_comes_back_from_disk(tmp_path):
    pool = KvPool(SHAPE, CPU, 8, 10, "reuse", archived(tmp_path))
    ids = list(range(100, 164))
    sunk(pool, ids)
    again = pool.open([*ids, 1], Lineage())
    assert not again.in_memory
    pool.settle()
    assert pool.survey(again) == 64
    assert pool.bring(again, 65)
    pool.settle()
    assert_holds(pool, again, ids)
    sound(pool)
    pool.shut()


def test_what_came_from_disk_is_not_written_again(tmp_path, monkeypatch):
    pool, written = KvPool(SHAPE, CPU, 8, 10, "reuse", archived(tmp_path)), []
    keep = Archive.keep
    monkeypatch.setattr(Archive, "keep", lambda self, names, *to: written.extend(names) or keep(self, names, *to))
    ids = list(range(100, 164))
    sunk(pool, ids)
    for _ in range(2):
        pool.close(pool.open([*ids, 1], Lineage()))
        pool.settle()
        pool.close(started(pool, [len(written), *[6] * 110]))
        pool.settle()
    assert len(written) == len(set(written)) > 4
    pool.shut()


def test_what_is_in_memory_is_not_read_a_second_time(tmp_path):
    pool = KvPool(SHAPE, CPU, 8, 10, "reuse", archived(tmp_path))
    ids = list(range(100, 164))
    sunk(pool, ids)
    table = pool.open([*ids, 1], Lineage())
    pool.settle()
    pool.close(table)
    for lost in (table.blocks[0], table.blocks[2]):
        pool._places.release_copy(lost)
        pool._places.settle(lost)
    before = pool.stats()["fetched_blocks"]
    again = pool.open([*ids, 1], Lineage())
    pool.settle()
    assert pool.stats()["fetched_blocks"] == before + 1
    assert again.tokens == 32
    assert again.blocks[1] is table.blocks[1]
    assert pool.bring(again, 65)
    pool.settle()
    assert_holds(pool, again, ids[:32])
    sound(pool)
    pool.shut()


def test_a_damaged_block_on_disk_is_lost_and_nothing_else(tmp_path):
    pool = KvPool(SHAPE, CPU, 8, 10, "reuse", archived(tmp_path))
    ids = list(range(100, 164))
    sunk(pool, ids)
    third = pool._sink._archive._key(Lineage().names(ids, 16)[2])
    path = Path(pool._sink._archive._store.folder.entry_path(third))
    data = bytearray(path.read_bytes())
    data[4096:4196] = bytes(100)
    path.write_bytes(data)
    again = pool.open([*ids, 1], Lineage())
    pool.settle()
    assert pool.stats()["fetched_blocks"] == 3
    assert pool.survey(again) == 32
    assert pool.bring(again, 65)
    pool.settle()
    assert_holds(pool, again, ids[:32])
    sound(pool)
    pool.shut()


def test_what_is_being_written_keeps_its_place_until_it_is(tmp_path):
    archive, go = archived(tmp_path), threading.Event()
    pool = KvPool(SHAPE, CPU, 8, 10, "reuse", archive)
    ids = list(range(100, 164))
    pool.close(started(pool, ids))
    pool.settle()
    archive._writer.submit(go.wait, 10)
    pool.close(started_meanwhile(pool, [7] * 100))  # RAM is nearly full: the first conversation is to be written
    looked_at = pool.open([*ids, 1], Lineage())
    assert all(block.keeping for block in looked_at.blocks)
    pool.close(looked_at)
    for number in range(3):  # whose blocks want places in RAM, too
        pool.close(started_meanwhile(pool, [number, *[8] * 110]))
    assert pool.check() == []
    go.set()
    pool.settle()
    for number in range(3, 6):
        pool.close(started(pool, [number, *[8] * 110]))
        pool.settle()
    again = pool.open([*ids, 1], Lineage())
    pool.settle()
    assert again.tokens == 64
    assert pool.stats()["fetched_blocks"] == 4
    assert pool.bring(again, 65)
    pool.settle()
    assert_holds(pool, again, ids)
    pool.shut()


def started_meanwhile(pool, ids):
    """A conversation, while something is being written to disk."""
    table = pool.open(ids, Lineage())
    assert pool.bring(table, len(ids))
    fill(pool, table, ids)
    pool.moves.wait()
    pool.poll()
    return table


def test_a_full_disk_only_forgets(tmp_path):
    pool = KvPool(SHAPE, CPU, 8, 10, "reuse", archived(tmp_path, 4096))
    sunk(pool, list(range(100, 164)))
    assert pool.open(list(range(100, 170)), Lineage()).tokens == 0
    sound(pool)
    pool.shut()


def test_another_process_finds_what_was_exact(tmp_path):
    ids = list(range(100, 164))
    pool = KvPool(SHAPE, CPU, 8, 10, "reuse", archived(tmp_path))
    sunk(pool, ids)
    pool.shut()
    later = KvPool(SHAPE, CPU, 8, 10, "reuse", archived(tmp_path))
    table = later.open([*ids, 1], Lineage())
    later.settle()
    assert later.survey(table) == 64
    later.shut()


def test_any_life_with_a_disk_and_any_choice(tmp_path):
    chooser = random.Random(7)
    pool = KvPool(SHAPE, CPU, 16, 12, "reuse", archived(tmp_path))
    for name in ("storing", "loading", "fetching"):
        setattr(pool.costs, name, lambda blocks, tokens: chooser.choice([0, blocks, chooser.randrange(blocks + 1)]))
    live: dict[Table, list[int]] = {}
    for step in range(600):
        act = chooser.choice(["open", "bring", "park", "close", "poll"])
        if act == "open" and len(live) < 4:
            start = 100 * chooser.randrange(9)
            ids = list(range(start, start + chooser.randrange(2, 99)))
            live[pool.open(ids, Lineage())] = ids
        elif act == "poll":
            pool.poll()
        elif live:
            table = chooser.choice(list(live))
            ids = live[table]
            if act == "close":
                pool.close(table)
                del live[table]
            elif act == "park" and table.resident:
                pool.park(table)
            elif act == "bring" and not table.resident and table.in_memory:
                pool.survey(table)
                if pool.bring(table, len(ids)):
                    pool.settle()
                    fill(pool, table, ids)
        if step % 10 == 0:
            sound(pool)
            for table, ids in live.items():
                if table.resident:
                    assert_holds(pool, table, ids)
    assert pool.stats()["fetched_blocks"] > 20
    for table in live:
        pool.close(table)
    sound(pool)
    pool.shut()
