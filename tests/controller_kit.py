"""Machines that only exist on paper: what a prefill takes on them is simulated layer by layer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from ragkv.controller import Actual, Choice, Controller, Reading
from ragkv.costs import Curve, Estimate, Machine, Pass, Piece, Work, passes


def simulate(steps: Sequence[Pass], seconds: Sequence[float], *, layers: int, read: float, place: float, depth: int):
    """(time of the end, time waited for the reader) of passes whose layers take ``seconds`` each.

    One layer is read after the other, ``read`` each, none before the layer ``depth`` before it is asked for.
    """
    asked: list[float] = []
    arrived: list[float] = []
    now = waited = 0.0

    def arrive(layer: int) -> float:
        while len(arrived) <= layer:
            j = len(arrived)
            free = asked[j - depth] if j >= depth else 0.0
            arrived.append(max(arrived[-1] if arrived else 0.0, free) + read)
        return arrived[layer]

    for step, spent in zip(steps, seconds, strict=True):
        for layer in range(step.first, step.end):
            while len(asked) <= layer:
                asked.append(now)
                there = arrive(len(asked) - 1)
                waited += max(0.0, there - now)
                now = max(now, there) + place
            now += spent
    return now, waited


@dataclass
class World:
    """The truth: seconds per row, per pair of row and key, and per byte of every tier; ``noise`` around it."""

    row: float = 2e-6
    pair: float = 1e-10
    launch: float = 2e-4
    place: float = 1 / 50e9
    tiers: dict[str, float] = field(default_factory=lambda: {"ssd": 1 / 3e9, "remote": 1 / 1e9})
    layers: int = 32
    overlapped: bool = True
    depth: int = 2
    noise: float = 0.0
    random: random.Random = field(default_factory=lambda: random.Random(0))

    def curve(self) -> Curve:
        return Curve([(n, max(self.launch, self.row * n)) for n in (16, 64, 256, 1024, 4096)], self.pair)

    def machine(self) -> Machine:
        """What measuring it at start-up gives: no disk, no network."""
        tiers = {"ram": Estimate(self.place)}
        return Machine(self.layers, self.curve(), self.curve(), self.launch, tiers, self.overlapped, self.depth)

    def full(self, work: Work) -> float:
        return self.launch + self.layers * self.layer(work.length, work.length**2 / 2)

    def layer(self, rows: float, pairs: float) -> float:
        return max(self.launch, self.row * rows) + self.pair * pairs

    def run(self, work: Work, loaded: Sequence[int]) -> Actual:
        """What a prefill that loads these pieces takes."""
        shake = 1 + self.random.uniform(-self.noise, self.noise)
        if not loaded:
            spent = self.full(work) * shake
            return Actual(spent, recompute=spent)
        pieces = [work.pieces[i] for i in loaded]
        nbytes = {tier: sum(p.nbytes for p in pieces if p.tier == tier) for tier in self.tiers}
        placing = sum(p.nbytes for p in pieces) * self.place
        readings = [Reading(t, n, n * self.tiers[t] * shake) for t, n in nbytes.items() if n]
        waits = [one.seconds for one in readings] + [placing * self.overlapped]
        place = 0.0 if self.overlapped else placing / self.layers
        steps = passes(work, pieces, self.layers)
        spent = [self.layer(s.rows, s.pairs) * shake for s in steps]
        total, waited = simulate(
            steps, spent, layers=self.layers, read=max(waits) / self.layers, place=place, depth=self.depth
        )
        parts = {"select": 0.0, "recompute": self.launch}
        for step, one in zip(steps, spent, strict=True):
            parts[step.part] += one * (step.end - step.first)
        total += self.launch
        load = total - sum(parts.values())
        return Actual(total, load, parts["select"], parts["recompute"], waited, readings)

    def best(self, work: Work, options: Sequence[Sequence[int]]) -> float:
        """What the best of these takes, in hindsight and without noise."""
        noise, self.noise = self.noise, 0.0
        times = [self.run(work, loaded).total for loaded in options]
        self.noise = noise
        return min(times)


def work(
    chunks: int = 8,
    tokens: int = 512,
    tier: str = "ssd",
    *,
    strategy: str = "question",
    ratio: float = 0.15,
    question: int = 32,
    token_bytes: int = 131_072,
    tiers: Sequence[str] = (),
    kept: Sequence[int] = (),
) -> Work:
    """A prompt of equal chunks, all on one tier, or on ``tiers``; the document context of ``kept`` is not in it."""
    where = list(tiers) or [tier] * chunks
    pieces = tuple(Piece(tokens, i * tokens, tokens * token_bytes, name, i not in kept) for i, name in enumerate(where))
    return Work(len(where) * tokens + question, pieces, strategy, ratio)


def serve(controller: Controller, world: World, job: Work) -> tuple[Choice, Actual]:
    choice = controller.choose(job)
    assert choice is not None
    actual = world.run(job, choice.loaded)
    controller.learn(choice, actual)
    if choice.beside is not None:
        piece = job.pieces[choice.beside]
        controller.hear([Reading(piece.tier, piece.nbytes, piece.nbytes * world.tiers[piece.tier])])
    return choice, actual
