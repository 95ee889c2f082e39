"""The store's folder: where entries lie, how they get there whole, and how their bytes are read.

::

    ragkv-store.json        the format version
    lock                    held by every process that has the store open
    index/                  LMDB, see index.py
    entries/ab/ab12….kv     one file per entry, named by its key alone
    tmp/                    entries being written; their space is taken beforehand
    quarantine/             entries whose bytes did not match their checksum
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ragkv.errors import CorruptEntryError, StoreError, StoreFormatError, StoreFullError, StoreReadOnlyError
from ragkv.store.buffers import aligned_empty
from ragkv.store.header import BLOCK, EntryHeader, header_size, unpack_header
from ragkv.store.keys import FORMAT_VERSION, KEY_BYTES
from ragkv.store.lease import leased, remove_unleased

MARKER = "ragkv-store.json"


@contextlib.contextmanager
def disk_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what the operating system says about ``path`` into the store's own errors."""
    try:
        yield
    except OSError as error:
        facts = {"path": os.fspath(path), "errno": error.errno}
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"the disk of {path} is full; free some space, or lower the store's capacity"
            raise StoreFullError(message, **facts) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            reason = f"{path} cannot be written ({error.strerror})"
            message = f"{reason}; make it writable, choose another folder, or open with read_only=True"
            raise StoreReadOnlyError(message, **facts) from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise StoreError(f"{path}: a file is where the store needs a folder; choose another", **facts) from error
        raise StoreError(f"{path}: {error.strerror}; check the disk", **facts) from error


class Folder:
    """The paths of one store, and what may be done to the files there."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root).absolute()
        self.index = self.root / "index"
        self.tmp = self.root / "tmp"
        self.quarantined = self.root / "quarantine"
        self.entries = self.root / "entries"
        self._entries = str(self.entries)

    def prepare(self, *, read_only: bool) -> None:
        """Create the folder, or make sure that it is a store of this version.

        Raises:
            StoreFormatError: it holds something else, or a store of another version.
            StoreReadOnlyError: it cannot be created or written, and ``read_only`` is off.
        """
        marker = self.root / MARKER
        if not read_only:
            with disk_errors(self.root):
                self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._create(marker)
                if not os.access(self.root, os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, "permission denied")
        try:
            version = json.loads(marker.read_bytes())["format"]
        except OSError as error:
            raise StoreFormatError(f"{self.root} is not a ragkv store", path=str(self.root)) from error
        except (ValueError, KeyError, TypeError) as error:
            message = f"{marker} is damaged; restore it as {_marker_text()!r}"
            raise StoreFormatError(message, path=str(marker)) from error
        if version != FORMAT_VERSION:
            raise StoreFormatError(
                f"{self.root} has store format {version}; this version reads {FORMAT_VERSION}: "
                "open it with the ragkv that wrote it, or choose another folder",
                path=str(self.root),
                version=version,
            )

    def _create(self, marker: Path) -> None:
        if not marker.exists():
            # `lock` may be there already: another process is creating the same store.
            ours = {MARKER, "lock", "entries", "tmp", "quarantine", "index"}
            if any(c.name not in ours and c.suffix != ".new" for c in self.root.iterdir()):
                message = f"{self.root} is not empty and not a ragkv store; choose an empty folder"
                raise StoreFormatError(message, path=str(self.root))
            fresh = self.root / f"{secrets.token_hex(8)}.new"
            with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
                file.write(_marker_text())
                file.flush()
                os.fsync(file.fileno())  # or a power failure leaves an empty marker, and no way in
            fresh.replace(marker)
        for folder in (self.entries, self.tmp, self.quarantined):
            folder.mkdir(mode=0o700, exist_ok=True)
        sync_folder(self.root)

    def entry_path(self, key: bytes) -> str:
        name = key.hex()
        return f"{self._entries}/{name[:2]}/{name}.kv"

    def entry_keys(self) -> Iterator[bytes]:
        """The keys that the files under ``entries`` are named by, in no order."""
        for shard in range(256):
            yield from self.shard_keys(bytes([shard]))

    def shard_keys(self, first: bytes) -> list[bytes]:
        """The keys of files whose first byte is ``first``."""
        try:
            names = os.listdir(self.entries / first.hex())
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [key for key in map(key_of, names) if key is not None and key[:1] == first]

    def remove(self, key: bytes) -> bool:
        """Delete an entry's file unless it is leased. True when it is gone afterwards."""
        return remove_unleased(self.entry_path(key))

    def quarantine(self, key: bytes, fd: int | None = None) -> bool:
        """Move an entry's file away. With ``fd``, only if its name still leads to that open file."""
        path = self.entry_path(key)
        with contextlib.suppress(FileNotFoundError):
            if fd is None or os.path.samestat(os.lstat(path), os.fstat(fd)):
                os.replace(path, self.quarantined / os.path.basename(path))
                return True
        return False

    def purge_quarantine(self) -> None:
        for path in self.quarantined.iterdir():
            if path.is_dir() and not path.is_symlink():  # somebody's, where an entry's file should have been
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def stale_temps(self) -> Iterator[Path]:
        """Temporary files whose writer is gone. Call it where no new one can appear meanwhile."""
        for path in self.tmp.iterdir():
            if path.is_file() and not path.is_symlink() and not leased(str(path)):
                yield path


def read_into(fd: int, buffer: NDArray[np.uint8], offset: int, *, block: int = 1) -> None:
    """Fill ``buffer`` from ``offset`` on. With ``block``, by whole blocks only, as a descriptor set to direct I/O
    wants it: ``buffer`` and ``offset`` begin on one, and the file ends on one.

    Raises:
        CorruptEntryError: the file ends before, or the disk cannot read it.
    """
    body = buffer.nbytes // block * block
    tail = aligned_empty(block if body < buffer.nbytes else 0)
    done, direct = 0, block > 1
    while done < body + tail.nbytes:
        views = [buffer[done:body].data, tail.data] if done < body else [tail.data]
        try:
            count = os.preadv(fd, views, offset + done)
        except OSError as error:
            if error.errno == errno.EINVAL and direct:
                direct = leave_direct(fd)
                continue
            raise CorruptEntryError(f"the disk cannot read the entry: {error.strerror}") from error
        if count < block:
            raise CorruptEntryError("the entry's file ends too early", offset=offset + done)
        done += count // block * block
    buffer[body:] = tail[: buffer.nbytes - body]


def go_direct(fd: int) -> bool:
    """Have a file's bytes moved past the page cache, if its file system can; True if so."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True


def leave_direct(fd: int) -> Literal[False]:
    """Go through the page cache again: a file system may allow direct I/O, and then refuse it."""
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
    return False


def read_header(fd: int) -> EntryHeader:
    """Read and verify the header of an open entry file.

    Raises:
        CorruptEntryError, StoreFormatError: see ``unpack_header``.
    """
    try:
        raw = os.pread(fd, BLOCK, 0)
        size = header_size(raw)
        if size > BLOCK:
            raw += os.pread(fd, size - BLOCK, BLOCK)
        return unpack_header(raw, os.fstat(fd).st_size)
    except OSError as error:
        raise CorruptEntryError(f"the disk cannot read the entry: {error.strerror}") from error


def disk_bytes(path: str | os.PathLike[str], *, names: int = 1) -> int:
    """What the disk counts for a file; 0 when it is gone, a link, or has fewer ``names`` than asked for."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return 0
    return found.st_blocks * 512 if found.st_nlink >= names and not stat.S_ISLNK(found.st_mode) else 0


def is_there(path: str) -> bool:
    """Whether something stands at ``path`` that is no link: links are never followed."""
    try:
        return not stat.S_ISLNK(os.lstat(path).st_mode)
    except OSError:
        return False


def key_of(name: str) -> bytes | None:
    """The key an entry's file, or temporary file, is named by."""
    try:
        key = bytes.fromhex(name.partition(".")[0])
    except ValueError:
        return None
    return key if len(key) == KEY_BYTES else None


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _marker_text() -> str:
    return json.dumps({"kind": "ragkv chunk store", "format": FORMAT_VERSION}) + "\n"
