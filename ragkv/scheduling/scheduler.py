"""Who runs, who waits: the state of all requests, from submission to end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count

from ragkv.errors import ConfigError, QueueFullError
from ragkv.scheduling.accounts import OUTPUT_PRICE
from ragkv.scheduling.planning import Plan, Planning
from ragkv.scheduling.policies import POLICIES
from ragkv.scheduling.ranking import Ranking
from ragkv.scheduling.ticket import State, Ticket

# The credit is that of a few long requests: who asks for 60% of its share in bursts needs as much to be answered as if
# the others did the same, and hardly ever more.
QUANTUM, CREDIT = 1024.0, 32768.0


@dataclass(frozen=True)
class SchedulerStats:
    """``waiting_tokens`` are prompt tokens of ``waiting``, which are those never started; ``service`` is by tenant."""

    waiting: int
    waiting_tokens: int
    running: int
    preempted: int
    service: dict[str, int] = field(default_factory=dict)


class Scheduler:
    """Ranks requests by ``policy`` and says each step who is preempted and who starts (:class:`Planning`).

    Not thread-safe: its owner calls it under a lock of its own.

    Args:
        policy: a name in ``POLICIES``.
        clock: seconds; only ``submit`` reads it.
        max_running: requests that run at once.
        max_queued: requests that wait for their first start.
        max_queued_tokens: their prompts' tokens. A single request always finds room in an empty queue.
        max_preemptions: of one request.
        aging_s: seconds since arrival that count as one class of priority.
        quantum: under ``vtc``, by how much service ÷ weight a tenant must be ahead to lose a running request.
        credit: of service ÷ weight that a tenant keeps at most while nothing of it waits.

    Raises:
        ConfigError: an unknown policy, or a number out of range.
    """

    def __init__(
        self,
        policy: str,
        *,
        clock: Callable[[], float],
        max_running: int,
        max_queued: int,
        max_queued_tokens: int,
        max_preemptions: int,
        aging_s: float,
        quantum: float = QUANTUM,
        credit: float = CREDIT,
    ) -> None:
        if policy not in POLICIES:
            raise ConfigError(f"scheduler must be one of {', '.join(POLICIES)}, not {policy!r}", setting="scheduler")
        _at_least("max_running", max_running, 1)
        _at_least("max_preemptions", max_preemptions, 0)
        _at_least("quantum", quantum, 0)
        _at_least("credit", credit, 0)
        if not aging_s > 0:
            raise ConfigError(f"aging_s must be more than 0, not {aging_s}", setting="aging_s", value=aging_s)
        self._clock, self._numbers = clock, count()
        self._max_running, self._max_preemptions = max_running, max_preemptions
        self._max_queued, self._max_queued_tokens = max_queued, max_queued_tokens
        self._ranking = Ranking(POLICIES[policy], aging_s=aging_s, quantum=quantum, credit=credit)
        self._running: dict[Ticket, None] = {}
        self._waiting = self._waiting_tokens = self._preempted = 0

    def submit(self, ticket: Ticket) -> None:
        """Put a new request into the queue; its arrival is now.

        Raises:
            QueueFullError: as many requests, or tokens of prompts, wait as may.
            ConfigError: its tenant's weight is not positive.
        """
        if not ticket.weight > 0:
            raise ConfigError(f"the weight of tenant {ticket.tenant!r} must be more than 0, not {ticket.weight}")
        self._check_room(ticket)
        ticket.arrived, ticket.place = self._clock(), (0.0, next(self._numbers))
        ticket.state, ticket.unpaid = State.WAITING, ticket.prompt_tokens
        self._ranking.account(ticket).weight = ticket.weight
        self._ranking.locate(ticket)
        self._ranking.add(ticket)
        self._count_waiting(ticket, 1)

    def plan(self, free: int, freeing: int, *, starting: int | None = None) -> Plan:
        """What to do before the next step, given blocks that are free and blocks that soon will be. Where it preempts,
        ask again once that is done: what it set free at once may start somebody at once.

        Args:
            starting: how many requests may be in their prefill at once, the last of them only where it may displace
                all the others; None: as many as may run.
        """
        planning = Planning(
            self._ranking,
            self._running,
            free,
            freeing,
            slots=self._max_running,
            starting=starting,
            most_often=self._max_preemptions,
        )
        plan = planning.make()
        self._preempted += len(plan.preempt)
        for ticket in plan.start:
            if ticket.preemptions:
                self._preempted -= 1
            else:
                self._count_waiting(ticket, -1)
        return plan

    def in_turn(self, prefills: Sequence[Ticket]) -> list[Ticket]:
        """Requests in their prefill in the order to compute them, best first. The first of ``prefills`` is under way
        and goes on unless the best may displace it, so that equals do not take turns."""
        ranked = sorted(prefills, key=self._ranking.order)
        if ranked and not self._ranking.beaten_by(ranked[0])(prefills[0]):
            ranked.sort(key=lambda ticket: ticket is not prefills[0])
        return ranked

    def finish(self, ticket: Ticket) -> None:
        """The request is over, from whatever state, however often this is said."""
        if ticket.state is State.RUNNING:
            del self._running[ticket]
            self._ranking.promise(ticket, -1)
        elif ticket.state is State.PREEMPTED:
            self._ranking.remove(ticket)
            self._preempted -= 1
        elif ticket.state is State.WAITING:
            self._ranking.remove(ticket)
            self._count_waiting(ticket, -1)
        ticket.state = State.DONE

    cancel = finish

    def charge(self, ticket: Ticket, computed_in: int, computed_out: int) -> None:
        """Its tenant was served: tokens of the prompt, and of output, that were computed, not found in a cache."""
        self._ranking.account(ticket).charge(ticket, computed_in, computed_out)

    def charge_many(self, tickets: Iterable[Ticket], computed_out: int = 1) -> None:
        """The same, ``computed_out`` tokens of output for each of ``tickets``."""
        accounts, price = self._ranking.accounts, OUTPUT_PRICE * computed_out
        for ticket in tickets:
            account = accounts[ticket.tenant]
            if ticket.prefilling:
                account.charge(ticket, 0, computed_out)
            else:
                account.service += price
                account.counter += price / account.weight

    def set_priority(self, ticket: Ticket, priority: int) -> None:
        """At any time; it keeps its arrival."""
        if waits := ticket.state in (State.WAITING, State.PREEMPTED):
            self._ranking.remove(ticket)
        ticket.priority = priority
        self._ranking.locate(ticket)
        if waits:
            self._ranking.add(ticket)

    @property
    def stats(self) -> SchedulerStats:
        service = {tenant: account.service for tenant, account in self._ranking.accounts.items()}
        return SchedulerStats(self._waiting, self._waiting_tokens, len(self._running), self._preempted, service)

    def _check_room(self, ticket: Ticket) -> None:
        if self._waiting >= self._max_queued:
            raise QueueFullError(
                f"{self._waiting} requests are waiting, as many as max_queued allows: try again later",
                setting="max_queued",
                value=self._max_queued,
            )
        if self._waiting and self._waiting_tokens + ticket.prompt_tokens > self._max_queued_tokens:
            raise QueueFullError(
                f"prompts of {self._waiting_tokens} tokens are waiting, and {ticket.prompt_tokens} more would be more "
                f"than max_queued_tokens allows ({self._max_queued_tokens}): try again later, or with a shorter prompt",
                setting="max_queued_tokens",
                value=self._max_queued_tokens,
            )

    def _count_waiting(self, ticket: Ticket, sign: int) -> None:
        self._waiting += sign
        self._waiting_tokens += sign * ticket.prompt_tokens


def _at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise ConfigError(f"{name} must be at least {least}, not {value}", setting=name, value=value)
