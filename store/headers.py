"""Headers of entry files read lately. A file that has not changed since, as far as its times say, is not read again,
nor parsed, which would be most of what opening it takes.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict

from ragkv.store.files import read_header
from ragkv.store.header import BLOCK, EntryHeader

# 28 MB, if models have 32 layers.
MOST = 4096

Identity = tuple[int, int, int, int, int]


class Headers:
    """Of entries by key, the ``most`` last used. From any thread."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._known: OrderedDict[bytes, tuple[Identity, EntryHeader]] = OrderedDict()
        self._lock = threading.Lock()

    def expect(self, key: bytes, fd: int) -> None:
        """The header of this open file will be read: have the disk bring it, without waiting for it."""
        if key not in self._known:
            with contextlib.suppress(OSError):  # not every file system takes advice
                os.posix_fadvise(fd, 0, BLOCK, os.POSIX_FADV_WILLNEED)

    def read(self, key: bytes, fd: int) -> EntryHeader:
        """The header of the open file that is named by ``key``.

        Raises:
            CorruptEntryError, StoreFormatError: see ``unpack_header``.
        """
        identity = _identity(fd)
        with self._lock:
            known = self._known.get(key)
            if known is not None and known[0] == identity:
                self._known.move_to_end(key)
                return known[1]
        header = read_header(fd)
        if identity is None:
            return header
        with self._lock:
            self._known[key] = identity, header
            self._known.move_to_end(key)
            while len(self._known) > self._most:
                self._known.popitem(last=False)
        return header

    def drop(self, key: bytes) -> None:
        """Its file is gone, or wrong."""
        with self._lock:
            self._known.pop(key, None)


def _identity(fd: int) -> Identity | None:
    """What does not stay the same where another file, or other bytes, take a file's place (but for what happens within
    a tick of the file system's clock); None if nobody can tell."""
    try:
        found = os.fstat(fd)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
