"""One opening of a store's folder: who else has it open, and whether its index may be trusted."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading

from ragkv.errors import StoreError, StoreFormatError
from ragkv.store.check import adopt_orphans
from ragkv.store.files import Folder, disk_errors
from ragkv.store.index import Index, is_clean, is_sound, move_aside
from ragkv.store.lease import lock

_indexes: dict[str, tuple[Index, int]] = {}  # LMDB allows one environment per process and file
_indexes_lock = threading.Lock()


class Session:
    """Holds the folder's lock (shared; exclusive while an index is examined) and this process's one index."""

    def __init__(self, folder: Folder, *, read_only: bool) -> None:
        self._folder = folder
        self._read_only = read_only
        self._name = os.path.realpath(folder.index)
        self._fd = self._open_lock()
        try:
            with _indexes_lock:
                self.index = self._shared() or self._first()
        except BaseException:
            os.close(self._fd)
            raise

    def close(self) -> None:
        """Give index and lock back; the last one of the process closes the index."""
        with _indexes_lock:
            index, users = _indexes.get(self._name, (None, 0))
            if index is self.index:
                if users > 1:
                    _indexes[self._name] = (self.index, users - 1)
                else:
                    del _indexes[self._name]
                    self.index.close()
        os.close(self._fd)

    def _open_lock(self) -> int:
        path = self._folder.root / "lock"
        flags = os.O_RDONLY if self._read_only else os.O_RDWR | os.O_CREAT
        with disk_errors(path):
            return os.open(path, flags | os.O_CLOEXEC, 0o600)

    def _shared(self) -> Index | None:
        index, users = _indexes.get(self._name, (None, 0))
        if index is None:
            return None
        index.check_process()
        if index.read_only and not self._read_only:
            raise StoreError(
                f"this process has {self._folder.root} open with read_only=True; close that first",
                path=str(self._folder.root),
            )
        lock(self._fd, exclusive=False, wait=True)
        _indexes[self._name] = (index, users + 1)
        return index

    def _first(self) -> Index:
        sole = not self._read_only and lock(self._fd, exclusive=True)
        if not sole:
            lock(self._fd, exclusive=False, wait=True)  # whoever repairs the index holds it exclusively
        if sole:
            # Stale readers, and a damaged lock file, go with it; nobody else has it open.
            (self._folder.index / "lock.mdb").unlink(missing_ok=True)
        clean = is_clean(self._folder.index)
        if not clean and not self._usable():
            self._repair()
        index = Index(self._folder.index, read_only=self._read_only)
        if sole and not clean:
            # A flipped bit can make LMDB fall back to its last transaction but one, which is sound as well.
            adopt_orphans(self._folder, index)
        _indexes[self._name] = (index, 1)
        lock(self._fd, exclusive=False)
        return index

    def _usable(self) -> bool:
        data = self._folder.index / "data.mdb"
        if data.exists() and data.stat().st_size:
            return is_sound(self._folder.index)
        return not self._read_only and next(self._folder.entry_keys(), None) is None

    def _repair(self) -> None:
        root = self._folder.root
        if self._read_only:
            message = f"the index of {root} is damaged or missing; open it once without read_only to rebuild it"
            raise StoreFormatError(message, path=str(root))
        if not lock(self._fd, exclusive=True):
            message = f"the index of {root} is damaged and another process has it open; close that first"
            raise StoreError(message, path=str(root))
        fresh = root / "index.new"
        with disk_errors(fresh):
            shutil.rmtree(fresh, ignore_errors=True)
            index = Index(fresh, read_only=False)
            with contextlib.closing(index):
                adopt_orphans(self._folder, index)
            move_aside(self._folder.index)
            fresh.rename(self._folder.index)
