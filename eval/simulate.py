"""The serving engine in discrete events: the scheduler itself, and a model of what its engine does, with times.

A turn is the engine's (:mod:`ragkv.loop`): the best prefill is advanced by so many tokens, or to its end and first
token; then everybody who decodes gets a token. Who is preempted in its prefill loses it. Blocks and moves are
:mod:`ragkv.eval.sim_memory`'s.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from ragkv.errors import ConfigError, QueueFullError, RagkvError
from ragkv.eval.sim_memory import BLOCK_TOKENS, Kept, Memory, Preemption, blocks_of
from ragkv.eval.simulated import Outcome, Sample, SimRequest, SimResult
from ragkv.eval.step_costs import StepCosts
from ragkv.scheduling import Plan, Scheduler, Ticket

# Priorities of all requests after so many turns; None: as they were.
Reassign = Callable[[int], Sequence[int] | None]


@dataclass(frozen=True)
class EngineModel:
    """``blocks`` of 16 tokens on the device, ``host_blocks`` in RAM (None: as many as it takes); ``prefill_tokens`` a
    turn, ``starting`` requests in their prefill at once (None: no limit)."""

    blocks: int
    prefill_tokens: int = 512
    starting: int | None = 3
    preemption: Preemption = "reuse"
    host_blocks: int | None = None
    sample_steps: int = 16


@dataclass(eq=False)
class _Job:
    ticket: Ticket
    outcome: Outcome
    number: int
    kept: Kept
    made: int = 0  # tokens of output
    ready: int = 0  # tokens whose KV is there, or is on its way
    known: int = 0  # of them, those that its last prefill did not compute
    began: int = 0  # the step in which it last began to decode
    turn: int = 0  # changes whenever it leaves the device or the decoding, so that what was foreseen is void

    @property
    def tokens(self) -> int:
        return self.ticket.prompt_tokens + self.made


def simulate(
    requests: Sequence[SimRequest],
    scheduler: dict[str, Any],
    costs: StepCosts,
    engine: EngineModel,
    reassign: Reassign = lambda turns: None,
) -> SimResult:
    """Serve all ``requests``. ``scheduler``: the arguments of :class:`Scheduler` but for its clock.

    Raises:
        ConfigError: a request alone does not fit the device, or a bad setting of the scheduler.
    """
    return _Simulation(requests, scheduler, costs, engine, reassign).run()


@dataclass
class _Simulation:
    requests: Sequence[SimRequest]
    settings: dict[str, Any]
    costs: StepCosts
    engine: EngineModel
    reassign: Reassign
    now: float = 0.0
    busy: float = 0.0
    turns: int = 0
    found: int = 0
    kv_tokens: int = 0  # read by a decode step

    def __post_init__(self) -> None:
        engine = self.engine
        self.scheduler = Scheduler(clock=lambda: self.now, **self.settings)
        self.memory = Memory(engine.blocks, engine.host_blocks, engine.preemption, self.costs)
        self.numbers, self.step_ends, self.samples = count(), list[float](), [Sample(0.0, {}, frozenset())]
        self.outcomes = [Outcome(request) for request in self.requests]
        self.priorities: Sequence[int] = [request.priority for request in self.requests]
        self.arrivals = [(request.at, n) for n, request in enumerate(self.requests) if request.after is None]
        heapq.heapify(self.arrivals)
        self.followers = {request.after: n for n, request in enumerate(self.requests) if request.after is not None}
        self.jobs: dict[Ticket, _Job] = {}
        self.prefilling: list[_Job] = []
        self.decoding: dict[Ticket, None] = {}
        self.stalled: list[_Job] = []  # want a block to go on
        # By the step before which a block is full, or the last token made: (job, its turn when that was foreseen).
        self.due: dict[int, list[tuple[_Job, int]]] = defaultdict(list)
        self.coming: list[tuple[float, int, _Job, int]] = []  # (when, number, job, its turn)
        self.conversations: dict[int, Kept] = {}  # by the follower to come
        self.waits, self.broke, self.sampled = Counter[str](), set[str](), 0

    def run(self) -> SimResult:
        while self.arrivals or self.jobs:
            self._reassign()
            self._arrive()
            self._land()
            while self._apply(self._plan()).preempt:
                pass  # what that set free at once is given away at once
            self._grow()
            if self.decoding or self.prefilling:
                self._turn()
            elif self.arrivals or self.jobs:
                self._wait()
        return SimResult(
            self.outcomes,
            np.array(self.step_ends),
            self.samples,
            copied_blocks=self.memory.copied,
            loaded_blocks=self.memory.loaded,
            found_tokens=self.found,
            busy_s=self.busy,
            ended=self.now,
        )

    # What happens beside the steps

    def _reassign(self) -> None:
        if (priorities := self.reassign(self.turns)) is None:
            return
        self.priorities = priorities
        for ticket, job in self.jobs.items():
            if ticket.priority != priorities[job.number]:
                self.scheduler.set_priority(ticket, int(priorities[job.number]))

    def _arrive(self) -> None:
        while self.arrivals and self.arrivals[0][0] <= self.now:
            at, number = heapq.heappop(self.arrivals)
            self.outcomes[number].came = at
            try:
                self._submit(number)
            except QueueFullError:
                self.outcomes[number].refused = True

    def _submit(self, number: int) -> None:
        request = self.requests[number]
        most = blocks_of(request.prompt_tokens + request.output_tokens)
        if most > self.engine.blocks:
            raise ConfigError(f"a request of {most} blocks does not fit {self.engine.blocks}", setting="blocks")
        ticket = Ticket(
            str(number),
            request.prompt_tokens,
            request.output_tokens,
            blocks_of(request.prompt_tokens + 1),
            most,
            tenant=request.tenant,
            weight=request.weight,
            priority=int(self.priorities[number]),
        )
        self.scheduler.submit(ticket)
        self.jobs[ticket] = _Job(ticket, self.outcomes[number], number, self.conversations.pop(number, Kept()))
        self._queue(ticket, 1)

    def _land(self) -> None:
        self.memory.land(self.now)
        while self.coming and self.coming[0][0] <= self.now:
            _, _, job, turn = heapq.heappop(self.coming)
            if job.turn == turn:
                self._enter(job)

    def _wait(self) -> None:
        """Nothing can run: until something arrives, or lands."""
        until = min(self.memory.next_free, *(heap[0][0] for heap in (self.coming, self.arrivals) if heap), np.inf)
        if until == np.inf:
            raise RagkvError(f"{len(self.jobs)} requests wait for nothing")
        self._pass(max(0.0, until - self.now))

    def _pass(self, seconds: float) -> None:
        """Moves that everybody waits for are waited for as well."""
        self.now += self.memory.stall + seconds
        self.memory.stall = 0.0

    # Who has which blocks

    def _plan(self) -> Plan:
        return self.scheduler.plan(self.memory.available, self.memory.freeing, starting=self.engine.starting)

    def _apply(self, plan: Plan) -> Plan:
        for ticket in plan.preempt:
            self._queue(ticket, 1)
            self._preempt(self.jobs[ticket])
        for ticket in plan.start:
            self._queue(ticket, -1)
            self._begin(self.jobs[ticket])
        return plan

    def _preempt(self, job: _Job) -> None:
        self._leave(job)
        job.outcome.preemptions += 1
        job.kept.tokens = job.ready if job.ready == job.tokens else job.known
        self.memory.park(job.kept, job.ticket.blocks, self.now)
        job.ticket.blocks, job.ticket.wants = 0, blocks_of(job.tokens + 1)

    def _begin(self, job: _Job) -> None:
        request, ticket = job.outcome.request, job.ticket
        there, at = self.memory.bring(job.kept, ticket.wants, self.now)
        ticket.blocks, ticket.wants = ticket.wants, 0
        self.found += 0 if job.outcome.preemptions else there
        if not job.made or there < job.tokens:  # a prefill goes on from whole blocks, and computes the last token
            there = min(max(there // BLOCK_TOKENS * BLOCK_TOKENS, request.cached_tokens), job.tokens - 1)
        job.ready = job.known = there
        heapq.heappush(self.coming, (at, next(self.numbers), job, job.turn))
        self._land()

    def _grow(self) -> None:
        """A block each for those that wait for one, as far as there are any."""
        stalled, self.stalled = self.stalled, []
        for job in stalled:
            if self.memory.available:
                self.memory.take(1)
                job.ticket.blocks, job.ticket.wants = job.ticket.blocks + 1, 0
                self._decode(job)
            else:
                self.stalled.append(job)

    def _finish(self, job: _Job) -> None:
        self.scheduler.finish(job.ticket)
        del self.jobs[job.ticket]
        job.kept.tokens = job.tokens
        self.memory.close(job.kept, job.ticket.blocks)
        if (follower := self.followers.get(job.number)) is not None:
            self.conversations[follower] = job.kept
            heapq.heappush(self.arrivals, (self.now + self.requests[follower].at, follower))

    # Computing

    def _enter(self, job: _Job) -> None:
        """All that was kept of it is on the device."""
        if job.ready == job.tokens:
            self._decode(job)
        else:
            self.prefilling.append(job)

    def _decode(self, job: _Job) -> None:
        """It gets a token a step, until its blocks are full or it has all."""
        steps = min(job.ticket.blocks * BLOCK_TOKENS - job.tokens, job.ticket.max_tokens - job.made)
        if not steps:
            job.ticket.wants = 1
            self.stalled.append(job)
            return
        job.began = len(self.step_ends)
        self.decoding[job.ticket] = None
        self.kv_tokens += job.tokens
        self.due[job.began + steps].append((job, job.turn))

    def _leave(self, job: _Job) -> None:
        """It is not in the next step."""
        job.turn += 1
        for where in (self.prefilling, self.stalled):
            if job in where:
                where.remove(job)
        if job.ticket not in self.decoding:
            return
        del self.decoding[job.ticket]
        self.kv_tokens -= job.tokens + len(self.step_ends) - job.began
        self._got(job, job.began, len(self.step_ends) - job.began)

    def _got(self, job: _Job, first: int, steps: int) -> None:
        """A token in each of these steps."""
        job.made += steps
        job.ready = job.tokens
        spans = job.outcome.spans
        if spans and sum(spans[-1]) == first:
            first, steps = spans[-1][0], spans.pop()[1] + steps
        if steps:
            spans.append((first, steps))

    def _go_on(self, job: _Job) -> None:
        if job.made == job.ticket.max_tokens:
            self._finish(job)
        else:
            self._decode(job)

    def _turn(self) -> None:
        began = self.now
        self._pass(self.costs.fixed_s)
        self.turns += 1
        if self.prefilling:
            self._prefill()
        if self.decoding:
            self._step()
        self.busy += self.now - began
        if self.turns - self.sampled >= self.engine.sample_steps:
            self._sample()

    def _prefill(self) -> None:
        """Advance the best prompt."""
        turn = self.scheduler.in_turn([job.ticket for job in self.prefilling])
        self.prefilling = [self.jobs[ticket] for ticket in turn]
        job = self.prefilling[0]
        tokens = min(self.engine.prefill_tokens, job.tokens - job.ready)
        self.now += self.costs.prefill_token_s * tokens
        job.ready += tokens
        if job.ready < job.tokens:
            return
        self.prefilling.remove(job)
        self.scheduler.charge(job.ticket, 0 if job.made else job.ready - job.known, 1)
        job.made += 1
        job.outcome.prefilled.append(self.now)
        self._go_on(job)

    def _step(self) -> None:
        """A token for each who decodes; as many steps as are alike, where nobody waits for anything."""
        rows, first = len(self.decoding), len(self.step_ends)
        last = min(self.due) if rows == len(self.jobs) else first + 1
        arrival = self.arrivals[0][0] if self.arrivals else np.inf
        while True:
            self.now += self.costs.decode(rows, self.kv_tokens)
            self.step_ends.append(self.now)
            self.kv_tokens += rows
            if len(self.step_ends) == last or self.now >= arrival:
                break
            self.now += self.costs.fixed_s
            self.turns += 1
        self.scheduler.charge_many(self.decoding, len(self.step_ends) - first)
        for job, turn in self.due.pop(len(self.step_ends), ()):
            if job.turn == turn:
                self._leave(job)
                self._go_on(job)

    # Records

    def _queue(self, ticket: Ticket, change: int) -> None:
        self.waits[ticket.tenant] += change
        if self.waits[ticket.tenant] == max(change, 0):
            self.broke.add(ticket.tenant)  # it begins, or ceases, to be backlogged

    def _sample(self) -> None:
        backlogged = frozenset(tenant for tenant, waits in self.waits.items() if waits) - self.broke
        self.samples.append(Sample(self.now, self.scheduler.stats.service, backlogged))
        self.sampled = self.turns
        self.broke.clear()
