"""Storms: requests come, go on with earlier ones, change places, are cancelled and fail, in any order and phase."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from ragkv.errors import NotFoundError
from ragkv.lineage import Lineage
from ragkv.runner import ModelRunner
from ragkv.store import ChunkStore
from tests.blend_kit import token_ids
from tests.families import make_runner
from tests.serving_kit import PATIENCE_S, Asked, Hall, alone, hall, machine

MODES = ["recompute", "blockwise", "groups", "async", "reuse"]
BLOCKS, LONGEST = 24, 120
ENDS = {"length", "cancelled"}


@pytest.fixture(scope="module")
def sound():
    return make_runner("llama")


class PoisonError(Exception):
    """What the model raises where it sees a certain token, in a prompt or in what it has said."""


@contextmanager
def poisoned(runner: ModelRunner, token: int) -> Iterator[None]:
    def look(module: torch.nn.Module, ids: tuple[torch.Tensor]) -> None:
        if bool((ids[0] == token).any()):
            raise PoisonError

    hook = runner.decoder.embed_tokens.register_forward_pre_hook(look)
    yield
    hook.remove()


class Storm:
    """So many requests through a hall with memory for a few, the disk behind it damaged all the time."""

    def __init__(self, place: Hall, folder: Path, chooser: random.Random, poison: int) -> None:
        self.place, self.folder, self.chooser, self.poison = place, folder, chooser, poison
        self.asked: list[tuple[Asked, tuple[int, ...], int]] = []
        self.beginnings = [self.clean(token_ids(48, seed=90 + i)) for i in range(3)]

    def clean(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(token for token in ids if token != self.poison)

    def blow(self, requests: int) -> None:
        for number in range(requests):
            self.ask(number)
            self.disturb()
            self.damage()
            while sum(not one.ended.is_set() for one, *_ in self.asked[-40:]) > 12:
                self.chooser.choice(self.asked)[0].ended.wait(0.01)
        assert all(one.ended.wait(PATIENCE_S) for one, *_ in self.asked)

    def ask(self, number: int) -> None:
        chooser = self.chooser
        prompt = (*self.beginning(), *self.clean(token_ids(chooser.randrange(2, 70), seed=number)))
        if chooser.random() < 0.05:
            prompt += (self.poison, 3)
        most = chooser.randrange(1, 60)
        fields = {"tenant": chooser.choice("abc"), "priority": chooser.randrange(3)}
        asked = self.place.ask(prompt, most, lineage=Lineage(b"shared"), **fields)
        if chooser.random() < 0.05:
            asked.generation.on_token = lambda *_: 1 / 0  # its caller's failure
        self.asked.append((asked, prompt, most))

    def beginning(self) -> tuple[int, ...]:
        """One that many share, or an earlier conversation."""
        if self.asked and self.chooser.random() < 0.4:
            one, prompt, _ = self.chooser.choice(self.asked)
            if len(prompt) < LONGEST and one.ends == ["length"]:
                return (*prompt, *self.clean(tuple(one.tokens)))
        return self.chooser.choice(self.beginnings)

    def disturb(self) -> None:
        """Waiting, loading, prefilling or decoding: whatever they are at."""
        loop, chooser = self.place.loop, self.chooser
        for one, *_ in chooser.sample(self.asked[-20:], min(len(self.asked), 3)):
            request = one.generation
            with suppress(NotFoundError):
                loop.reprioritize(request.id, chooser.randrange(3), request.tenant)
                if chooser.random() < 0.1:
                    loop.cancel(request.id, request.tenant)
            if chooser.random() < 0.03:
                request.stop.set()

    def damage(self) -> None:
        files = sorted(path for path in (self.folder / "entries").rglob("*") if path.is_file())
        if not files or self.chooser.random() < 0.5:
            return
        path = self.chooser.choice(files)
        with suppress(FileNotFoundError):
            if self.chooser.random() < 0.5:
                path.unlink()
            else:
                os.truncate(path, self.chooser.randrange(path.stat().st_size))

    def check(self, model: ModelRunner, samples: int) -> None:
        """Everybody heard of one end, and those who were served said what they would have said alone."""
        assert all(len(one.ends) == 1 for one, *_ in self.asked)
        served = [(one, prompt, most) for one, prompt, most in self.asked if one.ends == ["length"]]
        failed = [(one, prompt, most) for one, prompt, most in self.asked if isinstance(one.ends[0], PoisonError)]
        others = [one.ends[0] for one, *_ in self.asked if one.ends[0] not in ENDS]
        assert {type(end) for end in others} <= {PoisonError, ZeroDivisionError}
        for one, prompt, most in self.chooser.sample(served, min(samples, len(served))):
            assert one.tokens == alone(model, prompt, most)
        for one, prompt, most in self.chooser.sample(failed, min(samples, len(failed))):
            assert self.poison in (*prompt, *alone(model, prompt, most)[:-1])
            assert self.poison not in one.tokens[:-1]
        assert len(served) > len(self.asked) / 3


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def storm(root: Path, sound: ModelRunner, *, seed: int, requests: int, preemption: str) -> dict[str, float]:
    """Says what the loop counted."""
    chooser = random.Random(seed)
    poison = alone(sound, token_ids(60, seed=1), 8)[4]
    threads, files = set(threading.enumerate()), open_files()
    runner = make_runner("llama")
    room = {"blocks": BLOCKS, "host_blocks": chooser.choice([8, 30]), "max_running": 6, "machine": machine()}
    ways = {"preemption": preemption, "policy": chooser.choice(["vtc", "priority"]), "late": chooser.random() < 0.5}
    sinks = preemption == "reuse"
    with poisoned(runner, poison), hall(root, runner=runner, archived=sinks, **room, **ways) as place:
        blown = Storm(place, root / "sessions", chooser, poison)
        blown.blow(requests)
        blown.check(sound, 10)
        stats = place.loop.stats()
        assert stats["preemptions"] > 0 < stats["joined_layers"]
        place.check()
    assert set(threading.enumerate()) <= threads
    assert open_files() == files
    if sinks:
        with ChunkStore(root / "sessions", capacity_bytes=2**22, policy="lru", ram_bytes=0, threads=1) as kept:
            kept.check(fix=True)
            assert kept.check().clean
    return stats


@pytest.mark.parametrize("preemption", ["recompute", "async", "reuse"])
def test_a_storm_leaves_an_empty_and_consistent_pool(tmp_path, sound, preemption):
    storm(tmp_path, sound, seed=2, requests=60, preemption=preemption)


@pytest.mark.slow
@pytest.mark.parametrize("preemption", MODES)
def test_a_long_storm(tmp_path, sound, preemption):
    stats = storm(tmp_path, sound, seed=7, requests=2000, preemption=preemption)
    assert (stats["fetched_blocks"] > 0) == (preemption == "reuse")
