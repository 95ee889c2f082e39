"""Which of the processes that write a store sees to it that its index counts every file; the others wait for that."""

from __future__ import annotations

import os
from collections.abc import Callable

from ragkv.store.lease import lock, unlock

# Bytes of the store's lock file. (Byte 0 is every session's.)
_COUNTING = 1
_COUNTED = 2


class Counting:
    """Two locks that die with their owner, whatever ends it.

    Who counts holds the first one alone. Who knows that all is counted holds the second, with all others that
    know, until it closes: while anybody knows, nobody has to count, as each writer indexes what it writes. When the
    one that counts dies, the next counts anew.

    Args:
        fd: the lock file, opened for writing, for this object alone.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def begin(self) -> bool:
        """Become the one that counts; False while another is. Harmless if this is the one already."""
        return lock(self._fd, exclusive=True, byte=_COUNTING)

    def known(self) -> bool:
        """Whether somebody else knows that all is counted. Only between ``begin`` and ``end``."""
        return not lock(self._fd, exclusive=True, byte=_COUNTED)

    def end(self, *, counted: bool) -> None:
        """Let the others go on. Unless ``counted``, the next of them begins."""
        if counted:
            lock(self._fd, exclusive=False, byte=_COUNTED)
        else:
            unlock(self._fd, byte=_COUNTED)
        unlock(self._fd, byte=_COUNTING)

    def settled(self, clean: Callable[[], bool]) -> bool:
        """Whether nothing is to be counted: somebody knows, or the index is ``clean``. Never waits."""
        if not self.begin() or not (self.known() or clean()):
            return False
        self.end(counted=True)
        return True

    def close(self) -> None:
        os.close(self._fd)
