"""Leases on entry files: kernel locks on an open file (OFD), which die with their owner.

An entry that is open from its file holds a read lock. Whoever wants to remove it needs the write lock and does not
wait for it. So a file in use is never removed, by no thread and no process, and a killed reader leaves nothing behind.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

_FLOCK = struct.Struct("hhqqi4x")  # l_type, l_whence, l_start, l_len, l_pid; a length of zero means to the end


def lock(fd: int, *, exclusive: bool, wait: bool = False, byte: int | None = None) -> bool:
    """Take, or change, the lock of this open file, or of one byte of it. False when another holds it and ``wait`` is
    off.
    """
    kind = fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK
    command = fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK
    try:
        fcntl.fcntl(fd, command, _FLOCK.pack(kind, 0, *_range(byte), 0))
    except BlockingIOError:
        return False
    return True


def unlock(fd: int, *, byte: int | None = None) -> None:
    """Give up the lock of this open file, or of one byte of it."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, 0, *_range(byte), 0))


def lease(path: str) -> int | None:
    """Open ``path`` for reading and hold its lease until the descriptor is closed; None when it is gone, or a link."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return None
        raise
    try:
        # Whoever holds it exclusively removes it in a moment: then no name leads to it any more.
        lock(fd, exclusive=False, wait=True)
        gone = not os.fstat(fd).st_nlink
    except BaseException:
        os.close(fd)
        raise
    if gone:
        os.close(fd)
        return None
    return fd


def leased(path: str) -> bool:
    """Whether somebody holds a lease on ``path`` at this moment."""
    fd = _open(path)
    if fd is None:
        return False
    try:
        return not lock(fd, exclusive=True)
    finally:
        os.close(fd)


def remove_unleased(path: str) -> bool:
    """Delete ``path`` unless it is leased. True when it is gone afterwards."""
    fd = _open(path)
    if fd is None:
        return True
    try:
        if not lock(fd, exclusive=True):
            return False
        os.unlink(path)
        return True
    finally:
        os.close(fd)


def _range(byte: int | None) -> tuple[int, int]:
    return (0, 0) if byte is None else (byte, 1)


def _open(path: str) -> int | None:
    """None when no file is there (any more), whatever somebody may have put in its place."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP):
            return None
        raise
