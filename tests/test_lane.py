"""A lane: in order, as fast as it was, behind what it was asked before."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from ragkv.lane import Lane


class Clock:
    """Stands still but for what is told to take time."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("ragkv.lane.time", SimpleNamespace(perf_counter=lambda: self.now))

    def takes(self, seconds, result=None):
        def work():
            self.now += seconds
            return result

        return work


@pytest.fixture
def lane():
    lane = Lane("test")
    yield lane
    lane.close()


def test_what_it_waits_for_first_is_not_counted(monkeypatch, lane):
    clock = Clock(monkeypatch)
    assert lane.seconds(1) is None
    assert lane.submit(4, clock.takes(2.0, "moved"), clock.takes(100.0)).result() == "moved"
    assert lane.seconds(3) == pytest.approx(1.5)
    assert lane.blocks == 4


def test_what_was_asked_for_before_is_waited_for(monkeypatch, lane):
    clock, go = Clock(monkeypatch), threading.Event()
    lane.submit(1, clock.takes(0.5)).result()
    held = lane.submit(5, lambda: go.wait(10))
    behind = lane.submit(2, clock.takes(1.0))
    assert lane.seconds(3) == pytest.approx(0.5 * (5 + 2 + 3))
    go.set()
    held.result()
    behind.result()
    assert lane.seconds(3) == pytest.approx(1.5)


def test_a_move_that_fails_says_so_and_nothing_of_speed(monkeypatch, lane):
    clock = Clock(monkeypatch)
    lane.submit(1, clock.takes(1.0)).result()
    with pytest.raises(ZeroDivisionError):
        lane.submit(1000, lambda: 1 / 0).result()
    lane.submit(1, clock.takes(1.0)).result()
    assert lane.seconds(1) == pytest.approx(1.0)
    assert lane.blocks == 2


def test_one_move_that_was_held_up_is_no_news(monkeypatch, lane):
    clock = Clock(monkeypatch)
    for seconds in (1.0, 60.0, 1.0):
        lane.submit(1, clock.takes(seconds)).result()
    assert lane.seconds(1) == pytest.approx(1.0)
