"""The serving engine in discrete events: the scheduler itself, and a model of what its engine does, with times.

A step gives every request that decodes a token, and up to ``prefill_tokens`` tokens of prompts are computed beside it,
in the order of starting. Blocks move on a link each way, beside the steps or, where preemption is synchronous, between
them. Conversations keep their KV on the device until its room is wanted, then on the host (or nowhere: ``recompute``).
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

import numpy as np

from ragkv.errors import ConfigError, QueueFullError, RagkvError
from ragkv.eval.simulated import Outcome, Sample, SimRequest, SimResult
from ragkv.eval.step_costs import StepCosts
from ragkv.scheduling import Plan, Scheduler, Ticket

BLOCK_TOKENS = 16
Preemption = Literal["recompute", "blockwise", "groups", "async", "reuse"]


@dataclass(frozen=True)
class EngineModel:
    """``blocks`` of 16 tokens on the device; ``starting`` requests in their prefill at once, ``None`` for no limit."""

    blocks: int
    prefill_tokens: int = 512
    starting: int | None = 4
    preemption: Preemption = "reuse"
    sample_steps: int = 16


@dataclass(eq=False)
class _Job:
    ticket: Ticket
    outcome: Outcome
    made: int = 0  # tokens of output
    ready: int = 0  # tokens whose KV is there, or is on its way
    paid: int = 0  # tokens of the prompt that were charged, or came from a cache
    copied: int = 0  # blocks that have a copy on the host
    began: int = 0  # the step in which it last began to decode
    turn: int = 0  # changes whenever it leaves the device or the decoding, so that what was foreseen is void

    @property
    def tokens(self) -> int:
        return self.ticket.prompt_tokens + self.made


def blocks_of(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


def simulate(
    requests: Sequence[SimRequest],
    scheduler: dict[str, Any],
    costs: StepCosts,
    engine: EngineModel,
) -> SimResult:
    """Serve all ``requests``. ``scheduler``: the arguments of :class:`Scheduler` but for its clock.

    Raises:
        ConfigError: a request alone does not fit the device, or a bad setting of the scheduler.
    """
    return _Simulation(requests, scheduler, costs, engine).run()


@dataclass
class _Simulation:
    requests: Sequence[SimRequest]
    settings: dict[str, Any]
    costs: StepCosts
    engine: EngineModel
    now: float = 0.0
    busy: float = 0.0
    swapped: int = 0
    stall: float = 0.0  # seconds of synchronous moves before the next step
    kv_tokens: int = 0  # read by a decode step
    _links: dict[str, float] = field(default_factory=lambda: {"in": 0.0, "out": 0.0})

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(clock=lambda: self.now, **self.settings)
        self.numbers, self.step_ends, self.samples = count(), list[float](), [Sample(0.0, {}, frozenset())]
        self.outcomes = [Outcome(request) for request in sorted(self.requests, key=lambda request: request.at)]
        self.arriving = 0  # the next of them
        self.free, self.freeing = self.engine.blocks, 0
        self.jobs: dict[Ticket, _Job] = {}
        self.prefilling: dict[_Job, None] = {}
        self.decoding: dict[Ticket, None] = {}
        self.stalled: list[_Job] = []  # want a block to go on
        # By the step before which a block is full, or the last token made: (job, its turn when that was foreseen).
        self.due: dict[int, list[tuple[_Job, int]]] = defaultdict(list)
        self.leaving: list[tuple[float, int, int]] = []  # (when, number, blocks)
        self.coming: list[tuple[float, int, _Job, int]] = []  # (when, number, job, its turn)
        self.idle: OrderedDict[str, tuple[int, int]] = OrderedDict()  # conversations on the device: tokens, blocks
        self.sunk: dict[str, int] = {}  # and on the host: tokens
        self.idle_blocks = 0
        self.waits, self.broke, self.sampled = Counter[str](), set[str](), 0

    def run(self) -> SimResult:
        while self.arriving < len(self.outcomes) or self.jobs:
            self._arrive()
            self._land()
            free = self.free + self.idle_blocks
            plan = self.scheduler.plan(free, self.freeing, starting=self.engine.starting)
            self._apply(plan)
            self._grow()
            if self.decoding or self.prefilling:
                self._step()
            elif not plan.preempt:  # else what it set free is for the next plan to give away
                self._wait()
        ends = np.array(self.step_ends)
        return SimResult(self.outcomes, ends, self.samples, self.swapped, self.busy)

    # What happens beside the steps

    def _arrive(self) -> None:
        while self.arriving < len(self.outcomes) and self.outcomes[self.arriving].request.at <= self.now:
            outcome = self.outcomes[self.arriving]
            self.arriving += 1
            try:
                self._submit(outcome)
            except QueueFullError:
                outcome.refused = True

    def _submit(self, outcome: Outcome) -> None:
        request = outcome.request
        most = blocks_of(request.prompt_tokens + request.output_tokens)
        if most > self.engine.blocks:
            raise ConfigError(f"a request of {most} blocks does not fit {self.engine.blocks}", setting="blocks")
        ticket = Ticket(
            str(self.arriving),
            request.prompt_tokens,
            request.output_tokens,
            blocks_of(request.prompt_tokens + 1),
            most,
            tenant=request.tenant,
            weight=request.weight,
            priority=request.priority,
        )
        self.scheduler.submit(ticket)
        self.jobs[ticket] = _Job(ticket, outcome)
        self._queue(ticket, 1)

    def _land(self) -> None:
        while self.leaving and self.leaving[0][0] <= self.now:
            blocks = heapq.heappop(self.leaving)[2]
            self.free, self.freeing = self.free + blocks, self.freeing - blocks
        while self.coming and self.coming[0][0] <= self.now:
            _, _, job, turn = heapq.heappop(self.coming)
            if job.turn == turn:
                self._enter(job)

    def _wait(self) -> None:
        """Nothing can run: until something arrives, or lands."""
        times = [heap[0][0] for heap in (self.leaving, self.coming) if heap]
        times += [self.outcomes[self.arriving].request.at] if self.arriving < len(self.outcomes) else []
        if not times:
            raise RagkvError(f"{len(self.jobs)} requests wait for nothing")
        self.now = max(self.now, min(times)) + self.stall
        self.stall = 0.0

    def _move(self, way: str, blocks: int) -> float:
        """Seconds at which these blocks will have moved."""
        self.swapped += blocks
        seconds = self.costs.move(blocks, piecewise=self.engine.preemption == "blockwise")
        if self.engine.preemption in ("blockwise", "groups"):
            self.stall += seconds
            return self.now
        self._links[way] = max(self._links[way], self.now) + seconds
        return self._links[way]

    # Memory

    def _apply(self, plan: Plan) -> None:
        for ticket in plan.preempt:
            self._queue(ticket, 1)
            self._preempt(self.jobs[ticket])
        for ticket in plan.start:
            self._queue(ticket, -1)
            self._begin(self.jobs[ticket])

    def _preempt(self, job: _Job) -> None:
        ticket, blocks = job.ticket, job.ticket.blocks
        self._leave(job)
        job.outcome.preemptions += 1
        if self.engine.preemption == "recompute":
            self.free += blocks
            job.ready = 0
        else:
            moved = blocks_of(job.ready) - (job.copied if self.engine.preemption == "reuse" else 0)
            job.copied = job.ready // BLOCK_TOKENS
            heapq.heappush(self.leaving, (self._move("out", moved), next(self.numbers), blocks))
            self.freeing += blocks
        ticket.blocks, ticket.wants = 0, blocks_of(job.tokens + 1)

    def _begin(self, job: _Job) -> None:
        loaded = job.ready
        if not job.made and not job.ready:
            loaded = self._recall(job)
        self._take(job.ticket.wants)
        job.ticket.blocks, job.ticket.wants = job.ticket.wants, 0
        if loaded:
            arrives = self._move("in", blocks_of(loaded))
            heapq.heappush(self.coming, (arrives, next(self.numbers), job, job.turn))
        else:
            self._enter(job)

    def _recall(self, job: _Job) -> int:
        """Find what need not be computed of its prompt; how much of that is on the host."""
        request = job.outcome.request
        kept, blocks = self.idle.pop(request.session, (0, 0))
        self.idle_blocks -= blocks
        self.free += blocks
        sunk = self.sunk.pop(request.session, 0)
        job.ready = min(max(kept, sunk, request.cached_tokens), request.prompt_tokens - 1)
        job.paid = max(job.paid, job.ready)
        return min(sunk, job.ready)

    def _take(self, blocks: int) -> None:
        """Idle conversations give way, the one that ended first before the others."""
        while self.free < blocks:
            session, (tokens, held) = self.idle.popitem(last=False)
            self.idle_blocks -= held
            self.free += held
            if self.engine.preemption != "recompute":
                self.sunk[session] = tokens
                self.swapped += held  # written through while nothing else moved
        self.free -= blocks

    def _grow(self) -> None:
        """A block each for those that wait for one, as far as there are any."""
        stalled, self.stalled = self.stalled, []
        for job in stalled:
            if self.free + self.idle_blocks:
                self._take(1)
                job.ticket.blocks, job.ticket.wants = job.ticket.blocks + 1, 0
                self._decode(job)
            else:
                self.stalled.append(job)

    def _finish(self, job: _Job) -> None:
        self.scheduler.finish(job.ticket)
        del self.jobs[job.ticket]
        if session := job.outcome.request.session:
            self._forget(session)
            self.idle[session] = (job.tokens, job.ticket.blocks)
            self.idle_blocks += job.ticket.blocks
        else:
            self.free += job.ticket.blocks

    def _forget(self, session: str) -> None:
        blocks = self.idle.pop(session, (0, 0))[1]
        self.idle_blocks -= blocks
        self.free += blocks
        self.sunk.pop(session, None)

    # Steps

    def _enter(self, job: _Job) -> None:
        """All that was kept of it is on the device."""
        if job.made and job.ready == job.tokens:
            self._decode(job)
        else:
            self.prefilling[job] = None

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
        self.prefilling.pop(job, None)
        if job in self.stalled:
            self.stalled.remove(job)
        if job.ticket not in self.decoding:
            return
        del self.decoding[job.ticket]
        self._got(job, job.began, len(self.step_ends) - job.began)
        self.kv_tokens -= job.tokens

    def _got(self, job: _Job, first: int, steps: int) -> None:
        """A token in each of these steps."""
        job.made += steps
        job.ready = job.tokens
        spans = job.outcome.spans
        if spans and sum(spans[-1]) == first:
            first, steps = spans[-1][0], spans.pop()[1] + steps
        if steps:
            spans.append((first, steps))

    def _step(self) -> None:
        """One step; or as many as are alike, where nobody waits for anything."""
        tokens, done = self._prefill()
        rows, first = len(self.decoding), len(self.step_ends)
        alike = min(self.due) - first if rows == len(self.jobs) else 1
        arrival = self.outcomes[self.arriving].request.at if self.arriving < len(self.outcomes) else np.inf
        began, self.now, self.stall = self.now, self.now + self.stall, 0.0
        for _ in range(alike):
            self.now += self.costs.step(rows, self.kv_tokens, tokens)
            self.step_ends.append(self.now)
            self.kv_tokens += rows
            if self.now >= arrival:
                break
        self.busy += self.now - began
        self.scheduler.charge_many(self.decoding, len(self.step_ends) - first)
        for job in done:
            self.scheduler.charge(job.ticket, 0, 1)
            self._got(job, first, 1)
            self._go_on(job)
        for job, turn in self.due.pop(len(self.step_ends), ()):
            if job.turn == turn:
                self._leave(job)
                self._go_on(job)
        if len(self.step_ends) - self.sampled >= self.engine.sample_steps:
            self._sample()

    def _go_on(self, job: _Job) -> None:
        if job.made == job.ticket.max_tokens:
            self._finish(job)
        else:
            self._decode(job)

    def _prefill(self) -> tuple[int, list[_Job]]:
        """Compute prompts, as many tokens as a step may; the tokens, and whose prompts are whole now."""
        budget, done = self.engine.prefill_tokens, []
        turn = self.scheduler.in_turn([job.ticket for job in self.prefilling])
        self.prefilling = {self.jobs[ticket]: None for ticket in turn}
        for job in list(self.prefilling):
            tokens = min(budget, job.tokens - job.ready)
            budget -= tokens
            job.ready += tokens
            new = min(job.ready, job.ticket.prompt_tokens) - job.paid
            if new > 0:
                job.paid += new
                self.scheduler.charge(job.ticket, new, 0)
            if job.ready == job.tokens:
                del self.prefilling[job]
                done.append(job)
            if not budget:
                break
        return self.engine.prefill_tokens - budget, done

    # Records

    def _queue(self, ticket: Ticket, change: int) -> None:
        self.waits[ticket.tenant] += change
        if self.waits[ticket.tenant] == max(change, 0):
            self.broke.add(ticket.tenant)  # it begins, or ceases, to be backlogged

    def _sample(self) -> None:
        backlogged = frozenset(tenant for tenant, waits in self.waits.items() if waits) - self.broke
        self.samples.append(Sample(self.now, self.scheduler.stats.service, backlogged))
        self.sampled = len(self.step_ends)
        self.broke.clear()
