"""The byte cap: who has to leave when something new comes, and what was used last."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

from ragkv.errors import StoreFullError
from ragkv.store.check import recover
from ragkv.store.files import Folder, disk_bytes, disk_errors, key_of
from ragkv.store.header import BLOCK
from ragkv.store.policies import Policy, evict
from ragkv.store.rows import Row
from ragkv.store.txn import IndexTxn

TOUCHES_BEFORE_FLUSH = 4096
SECONDS_BEFORE_FLUSH = 30.0


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

    Every method wants the write transaction, inside which nobody else can take or free space. ``on_evict`` is
    called with each key that had to leave.
    """

    def __init__(
        self, folder: Folder, capacity: int, policy: Policy, recency: Recency, on_evict: Callable[[bytes], None]
    ) -> None:
        self.capacity = capacity
        self._folder = folder
        self._policy = policy
        self._recency = recency
        self._on_evict = on_evict

    def make(self, txn: IndexTxn, need: int, *, tidy: bool = False) -> None:
        """Evict until ``need`` more bytes fit; ``tidy`` clears up after dead writers even if they do already.

        Raises:
            StoreFullError: they never will, or what is left is leased.
        """
        # One block more than asked for: the disk may need it for the file's own list of extents.
        room = self.capacity - (need + BLOCK if need else 0)
        if room < 0:
            message = f"{need} bytes do not fit a store of {self.capacity}; raise its capacity"
            raise StoreFullError(message, need=need, capacity_bytes=self.capacity)
        with disk_errors(self._folder.root):
            if tidy or self._used(txn) > room:
                recover(self._folder, txn)
                if self._used(txn) > room:
                    self._folder.purge_quarantine()
            excess = self._used(txn) - room
            if excess > 0:
                self.use(txn, self._recency.take())
                self._evict(txn, excess)

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

    def _evict(self, txn: IndexTxn, excess: int) -> None:
        for key, row in self._policy.victims(txn):
            if self._folder.remove(key):
                evict(txn, key, row)
                self._on_evict(key)
                excess -= row.nbytes
            if excess <= 0:
                return
        message = f"{excess} bytes are lacking and all entries left are open; close some or raise the capacity"
        raise StoreFullError(message, need=excess, capacity_bytes=self.capacity)
