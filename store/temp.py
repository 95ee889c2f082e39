"""An entry's file on its way into the store: private, its space taken beforehand, public only when it is whole."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets

from ragkv.store.buffers import Array
from ragkv.store.files import Folder, disk_errors, go_direct, leave_direct, sync_folder
from ragkv.store.header import BLOCK
from ragkv.store.lease import lock


class TempFile:
    """One temporary file, of ``nbytes``, for the entry of ``key``."""

    def __init__(self, folder: Folder, key: bytes, nbytes: int) -> None:
        self._name = f"{folder.tmp}/{key.hex()}."
        self._final = folder.entry_path(key)
        self._nbytes = nbytes
        self.path = ""
        self.fd = -1
        self.indexed = False

    @property
    def shard(self) -> str:
        """The folder that the entry's final name stands in."""
        return os.path.dirname(self._final)

    @property
    def nbytes(self) -> int:
        """What the disk counts for it."""
        return os.fstat(self.fd).st_blocks * 512

    def reserve(self) -> None:
        """Take the whole size at once, so that the store's capacity holds throughout; anew if called again."""
        self.discard()
        self.path = self._name + secrets.token_hex(8)
        with disk_errors(self.path):
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            lock(self.fd, exclusive=True)
            os.posix_fallocate(self.fd, 0, self._nbytes)
            go_direct(self.fd)

    def write(self, memory: Array, offset: int) -> None:
        """Write whole blocks from page-aligned memory. Several threads may write different parts at once."""
        view = memory.data
        direct = True
        with disk_errors(self.path):
            while view:
                try:
                    written = os.pwrite(self.fd, view, offset)
                except OSError as error:
                    if error.errno == errno.EINVAL and direct:
                        direct = leave_direct(self.fd)
                        continue
                    raise
                if written % BLOCK:
                    direct = leave_direct(self.fd)  # the rest does not begin on a block any more
                view = view[written:]
                offset += written

    def sync(self) -> None:
        with disk_errors(self.path):
            os.fsync(self.fd)

    def publish(self) -> None:
        """Give the finished file its final name; durable once ``shard`` is synced. Calling it again is harmless.

        The temporary name stays until ``discard``: if the process dies before the index knows the entry, the
        next one to open the store finds it by that name, and nothing is left uncounted.
        """
        with disk_errors(self._final):
            lock(self.fd, exclusive=False)  # from now on it can be read, and still not be taken for stale
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.shard, 0o700)
                sync_folder(os.path.dirname(self.shard))
            if self._published():
                return
            # A file that no row belongs to may stand there; replacing it would cost the temporary name.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._final)
            try:
                os.link(self.path, self._final)
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
                    raise
                os.replace(self.path, self._final)  # a file system without hard links

    def _published(self) -> bool:
        try:
            return os.path.samestat(os.lstat(self._final), os.fstat(self.fd))
        except FileNotFoundError:
            return False

    def discard(self) -> None:
        """Drop the temporary name (what was published stays) and close the file. Calling it again is harmless.

        What was published and then not ``indexed``, as its transaction failed, keeps both names: it is counted by
        the temporary one until somebody clears up.
        """
        fd, self.fd = self.fd, -1
        if fd >= 0:
            # A disk that fails here too must not hide what went wrong; who needs the space clears up.
            with contextlib.suppress(OSError):
                if self.indexed or os.fstat(fd).st_nlink < 2:
                    os.unlink(self.path)
            os.close(fd)
