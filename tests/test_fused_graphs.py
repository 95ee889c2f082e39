from __future__ import annotations

from ragkv.fused_graphs import MOST_ROWS, sizes_that_pay

ALL = list(range(32, MOST_ROWS + 1, 32))


def test_every_size_that_takes_less_than_the_next():
    assert sizes_that_pay(float) == ALL


def test_a_size_that_takes_longer_than_a_greater_one_is_left_out():
    ms = {size: float(size) for size in ALL} | {448: 600.0, 480: 511.0}
    assert sizes_that_pay(ms.__getitem__) == [size for size in ALL if size not in (448, 480)]


def test_where_all_take_the_same_there_is_one():
    assert sizes_that_pay(lambda size: 1.0) == [MOST_ROWS]
