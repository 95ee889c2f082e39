"""Moved, computed again or kept: what the pool does with what the costs say."""

from __future__ import annotations

import pytest

from ragkv.lineage import Lineage
from ragkv.pool import KvPool, blocks_for
from tests.pool_kit import CPU, MODES, SHAPE, archived, assert_holds, fill, make_pool, sound, started, sunk


def computes(pool, seconds):
    """Have a prefill take ``seconds`` a token, as far as the pool was told."""
    for tokens in (16, 64, 256) * 9:
        pool.costs.computed(tokens, tokens * seconds)


NEVER, AT_ONCE = 1e9, 1e-12


@pytest.mark.parametrize(("seconds", "tokens"), [(AT_ONCE, 0), (NEVER, 64)])
def test_what_is_on_disk_is_fetched_where_that_is_sooner(tmp_path, seconds, tokens):
    pool = KvPool(SHAPE, CPU, 8, 10, "reuse", archived(tmp_path))
    first, second = list(range(100, 164)), list(range(200, 264))
    sunk(pool, first)
    started_again = pool.open([*first, 1], Lineage())
    pool.settle()
    assert pool.bring(started_again, 65)  # disk and RAM are measured now
    pool.close(started_again)
    sunk(pool, second)
    computes(pool, seconds)
    before = pool.stats()
    again = pool.open([*second, 1], Lineage())
    assert again.tokens == tokens
    pool.settle()
    after = pool.stats()
    assert after["fetched_blocks"] - before["fetched_blocks"] == tokens // 16
    assert after["recomputed_blocks"] - before["recomputed_blocks"] == 4 - tokens // 16
    assert pool.bring(again, 65)
    pool.settle()
    fill(pool, again, [*second, 1])
    assert_holds(pool, again, [*second, 1])
    sound(pool)
    pool.shut()


def away(pool, ids, lineage=None):
    """A parked conversation that is in RAM alone, and a pool that has measured both ways."""
    for _ in range(2):
        table = started(pool, ids, lineage)
        pool.park(table)
        pool.settle()
        pool.close(started(pool, [7] * 128))
        pool.settle()
        assert pool.bring(table, len(ids))
        pool.settle()
        pool.park(table)
        pool.settle()
        pool.close(started(pool, [8] * 128))
        pool.settle()
    assert not table.places
    return table


@pytest.mark.parametrize(("seconds", "tokens"), [(AT_ONCE, 0), (NEVER, 70)])
def test_what_is_in_ram_is_brought_where_that_is_sooner(seconds, tokens):
    pool = make_pool(blocks=8, host=64)
    ids = list(range(70))
    table = away(pool, ids)
    computes(pool, seconds)
    before = pool.stats()
    assert pool.survey(table) == tokens
    assert pool.bring(table, 71)
    pool.settle()
    after = pool.stats()
    blocks = blocks_for(tokens)
    assert after["loaded_blocks"] - before["loaded_blocks"] == blocks
    assert after["recomputed_blocks"] - before["recomputed_blocks"] == 5 - blocks
    fill(pool, table, ids)
    assert_holds(pool, table, ids)
    sound(pool)


def test_only_what_is_not_on_the_device_is_computed_again():
    pool = make_pool(blocks=8, host=64)
    ids = list(range(70))
    table = away(pool, ids)
    assert pool.bring(pool.open(ids[:33], Lineage()), 33)
    pool.settle()
    computes(pool, AT_ONCE)
    before = pool.stats()["recomputed_blocks"]
    assert pool.survey(table) == 32
    assert pool.stats()["recomputed_blocks"] == before + 3
    sound(pool)


def test_what_is_still_on_the_device_is_kept_whatever_is_sooner():
    pool = make_pool(blocks=8, host=64)
    ids = list(range(70))
    table = away(pool, ids)
    assert pool.bring(table, 70)
    pool.settle()
    pool.park(table)
    pool.settle()
    computes(pool, AT_ONCE)
    before = pool.stats()
    assert pool.survey(table) == 70
    assert pool.bring(table, 70)
    assert pool.stats()["kept_blocks"] - before["kept_blocks"] == 5
    sound(pool)


@pytest.mark.parametrize(("seconds", "copies"), [(AT_ONCE, 0), (NEVER, 1)])
def test_a_victims_last_block_is_copied_where_that_is_sooner(seconds, copies):
    pool = make_pool(blocks=8, host=64)
    table = away(pool, list(range(70)))
    assert pool.bring(table, 72)
    pool.settle()
    fill(pool, table, list(range(72)))
    computes(pool, seconds)
    before, moved = pool.stats(), pool.moves.out.lane.blocks
    pool.park(table)
    pool.settle()
    assert pool.moves.out.lane.blocks - moved == copies
    assert pool.stats()["uncopied_blocks"] - before["uncopied_blocks"] == 1 - copies
    pool.close(started(pool, [9] * 128))
    pool.settle()
    computes(pool, NEVER)
    assert pool.survey(table) == (72 if copies else 64)
    sound(pool)


def test_what_was_blended_comes_back_even_if_computing_is_sooner(tmp_path):
    pool = make_pool(blocks=8, host=64)
    table = away(pool, list(range(70)), Lineage(exact=20))
    computes(pool, AT_ONCE)
    assert pool.survey(table) == 70
    assert pool.bring(table, 72)
    pool.settle()
    fill(pool, table, list(range(72)))
    moved = pool.moves.out.lane.blocks
    pool.park(table)
    pool.settle()
    assert pool.moves.out.lane.blocks == moved + 1
    pool = KvPool(SHAPE, CPU, 8, 10, "reuse", archived(tmp_path))
    ids, mine = list(range(100, 164)), Lineage(exact=20)
    sunk(pool, ids, mine)
    pool.close(again := pool.open([*ids, 1], mine))
    pool.settle()
    sunk(pool, ids, mine)
    computes(pool, AT_ONCE)
    again = pool.open([*ids, 1], mine)
    assert again.tokens == 64
    pool.settle()
    pool.shut()


@pytest.mark.parametrize("preemption", MODES[1:4])
def test_modes_to_compare_with_always_move(preemption):
    pool = make_pool(blocks=8, host=64, preemption=preemption)
    table = away(pool, list(range(70)))
    computes(pool, AT_ONCE)
    assert pool.survey(table) == 70
    assert pool.bring(table, 70)
    pool.settle()
    moved = pool.moves.out.lane.blocks
    pool.park(table)
    pool.settle()
    assert pool.moves.out.lane.blocks == moved + 5
