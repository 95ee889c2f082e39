"""The byte cap and the policies' state in a real store: folders, files, crashes, several processes."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragkv.errors import StoreError, StoreFullError
from ragkv.store import ChunkStore, OpenEntry, space
from ragkv.store.index import Index
from ragkv.store.lease import lease
from ragkv.store.policies import POLICIES
from ragkv.store.rows import Ghost, Row
from ragkv.store.temp import TempFile
from tests.store_kit import FILE, GEOMETRY, disk_usage, entry_file, holds, key_for, open_one, put, python

EVERY = list(POLICIES)
MIB = 1 << 20
CAPACITY = 6 * FILE + 4096


def store_at(root, policy="cost", capacity=CAPACITY):
    return ChunkStore(root, capacity_bytes=capacity, ram_bytes=0, policy=policy)


def use(store: ChunkStore, *numbers: int) -> None:
    for i in numbers:
        open_one(store, i).close()


def here(store: ChunkStore, numbers) -> list[int]:
    return [i for i in numbers if key_for(i) in store]


def sized(store: ChunkStore, i: int, tokens: int) -> bool:
    slab = np.random.default_rng(i).integers(0, 256, GEOMETRY.slab_bytes(tokens), dtype=np.uint8)
    return store.put(key_for(i), GEOMETRY, [slab] * GEOMETRY.layers, tokens=tokens, model="m")


@pytest.mark.parametrize("policy", EVERY)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["put", "use", "hold", "release", "delete"]), st.integers(0, 9)), max_size=25
    )
)
@settings(max_examples=12, deadline=None)
def test_the_cap_holds_whatever_happens(tmp_path_factory, policy, steps):
    """Puts of many sizes, uses, leases and deletions: never above the cap, no leased entry gone, all bytes counted."""
    root = tmp_path_factory.mktemp("store")
    capacity = 5 * FILE
    held: dict[int, OpenEntry] = {}
    with store_at(root, policy, capacity) as store:
        for action, i in steps:
            if action == "put":
                with contextlib.suppress(StoreFullError):
                    sized(store, i, 20 + 40 * (i % 4))
            elif action == "use":
                store.open([key_for(i)])
            elif action == "hold" and i not in held:
                [entry] = store.open([key_for(i)])
                if isinstance(entry, OpenEntry):
                    held[i] = entry
            elif action == "release" and i in held:
                held.pop(i).close()
            elif action == "delete":
                store.delete([key_for(i)])
            assert disk_usage(root) <= capacity
            assert set(here(store, held)) == set(held)
        for entry in held.values():
            entry.close()
        assert store.check().clean
        assert store.stats().bytes == disk_usage(root)
    shutil.rmtree(root)


def test_the_cap_holds_while_an_entry_is_written(tmp_path, monkeypatch):
    with store_at(tmp_path / "kv") as store:
        for i in range(6):
            put(store, i)
        seen = []
        write = TempFile.write
        monkeypatch.setattr(TempFile, "write", lambda *args: (seen.append(disk_usage(tmp_path / "kv")), write(*args)))
        put(store, 6)
        assert seen
        assert max(seen) <= CAPACITY


@pytest.mark.parametrize(("policy", "stay"), [("lru", []), ("s3-fifo", [0, 1]), ("cost", [0, 1])])
def test_the_store_evicts_as_its_policy_says(tmp_path, policy, stay):
    with store_at(tmp_path / "kv", policy) as store:
        put(store, 0)
        put(store, 1)
        for _ in range(3):
            use(store, 0, 1)
        for i in range(10, 22):
            put(store, i)
        assert here(store, [0, 1]) == stay
        assert holds(store, 21)


def test_the_default_is_cost_and_unknown_policies_are_refused(tmp_path):
    with ChunkStore(tmp_path / "kv", capacity_bytes=MIB, ram_bytes=0) as store:
        assert put(store, 0)
    with pytest.raises(StoreError, match=r"fifo2.*lru, s3-fifo, cost"):
        store_at(tmp_path / "other", "fifo2")
    assert not (tmp_path / "other").exists()


def test_context_is_part_of_what_an_entry_saves(tmp_path):
    """Chunks deep in their document cost more to compute again than their first ones: those leave first."""
    with store_at(tmp_path / "kv") as store:
        for i in range(6):
            put(store, i, context_tokens=1000 * (i % 2), context_policy="document")
            use(store, i)
        for i in range(6, 9):
            put(store, i, context_tokens=1000, context_policy="document")
            use(store, i)
        assert here(store, range(9)) == [1, 3, 5, 6, 7, 8]
    assert Row(4096, 50, 3, 0.0, "m", 1000).cost == 3 * 1050


def test_leased_entries_are_passed_over(tmp_path):
    for policy in EVERY:
        with store_at(tmp_path / policy, policy) as store:
            for i in range(6):
                put(store, i)
            with open_one(store, 0), open_one(store, 1):
                for i in range(6, 18):
                    put(store, i)
                assert here(store, [0, 1]) == [0, 1]
            held = [open_one(store, i) for i in here(store, range(18))]
            with pytest.raises(StoreFullError, match="close some"):
                put(store, 20)
            for entry in held:
                entry.close()
            assert put(store, 20)


@pytest.mark.parametrize("policy", ["s3-fifo", "cost"])
def test_uses_survive_closing(tmp_path, policy):
    with store_at(tmp_path / "kv", policy) as store:
        for i in range(6):
            put(store, i)
        use(store, 0, 0, 0)
    with store_at(tmp_path / "kv", policy) as store:
        for i in range(6, 14):
            put(store, i)
        assert here(store, range(6)) == [0]


def test_who_had_to_leave_is_remembered_after_closing(tmp_path):
    with store_at(tmp_path / "kv") as store:
        for i in range(12):
            put(store, i)
        assert not here(store, [0])
    with store_at(tmp_path / "kv") as store:
        put(store, 0)
        for i in range(12, 22):
            put(store, i)
        assert here(store, [0, 12]) == [0]


def test_clocks_may_jump(tmp_path, monkeypatch):
    now = iter([1e9, 5e9, 0.0, 2e9, -1.0, 3e9] * 4)
    monkeypatch.setattr(time, "time", lambda: next(now))
    with store_at(tmp_path / "kv", "lru") as store:
        for i in range(12):
            put(store, i)
            assert here(store, range(12)) == list(range(max(0, i - 5), i + 1))


KILLED = """
import sys
from ragkv.store import ChunkStore
from tests.store_kit import FILE, key_for, put
store = ChunkStore(sys.argv[1], capacity_bytes=6 * FILE + 4096, ram_bytes=0, policy=sys.argv[2])
for i in range(6):
    put(store, i)
for i in range(3):
    [entry] = store.open([key_for(0)])
    entry.close()
print("ready", flush=True)
i = 100
while True:
    put(store, i)
    i += 1
"""


@pytest.mark.parametrize("policy", EVERY)
def test_a_killed_process_takes_hints_with_it_and_nothing_else(tmp_path, policy):
    root = tmp_path / "kv"
    with python(KILLED, root, policy) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
    with store_at(root, policy) as store:
        assert store.check(fix=True).tables_sound
        assert disk_usage(root) <= CAPACITY
        for i in range(200, 208):
            put(store, i)
            assert disk_usage(root) <= CAPACITY
        assert here(store, [207]) == [207]
        assert store.check().clean


WRITER = """
import sys
from ragkv.store import ChunkStore
from tests.store_kit import FILE, key_for, put
first = int(sys.argv[2])
with ChunkStore(sys.argv[1], capacity_bytes=6 * FILE + 4096, ram_bytes=0) as store:
    for i in range(first, first + 25):
        put(store, i)
        for entry in store.open([key_for(7000)]):
            getattr(entry, "close", lambda: None)()
"""


def test_processes_share_one_order(tmp_path):
    root = tmp_path / "kv"
    with store_at(root) as store:
        put(store, 7000)
        use(store, 7000, 7000)
    with python(WRITER, root, 1000) as one, python(WRITER, root, 2000) as two:
        while one.poll() is None or two.poll() is None:
            assert disk_usage(root) <= CAPACITY
        assert (one.returncode, two.returncode) == (0, 0)
    with store_at(root) as store:
        assert here(store, [7000]) == [7000], "both used it, and it outlived fifty that nobody used"
        assert store.check().clean


AFTER_A_CRASH = """
import sys, threading
from ragkv.store import ChunkStore, reconcile
from tests.store_kit import FILE, put
root, slow, first = sys.argv[1], sys.argv[2] == "slow", int(sys.argv[3])
if slow:
    go_on, sound = threading.Event(), reconcile.tables_sound
    reconcile.tables_sound = lambda txn, pause: go_on.wait() and sound(txn, pause)
with ChunkStore(root, capacity_bytes=6 * FILE + 4096, ram_bytes=0) as store:
    print("open", flush=True)
    if slow:
        sys.stdin.readline()
        go_on.set()
    for i in range(first, first + 5):
        put(store, i)
    print("put", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("end", ["done", "killed", "reading"])
def test_the_cap_holds_while_another_process_counts(tmp_path, end):
    """After a crash that cost all rows: whoever comes later waits for the count, or makes it."""
    root = tmp_path / "kv"
    with store_at(root) as store:
        for i in range(6):
            put(store, i)
        store._index.write(lambda txn: [txn.delete(key_for(i)) for i in range(6)])
    (root / "index" / "clean").unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:

        def worker(speed: str, first: int):
            process = stack.enter_context(python(AFTER_A_CRASH, root, speed, first))
            stack.callback(process.kill)
            assert process.stdout.readline() == "open\n"
            return process

        if end == "reading":
            stack.enter_context(ChunkStore(root, capacity_bytes=CAPACITY, ram_bytes=0, read_only=True))
            others = [worker("fast", 20)]
        else:
            counts = worker("slow", 10)
            others = [worker("fast", first) for first in (20, 30)]
            assert not select.select([process.stdout for process in others], [], [], 0.2)[0]
            assert len(list(root.glob("entries/*/*"))) == 6
            if end == "done":
                others.append(counts)
                counts.stdin.write("\n")
                counts.stdin.flush()
            else:
                counts.kill()
        assert [process.stdout.readline() for process in others] == ["put\n"] * len(others)
        assert disk_usage(root) <= CAPACITY
        for process in others:
            process.stdin.close()
            assert process.wait() == 0
    with store_at(root) as store:
        assert store.check().clean
        assert store.stats().bytes == disk_usage(root) <= CAPACITY


def test_another_layout_is_rebuilt_from_the_headers(tmp_path, monkeypatch):
    root = tmp_path / "kv"
    with store_at(root) as store:
        put(store, 0, context_tokens=77, context_policy="document")
        put(store, 1)
    monkeypatch.setattr("ragkv.store.rows.LAYOUT", b"older")
    monkeypatch.setattr("ragkv.store.index.LAYOUT", b"older")
    monkeypatch.setattr("ragkv.store.index.DATABASES", (b"entries", b"order", b"models", b"ghosts", b"future"))
    with store_at(root) as store:
        store.check()
        assert here(store, [0, 1]) == [0, 1]
        assert holds(store, 0)
        [row] = store._index.get_many([key_for(0)])
        assert (row.context_tokens, row.cost) == (77, 3 * (50 + 77))


def test_a_state_that_was_lost_is_derived(tmp_path):
    with store_at(tmp_path / "kv") as store:
        for i in range(9):
            put(store, i)
            use(store, i)
        store._flush()

        def lose(txn):
            before, txn._state = txn.state, None
            txn._queues._txn.put(b"state", b"not what was written", db=txn._queues._state)
            return before, txn.state

        before, after = store._index.write(lose)
        assert after.tick <= before.tick
        assert after.nbytes == before.nbytes
        put(store, 20)
        use(store, 20)
        assert here(store, [20]) == [20]
        assert store.check().clean


def test_a_put_that_cannot_fit_costs_nobody_his_place(tmp_path):
    with store_at(tmp_path) as store:
        for i in range(6):
            put(store, i)
        held = [open_one(store, i) for i in range(3)]
        with pytest.raises(StoreFullError, match="open"):
            sized(store, 9, tokens=4 * 50)
        assert here(store, range(6)) == list(range(6))
        assert all(holds(store, i) for i in range(6))
        assert store.stats().evictions == 0
        assert store.check().clean
        for entry in held:
            entry.close()


def test_a_cap_below_what_is_leased_lets_only_that_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(space, "TIDIED_AT_ONCE", 2)
    with store_at(tmp_path) as store:
        for i in range(6):
            put(store, i)
    leases = [lease(str(entry_file(tmp_path, i))) for i in (1, 4)]
    with store_at(tmp_path, capacity=FILE) as store:
        assert here(store, range(6)) == [1, 4]
        assert disk_usage(tmp_path) == 2 * FILE
        assert store.check().clean
    for fd in leases:
        os.close(fd)
    with store_at(tmp_path, capacity=FILE) as store:
        assert len(here(store, range(6))) == 1


def test_what_a_dead_writer_published_is_counted_although_a_put_failed(tmp_path):
    with store_at(tmp_path) as store:
        for i in range(6):
            put(store, i)
        held = [open_one(store, i) for i in range(5)]
        file = entry_file(tmp_path, 5)
        raw = file.read_bytes()
        store.delete([key_for(5)])
        file.write_bytes(raw)  # as if its writer had died before its row was committed
        os.link(file, tmp_path / "tmp" / f"{key_for(5).hex()}.0")
        with pytest.raises(StoreFullError):
            sized(store, 9, tokens=4 * 50)
        put(store, 8)
        assert here(store, range(9)) == [0, 1, 2, 3, 4, 8]
        assert disk_usage(tmp_path) <= CAPACITY
        for entry in held:
            entry.close()


@pytest.mark.parametrize("where", ["entry", "entry link", "tmp", "tmp link", "quarantine"])
def test_what_is_no_file_stops_no_eviction(tmp_path, where):
    with store_at(tmp_path) as store:
        put(store, 0)
        kind, _, link = where.partition(" ")
        place = entry_file(tmp_path, 0) if kind == "entry" else tmp_path / kind / "x"
        place.unlink(missing_ok=True)
        if link:
            place.symlink_to("nowhere")
        else:
            place.mkdir()
        for i in range(1, 20):
            assert put(store, i)
        assert holds(store, 19)


def test_many_ghosts_too_many_are_forgotten_little_by_little(tmp_path):
    index = Index(tmp_path / "index", read_only=False)

    def remember(numbers, most):
        return lambda txn: [txn._queues.remember(key_for(i), Ghost(0, i), number=i, most=most) for i in numbers]

    def known(txn):
        return txn._txn.stat(txn._queues._ghosts)["entries"] // 2

    index.write(remember(range(100), 100))
    index.write(remember([100], 3))
    assert 80 < index.read(known) < 100
    index.write(remember(range(101, 150), 3))
    assert index.read(known) == 3
    index.close()
