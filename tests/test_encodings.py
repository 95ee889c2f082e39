"""Chunks encoded beside serving: one group after the other, whatever becomes of them."""

from __future__ import annotations

import gc
import weakref

import pytest

from ragkv import encodings
from ragkv.encodings import Encodings
from ragkv.errors import EngineClosedError


class Memory:
    """Stands for what a group's encoding holds."""


@pytest.fixture
def made(monkeypatch):
    """Encodings whose groups are numbers of steps, negative ones failing at the end; what each held."""
    held = []

    def encode(runner, steps):
        memory = Memory()
        held.append(weakref.ref(memory))
        for _ in range(abs(steps)):
            yield
        if steps < 0:
            raise RuntimeError("no memory")
        return [steps]

    monkeypatch.setattr(encodings, "encode", encode)
    return Encodings(None), held


def test_groups_are_encoded_in_turn_and_slices_end_when_told(made):
    jobs, _ = made
    told = []
    for steps in (3, 1):
        jobs.put(steps, told.append)
    jobs.advance(lambda seconds: seconds >= 0)
    assert (told, bool(jobs)) == ([], True)
    jobs.advance(lambda seconds: False)
    assert told == [[3]]
    jobs.advance(lambda seconds: False)
    assert (told, bool(jobs)) == ([[3], [1]], False)


def test_what_fails_is_told_and_holds_no_memory(made, monkeypatch):
    monkeypatch.setattr(encodings.log, "disabled", True)  # records that are kept here hold it
    jobs, held = made
    told = []
    jobs.put(-1, told.append)
    gc.disable()
    try:
        jobs.advance(lambda seconds: False)
        assert str(told[0]) == "no memory"
        assert held[0]() is None
    finally:
        gc.enable()
    assert not jobs


def test_all_are_told_that_it_is_over_each_by_an_error_of_its_own(made):
    jobs, _ = made
    told = []

    def failing(error):
        told.append(error)
        raise RuntimeError("who was told fails")

    for steps in (2, 2, 2):
        jobs.put(steps, failing)
    jobs.advance(lambda seconds: True)
    jobs.abort("the engine was closed")
    assert [type(error) for error in told] == [EngineClosedError] * 3
    assert len({id(error) for error in told}) == 3
    assert not jobs
