"""Which of two requests comes first.

Requests stand in lines, in the order of their *place*, a number that does not change while they live unless their
priority does: so who is ahead stays ahead, and equals never change places. ``fcfs`` and ``priority`` have one line;
``vtc`` has one a tenant, and the tenant that was served least is next (:mod:`ragkv.scheduling.accounts`).

**Aging.** The class of a request is its priority less the time since it arrived, in units of ``aging_s``. All age
alike, whether they wait or run, so comparing two is comparing ``arrived + priority · aging_s``. *Bound:* a request of
priority p that arrived at a is passed only by those of some priority q < p that arrived before a + (p − q) · aging_s.
With priorities of at least q₀, everybody who arrives later than (p − q₀) · aging_s after it waits behind it: nobody
starves, whatever load comes in better classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ragkv.scheduling.ticket import Ticket


@dataclass(frozen=True)
class Policy:
    """``place(ticket, aging_s)``, lower is sooner; whether every tenant has a line of its own."""

    place: Callable[[Ticket, float], float]
    by_tenant: bool = False


def _by_arrival(ticket: Ticket, aging_s: float) -> float:
    return ticket.arrived


def _by_class(ticket: Ticket, aging_s: float) -> float:
    return ticket.arrived + ticket.priority * aging_s


POLICIES = {
    "fcfs": Policy(_by_arrival),
    "priority": Policy(_by_class),
    "vtc": Policy(_by_class, by_tenant=True),
}
