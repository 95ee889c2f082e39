"""Free blocks: taken in few runs, merged again, never handed out twice."""

from __future__ import annotations

import random

import pytest

from ragkv.blocks import FreeBlocks, runs
from ragkv.errors import RagkvError


def test_takes_the_smallest_run_that_holds_all():
    free = FreeBlocks(20)
    taken = free.take(20)
    assert taken is not None
    free.give(range(2, 8))
    free.give(range(12, 15))
    assert free.take(3) == [12, 13, 14]
    assert free.take(3) == [2, 3, 4]


def test_goes_on_where_the_last_block_ends():
    free = FreeBlocks(20)
    assert free.take(4) == [0, 1, 2, 3]
    assert free.take(4) == [4, 5, 6, 7]
    free.give([0, 1, 2, 3])
    assert free.take(2, after=7) == [8, 9]
    assert free.take(2, after=7) == [0, 1]


def test_cuts_up_only_what_it_must():
    free = FreeBlocks(12)
    free.take(12)
    free.give([0, 1, 2, 6, 7, 9])
    assert free.take(5) == [0, 1, 2, 6, 7]


def test_takes_nothing_where_too_few_are_free():
    free = FreeBlocks(3)
    assert free.take(4) is None
    assert free.free == 3
    assert free.take(0) == []


@pytest.mark.parametrize("again", [[3], [-1], [7, 8], [2, 2]])
def test_refuses_what_was_not_taken(again):
    free = FreeBlocks(8)
    free.take(3)
    with pytest.raises(RagkvError):
        free.give(again)


def test_any_order_of_taking_and_giving_keeps_all_blocks_once():
    chooser, free, held = random.Random(5), FreeBlocks(64), []
    for _ in range(3000):
        if held and chooser.random() < 0.5:
            free.give(held.pop(chooser.randrange(len(held))))
        elif taken := free.take(chooser.randrange(12), chooser.choice([None, chooser.randrange(64)])):
            held.append(taken)
        assert free.check(block for taken in held for block in taken) == []


def test_runs_are_the_consecutive_stretches():
    assert runs([4, 5, 6, 1, 2, 9]) == [(4, 3), (1, 2), (9, 1)]
    assert runs([]) == []
