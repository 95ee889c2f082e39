"""One opening of a store's folder: who else has it open, and whether its index may be trusted."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from ragkv.errors import StoreError, StoreFormatError
from ragkv.store.check import adopt_orphans
from ragkv.store.counting import Counting
from ragkv.store.files import Folder, disk_errors
from ragkv.store.index import Index, is_clean, mark_clean, move_aside
from ragkv.store.lease import lock, unlock
from ragkv.store.pages import DamagedPagesError
from ragkv.store.reconcile import Reconciler

SECONDS_TO_BE_ALONE = 1.0
SESSION = 0  # the byte of the lock file that every session locks; counting.py has others


@dataclass(slots=True)
class _Shared:
    """This process's one index of a folder, as LMDB allows no second, and who uses it."""

    index: Index
    counting: Counting | None = None
    reconciler: Reconciler | None = None
    users: int = 1


_indexes: dict[str, _Shared] = {}
_indexes_lock = threading.Lock()


class Session:
    """Holds the folder's lock (shared; exclusive while an index is examined) and this process's one index.

    ``tidy`` is called with the index when it counts every file: at once, or in the background after an unclean
    end. Not with ``read_only``.
    """

    def __init__(self, folder: Folder, *, read_only: bool, tidy: Callable[[Index], None]) -> None:
        self._folder = folder
        self._tidy = tidy
        self._read_only = read_only
        self._name = os.path.realpath(folder.index)
        self._fd = self._open_lock()
        try:
            with _indexes_lock:
                self._shared = self._join() or self._first()
        except BaseException:
            os.close(self._fd)
            raise
        self.index = self._shared.index
        if not read_only and self._shared.reconciler is None:
            try:
                tidy(self.index)
            except BaseException:
                self.close()
                raise

    def wait_counted(self) -> None:
        """Wait until the index counts every file."""
        if self._shared.reconciler is not None:
            self._shared.reconciler.wait_counted()

    def wait_reconciled(self) -> None:
        """Wait until nothing is left to do in the background."""
        if self._shared.reconciler is not None:
            self._shared.reconciler.wait_finished()

    def close(self) -> None:
        """Give index and lock back; the last one of the process closes the index."""
        with _indexes_lock:
            self._shared.users -= 1
            if not self._shared.users:
                if _indexes.get(self._name) is self._shared:
                    del _indexes[self._name]
                self._close_index()
        os.close(self._fd)

    def _close_index(self) -> None:
        reconciler, counting = self._shared.reconciler, self._shared.counting
        if self.index.forked:
            reconciled = False  # all of it is the parent's, the locks as well
        else:
            reconciled = reconciler is None or reconciler.close()
            self.index.close()
        if counting is not None:
            counting.close()
        if reconciled and not self._read_only and lock(self._fd, exclusive=True, byte=SESSION):
            mark_clean(self._folder.index)

    def _open_lock(self) -> int:
        path = self._folder.root / "lock"
        flags = os.O_RDONLY if self._read_only else os.O_RDWR | os.O_CREAT
        with disk_errors(path):
            try:
                return os.open(path, flags | os.O_CLOEXEC, 0o600)
            except FileNotFoundError as error:
                if not self._read_only:
                    raise
                root = self._folder.root
                message = f"{root} lacks its lock file and its index, as a restored backup does; "
                message += "open it once without read_only"
                raise StoreFormatError(message, path=str(root)) from error

    def _join(self) -> _Shared | None:
        shared = _indexes.get(self._name)
        if shared is None:
            return None
        index = shared.index
        index.check_process()
        if index.read_only and not self._read_only:
            raise StoreError(
                f"this process has {self._folder.root} open with read_only=True; close that first",
                path=str(self._folder.root),
            )
        lock(self._fd, exclusive=False, wait=True, byte=SESSION)
        shared.users += 1
        return shared

    def _first(self) -> _Shared:
        patience = time.monotonic() + SECONDS_TO_BE_ALONE
        while True:
            sole = not self._read_only and lock(self._fd, exclusive=True, byte=SESSION)
            if sole:
                # Stale readers, and a damaged lock file, go with it; nobody else has it open.
                (self._folder.index / "lock.mdb").unlink(missing_ok=True)
            else:
                lock(self._fd, exclusive=False, wait=True, byte=SESSION)  # whoever repairs it is alone
            clean = is_clean(self._folder.index)
            index = self._open(clean)
            if index is None and sole:
                index = self._repair()
            if index is not None:
                break
            self._make_way(patience)
        shared = _Shared(index)
        if not self._read_only:
            shared.counting = counting = Counting(self._open_lock())
            # What was clean a moment ago may not be so any more, unless nobody else has it open.
            settled = counting.settled(lambda: clean and (sole or is_clean(self._folder.index)))
            # A damaged meta page makes LMDB fall back to its last transaction but one, which is sound as well.
            if not settled:
                shared.reconciler = Reconciler(self._folder, index, counting, self._tidy)
        lock(self._fd, exclusive=False, byte=SESSION)
        _indexes[self._name] = shared
        return shared

    def _make_way(self, patience: float) -> None:
        """Several may have found the same damage: let one of them be alone with it."""
        root = self._folder.root
        if self._read_only:
            message = f"the index of {root} is damaged or missing; open it once without read_only to rebuild it"
            raise StoreFormatError(message, path=str(root))
        if time.monotonic() > patience:
            message = f"the index of {root} is damaged and another process has it open; close that first"
            raise StoreError(message, path=str(root))
        unlock(self._fd, byte=SESSION)
        time.sleep(random.uniform(0.001, 0.05))  # noqa: S311 - so that they do not stay in step

    def _open(self, clean: bool) -> Index | None:
        """The index; None if it is damaged."""
        folder = self._folder
        if clean:
            return Index(folder.index, read_only=self._read_only)
        data = folder.index / "data.mdb"
        if data.exists() and data.stat().st_size:
            with contextlib.suppress(DamagedPagesError):
                return Index(folder.index, read_only=self._read_only, verify=True)
        elif not self._read_only and next(folder.entry_keys(), None) is None:
            return Index(folder.index, read_only=False)
        return None

    def _repair(self) -> Index:
        fresh = self._folder.root / "index.new"
        with disk_errors(fresh):
            shutil.rmtree(fresh, ignore_errors=True)
            index = Index(fresh, read_only=False)
            with contextlib.closing(index):
                adopt_orphans(self._folder, index)
            move_aside(self._folder.index)
            fresh.rename(self._folder.index)
        return Index(self._folder.index, read_only=False)
