"""Drives a serving loop with a workload: submits what is due, stamps tokens, reassigns priorities, ends in time."""

from __future__ import annotations

import heapq
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ragkv.errors import NotFoundError, QueueFullError
from ragkv.eval.priorities import PriorityTrace
from ragkv.eval.workloads import Ask, Workload

_TICK_S = 0.004
_DRAIN_S = 20.0
Say = Callable[[str, int, int], None]


class Served(Protocol):
    """A loop's own request."""

    id: str
    tenant: str
    plan: Any  # its ``ids`` are the whole prompt
    known_tokens: int


class Loop(Protocol):
    """What is driven; :class:`ragkv.loop.EngineLoop` is one.

    ``stats`` are counters that only grow: steps, step_seconds, scheduler_seconds, idle_seconds, preemptions,
    swap_in_bytes, swap_out_bytes, prefix_hit_tokens.
    """

    def submit(self, generation: Any) -> None: ...
    def reprioritize(self, request_id: str, priority: int, tenant: str = "") -> None: ...
    def cancel(self, request_id: str, tenant: str = "") -> None: ...
    def stats(self) -> Mapping[str, float]: ...


@dataclass(eq=False)
class Life:
    """What became of a request; times are seconds of one clock, ``due`` when it should have come.

    ``fate``: done, refused (the queue was full), failed, or unfinished when the run ended.
    """

    ask: Ask
    due: float
    prompt_tokens: int
    priority: int = 0
    known_tokens: int = 0
    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    ended: float | None = None
    fate: str = "unfinished"
    why: str = ""


@dataclass(frozen=True)
class Drive:
    """A run: ``lives`` in the order of submission, from ``started`` to ``ended``; what the loop's counters grew by.

    Requests that never came, because the run had to end, are not among ``lives``.
    """

    lives: Sequence[Life]
    started: float
    ended: float
    counters: Mapping[str, float]

    @property
    def seconds(self) -> float:
        return self.ended - self.started


@dataclass(frozen=True)
class Callbacks:
    """Called on the engine's thread."""

    on_token: Callable[[int], None]
    on_finish: Callable[[str], None]
    on_error: Callable[[Exception], None]


# A loop's own request of an ask, from the conversation so far, what is new of the prompt, and a priority.
Make = Callable[[Ask, Sequence[int], Sequence[int], int, Callbacks], Served]


def piece_ids(seed: int, count: int, vocab: int) -> list[int]:
    """The same seed gives the same ids, and a longer piece begins with a shorter one's."""
    ids: list[int] = np.random.default_rng(seed).integers(vocab, size=count).tolist()
    return ids


class Driver:
    """One run of a workload. ``frequency``: updates of priorities per step of the engine."""

    def __init__(
        self,
        loop: Loop,
        make: Make,
        workload: Workload,
        *,
        vocab: int,
        seed: int = 0,
        frequency: float = 0.02,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._loop, self._make, self._vocab, self._clock = loop, make, vocab, clock
        self._asks, self._frequency = workload.asks, frequency
        self._trace = PriorityTrace(workload.updates, len(workload.asks), seed) if workload.updates else None
        self._next = {ask.after: ask for ask in workload.asks if ask.after is not None}
        self._due = [(ask.at, ask.number) for ask in workload.asks if ask.after is None]
        heapq.heapify(self._due)
        self._ended: queue.SimpleQueue[Life] = queue.SimpleQueue()
        self._live: dict[int, tuple[Served, Life]] = {}
        self._said: dict[int, list[int]] = {}
        self._lives: list[Life] = []
        self._done = 0

    def run(self, seconds: float, say: Say = lambda stage, done, total: None) -> Drive:
        """Until all is answered, or for so many seconds; what runs then is cancelled."""
        before = dict(self._loop.stats())
        self._started = self._clock()
        until = self._started + seconds
        while (self._due or self._live) and self._clock() < until:
            self._submit_due()
            self._reassign()
            self._wait(until)
            say("requests", self._done, len(self._asks))
        ended = self._clock()
        after = dict(self._loop.stats())
        self._abandon()
        counters = {name: after[name] - before.get(name, 0.0) for name in after}
        return Drive(self._lives, self._started, ended, counters)

    def _submit_due(self) -> None:
        while self._due and self._due[0][0] <= self._clock() - self._started:
            at, number = heapq.heappop(self._due)
            self._submit(self._asks[number], self._started + at)

    def _submit(self, ask: Ask, due: float) -> None:
        said = self._said.pop(ask.after, []) if ask.after is not None else []
        new = [token for piece in ask.pieces for token in piece_ids(*piece, self._vocab)]
        priority = int(self._trace.now[ask.number]) if self._trace else 0
        life = Life(ask, due, 0, priority)
        self._lives.append(life)
        generation = self._make(ask, said, new, priority, self._callbacks(life))
        life.prompt_tokens = len(generation.plan.ids)
        if ask.number in self._next:
            self._said[ask.number] = list(generation.plan.ids)
        self._live[ask.number] = generation, life
        try:
            self._loop.submit(generation)
        except QueueFullError as error:
            life.fate, life.why, life.ended = "refused", str(error), self._clock()
            self._ended.put(life)

    def _callbacks(self, life: Life) -> Callbacks:
        clock, times, tokens = self._clock, life.times, life.tokens

        def on_token(token: int) -> None:
            times.append(clock())
            tokens.append(token)

        def on_finish(reason: str) -> None:
            life.fate = "unfinished" if reason == "cancelled" else "done"
            life.ended = clock()
            self._ended.put(life)

        def on_error(error: Exception) -> None:
            life.fate, life.why, life.ended = "failed", repr(error), clock()
            self._ended.put(life)

        return Callbacks(on_token, on_finish, on_error)

    def _reassign(self) -> None:
        if self._trace is None:
            return
        updates = int(self._loop.stats()["steps"] * self._frequency)
        if updates <= self._trace.updates:
            return
        priorities = self._trace.advance(updates)
        for number, (generation, life) in self._live.items():
            if life.ended is None and life.priority != priorities[number]:
                life.priority = int(priorities[number])
                with suppress(NotFoundError):  # it ended just now
                    self._loop.reprioritize(generation.id, life.priority, generation.tenant)

    def _wait(self, until: float) -> None:
        """For an answer, the next arrival or the next look at the priorities, whichever is first."""
        now = self._clock()
        pause = min(_TICK_S if self._trace else 0.05, until - now)
        if self._due:
            pause = min(pause, self._started + self._due[0][0] - now)
        if pause <= 0:
            return
        with suppress(queue.Empty):
            self._settle(self._ended.get(timeout=pause))
            while True:
                self._settle(self._ended.get_nowait())

    def _settle(self, life: Life) -> None:
        ask = life.ask
        generation, _ = self._live.pop(ask.number)
        life.known_tokens = generation.known_tokens
        self._done += 1
        turn = self._next.get(ask.number)
        if turn is None or life.ended is None:
            return
        if life.fate == "done":
            self._said[ask.number] += life.tokens
            heapq.heappush(self._due, (life.ended - self._started + turn.at, turn.number))
        else:
            self._said.pop(ask.number)  # the conversation ends here

    def _abandon(self) -> None:
        """Cancel what runs, and wait until the loop has let go of it."""
        self._due.clear()
        for generation, _ in self._live.values():
            with suppress(NotFoundError):  # as above
                self._loop.cancel(generation.id, generation.tenant)
        with suppress(queue.Empty):
            while self._live:
                self._settle(self._ended.get(timeout=_DRAIN_S))
                self._due.clear()
