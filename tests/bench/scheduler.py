"""What the scheduler costs a step: 64 running, 300 waiting, 16 tenants, memory full. Prints JSON, µs.

    python -m tests.bench.scheduler [--steps 20000]

``nothing``: a plan where nothing changed. ``charged``: a token of output is charged to all that run, and a plan.
``turnover``: a request ends, one arrives, and a plan starts another.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable

from ragkv.scheduling import POLICIES, Scheduler, Ticket

RUNNING, WAITING, TENANTS = 64, 300, 16


class Full:
    """A scheduler that runs and queues as much as it can."""

    def __init__(self, policy: str) -> None:
        self.random, self.now, self.made = random.Random(0), 0.0, 0
        self.scheduler = Scheduler(
            policy,
            clock=lambda: self.now,
            max_running=RUNNING,
            max_queued=10_000,
            max_queued_tokens=1 << 40,
            max_preemptions=8,
            aging_s=10.0,
        )
        for _ in range(RUNNING + WAITING):
            self.arrive()
        self.running = self.scheduler.plan(1 << 20, 0).start
        for ticket in self.running:
            self.began(ticket)

    def arrive(self) -> None:
        self.now += 0.01
        tenant, priority = f"t{self.random.randrange(TENANTS)}", self.random.randrange(3)
        ticket = Ticket(f"r{self.made}", 1024, 256, 65, 80, tenant=tenant, priority=priority)
        self.scheduler.submit(ticket)
        self.made += 1

    def began(self, ticket: Ticket) -> None:
        ticket.blocks, ticket.wants = 65, 0
        self.scheduler.charge(ticket, 1024, 1)

    def nothing(self) -> None:
        self.scheduler.plan(4, 0, starting=4)

    def charged(self) -> None:
        self.scheduler.charge_many(self.running)
        self.scheduler.plan(4, 0, starting=4)

    def turnover(self) -> None:
        gone = self.running.pop(self.random.randrange(len(self.running)))
        self.scheduler.finish(gone)
        self.arrive()
        plan = self.scheduler.plan(69, 0, starting=4)
        for ticket in plan.preempt:
            ticket.blocks, ticket.wants = 0, 66
            self.running.remove(ticket)
        for ticket in plan.start:
            self.began(ticket)
        self.running += plan.start


def measure(step: Callable[[], None], steps: int) -> dict[str, float]:
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        times.append((time.perf_counter() - began) * 1e6)
    return {"median": round(statistics.median(times), 1), "p99": round(statistics.quantiles(times, n=100)[98], 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    steps = parser.parse_args().steps
    rows = {}
    for policy in POLICIES:
        full = Full(policy)
        rows[policy] = {kind.__name__: measure(kind, steps) for kind in (full.nothing, full.charged, full.turnover)}
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
