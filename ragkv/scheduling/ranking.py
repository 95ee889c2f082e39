"""The total order of all live requests: within a line by place, between lines by what their tenants were served."""

from __future__ import annotations

from collections.abc import Callable

from ragkv.scheduling.accounts import INPUT_PRICE, Account, Line
from ragkv.scheduling.policies import Policy
from ragkv.scheduling.ticket import Ticket


class Ranking:
    """Requests in lines, and their tenants' accounts.

    Args:
        quantum: by how much service ÷ weight a tenant must be ahead of another before it loses a running request to it.
        credit: how much of it a tenant may have saved up when its line fills again.
    """

    def __init__(self, policy: Policy, *, aging_s: float, quantum: float, credit: float) -> None:
        self._policy, self._aging_s, self._quantum, self._credit = policy, aging_s, quantum, credit
        self.accounts: dict[str, Account] = {}
        self._lines: dict[str, Line] = {}  # those that are not empty, by the name of the tenant, or ""
        self._floor = 0.0  # the highest that the least counter of those lines ever was

    def account(self, ticket: Ticket) -> Account:
        account = self.accounts.get(ticket.tenant)
        if account is None:
            account = self.accounts[ticket.tenant] = Account(ticket.tenant)
        return account

    def locate(self, ticket: Ticket) -> None:
        """Find the ticket's place anew. Not while it stands in a line."""
        ticket.place = self._policy.place(ticket, self._aging_s), ticket.place[1]

    def add(self, ticket: Ticket) -> None:
        """Into its line, at its place."""
        name = ticket.tenant if self._policy.by_tenant else ""
        line = self._lines.get(name)
        if line is None:
            account = self.account(ticket) if self._policy.by_tenant else None
            if account is not None:
                self._raise_floor()
                account.counter = max(account.counter, self._floor - self._credit)
            line = self._lines[name] = Line(account)
        line.add(ticket)

    def remove(self, ticket: Ticket) -> None:
        name = ticket.tenant if self._policy.by_tenant else ""
        line = self._lines[name]
        line.remove(ticket)
        if not line.tickets:
            del self._lines[name]

    def head(self) -> Ticket | None:
        """The best of those that wait."""
        self._raise_floor()
        best, rank = None, None
        for line in self._lines.values():
            place, ticket = line.tickets[0]
            mine = (line.level, place)
            if rank is None or mine < rank:
                best, rank = ticket, mine
        return best

    def promise(self, ticket: Ticket, sign: int) -> None:
        """What is left of a prompt begins (1) or ceases (-1) to count as if it were served."""
        self.accounts[ticket.tenant].promised += sign * INPUT_PRICE * ticket.unpaid

    def order(self, ticket: Ticket) -> tuple[float, tuple[float, int]]:
        """Sorts running requests, best first."""
        return (self.accounts[ticket.tenant].level if self._policy.by_tenant else 0.0), ticket.place

    def beaten_by(self, ticket: Ticket) -> Callable[[Ticket], bool]:
        """Whether a running request may lose its place to ``ticket``, which waits and is strictly better."""
        place, mine = ticket.place, ticket.tenant
        if not self._policy.by_tenant:
            return lambda other: place < other.place
        limit = self.accounts[mine].level + self._quantum
        ahead = {name for name, account in self.accounts.items() if account.level > limit}
        return lambda other: place < other.place if other.tenant == mine else other.tenant in ahead

    def _raise_floor(self) -> None:
        if self._policy.by_tenant and self._lines:
            least = min([line.counter for line in self._lines.values()])
            self._floor = max(self._floor, least)
