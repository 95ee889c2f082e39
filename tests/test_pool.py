"""The pool's bookkeeping: sharing, moving, losing and finding blocks again, with real memory under it."""

from __future__ import annotations

import random
import threading
from concurrent.futures import Future

import pytest

from ragkv.lineage import ALL, Lineage
from ragkv.pool import Table, blocks_for
from ragkv.table import Block
from tests.pool_kit import MODES, assert_holds, fill, make_pool, sound, started


def test_a_second_conversation_shares_whole_blocks():
    pool = make_pool()
    ids = list(range(40))
    one = started(pool, ids)
    two = pool.open([*range(36), 99, 98], Lineage())
    assert two.tokens == 32
    assert two.blocks == one.blocks[:2]
    assert pool.bring(two, 40)
    fill(pool, two, [*range(36), 99, 98])
    assert_holds(pool, one, ids)
    assert_holds(pool, two, [*range(36), 99, 98])
    sound(pool)


def test_the_last_token_is_computed_even_if_all_are_known():
    pool = make_pool()
    ids = list(range(32))
    started(pool, ids)
    assert pool.open(ids, Lineage()).tokens == 16


def test_what_was_blended_is_found_by_its_own_conversation_alone():
    pool = make_pool()
    ids = list(range(64))
    mine = Lineage().until(20)
    table = started(pool, ids, mine)
    pool.close(table)
    assert pool.open([*ids, 5], mine).tokens == 64
    assert pool.open([*ids, 5], Lineage()).tokens == 16
    assert pool.open([*ids, 5], Lineage().until(20)).tokens == 16


@pytest.mark.parametrize("preemption", MODES)
@pytest.mark.parametrize(("askable", "kept"), [(0, 0), (20, 1), (32, 2), (ALL, 4)])
def test_what_nobody_can_ask_for_makes_room_at_once(preemption, askable, kept):
    pool = make_pool(blocks=8, preemption=preemption)
    table = started(pool, list(range(70)), Lineage().until(20))
    assert pool.stats()["pool_free_blocks"] == 3
    pool.close(table, askable=askable)
    pool.settle()
    assert pool.stats()["pool_free_blocks"] == 8 - kept
    assert pool.stats()["host_free_blocks"] == pool.stats()["host_blocks"] - (kept if preemption == "reuse" else 0)
    assert pool.open([*range(70), 1], table.lineage).tokens == 16 * kept
    sound(pool)


def test_other_roots_share_nothing():
    pool = make_pool()
    ids = list(range(64))
    started(pool, ids, Lineage(root=b"a"))
    assert pool.open(ids, Lineage(root=b"b")).tokens == 0


@pytest.mark.parametrize("preemption", MODES[1:])
def test_parked_comes_back_from_ram(preemption):
    pool = make_pool(blocks=8, preemption=preemption)
    ids = list(range(70))
    table = started(pool, ids)
    pool.park(table)
    pool.settle()
    other = started(pool, [7] * 120)
    assert not pool.bring(table, 71)
    pool.close(other)
    pool.settle()
    assert pool.bring(table, 71)
    pool.settle()
    assert table.arrived
    assert table.tokens == 70
    assert_holds(pool, table, ids)
    sound(pool)


def test_recompute_keeps_what_nobody_took():
    pool = make_pool(blocks=8, preemption="recompute")
    table = started(pool, list(range(70)))
    pool.park(table)
    other = started(pool, [7] * 64)
    pool.close(other)
    pool.settle()
    assert pool.survey(table) == 64
    assert pool.bring(table, 71)
    assert table.tokens == 64  # the tail went first, then there was room
    sound(pool)


def test_a_second_preemption_moves_only_what_changed():
    pool = make_pool()
    ids = list(range(100))
    table = started(pool, ids, room=8)
    pool.park(table)
    pool.settle()
    moved = pool.moves.out.lane.blocks
    assert moved == 7
    assert pool.bring(table, 108)
    ids += [3] * 8
    fill(pool, table, ids)
    pool.park(table)
    pool.settle()
    assert pool.moves.out.lane.blocks == moved + 1
    assert pool.moves.back.lane.blocks == 0  # nobody took its place: it never left


def test_without_reuse_everything_moves_again():
    pool = make_pool(preemption="async")
    table = started(pool, list(range(100)), room=8)
    for round_ in (1, 2):
        pool.park(table)
        pool.settle()
        assert pool.moves.out.lane.blocks == 7 * round_
        assert pool.bring(table, 108)
        pool.settle()
        assert pool.moves.back.lane.blocks == 7 * round_


def test_what_others_use_is_not_copied_for_a_victim():
    pool = make_pool(preemption="async")
    table = started(pool, list(range(64)))
    started(pool, [*range(32), *[9] * 8])
    pool.park(table)
    pool.settle()
    assert pool.moves.out.lane.blocks == 2
    assert pool.bring(table, 64)
    pool.settle()
    assert_holds(pool, table, list(range(64)))
    sound(pool)


def test_what_has_no_room_in_ram_is_lost_and_said_to_be():
    pool = make_pool(blocks=8, host=2)
    table = started(pool, list(range(70)))
    pool.park(table)
    pool.settle()
    pool.close(started(pool, [7] * 128))
    pool.settle()
    assert pool.survey(table) == 32
    assert pool.bring(table, 71)
    sound(pool)


def test_a_finished_conversation_is_found_in_ram():
    pool = make_pool(blocks=8)
    ids = list(range(70))
    pool.close(started(pool, ids))
    pool.settle()
    pool.close(started(pool, [7] * 128))
    pool.settle()
    again = pool.open([*ids, 1], Lineage())
    assert again.tokens == 64
    assert pool.bring(again, 80)
    pool.settle()
    fill(pool, again, [*ids, 1])
    assert_holds(pool, again, [*ids, 1])


def test_growing_goes_on_behind_the_last_block():
    pool = make_pool(blocks=7)
    short, table = started(pool, [1] * 5), started(pool, [2] * 5)
    assert (short.places, table.places) == ([0], [1])
    pool.close(short)
    assert pool.grow(table, 17)
    assert table.places == [1, 2]


def test_parking_gives_back_what_nobody_else_uses():
    pool = make_pool()
    table = started(pool, list(range(64)))
    assert pool.exclusive(table) == 4
    started(pool, [*range(32), *[9] * 8])
    assert pool.exclusive(table) == 2


def test_closing_twice_frees_once():
    pool = make_pool()
    table = started(pool, list(range(40)))
    pool.close(table)
    pool.close(table)
    sound(pool)


def test_cut_leaves_shared_blocks_alone():
    pool = make_pool()
    ids = list(range(64))
    one = started(pool, ids)
    two = pool.open([*ids, 1], Lineage())
    pool.cut(two, 32)
    assert two.tokens == 32
    assert pool.bring(two, 70)
    fill(pool, two, [*range(32), *[9] * 33])
    assert_holds(pool, one, ids)
    assert pool.open([*range(32), *[9] * 33], Lineage()).blocks == two.blocks[:4]
    sound(pool)


def test_freeing_counts_what_is_on_its_way():
    pool = make_pool(blocks=8, preemption="async")
    table = started(pool, list(range(100)))
    before = pool.available
    pool.park(table)
    assert pool.available + pool.freeing >= before
    pool.settle()
    assert pool.freeing == 0
    assert pool.available == 8


def test_what_is_copied_while_in_use_frees_nothing():
    pool, go = make_pool(), threading.Event()
    pool.moves.out.lane.submit(0, lambda: go.wait(10))
    table = pool.open(ids := list(range(64)), Lineage())
    assert pool.bring(table, 64)
    fill(pool, table, ids)
    pool.close(pool.open([*ids, 1], Lineage()))
    assert pool.freeing == 0
    pool.close(table)
    assert pool.freeing == 4
    go.set()
    pool.settle()
    assert pool.freeing == 0
    assert pool.available == 16


def test_only_what_is_there_and_not_in_ram_wants_a_copy():
    assert Block(device=1, filled=3).wants_copy
    assert Block(device=1, filled=3, host=2, copied=2).wants_copy
    assert not Block(device=1, filled=3, host=2, copied=3).wants_copy
    assert not Block(device=1).wants_copy
    assert not Block(filled=3).wants_copy
    assert not Block(device=1, filled=3, storing=Future()).wants_copy


def test_loading_without_room_is_refused():
    pool = make_pool(blocks=8)
    table = started(pool, [7] * 128)
    with pytest.raises(RuntimeError):
        pool.moves.load([Block(host=1, filled=16, copied=16)])
    assert pool.available == 0
    assert_holds(pool, table, [7] * 128)


@pytest.mark.parametrize("preemption", MODES)
def test_any_life_of_many_conversations(preemption):
    chooser = random.Random(3)
    pool = make_pool(blocks=24, host=20, preemption=preemption)
    live: dict[Table, list[int]] = {}
    for step in range(1500):
        act = chooser.choice(["open", "open", "grow", "grow", "park", "bring", "close", "poll"])
        if act == "open":
            ids = [
                *range(chooser.choice([0, 32, 48])),
                *(chooser.randrange(9) for _ in range(chooser.randrange(1, 60))),
            ]
            table = pool.open(ids, Lineage(exact=chooser.choice([16, 10**6])))
            if not pool.bring(table, len(ids)):
                pool.close(table)
                continue
            pool.settle()
            fill(pool, table, ids)
            live[table] = ids
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
            elif act == "bring" and not table.resident and pool.survey(table) >= 0 and pool.bring(table, len(ids)):
                pool.settle()
                fill(pool, table, ids)
            elif act == "grow" and table.resident and pool.grow(table, len(ids) + 5):
                ids += [chooser.randrange(9) for _ in range(5)]
                fill(pool, table, ids)
        if step % 10 == 0:
            sound(pool)
            for table, ids in live.items():
                if table.resident:
                    assert_holds(pool, table, ids)
    for table in live:
        pool.close(table)
    sound(pool)
    assert pool.available == 24
    pool.shut()


def test_blocks_for():
    assert [blocks_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]
