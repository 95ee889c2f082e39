"""The byte cap: who has to leave when something new comes, and what was used last."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

from ragkv.errors import StoreFullError
from ragkv.store.check import drop, recover
from ragkv.store.files import Folder, disk_bytes, disk_errors, key_of
from ragkv.store.header import BLOCK
from ragkv.store.lease import leased
from ragkv.store.policies import Policy, evict
from ragkv.store.ram import RamTier
from ragkv.store.rows import Row
from ragkv.store.txn import IndexTxn

TOUCHES_BEFORE_FLUSH = 4096
SECONDS_BEFORE_FLUSH = 30.0
TIDIED_AT_ONCE = 1000


class Recency:
    """Uses noted in memory. The index learns of them in batches, as each transaction flushes the disk.

    What dies with the process are its last uses, which are hints, and no entry.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._uses: dict[bytes, int] = {}
        self._flushed = time.monotonic()

    def note(self, keys: Sequence[bytes]) -> bool:
        """Note uses; True when it is time to write them to the index."""
        with self._lock:
            for key in keys:
                self._uses[key] = self._uses.pop(key, 0) + 1
            now = time.monotonic()
            if len(self._uses) < TOUCHES_BEFORE_FLUSH and now - self._flushed < SECONDS_BEFORE_FLUSH:
                return False
            self._flushed = now
            return True

    def take(self) -> dict[bytes, int]:
        """How often each key was used since the last call, the latest use last."""
        with self._lock:
            uses, self._uses = self._uses, {}
        return uses


class Space:
    """Keeps the entry files of a folder under ``capacity`` bytes, as the disk counts them.

    Every method wants the write transaction, inside which nobody else can take or free space. Files go last: what
    fails before has changed nothing that is not rolled back. What is open stays, from ``ram`` or under a lease.
    ``on_evict`` is called with each key that had to leave.
    """

    def __init__(
        self,
        folder: Folder,
        capacity: int,
        policy: Policy,
        recency: Recency,
        ram: RamTier,
        on_evict: Callable[[bytes], None],
    ) -> None:
        self.capacity = capacity
        self._folder = folder
        self._policy = policy
        self._recency = recency
        self._ram = ram
        self._on_evict = on_evict

    def make(self, txn: IndexTxn, need: int) -> None:
        """Evict until ``need`` more bytes fit.

        Raises:
            StoreFullError: they never will, or what is left is open; no entry has left then.
        """
        # One block more than asked for: the disk may need it for the file's own list of extents.
        room = self.capacity - (need + BLOCK if need else 0)
        if room < 0:
            message = f"{need} bytes do not fit a store of {self.capacity}; raise its capacity"
            raise StoreFullError(message, need=need, capacity_bytes=self.capacity)
        with disk_errors(self._folder.root):
            if self._used(txn) <= room:
                return
            spare = recover(self._folder, txn)
            excess = self._excess(txn, room)
            while excess > 0:
                victims = self._victims(txn, excess)
                if sum(row.nbytes for _, row in victims) < excess:
                    message = f"{excess} bytes are lacking and all entries left are open"
                    message += "; close some or raise the capacity"
                    raise StoreFullError(message, need=excess, capacity_bytes=self.capacity)
                excess -= self._remove(txn, victims)
            drop(spare)

    def tidy(self, txn: IndexTxn) -> bool:
        """Clear up after dead writers, and evict what is above the cap and not open; True if there is more to do."""
        with disk_errors(self._folder.root):
            drop(recover(self._folder, txn))
            excess = self._excess(txn, self.capacity)
            freed = self._remove(txn, self._victims(txn, excess, most=TIDIED_AT_ONCE)) if excess > 0 else 0
            return 0 < freed < excess

    def admit(self, txn: IndexTxn, key: bytes, row: Row) -> None:
        """Enter a new row where the policy wants it."""
        txn.put(key, row.at(self._policy.admit(txn, row, txn.recall(key))))

    def use(self, txn: IndexTxn, uses: Mapping[bytes, int]) -> None:
        """Tell the policy of uses, in their order."""
        for key, times in uses.items():
            row = txn.get(key)
            if row is not None:
                txn.move(key, self._policy.use(txn, row, times))

    def _used(self, txn: IndexTxn) -> int:
        """Bytes of indexed entries, of those being written, and of the quarantine."""
        used = txn.nbytes() + sum(disk_bytes(path) for path in self._folder.quarantined.iterdir())
        for temp in self._folder.tmp.iterdir():
            key = key_of(temp.name)
            # Published, but its temporary name not yet dropped: the index counts it.
            if key is None or disk_bytes(temp, names=2) == 0 or txn.get(key) is None:
                used += disk_bytes(temp)
        return used

    def _excess(self, txn: IndexTxn, room: int) -> int:
        """Bytes above ``room``, for which the quarantine leaves first."""
        if self._used(txn) > room:
            self._folder.purge_quarantine()
        excess = self._used(txn) - room
        if excess > 0:
            self.use(txn, self._recency.take())
        return excess

    def _victims(self, txn: IndexTxn, excess: int, *, most: int | None = None) -> list[tuple[bytes, Row]]:
        """Take rows off the shelf that together free ``excess`` bytes, or as many as are not open."""
        taken: list[tuple[bytes, Row]] = []
        for key, _ in self._policy.victims(txn):
            row = txn.get(key)
            if row is None or self._ram.is_open(key) or leased(self._folder.entry_path(key)):
                continue
            evict(txn, key, row)
            taken.append((key, row))
            excess -= row.nbytes
            if excess <= 0 or len(taken) == most:
                break
        return taken

    def _remove(self, txn: IndexTxn, victims: Sequence[tuple[bytes, Row]]) -> int:
        """Delete the files of ``victims``; says how many bytes that freed."""
        freed = 0
        for key, row in victims:
            if self._ram.let_go(key, self._folder.remove):
                self._on_evict(key)
                freed += row.nbytes
            else:  # opened a moment ago
                txn.recall(key)
                txn.put(key, row)
        return freed
