"""One step's decision: who is preempted, and who starts.

1. *Growth.* What running requests need for their next step comes first. Where it does not fit, counting blocks that are
   on their way back, the worst of those that may be preempted gives way, and so on.
2. *Starts*, best first, preempted and new ones alike, into what is left of blocks and slots. Nobody passes the head of
   the queue: where it does not fit, what comes free gathers for it, so a large request is not starved by small ones.
   Of the places for prefills the last is kept for a head that may displace every request in its prefill: a better
   request does not wait for the long prompts of a flood, and none of them loses what was computed.
3. *Displacing.* A head that does not fit preempts running requests that are strictly worse, the worst first, if those
   make it fit, and no more than it takes. It starts at once where it needed a slot, and in a later plan where it waits
   for their blocks; ``freeing`` counts them until then, so that nobody else is preempted for it.

**No deadlock.** Who was preempted ``most_often`` times may not be preempted again, so it is started only when all the
blocks it may ever want are to be had, and what it does not hold of them yet is kept for it. So whoever cannot be
preempted always finishes, everybody else can be preempted, and the best of those always gets what it wants.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ragkv.scheduling.ranking import Ranking
from ragkv.scheduling.ticket import State, Ticket


@dataclass
class Plan:
    """Requests to preempt now, then those to start or resume now, best first. Their states say so already."""

    preempt: list[Ticket] = field(default_factory=list)
    start: list[Ticket] = field(default_factory=list)


class Planning:
    """A plan in the making.

    Args:
        running: of all requests, those that run; changed as the plan says.
        free: blocks.
        freeing: blocks that will soon be free.
        slots: most requests that may run.
        starting: most requests in their prefill, one of them better than all others if there are any; None: no limit.
    """

    def __init__(
        self,
        ranking: Ranking,
        running: dict[Ticket, None],
        free: int,
        freeing: int,
        *,
        slots: int,
        starting: int | None,
        most_often: int,
    ) -> None:
        self._ranking, self._running, self._slots, self._most_often = ranking, running, slots, most_often
        self._starting, self.plan = starting, Plan()
        grown = sum([ticket.wants for ticket in running])
        kept = sum([self._need(ticket) - ticket.wants for ticket in running if ticket.preemptions >= most_often])
        self._now = free - grown - kept  # to be had at once
        self._soon = self._now + freeing

    def make(self) -> Plan:
        if self._soon < 0:
            self._relieve(lambda ticket: True)
        while (head := self._ranking.head()) is not None and self._place(head):
            self._start(head)
        return self.plan

    def _place(self, head: Ticket) -> bool:
        """Whether it may start now, having preempted whoever had to go."""
        if head.state is State.PREEMPTED and head in self.plan.preempt:
            return False  # what it wants to come back is not known yet
        if head.prefilling and not self._may_prefill(head):
            return False
        need = self._need(head)
        if need > self._soon or len(self._running) >= self._slots:
            self._relieve(self._ranking.beaten_by(head), need, slot=len(self._running) >= self._slots, all_or_none=True)
        return need <= self._now and len(self._running) < self._slots

    def _start(self, ticket: Ticket) -> None:
        need = self._need(ticket)
        self._now -= need
        self._soon -= need
        self._ranking.remove(ticket)
        ticket.state = State.RUNNING
        self._ranking.promise(ticket, 1)
        self._running[ticket] = None
        self.plan.start.append(ticket)

    def _relieve(
        self, may_go: Callable[[Ticket], bool], need: int = 0, *, slot: bool = False, all_or_none: bool = False
    ) -> None:
        """Preempt until ``need`` blocks are to be had soon, and a slot; no one where that is impossible, if so told."""
        candidates = [ticket for ticket in self._running if ticket.preemptions < self._most_often and may_go(ticket)]
        candidates = [ticket for ticket in candidates if ticket not in self.plan.start]
        candidates.sort(key=self._ranking.order)
        soon, going = self._soon, list[Ticket]()
        while candidates and (soon < need or (slot and not going)):
            going.append(candidates.pop())
            soon += self._gain(going[-1])
        if all_or_none and (soon < need or (slot and not going)):
            return
        for ticket in reversed(going):  # the best of them first: is it needed, after the worse ones?
            if soon - self._gain(ticket) >= need and not (slot and len(going) == 1):
                going.remove(ticket)
                soon -= self._gain(ticket)
        for ticket in going:
            self._preempt(ticket)

    def _preempt(self, ticket: Ticket) -> None:
        self._soon += self._gain(ticket)
        self._now += ticket.wants
        del self._running[ticket]
        self._ranking.promise(ticket, -1)
        ticket.state = State.PREEMPTED
        ticket.preemptions += 1
        self._ranking.add(ticket)
        self.plan.preempt.append(ticket)

    def _gain(self, ticket: Ticket) -> int:
        return ticket.blocks + ticket.wants

    def _need(self, ticket: Ticket) -> int:
        """Blocks it must be able to get."""
        if ticket.preemptions < self._most_often:
            return ticket.wants
        held = ticket.blocks if ticket.state is State.RUNNING else 0
        return max(ticket.wants, ticket.most - held)

    def _may_prefill(self, head: Ticket) -> bool:
        others = [ticket for ticket in self._running if ticket.prefilling]
        if self._starting is None or not others:
            return True
        left = self._starting - len(others)
        return left > 1 or (left == 1 and all(map(self._ranking.beaten_by(head), others)))
