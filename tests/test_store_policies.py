from __future__ import annotations

from collections import OrderedDict, deque
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragkv.config import Settings
from ragkv.errors import StoreError
from ragkv.eval.cache_policy import make_room
from ragkv.store.check import tables_sound
from ragkv.store.index import Index
from ragkv.store.policies import DEFAULT_POLICY, LEANS, MOST_PRIORITY, MOST_USES, POLICIES, S3Fifo, evict, make_policy
from ragkv.store.rows import Ghost, Place, Row, ShelfState
from ragkv.store.shelf import GHOSTS_PER_ENTRY, MemoryItem, MemoryShelf
from ragkv.store.txn import IndexTxn

EVERY = list(POLICIES)


class Cache:
    """A shelf, a policy and a capacity, driven as the store and the simulator drive them."""

    def __init__(self, policy: str, capacity: int) -> None:
        self.policy = make_policy(policy)
        self.capacity = capacity
        self.shelf = MemoryShelf()

    def ask(self, name: str, nbytes: int = 1, cost: int = 1) -> bool:
        key = name.encode()
        item = self.shelf.get(key)
        if item is not None:
            self.shelf.move(key, self.policy.use(self.shelf, item, 1))
            return True
        make_room(self.shelf, self.policy, self.capacity - nbytes)
        new = MemoryItem(nbytes, cost)
        self.shelf.put(key, new.at(self.policy.admit(self.shelf, new, self.shelf.recall(key))))
        return False

    def __contains__(self, name: str) -> bool:
        return self.shelf.get(name.encode()) is not None

    def count(self, prefix: str, of: int) -> int:
        return sum(f"{prefix}{i}" in self for i in range(of))


# What each policy is for


def warmed(policy: str) -> Cache:
    cache = Cache(policy, 100)
    for _ in range(4):
        for i in range(50):
            cache.ask(f"hot{i}")
    return cache


@pytest.mark.parametrize(("policy", "stay"), [("lru", 0), ("s3-fifo", 50), ("cost", 50)])
def test_a_scan_washes_out_only_lru(policy, stay):
    cache = warmed(policy)
    for i in range(1000):
        cache.ask(f"scan{i}")
    assert cache.count("hot", 50) == stay
    assert "scan999" in cache, "a new entry is never refused"


@pytest.mark.parametrize("policy", EVERY)
def test_what_was_hot_leaves_in_the_end(policy):
    cache = Cache(policy, 100)
    for _ in range(1000):
        for i in range(50):
            cache.ask(f"old{i}")
    for _ in range(3 * MOST_USES):
        for i in range(90):
            cache.ask(f"new{i}")
    assert cache.count("old", 50) <= 10
    assert cache.count("new", 90) == 90


@pytest.mark.parametrize("policy", EVERY)
def test_even_a_stream_of_one_hit_entries_ends_what_was_hot(policy):
    cache = warmed(policy)
    for i in range(100 * len(LEANS)):
        cache.ask(f"scan{i}")
    assert policy == "s3-fifo" or cache.count("hot", 50) == 0


@pytest.mark.parametrize("policy", ["s3-fifo", "cost"])
def test_frequency_counts(policy):
    rng = np.random.default_rng(0)
    cache = Cache(policy, 100)
    for i in range(5000):
        cache.ask(f"often{rng.integers(60)}" if i % 2 else f"seldom{rng.integers(2000)}")
    assert cache.count("often", 60) >= 55


def test_used_alike_the_cheap_and_the_large_leave_first():
    cache = Cache("cost", 100)
    for _ in range(3):
        for i in range(10):
            cache.ask(f"dear{i}", nbytes=5, cost=50)
            cache.ask(f"cheap{i}", nbytes=5, cost=5)
    for _ in range(3):
        for i in range(10):
            cache.ask(f"middle{i}", nbytes=5, cost=25)
    assert (cache.count("dear", 10), cache.count("middle", 10), cache.count("cheap", 10)) == (10, 10, 0)


def test_among_equals_the_least_recently_used_leaves():
    cache = Cache("cost", 3)
    for name in "abcab":
        cache.ask(name)
    cache.ask("c")
    cache.ask("d")
    assert [name for name in "abcd" if name in cache] == ["b", "c", "d"]


@pytest.mark.parametrize("policy", ["s3-fifo", "cost"])
def test_what_comes_back_is_remembered(policy):
    cache = warmed(policy)
    cache.ask("back")
    for i in range(100):
        cache.ask(f"scan{i}")
    assert "back" not in cache
    cache.ask("back")
    for i in range(100, 400):
        cache.ask(f"scan{i}")
    assert "back" in cache


def test_newcomers_count_for_more_where_they_come_back_and_for_less_where_others_do():
    cache = warmed("cost")
    shelf, item = cache.shelf, MemoryItem(1, 1)
    shelf.state.gone = [5000, 5000]

    def learnt(uses: int, ago: int) -> int:
        before = shelf.state.lean
        cache.policy.admit(shelf, item, Ghost(uses, gone=5000 - ago))
        return shelf.state.lean - before

    assert (learnt(0, 4), learnt(3, 4)) == (-1, 1)
    assert (learnt(0, 6), learnt(3, 6)) == (0, 0), "too long ago to say anything"
    newcomer = cache.policy.admit(shelf, item, None).priority
    for _ in range(2 * len(LEANS)):
        learnt(0, 1)
    assert cache.policy.admit(shelf, item, None).priority > newcomer
    for _ in range(2 * len(LEANS)):
        learnt(3, 1)
    assert shelf.state.age < cache.policy.admit(shelf, item, None).priority < newcomer


def test_ghosts_are_bounded():
    cache = Cache("cost", 20)
    for i in range(1000):
        cache.ask(f"x{i}")
    ghosts = [i for i in range(1000) if cache.shelf.recall(f"x{i}".encode())]
    assert GHOSTS_PER_ENTRY * 19 <= len(ghosts) <= GHOSTS_PER_ENTRY * 20
    assert ghosts == list(range(980 - len(ghosts), 980)), "the oldest are forgotten"


@pytest.mark.parametrize("policy", EVERY)
def test_uses_without_evictions_take_no_memory(policy):
    cache = Cache(policy, 100)
    for i in range(5000):
        cache.ask(f"x{i % 50}")
    assert sum(map(len, cache.shelf._heaps)) <= 3 * (2 * 50 + 65)


def test_priorities_end_at_their_ceiling():
    cache = Cache("cost", 10)
    for i in range(30):
        cache.ask(f"x{i}", nbytes=1, cost=2**60)
    assert all(0 < item.place.priority <= MOST_PRIORITY for item in [cache.shelf.next(2)[1]])
    assert "x29" in cache


@pytest.mark.parametrize("old", EVERY)
@pytest.mark.parametrize("new", EVERY)
def test_a_policy_takes_over_what_another_left(old, new):
    cache = warmed(old)
    cache.policy = make_policy(new)
    for _ in range(MOST_USES):
        for i in range(90):
            cache.ask(f"new{i}")
    assert cache.count("new", 90) == 90
    left = [key for key, item in cache.policy.victims(cache.shelf) if not evict(cache.shelf, key, item)]
    assert len(left) == 100
    assert cache.shelf.state.nbytes == [0, 0, 0]


@pytest.mark.parametrize("policy", EVERY)
def test_refused_victims_are_passed_over_and_all_others_offered(policy):
    cache = warmed(policy)
    leased = {key for i in range(0, 50, 3) for key in [f"hot{i}".encode()]}
    for i in range(60):
        cache.ask(f"new{i}")
    here = {key for key, _ in cache.policy.victims(cache.shelf)}
    gone = set()
    for key, item in cache.policy.victims(cache.shelf):
        if key not in leased:
            evict(cache.shelf, key, item)
            gone.add(key)
    assert gone == here - leased
    assert len(cache.shelf) == len(here & leased)


def test_unknown_policies_are_refused_by_name():
    with pytest.raises(StoreError, match=r"'mru'.*lru, s3-fifo, cost"):
        make_policy("mru")


def test_every_policy_can_be_set_and_the_default_is_the_stores():
    field = Settings.model_fields["store_policy"]
    assert set(get_args(field.annotation)) == set(POLICIES)
    assert field.default == DEFAULT_POLICY


def test_a_damaged_state_is_no_state():
    value = ShelfState(7, 6, 5, [1, 2], [3, 4, 5]).pack()
    assert ShelfState.unpack(value) == ShelfState(7, 6, 5, [1, 2], [3, 4, 5])
    for bit in range(len(value) * 8):
        damaged = bytearray(value)
        damaged[bit // 8] ^= 1 << bit % 8
        assert ShelfState.unpack(bytes(damaged)) is None
    assert ShelfState.unpack(b"") is None


# Against models made of plain lists


def reference_lru(asked: list[tuple[int, int]], capacity: int) -> list[bool]:
    cache: OrderedDict[int, int] = OrderedDict()
    found = []
    for name, nbytes in asked:
        found.append(name in cache)
        if found[-1]:
            cache.move_to_end(name)
            continue
        while sum(cache.values()) + nbytes > capacity:
            cache.popitem(last=False)
        cache[name] = nbytes
    return found


def reference_s3fifo(asked: list[tuple[int, int]], capacity: int) -> list[bool]:
    small: deque[int] = deque()
    main: deque[int] = deque()
    ghosts: deque[int] = deque()
    size, uses, found = {}, {}, []
    for name, nbytes in asked:
        found.append(name in uses)
        if found[-1]:
            uses[name] = min(3, uses[name] + 1)
            continue
        while sum(size[n] for n in uses) + nbytes > capacity:
            in_small, in_all = sum(size[n] for n in small), sum(size[n] for n in uses)
            if small and (in_small > S3Fifo.SMALL_SHARE * in_all or not main):
                victim = small.popleft()
                if uses[victim]:
                    main.append(victim)
                    uses[victim] = 0
                    continue
            else:
                victim = main.popleft()
                if uses[victim]:
                    main.append(victim)
                    uses[victim] -= 1
                    continue
            del uses[victim]
            ghosts.append(victim)
            while len(ghosts) > GHOSTS_PER_ENTRY * len(uses):
                ghosts.popleft()
        if name in ghosts:
            ghosts.remove(name)
            main.append(name)
        else:
            small.append(name)
        size[name], uses[name] = nbytes, 0
    return found


@pytest.mark.parametrize(("policy", "reference"), [("lru", reference_lru), ("s3-fifo", reference_s3fifo)])
@given(
    names=st.lists(st.integers(0, 25), max_size=150),
    sizes=st.lists(st.integers(1, 9), min_size=26, max_size=26),
    capacity=st.integers(9, 60),
)
@settings(max_examples=60, deadline=None)
def test_finds_what_the_textbook_finds(policy, reference, names, sizes, capacity):
    cache = Cache(policy, capacity)
    asked = [(name, sizes[name]) for name in names]
    assert [cache.ask(str(name), nbytes) for name, nbytes in asked] == reference(asked, capacity)


class ListShelf(MemoryShelf):
    """The same shelf, searched from end to end."""

    def next(self, queue, after=None):
        least = after.order if after else (queue, -1, -1)
        behind = [e for e in self._items.items() if e[1].place.queue == queue and e[1].place.order > least]
        return min(behind, key=lambda e: e[1].place.order, default=None)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["put", "use", "delete"]), st.integers(0, 12), st.integers(1, 9)),
        st.tuples(st.just("evict"), st.sets(st.integers(0, 12), max_size=4), st.integers(1, 30)),
    ),
    max_size=60,
)


@pytest.mark.parametrize("policy", EVERY)
@given(operations=OPERATIONS)
@settings(max_examples=25, deadline=None)
def test_the_index_is_the_shelf_that_is_simulated(policy, operations):
    """Random puts, uses, deletions and evictions among leases: LMDB, heaps and a plain list agree on everything."""
    with TemporaryDirectory() as folder:
        index = Index(Path(folder) / "index", read_only=False)
        heaps, plain = MemoryShelf(), ListShelf()
        for operation in operations:
            work = partial(apply, policy, operation)
            expected = work(plain)
            assert work(heaps) == expected
            assert index.write(work) == expected
        index.close()


def apply(policy_name: str, operation, shelf):
    policy = make_policy(policy_name)
    name, which, amount = operation
    if name == "evict":
        leased, evicted = {key_of(i) for i in which}, []
        for key, item in policy.victims(shelf):
            if key not in leased:
                evict(shelf, key, item)
                evicted.append(key)
                amount -= item.nbytes
            if amount <= 0:
                break
        return evicted, shelf.state
    key = key_of(which)
    item = shelf.get(key)
    if name == "use" and item is not None:
        shelf.move(key, policy.use(shelf, item, amount))
    elif name == "put":
        row = Row(amount, 1 + which, 7, 0.0, "m")
        new = MemoryItem(row.nbytes, row.cost) if isinstance(shelf, MemoryShelf) else row
        shelf.put(key, new.at(policy.admit(shelf, new, shelf.recall(key))))
    elif name == "delete":
        shelf.delete(key)
    item = shelf.get(key)
    return item and (item.nbytes, item.cost, item.place), shelf.state, len(shelf)


def key_of(number: int) -> bytes:
    return number.to_bytes(32, "little")  # ghosts go by a key's first bytes, which a hash makes all differ


@pytest.mark.parametrize("policy", EVERY)
def test_the_next_victim_is_found_and_not_searched_for(tmp_path, monkeypatch, policy):
    index = Index(tmp_path / "index", read_only=False)
    index.write(lambda txn: [apply(policy, ("put", i, 5), txn) for i in range(1500)])
    index.write(lambda txn: [apply(policy, ("use", i, 1), txn) for i in range(500)])
    looked = []
    get = IndexTxn.get
    monkeypatch.setattr(IndexTxn, "get", lambda txn, key: (looked.append(key), get(txn, key))[1])
    evicted, _ = index.write(partial(apply, policy, ("evict", set(), 20)))
    assert len(evicted) == 4
    # S3-FIFO passes what was used on to its main queue, each entry once.
    assert len(looked) <= (500 if policy == "s3-fifo" else 0) * 3 + 20
    looked.clear()
    index.write(partial(apply, policy, ("evict", set(), 20)))
    assert len(looked) <= 20
    index.close()


@pytest.mark.parametrize("policy", EVERY)
def test_a_damaged_order_ends_nothing_but_itself(tmp_path, policy):
    """Places that lead nowhere, to another row, or to one that stands elsewhere are passed over, and repaired."""
    index = Index(tmp_path / "index", read_only=False)
    index.write(lambda txn: [apply(policy, ("put", i, 5), txn) for i in range(9)])

    def damage(txn):
        queue, priority, tick, _ = txn.get(key_of(4)).place
        for off, key in enumerate([key_of(4), key_of(99), key_of(8)]):
            txn._queues.add(Place(queue, priority, tick * 1000 + off), key)
            txn._queues.add(Place((queue + 1) % 3, 0, off), key)
        txn._queues.drop(txn.get(key_of(2)).place)
        txn._txn.put(b"state", b"damaged", db=txn._queues._state)

    index.write(damage)
    assert not index.read(tables_sound)
    evicted, _ = index.write(partial(apply, policy, ("evict", {0}, 99)))
    assert sorted(evicted) == [key_of(i) for i in range(9) if i not in (0, 2)]
    index.write(lambda txn: txn.rebuild())
    assert index.read(tables_sound)
    assert sorted(index.write(partial(apply, policy, ("evict", set(), 99)))[0]) == [key_of(0), key_of(2)]
    index.close()


def test_places_are_ordered_as_their_bytes():
    rng = np.random.default_rng(0)
    places = [Place(*map(int, rng.integers(0, [3, 2**63, 2**63]))) for _ in range(200)]
    assert [Place.unpack(p) for p in sorted(p.pack() for p in places)] == sorted((*p[:3], 0) for p in places)
