"""Eviction policies: who enters where, what a use changes, and who leaves first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from ragkv.errors import StoreError
from ragkv.store.rows import Ghost, Place
from ragkv.store.shelf import Item, Shelf

PROBATION, RECENT, WORTH = range(3)
MOST_USES = 15
MOST_PRIORITY = 2**64 - 1
ONE_USE = 2**32
LEANS = tuple(round(ONE_USE * 2 ** (-step / 32)) for step in range(161))
"""What a newcomer may count for: from a whole use down to 1/32."""


class Policy(Protocol):
    """A policy keeps nothing itself: all it knows is in the shelf, which may be shared by several processes.

    Nothing is ever refused. What has to prove itself first enters where it will leave first.
    """

    def admit(self, shelf: Shelf, item: Item, ghost: Ghost | None) -> Place:
        """The place of a new entry; ``ghost`` if it was here before and is remembered."""

    def use(self, shelf: Shelf, item: Item, times: int) -> Place:
        """The new place of an entry that was used."""

    def victims(self, shelf: Shelf) -> Iterator[tuple[bytes, Item]]:
        """Who has to leave, in turn. The caller takes each off the shelf, or leaves it if it is leased."""


class Lru:
    """The least recently used leaves first. One pass over many new entries empties it of all others."""

    def admit(self, shelf: Shelf, item: Item, ghost: Ghost | None) -> Place:
        return Place(RECENT, 0, shelf.state.next_tick())

    def use(self, shelf: Shelf, item: Item, times: int) -> Place:
        return Place(RECENT, 0, shelf.state.next_tick(), _uses(item, times))

    def victims(self, shelf: Shelf) -> Iterator[tuple[bytes, Item]]:
        return _in_order(shelf, PROBATION, WORTH, RECENT)


class S3Fifo:
    """Newcomers pass through a small queue, which they survive only if used; those used go round in the main one.

    Source: Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023.
    """

    SMALL_SHARE = 0.1
    ROUNDS = 3

    def admit(self, shelf: Shelf, item: Item, ghost: Ghost | None) -> Place:
        return Place(PROBATION if ghost is None else RECENT, 0, shelf.state.next_tick())

    def use(self, shelf: Shelf, item: Item, times: int) -> Place:
        # Nothing moves: a use is a counter, which the next look at the entry takes into account.
        return item.place._replace(uses=min(self.ROUNDS, item.place.uses + times))

    def victims(self, shelf: Shelf) -> Iterator[tuple[bytes, Item]]:
        yield from _in_order(shelf, WORTH)
        at: dict[int, Place | None] = {PROBATION: None, RECENT: None}
        while True:
            small, main = shelf.state.nbytes[PROBATION], shelf.state.nbytes[RECENT]
            queue = PROBATION if small > self.SMALL_SHARE * (small + main) else RECENT
            found = shelf.next(queue, at[queue])
            if found is None:  # what is left of this queue is leased
                queue = RECENT if queue == PROBATION else PROBATION
                found = shelf.next(queue, at[queue])
                if found is None:
                    return
            key, item = found
            at[queue] = place = item.place
            if place.uses:
                left = 0 if queue == PROBATION else place.uses - 1
                shelf.move(key, Place(RECENT, 0, shelf.state.next_tick(), left))
            else:
                yield found


class CostAware:
    """What saves least per byte leaves first: priority = age + uses * cost / bytes.

    The age is the priority of the last that left. It rises as entries leave, so that what was used much, long
    ago, leaves in the end; uses are counted up to ``MOST_USES``, which bounds how long that takes. An entry not
    yet used counts as a fraction of a use, so that a stream of one-hit entries evicts itself, and hardly others.

    How large that fraction should be depends on the load, and is learnt from keys that come back soon after they
    had to leave: if they left unused, newcomers need more time; if they had been used, the others do.

    Sources: Cherkasova, "Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching policy",
    HPL-98-69R1, 1998, for the priority; Megiddo and Modha, "ARC", FAST 2003, for learning from ghosts.
    """

    SOON = 0.1
    """Back before so many more of its kind have left, as a share of the entries."""

    def admit(self, shelf: Shelf, item: Item, ghost: Ghost | None) -> Place:
        uses = 0
        if ghost is not None:
            self._learn(shelf, ghost)
            uses = min(MOST_USES, ghost.uses + 1)
        return self._place(shelf, item, uses)

    def use(self, shelf: Shelf, item: Item, times: int) -> Place:
        return self._place(shelf, item, _uses(item, times))

    def victims(self, shelf: Shelf) -> Iterator[tuple[bytes, Item]]:
        return _in_order(shelf, PROBATION, RECENT, WORTH)

    def _place(self, shelf: Shelf, item: Item, uses: int) -> Place:
        counts = uses * ONE_USE + LEANS[shelf.state.lean]
        worth = counts * item.cost // max(1, item.nbytes)
        return Place(WORTH, min(shelf.state.age + worth, MOST_PRIORITY), shelf.state.next_tick(), uses)

    def _learn(self, shelf: Shelf, ghost: Ghost) -> None:
        state, used = shelf.state, ghost.uses > 0
        if state.gone[used] - ghost.gone < self.SOON * len(shelf):
            state.lean = min(len(LEANS) - 1, state.lean + 1) if used else max(0, state.lean - 1)


POLICIES: dict[str, Callable[[], Policy]] = {"lru": Lru, "s3-fifo": S3Fifo, "cost": CostAware}
DEFAULT_POLICY = "cost"


def make_policy(name: str) -> Policy:
    """The policy of that name.

    Raises:
        StoreError: there is none.
    """
    if name not in POLICIES:
        raise StoreError(f"unknown policy {name!r}; use one of {', '.join(POLICIES)}", setting="policy", value=name)
    return POLICIES[name]()


def evict(shelf: Shelf, key: bytes, item: Item) -> None:
    """Take a victim off the shelf, and remember it in case it comes back."""
    used = item.place.uses > 0
    shelf.state.gone[used] += 1
    shelf.state.age = max(shelf.state.age, item.place.priority)
    shelf.delete(key)
    shelf.remember(key, Ghost(item.place.uses, shelf.state.gone[used]))


def _uses(item: Item, times: int) -> int:
    return min(MOST_USES, item.place.uses + times)


def _in_order(shelf: Shelf, *queues: int) -> Iterator[tuple[bytes, Item]]:
    """Queue after queue. The last is the policy's own; the others hold what another policy had put there."""
    for queue in queues:
        found = shelf.next(queue)
        while found:
            yield found
            found = shelf.next(queue, found[1].place)
