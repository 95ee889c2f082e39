"""What tenants were served: virtual token counters (VTC; Sheng et al., "Fairness in Serving Large Language Models",
OSDI 2024), with weights, over computed tokens, for an engine that preempts.

A tenant's service is 1 for every prompt token computed for it and 2 for every output token (cache hits are free, and
what is computed again after a preemption is not the tenant's doing and not charged). Its *counter* c is service ÷
weight, plus lifts: with V the highest that the least counter of all lines that are not empty has ever been, a tenant
whose line was empty and fills again is lifted to V − C at least. So nobody saves up more than the *credit* C by
staying away (VTC is the case C = 0), and who asks for less than its share has enough to go before those that flood. Its
*level* e is c plus what its running requests' prompts still promise to cost, known when they start and gone when their
first token is there. The tenant of least level is next, and nobody passes it.

**Bound.** With at most B requests running, S of them in their prefill, prompts of at most I and outputs of at most O
tokens, and fixed weights of at least w, any two tenants whose lines are not empty have

    |cᵢ − cⱼ| ≤ U = (I · (1 + S) + 2 · O · B) / w + C

and so, over any time in which both stay backlogged, services ÷ weight that differ by at most 2U.

*Proof.* V never falls, counters never fall, and lifts put whoever becomes backlogged at V − C or above. A tenant that
stays backlogged does not fall below that either: V rises only where the least counter of all, and so its own, is as
high. So every backlogged tenant has c ≥ V − C. Let tenant i last have started or resumed a request at time s. Then it
had the least level: eᵢ(s) ≤ V(s) + S·I/w, where S·I/w are the promises of the tenant with the least counter. From then
on cᵢ grows by no more than what it had promised already, which eᵢ(s) holds, the prompt just started, I/w, and the
outputs of at most B running requests, 2·O·B/w; so cᵢ ≤ V + U − C until its next start. A lift since then puts cᵢ at
V − C and leaves at most S·I/w + 2·O·B/w to come. So V − C ≤ cᵢ, cⱼ ≤ V − C + U for any two backlogged tenants. ∎

Neither preempting (by more than ``quantum``) nor the order in which prefills are computed matters to the bound; they
keep what is seen far below it, and let who asks for little be answered as if nobody flooded.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from ragkv.scheduling.ticket import State, Ticket

INPUT_PRICE, OUTPUT_PRICE = 1, 2


def service_bound(
    *, running: int, prefills: int, prompt_tokens: int, output_tokens: int, credit: float, weight: float = 1.0
) -> float:
    """2U of this module's bound: by how much service ÷ weight of two backlogged tenants may differ over any time."""
    u = INPUT_PRICE * prompt_tokens * (1 + min(prefills, running)) + OUTPUT_PRICE * output_tokens * running
    return 2 * (u / weight + credit)


class Account:
    """A tenant's service.

    Attributes:
        service: in all.
        counter: virtual: service ÷ weight, and lifts.
        promised: service that prompts of running requests will still cost, at most.
    """

    __slots__ = ("counter", "promised", "service", "tenant", "weight")

    def __init__(self, tenant: str) -> None:
        self.tenant, self.weight = tenant, 1.0
        self.service, self.counter, self.promised = 0, 0.0, 0

    @property
    def level(self) -> float:
        return self.counter + self.promised / self.weight

    def charge(self, ticket: Ticket, computed_in: int, computed_out: int) -> None:
        service = INPUT_PRICE * computed_in + OUTPUT_PRICE * computed_out
        self.service += service
        self.counter += service / self.weight
        if ticket.prefilling:
            paid = ticket.unpaid if computed_out else min(computed_in, ticket.unpaid)
            ticket.unpaid -= paid
            ticket.prefilling = not computed_out
            if ticket.state is State.RUNNING:
                self.promised -= INPUT_PRICE * paid


class Line:
    """Requests that wait, best first, and the account whose level ranks them among other lines (None: the only one)."""

    def __init__(self, account: Account | None) -> None:
        self.account = account
        self.tickets: list[tuple[tuple[float, int], Ticket]] = []

    @property
    def level(self) -> float:
        return 0.0 if self.account is None else self.account.level

    @property
    def counter(self) -> float:
        return 0.0 if self.account is None else self.account.counter

    def add(self, ticket: Ticket) -> None:
        insort(self.tickets, (ticket.place, ticket))  # no two have the same place

    def remove(self, ticket: Ticket) -> None:
        del self.tickets[bisect_left(self.tickets, (ticket.place,))]
