"""The store against a simple model in memory, through random interleavings; longer: ``make properties``."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ragkv.errors import StoreError, StoreFullError
from ragkv.store import ChunkStore, OpenEntry
from tests.store_kit import FILE, GEOMETRY, TOKENS, disk_usage, entry_file, key_for, put, slabs_for

EXAMPLES = int(os.environ.get("RAGKV_PROPERTY_EXAMPLES", "15"))
CAPACITY = 6 * FILE + 4096
CHUNKS = st.integers(0, 11)


def right(slabs: list[np.ndarray], i: int) -> bool:
    return all(np.array_equal(got, want) for got, want in zip(slabs, slabs_for(i), strict=True))


class StoreMachine(RuleBasedStateMachine):
    """``maybe`` are the chunks put and not deleted: any of them may have been evicted, nothing else may be there.

    ``held`` are open entries: they stay, whatever happens. After a crash what was being put may be there or not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)) / "kv"
        self.maybe: set[int] = set()
        self.held: list[tuple[int, OpenEntry]] = []
        self.sure: int | None = None
        self.store: ChunkStore | None = None

    @initialize(ram=st.sampled_from([0, 3 * FILE]), policy=st.sampled_from(["cost", "lru", "s3-fifo"]))
    def begin(self, ram: int, policy: str) -> None:
        self.options = {"capacity_bytes": CAPACITY, "ram_bytes": ram, "policy": policy, "threads": 2}
        self.reopen()

    def reopen(self) -> None:
        self.store = ChunkStore(self.root, **self.options)

    @rule(i=CHUNKS)
    def put(self, i: int) -> None:
        there = self.store.lookup([key_for(i)])[0] is not None
        try:
            assert put(self.store, i) != there
        except StoreFullError:
            assert self.held  # everything that could leave is open
            return
        self.maybe.add(i)
        self.sure = i

    @rule(some=st.lists(CHUNKS, max_size=6))
    def lookup(self, some: list[int]) -> None:
        for i, info in zip(some, self.store.lookup([key_for(i) for i in some]), strict=True):
            assert info is None or (i in self.maybe and info.tokens == TOKENS and info.nbytes == FILE)

    @rule(some=st.lists(CHUNKS, max_size=4), depth=st.integers(1, 4), early=st.booleans())
    def read(self, some: list[int], depth: int, early: bool) -> None:
        opened = self.store.open([key_for(i) for i in some])
        pairs = [(i, entry) for i, entry in zip(some, opened, strict=True) if isinstance(entry, OpenEntry)]
        assert {i for i, _ in pairs} <= self.maybe
        with self.store.open_layers([entry for _, entry in pairs], depth=depth) as layers:
            for n, slabs in enumerate(layers):
                for (i, _), slab in zip(pairs, slabs, strict=True):
                    assert np.array_equal(slab, slabs_for(i)[n])
                if early:
                    break
        for _, entry in pairs:
            entry.close()

    @precondition(lambda self: len(self.held) < 3)
    @rule(i=CHUNKS)
    def hold(self, i: int) -> None:
        [entry] = self.store.open([key_for(i)])
        if isinstance(entry, OpenEntry):
            assert i in self.maybe
            self.held.append((i, entry))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        _, entry = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        entry.close()

    @rule(some=st.lists(CHUNKS, max_size=5, unique=True))
    def delete(self, some: list[int]) -> None:
        there = {i for i, info in zip(some, self.store.lookup([key_for(i) for i in some]), strict=True) if info}
        leave = there - {i for i, _ in self.held}
        assert self.store.delete([key_for(i) for i in some]) == len(leave)
        self.maybe -= set(some) - {i for i, _ in self.held}

    @rule(i=CHUNKS)
    def lose_a_file(self, i: int) -> None:
        if i not in {held for held, _ in self.held}:
            entry_file(self.root, i).unlink(missing_ok=True)
            self.store.open([key_for(i)])
            self.maybe.discard(i)
            self.sure = None if self.sure == i else self.sure

    @rule()
    def reopened(self) -> None:
        self.let_go_of_all()
        self.store.close()
        self.reopen()

    @rule(some=st.lists(CHUNKS, min_size=1, max_size=4), gone=st.lists(CHUNKS, max_size=2), torn=st.booleans())
    def crash(self, some: list[int], gone: list[int], torn: bool) -> None:
        """A child puts and deletes, and dies without a word, perhaps in the middle of a put."""
        self.let_go_of_all()
        self.store.close()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                store = ChunkStore(self.root, **self.options)
                for i in some:
                    put(store, i)
                store.delete([key_for(i) for i in gone])
                if torn:
                    self.die_while_putting(store, some[0] + 100)
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        self.maybe |= set(some)
        self.maybe -= set(gone)
        self.sure = None if some[-1] in gone else some[-1]
        self.reopen()

    @staticmethod
    def die_while_putting(store: ChunkStore, i: int) -> None:
        def slabs():
            yield slabs_for(i)[0]
            os._exit(0)

        store.put(key_for(i), GEOMETRY, slabs(), tokens=TOKENS, model="m")

    @rule(fix=st.booleans())
    def check(self, fix: bool) -> None:
        report = self.store.check(fix=fix)
        assert not report.corrupt
        assert not report.orphans
        assert not report.miscounted
        assert report.tables_sound
        assert self.store.check().clean or not fix

    @rule()
    def clear(self) -> None:
        self.store.clear()
        self.maybe = {i for i, _ in self.held}
        self.sure = None

    @invariant()
    def what_was_put_last_is_there(self) -> None:
        if self.store is not None and self.sure in self.maybe and self.options["policy"] == "lru":
            assert key_for(self.sure) in self.store
        self.sure = None

    @invariant()
    def what_is_held_can_be_read(self) -> None:
        for i, entry in self.held:
            assert right([slab for [slab] in self.store.open_layers([entry])], i)

    @invariant()
    def the_cap_holds(self) -> None:
        assert not self.root.exists() or disk_usage(self.root) <= CAPACITY
        if self.store is not None:
            stats = self.store.stats()
            assert stats.bytes == stats.entries * FILE <= CAPACITY
            assert stats.ram_bytes <= self.options["ram_bytes"]

    def let_go_of_all(self) -> None:
        for _, entry in self.held:
            entry.close()
        self.held.clear()

    def teardown(self) -> None:
        self.let_go_of_all()
        if self.store is not None:
            self.store.check(fix=True)
            assert self.store.check().clean
            for i in range(200):
                [entry] = self.store.open([key_for(i)])
                assert isinstance(entry, StoreError) or i in self.maybe
                if isinstance(entry, OpenEntry):
                    with entry:
                        assert right([slab for [slab] in self.store.open_layers([entry])], i)
            assert not list((self.root / "tmp").iterdir())
            self.store.close()
        shutil.rmtree(self.root.parent)


TestStore = StoreMachine.TestCase
TestStore.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=40,
    deadline=None,
    derandomize=EXAMPLES <= 15,
    suppress_health_check=list(HealthCheck),
    database=None,
)
