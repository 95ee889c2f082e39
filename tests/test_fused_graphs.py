from __future__ import annotations

import pytest

from ragkv.fused_graphs import MOST_ROWS, LayerGraphs

ALL = list(range(32, MOST_ROWS + 1, 32))


def sizes(monkeypatch: pytest.MonkeyPatch, ms: dict[int, float]) -> list[int]:
    monkeypatch.setattr(LayerGraphs, "_time", lambda self, room, size: ms[size])
    return LayerGraphs._sizes_that_pay(object.__new__(LayerGraphs), None)


def test_every_size_that_takes_less_than_the_next(monkeypatch):
    assert sizes(monkeypatch, {size: float(size) for size in ALL}) == ALL


def test_a_size_that_takes_longer_than_a_greater_one_is_left_out(monkeypatch):
    ms = {size: float(size) for size in ALL} | {448: 600.0, 480: 511.0}
    assert sizes(monkeypatch, ms) == [size for size in ALL if size not in (448, 480)]


def test_where_all_take_the_same_there_is_one(monkeypatch):
    assert sizes(monkeypatch, dict.fromkeys(ALL, 1.0)) == [MOST_ROWS]
