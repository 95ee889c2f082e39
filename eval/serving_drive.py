"""Drives a serving loop with a workload: submits what is due, stamps tokens, reassigns priorities, ends in time."""

from __future__ import annotations

import heapq
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from ragkv.errors import NotFoundError, QueueFullError
from ragkv.eval.priorities import PriorityTrace
from ragkv.eval.workloads import Ask, Workload

_DRAIN_S = 20.0
Say = Callable[[str, int, int], None]


class Served(Protocol):
    """A loop's own request."""

    id: str
    tenant: str


class Loop(Protocol):
    """What is driven: :class:`ragkv.loop.EngineLoop`, or a server (:class:`ragkv.eval.serving_http.ServerLoop`).

    ``stats`` are counters that only grow: steps, step_seconds, scheduler_seconds, idle_seconds, preemptions,
    swap_in_bytes, swap_out_bytes, prefix_hit_tokens.
    """

    def submit(self, request: Any) -> None: ...
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
    prompt_tokens: int = 0
    priority: int = 0
    known_tokens: int = 0
    times: list[float] = field(default_factory=list)
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
    """Called on the engine's thread. ``on_finish``: why, the prompt's tokens, those of them that were found."""

    on_token: Callable[[], None]
    on_finish: Callable[[str, int, int], None]
    on_error: Callable[[Exception], None]


# A loop's own request of an ask and its priority. An ask ``after`` another goes on with what came of that.
Make = Callable[[Ask, int, Callbacks], Served]


class Driver:
    """One run of a workload.

    Args:
        frequency: updates of priorities per step of the engine.
        tick_s: how often the loop is asked for its steps, where priorities change.
    """

    def __init__(
        self,
        loop: Loop,
        make: Make,
        workload: Workload,
        *,
        seed: int = 0,
        frequency: float = 0.02,
        tick_s: float = 0.004,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._loop, self._make, self._tick_s, self._clock = loop, make, tick_s, clock
        self._asks, self._frequency = workload.asks, frequency
        self._trace = PriorityTrace(workload.updates, len(workload.asks), seed) if workload.updates else None
        self._next = {ask.after: ask for ask in workload.asks if ask.after is not None}
        self._due = [(ask.at, ask.number) for ask in workload.asks if ask.after is None]
        heapq.heapify(self._due)
        self._ended: queue.SimpleQueue[Life] = queue.SimpleQueue()
        self._live: dict[int, tuple[Served, Life]] = {}
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
        priority = int(self._trace.now[ask.number]) if self._trace else 0
        life = Life(ask, due, priority=priority)
        self._lives.append(life)
        callbacks = self._callbacks(life)
        request = self._make(ask, priority, callbacks)
        self._live[ask.number] = request, life
        try:
            self._loop.submit(request)
        except QueueFullError as error:
            callbacks.on_error(error)

    def _callbacks(self, life: Life) -> Callbacks:
        clock, times = self._clock, life.times

        def on_token() -> None:
            times.append(clock())

        def on_finish(reason: str, prompt_tokens: int, known_tokens: int) -> None:
            life.fate = "unfinished" if reason == "cancelled" else "done"
            life.prompt_tokens, life.known_tokens, life.ended = prompt_tokens, known_tokens, clock()
            self._ended.put(life)

        def on_error(error: Exception) -> None:
            life.fate = "refused" if isinstance(error, QueueFullError) else "failed"
            life.why, life.ended = repr(error), clock()
            self._ended.put(life)

        return Callbacks(on_token, on_finish, on_error)

    def _reassign(self) -> None:
        if self._trace is None:
            return
        updates = int(self._loop.stats()["steps"] * self._frequency)
        if updates <= self._trace.updates:
            return
        priorities = self._trace.advance(updates)
        for number, (request, life) in self._live.items():
            if life.ended is None and life.priority != priorities[number]:
                life.priority = int(priorities[number])
                with suppress(NotFoundError):  # it ended just now
                    self._loop.reprioritize(request.id, life.priority, request.tenant)

    def _wait(self, until: float) -> None:
        """For an answer, the next arrival or the next look at the priorities, whichever is first."""
        now = self._clock()
        pause = min(self._tick_s if self._trace else 0.05, until - now)
        if self._due:
            pause = min(pause, self._started + self._due[0][0] - now)
        if pause <= 0:
            return
        with suppress(queue.Empty):
            self._settle(self._ended.get(timeout=pause))
            while True:
                self._settle(self._ended.get_nowait())

    def _settle(self, life: Life) -> None:
        del self._live[life.ask.number]
        self._done += 1
        turn = self._next.get(life.ask.number)
        if turn is not None and life.ended is not None and life.fate == "done":  # else the conversation ends here
            heapq.heappush(self._due, (life.ended - self._started + turn.at, turn.number))

    def _abandon(self) -> None:
        """Cancel what runs, and wait until the loop has let go of it."""
        self._due.clear()
        for request, _ in self._live.values():
            with suppress(NotFoundError):  # as above
                self._loop.cancel(request.id, request.tenant)
        with suppress(queue.Empty):
            while self._live:
                self._settle(self._ended.get(timeout=_DRAIN_S))
                self._due.clear()
