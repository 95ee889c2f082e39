"""A scheduler with a small engine around it that only counts blocks, and checks every plan."""

from __future__ import annotations

import random

from ragkv.scheduling import Plan, Scheduler, State, Ticket

BLOCK = 4  # tokens


def blocks_of(tokens: int) -> int:
    return -(-tokens // BLOCK)


def make_scheduler(policy: str = "fcfs", clock=lambda: 0.0, **changes) -> Scheduler:
    settings = {
        "max_running": 4,
        "max_queued": 10_000,
        "max_queued_tokens": 10**9,
        "max_preemptions": 3,
        "aging_s": 10.0,
    }
    return Scheduler(policy, clock=clock, **{**settings, **changes})


def make_ticket(name: str = "r", prompt: int = 8, output: int = 8, **changes) -> Ticket:
    first, most = blocks_of(prompt + 1), blocks_of(prompt + output)
    return Ticket(name, prompt, output, **{"wants": first, "most": most, **changes})


class Engine:
    """Steps of one second. What is preempted moves out for ``swap_steps``, its blocks being ``freeing`` meanwhile."""

    def __init__(self, scheduler: Scheduler, blocks: int, *, swap_steps: int = 2, starting: int | None = None) -> None:
        self.scheduler, self.total, self.swap_steps, self.starting = scheduler, blocks, swap_steps, starting
        self.running: list[Ticket] = []
        self.made: dict[Ticket, int] = {}  # tokens of output
        self.moving: list[list[int]] = []  # [steps left, blocks]
        self.plans: list[Plan] = []
        self.finished: list[Ticket] = []

    @property
    def free(self) -> int:
        return self.total - sum(ticket.blocks for ticket in self.running) - self.freeing

    @property
    def freeing(self) -> int:
        return sum(blocks for _, blocks in self.moving)

    def submit(self, ticket: Ticket) -> Ticket:
        self.scheduler.submit(ticket)
        self.made[ticket] = 0
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        self.scheduler.cancel(ticket)
        if ticket in self.running:
            self.running.remove(ticket)
        self.made.pop(ticket, None)

    def step(self) -> Plan:
        self._move()
        before = list(self.running)
        plan = self.scheduler.plan(self.free, self.freeing, starting=self.starting)
        self.plans.append(plan)
        assert not set(plan.preempt) - set(before)
        assert not set(plan.start) & set(before)
        for ticket in plan.preempt:
            self._swap_out(ticket)
        for ticket in plan.start:
            assert ticket.state is State.RUNNING
            ticket.blocks, ticket.wants = ticket.wants, 0
            self.running.append(ticket)
        assert self.free >= 0, "more was started than there is room for"
        assert len(self.running) <= self.scheduler._max_running
        self._decode()
        return plan

    def run(self, steps: int = 10_000) -> None:
        """Until nothing is left to do."""
        for _ in range(steps):
            if not self.made:
                return
            self.step()
        raise AssertionError(f"{len(self.made)} requests never ended")

    def _move(self) -> None:
        for move in self.moving:
            move[0] -= 1
        self.moving = [move for move in self.moving if move[0] > 0]

    def _swap_out(self, ticket: Ticket) -> None:
        assert ticket.state is State.PREEMPTED
        assert ticket.preemptions <= self.scheduler._max_preemptions
        self.running.remove(ticket)
        self.moving.append([self.swap_steps, ticket.blocks])
        ticket.wants, ticket.blocks = blocks_of(ticket.prompt_tokens + self.made[ticket] + 1), 0

    def _decode(self) -> None:
        for ticket in sorted(self.running, key=self.scheduler._ranking.order):
            if ticket.wants > self.free:
                continue  # it waits for blocks that are being freed
            ticket.blocks, ticket.wants = ticket.blocks + ticket.wants, 0
            self.scheduler.charge(ticket, 0 if self.made[ticket] else ticket.prompt_tokens, 1)
            self.made[ticket] += 1
            if self.made[ticket] >= ticket.max_tokens:
                self.scheduler.finish(ticket)
                self.cancel(ticket)
                self.finished.append(ticket)
            else:
                held = ticket.blocks * BLOCK
                ticket.wants = int(ticket.prompt_tokens + self.made[ticket] + 1 > held)


def random_ticket(rng: random.Random, number: int, *, longest: int = 40) -> Ticket:
    return make_ticket(
        f"r{number}",
        rng.randint(1, longest),
        rng.randint(1, longest),
        tenant=f"t{rng.randrange(3)}",
        priority=rng.randrange(3),
    )
