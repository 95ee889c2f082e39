"""The remote tier under a store: shared, slow, frozen, killed, full, lying."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import Counter
from functools import partial

import numpy as np
import pytest

from ragkv.errors import (
    CorruptEntryError,
    MissingEntryError,
    MissingExtraError,
    RemoteError,
    StoreError,
    StoreReadOnlyError,
)
from ragkv.store import ChunkStore, OpenEntry, reconcile
from ragkv.store.remote import client, writeback
from ragkv.store.remote.breaker import Breaker
from tests.remote_kit import FakeTier, started
from tests.store_kit import (
    FILE,
    PATIENCE_S,
    TOKENS,
    entry_file,
    eventually,
    flip,
    holds,
    key_for,
    open_one,
    put,
    slabs_for,
)


@pytest.fixture(autouse=True)
def quick_probes(monkeypatch):
    monkeypatch.setattr(client, "Breaker", partial(Breaker, backoff=0.02, longest=0.05))


@pytest.fixture(autouse=True)
def nothing_leaks():
    threads, files = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    yield
    eventually(lambda: {t for t in threading.enumerate() if t.name.startswith("ragkv-")} <= threads)
    assert len(os.listdir("/proc/self/fd")) <= files


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory):
    server = started(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture
def server(shared_server):
    shared_server.client.flushall()
    return shared_server


@pytest.fixture
def own_server(tmp_path_factory):
    """One that may be killed and frozen."""
    server = started(tmp_path_factory.mktemp("redis"))
    yield server
    server.thaw()
    server.kill()


@pytest.fixture
def make(tmp_path):
    with contextlib.ExitStack() as stores:

        def make(name: str, remote, **options) -> ChunkStore:
            options = {"capacity_bytes": 1 << 24, "ram_bytes": 1 << 24, "remote_timeout_ms": 500, **options}
            return stores.enter_context(ChunkStore(tmp_path / name, remote=remote, **options))

        yield make


def filled(make, remote, n: int = 1) -> None:
    """Put entries 0 … n-1 and have them uploaded."""
    store = make("filler", remote)
    for i in range(n):
        assert put(store, i)
    assert store.drain(PATIENCE_S)
    store.close()


# Sharing


def test_the_second_store_hits_what_the_first_put(make, server):
    one, two = make("one", server.url), make("two", server.url)
    assert put(one, 1)
    assert one.drain(PATIENCE_S)
    [info, nothing] = two.lookup([key_for(1), key_for(2)])
    assert (info.tier, info.tokens, nothing) == ("remote", TOKENS, None)
    with open_one(two, 1) as entry:
        assert entry.tier == "remote"
        layers = [slab for [slab] in two.open_layers([entry])]
    assert all(np.array_equal(a, b) for a, b in zip(layers, slabs_for(1), strict=True))
    assert (one.stats().remote.writebacks, two.stats().hits_remote, two.stats().misses) == (1, 1, 0)


def test_what_was_read_to_the_end_is_here_afterwards_byte_for_byte(make, server, tmp_path):
    one, two = make("one", server.url), make("two", server.url)
    put(one, 1)
    one.drain(PATIENCE_S)
    assert holds(two, 1)
    assert two.drain(PATIENCE_S)
    assert entry_file(tmp_path / "two", 1).read_bytes() == entry_file(tmp_path / "one", 1).read_bytes()
    with open_one(two, 1) as entry:
        assert entry.tier in ("ram", "ssd")
    assert two.stats().remote.promotions == 1
    assert two.check().clean
    assert two.stats().remote.writebacks == 0  # it came from there


def test_nothing_is_kept_before_the_index_counts_every_file(make, monkeypatch):
    fake, gate = FakeTier(), threading.Event()
    filled(make, fake)
    counted = reconcile.tables_sound
    monkeypatch.setattr(reconcile, "tables_sound", lambda txn, pause: gate.wait(PATIENCE_S) and counted(txn, pause))
    store = make("two", fake)
    assert holds(store, 0)
    assert not store.drain(0.2)
    assert key_for(0) not in store
    gate.set()
    assert store.drain(PATIENCE_S)
    assert key_for(0) in store


def test_what_was_not_read_to_the_end_is_not_kept(make):
    fake = FakeTier()
    filled(make, fake)
    store = make("two", fake)
    with open_one(store, 0) as entry, store.open_layers([entry], depth=1) as reader:
        next(reader)
    assert store.drain(PATIENCE_S)
    assert key_for(0) not in store
    assert store.stats().remote.promotions == 0


def test_local_ssd_and_remote_entries_are_read_together_in_order(make, server):
    one, two = make("one", server.url), make("two", server.url, ram_bytes=0)
    for i in range(6):
        put(one if i % 2 else two, i)
    assert one.drain(PATIENCE_S)
    given = []

    def allocate(nbytes):
        given.append(np.empty(nbytes, np.uint8))
        return given[-1]

    entries = two.open([key_for(i) for i in range(6)])
    with contextlib.ExitStack() as leases:
        assert [leases.enter_context(entry).tier for entry in entries] == ["ssd", "remote"] * 3
        layers = list(two.open_layers(entries, allocate=allocate))
    for layer, slabs in enumerate(layers):
        for i, slab in enumerate(slabs):
            assert np.array_equal(slab, slabs_for(i)[layer])
            assert any(slab is buffer for buffer in given)


def test_the_same_missing_key_twice(make, server):
    filled(make, server.url)
    store = make("two", server.url)
    entries = store.open([key_for(0), key_for(0)])
    entries[0].close()
    assert [len(slabs) for slabs in store.open_layers([entries[1]])] == [1, 1, 1]
    entries[1].close()


def test_what_is_there_already_is_not_sent_again(make, server):
    for name in ("one", "two"):
        store = make(name, server.url)
        put(store, 1)
        assert store.drain(PATIENCE_S)
        assert store.stats().remote.writebacks == (name == "one")


def test_a_damaged_local_entry_is_healed_from_the_remote_one(make, server, tmp_path):
    store = make("one", server.url, ram_bytes=0)
    put(store, 1)
    store.drain(PATIENCE_S)
    flip(entry_file(tmp_path / "one", 1), 8 * 4096 + 3)
    with open_one(store, 1) as entry:
        [[answer], *_] = store.open_layers([entry])
    assert isinstance(answer, CorruptEntryError)
    with open_one(store, 1) as entry:
        assert entry.tier == "remote"
    assert holds(store, 1)


def test_rot_on_the_disk_is_not_uploaded(make, tmp_path):
    fake = FakeTier()
    fake.down()
    store = make("one", fake)
    store.lookup([key_for(9)] * 3)
    eventually(lambda: (store.lookup([key_for(9)]), store.stats().remote.breaker == "open")[1])
    put(store, 1)
    flip(entry_file(tmp_path / "one", 1), 8 * 4096 + 3)
    fake.up()
    assert store.drain(PATIENCE_S)
    assert fake.objects == {}
    assert store.stats().remote.writebacks_dropped == 1


def test_delete_deletes_there_too_and_clear_does_not(make, server):
    store = make("one", server.url)
    for i in (1, 2):
        put(store, i)
    assert store.drain(PATIENCE_S)
    assert store.delete([key_for(1), key_for(9)]) == 1
    assert store.drain(PATIENCE_S)
    assert server.entries() == [f"ragkv:1:{{{key_for(2).hex()}}}"]
    assert store.clear() == 1
    assert store.drain(PATIENCE_S)
    assert len(server.entries()) == 1
    assert holds(store, 2)


def test_a_delete_forgets_the_upload_that_waits(make):
    fake, gate = FakeTier(), threading.Event()
    fake.before = lambda method: gate.wait(PATIENCE_S) if method == "put" else None
    store = make("one", fake)
    for i in (1, 2):
        put(store, i)
    eventually(lambda: "put" in fake.asked)
    store.delete([key_for(1), key_for(2)])
    gate.set()
    assert store.drain(PATIENCE_S)
    assert fake.objects == {}


def test_a_delete_waits_for_a_server_that_is_down(make, own_server):
    store = make("one", own_server.url)
    put(store, 1)
    assert store.drain(PATIENCE_S)
    own_server.freeze()
    store._remote._breaker.trip("it hangs")
    assert store.delete([key_for(1)]) == 1
    own_server.thaw()
    assert store.drain(PATIENCE_S)
    assert own_server.entries() == []
    assert store.stats().remote.deletes_failed == 0


def test_no_more_deletions_wait_for_a_server_that_is_down_than_are_allowed(make, monkeypatch):
    monkeypatch.setattr(writeback, "MOST_DELETES", 3)
    store = make("one", FakeTier())
    store._remote._breaker.trip("it is down")
    for i in range(5):
        store.delete([key_for(i)])
    assert store.stats().remote.deletes_failed == 2


def test_a_read_only_store_reads_and_never_writes(make, server):
    make("two", server.url).close()
    filled(make, server.url)
    store = make("two", server.url, read_only=True)
    assert holds(store, 0)
    with pytest.raises(StoreReadOnlyError):
        store.delete([key_for(0)])
    assert store.drain(PATIENCE_S)
    assert key_for(0) not in store
    assert len(server.entries()) == 1


def test_promotion_keeps_to_the_cap(make, server, tmp_path):
    filled(make, server.url, 4)
    store = make("two", server.url, capacity_bytes=3 * 32768)
    for i in range(4):
        assert holds(store, i)
    assert store.drain(PATIENCE_S)
    assert 0 < store.stats().bytes <= 3 * 32768
    assert store.stats().evictions > 0
    assert store.check().clean


# Slow, frozen, dead


def test_a_dead_remote_costs_no_more_than_misses(make, tmp_path):
    store = make("one", f"unix://{tmp_path}/none.sock")
    assert put(store, 1)
    for _ in range(5):
        found, missing = store.open([key_for(1), key_for(2)])
        assert isinstance(found, OpenEntry)
        assert isinstance(missing, MissingEntryError)
        found.close()
    stats = store.stats().remote
    assert stats.breaker != "closed"
    assert 1 <= stats.errors <= 4
    assert holds(store, 1)


def test_what_is_all_here_asks_nobody(make):
    fake = FakeTier()
    store = make("one", fake)
    put(store, 1)
    assert store.drain(PATIENCE_S)
    fake.asked.clear()
    store.lookup([key_for(1)])
    assert holds(store, 1)
    assert fake.asked == []


def test_a_frozen_server_is_a_miss_then_left_alone_then_used_again(make, own_server):
    filled(make, own_server.url)
    store = make("two", own_server.url, remote_timeout_ms=100)
    assert store.lookup([key_for(0)])[0].tier == "remote"
    own_server.freeze()
    for _ in range(3):
        [answer] = store.open([key_for(0)])
        assert isinstance(answer, MissingEntryError)
    assert store.stats().remote.breaker != "closed"
    own_server.thaw()
    eventually(lambda: store.stats().remote.breaker == "closed")
    assert holds(store, 0)


@pytest.mark.parametrize("harm", ["kill", "freeze"])
def test_a_server_lost_in_mid_transfer_is_an_error_in_that_entrys_place(make, own_server, harm):
    filled(make, own_server.url, 2)
    store = make("two", own_server.url, remote_timeout_ms=20)
    put(store, 7)
    entries = store.open([key_for(0), key_for(7), key_for(1)])
    with contextlib.ExitStack() as leases:
        for entry in entries:
            leases.enter_context(entry)
        reader = leases.enter_context(store.open_layers(entries, depth=1))
        first = next(reader)
        getattr(own_server, harm)()
        rest = list(reader)
    assert all(np.array_equal(slab, slabs_for(i)[0]) for i, slab in zip((0, 7, 1), first, strict=True))
    for layer, slabs in enumerate(rest, 1):
        assert np.array_equal(slabs[1], slabs_for(7)[layer])
    assert isinstance(rest[-1][0], RemoteError)
    assert isinstance(rest[-1][2], RemoteError)
    assert rest[-1][0].context["key"] == key_for(0).hex()
    assert store.stats().remote.breaker != "closed" or store.stats().remote.errors


def test_a_restarted_server_gets_what_was_put_meanwhile(make, own_server):
    store = make("one", own_server.url)
    put(store, 1)
    assert store.drain(PATIENCE_S)
    own_server.kill()
    for i in (2, 3, 4, 5):
        put(store, i)
    eventually(lambda: store.stats().remote.breaker != "closed")
    own_server.start()
    assert store.drain(PATIENCE_S)
    assert store.stats().remote.breaker == "closed"
    assert len(own_server.entries()) == 4
    assert store.stats().remote.writebacks_dropped == 0


def test_a_server_that_sends_too_slowly_is_not_waited_for(make):
    fake, gate = FakeTier(), threading.Event()
    filled(make, fake, 8)
    store = make("two", fake, remote_timeout_ms=10)
    fake.before = lambda method: gate.wait(PATIENCE_S) if method == "get" else None  # heads at once, bytes never
    entries = store.open([key_for(i) for i in range(8)])
    [*_, last] = store.open_layers(entries)
    assert all(isinstance(slab, RemoteError) for slab in last)
    assert store.stats().remote.breaker != "closed"
    for entry in entries:
        entry.close()
    assert fake.asked.count("get") <= 4 + 3  # as many as there are threads, then the breaker
    gate.set()


def test_a_hanging_lookup_ends_in_time(make):
    fake, gate = FakeTier(), threading.Event()
    store = make("one", fake, remote_timeout_ms=10)
    fake.before = lambda method: gate.wait(PATIENCE_S)
    assert store.lookup([key_for(1)]) == [None]
    gate.set()


def test_a_client_library_that_throws_anything_fails_no_request(make):
    fake = FakeTier()
    filled(make, fake)
    store = make("two", fake)

    def throw(method):
        raise ZeroDivisionError(method)

    [entry] = store.open([key_for(0)])
    fake.before = throw
    assert isinstance(store.open([key_for(1)])[0], MissingEntryError)
    [*_, [slab]] = store.open_layers([entry])
    assert isinstance(slab, RemoteError)
    entry.close()
    put(store, 3)
    fake.up()
    assert store.drain(PATIENCE_S)


@pytest.mark.parametrize("answers", [0, 1, 3])
def test_a_tier_that_answers_another_number_of_questions_is_in_error(make, answers):
    fake = FakeTier()
    filled(make, fake, 3)
    store, heads = make("two", fake), fake.heads
    fake.heads = lambda keys: heads([key_for(i) for i in range(answers)])
    assert store.lookup([key_for(0), key_for(1)]) == [None, None]
    assert store.stats().remote.errors == 1
    fake.heads = heads


def test_closing_while_the_server_hangs_ends(make, own_server):
    filled(make, own_server.url)
    store = make("two", own_server.url, remote_timeout_ms=1000)
    with open_one(store, 0) as entry:
        own_server.freeze()
        reader = store.open_layers([entry])
        put(store, 5)
        store._remote._breaker.trip("it hangs")  # or close would wait for the upload
        store.close()
        with contextlib.suppress(StoreError):
            list(reader)
        reader.close()


# Gone, damaged, full


def test_an_object_evicted_between_open_and_read_is_a_miss_in_its_place(make, server):
    filled(make, server.url)
    store = make("two", server.url)
    with open_one(store, 0) as entry:
        server.client.flushall()
        answers = [slab for [slab] in store.open_layers([entry])]
    assert all(isinstance(answer, MissingEntryError) for answer in answers)
    assert isinstance(store.open([key_for(0)])[0], MissingEntryError)
    assert store.stats().remote.breaker == "closed"


@pytest.mark.parametrize("field", ["0", "4096", "12288", "20480"])
def test_damaged_objects_are_never_served_and_dropped_there(make, server, field):
    filled(make, server.url)
    store = make("two", server.url)
    [name] = server.entries()
    raw = bytearray(server.client.hget(name, field))
    raw[100] ^= 4
    server.client.hset(name, field, bytes(raw))
    [answer] = store.open([key_for(0)])
    if isinstance(answer, OpenEntry):
        with answer:
            slabs = [slab for [slab] in store.open_layers([answer])]
        for slab, right in zip(slabs, slabs_for(0), strict=True):
            assert isinstance(slab, StoreError) or np.array_equal(slab, right)
        assert isinstance(slabs[-1], CorruptEntryError | MissingEntryError)  # missing: a later layer had it deleted
    assert store.drain(PATIENCE_S)
    assert server.entries() == []
    assert store.stats().remote.corrupt == 1
    assert key_for(0) not in store


def test_another_chunks_object_under_a_key_is_dropped(make):
    fake = FakeTier()
    filled(make, fake, 2)
    fake.objects[key_for(5)] = fake.objects[key_for(0)]
    store = make("two", fake)
    assert isinstance(store.open([key_for(5)])[0], MissingEntryError)
    assert store.drain(PATIENCE_S)
    assert set(fake.objects) == {key_for(0), key_for(1)}


def test_shortened_objects_are_misses(make):
    fake = FakeTier()
    filled(make, fake)
    fake.objects[key_for(0)] = fake.objects[key_for(0)][:-5000]
    store = make("two", fake)
    with open_one(store, 0) as entry:
        [*_, [slab]] = store.open_layers([entry])
    assert isinstance(slab, MissingEntryError)
    assert store.drain(PATIENCE_S)
    assert fake.objects == {}


def test_a_full_server_drops_uploads_and_is_still_read(make, server):
    filled(make, server.url)
    server.client.config_set("maxmemory", "1")
    try:
        store = make("two", server.url)
        for i in range(5, 10):
            put(store, i)
        assert store.drain(PATIENCE_S)
        assert store.stats().remote.writebacks_dropped == 5
        assert store.stats().remote.breaker == "closed"
        assert holds(store, 0)
    finally:
        server.client.config_set("maxmemory", "0")


def test_a_full_queue_drops_and_never_blocks(make):
    fake, gate = FakeTier(), threading.Event()
    fake.before = lambda method: gate.wait(PATIENCE_S) if method == "put" else None
    store = make("one", fake)
    store._remote._writes._capacity = 2 * FILE
    put(store, 0)
    eventually(lambda: "put" in fake.asked)
    for i in range(1, 6):
        assert put(store, i)
    assert store.stats().remote.writebacks_waiting_bytes == 2 * FILE
    assert store.stats().remote.writebacks_dropped == 3
    store.delete([key_for(2)])
    assert store.stats().remote.writebacks_waiting_bytes == FILE
    gate.set()
    assert store.drain(PATIENCE_S)
    assert set(fake.objects) == {key_for(0), key_for(1)}
    assert store.stats().remote.writebacks_waiting_bytes == 0


def test_an_entry_evicted_before_its_upload_is_dropped(make):
    fake = FakeTier()
    fake.down()
    store = make("one", fake, capacity_bytes=3 * 32768)
    for i in range(8):
        put(store, i)
    fake.up()
    assert store.drain(PATIENCE_S)
    stats = store.stats()
    assert stats.remote.writebacks_dropped == stats.evictions > 0
    assert len(fake.objects) == 8 - stats.evictions


# The breaker


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_breaker_opens_after_failures_in_a_row_only(clock):
    breaker = Breaker(failures=3, clock=clock)
    for _ in range(5):
        breaker.failure("ask", "no answer")
        breaker.failure("ask", "no answer")
        breaker.success("ask")
    assert breaker.closed
    for _ in range(3):
        breaker.success("ask")
        breaker.failure("transfer", "too slow")  # answers to questions do not make up for it
    assert breaker.state == "open"


def test_breaker_probes_ever_more_seldom(clock):
    breaker = Breaker(failures=1, backoff=1, longest=5, clock=clock)
    breaker.failure("ask", "no answer")
    waits = []
    for _ in range(5):
        waits.append(breaker.seconds_to_probe())
        clock.now += waits[-1]
        breaker.probe(lambda: False)
    assert waits == [1, 2, 4, 5, 5]


def test_breaker_opens_at_the_first_failure_after_a_probe_and_for_longer(clock):
    breaker = Breaker(failures=3, backoff=1, clock=clock)
    for _ in range(3):
        breaker.failure("transfer", "too slow")
    seen = []
    breaker.probe(lambda: bool(seen.append(breaker.state)) or True)
    assert (seen, breaker.state) == (["half-open"], "closed")
    breaker.success("ask")
    breaker.failure("transfer", "too slow")
    assert (breaker.state, breaker.seconds_to_probe()) == ("open", 2)
    breaker.probe(lambda: True)
    breaker.success("transfer")
    breaker.success("ask")
    for _ in range(3):
        breaker.failure("transfer", "too slow")
    assert breaker.seconds_to_probe() == 1


def test_breaker_says_when_it_changes_and_ignores_what_was_begun_before(clock):
    breaker, changes = Breaker(failures=1, clock=clock), []
    breaker.on_change = lambda: changes.append(breaker.state)
    breaker.trip("down")
    breaker.success("ask")
    breaker.failure("ask", "no answer")
    assert breaker.seconds_to_probe() == 1
    breaker.probe(lambda: True)
    assert changes == ["open", "closed"]
    assert breaker.seconds_to_probe() is None


def test_without_the_client_library_the_message_names_the_extra(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "ragkv.store.remote.redis", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ragkv\[remote\]'"):
        make("one", "redis://localhost")


# Everything at once


@pytest.mark.slow
def test_a_server_harmed_at_random_moments_gives_no_wrong_byte(make, own_server):
    """Readers and a writer at work while the server is killed, frozen, emptied, cut off and corrupted 120 times."""
    rng, chunks = np.random.default_rng(1), 12
    right = [slabs_for(i) for i in range(chunks)]
    writer = make("writer", own_server.url, remote_timeout_ms=20)
    for i in range(chunks):
        put(writer, i)
    counts, stop, faults = Counter(), threading.Event(), []

    def reading(seed: int) -> None:
        mine, store = np.random.default_rng(seed), make(f"reader{seed}", own_server.url, remote_timeout_ms=20)
        try:
            while not stop.is_set():
                some = mine.permutation(chunks)[:5].tolist()
                opened = zip(some, store.open([key_for(i) for i in some]), strict=True)
                found = [(i, entry) for i, entry in opened if isinstance(entry, OpenEntry)]
                for layer, slabs in enumerate(store.open_layers([entry for _, entry in found], depth=1)):
                    for (i, entry), slab in zip(found, slabs, strict=True):
                        answer = type(slab).__name__ if isinstance(slab, StoreError) else entry.tier
                        counts[answer] += 1
                        assert isinstance(slab, StoreError) or np.array_equal(slab, right[i][layer])
                for _, entry in found:
                    entry.close()
                store.clear()  # so that the next round asks the server again
        except BaseException as error:
            faults.append(error)

    def harm() -> None:
        what = rng.integers(6)
        if what == 0:
            own_server.kill()
            own_server.start()
        elif what == 1:
            own_server.freeze()
            time.sleep(rng.random() / 10)
            own_server.thaw()
        elif what == 2:
            own_server.client.flushall()
        elif what == 3:
            own_server.client.client_kill_filter(_type="normal", skipme=True)
        else:
            for name in own_server.entries():
                field = rng.choice(["0", "4096", "12288", "20480"])
                raw = bytearray(own_server.client.hget(name, field) or b"0")
                raw[rng.integers(len(raw))] ^= 1 << int(rng.integers(8))
                own_server.client.hset(name, field, bytes(raw))
        for i in range(chunks):
            writer._remote.add(key_for(i), FILE)

    threads = [threading.Thread(target=reading, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for _ in range(120):
        harm()
        time.sleep(rng.random() / 20)
    stop.set()
    for thread in threads:
        thread.join()
    assert faults == []
    assert writer.drain(PATIENCE_S)
    assert counts["remote"] > 100
    assert counts["RemoteError"] + counts["MissingEntryError"] > 0
    assert counts["CorruptEntryError"] > 0
    print(dict(counts))
