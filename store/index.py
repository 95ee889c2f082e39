"""The LMDB index: key → row, the order of eviction, and a tally per model, always in step.

The write transaction is also the store's mutex between threads and processes: whoever makes room,
publishes or removes a file does it inside one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import lmdb
import xxhash

from ragkv.errors import StoreError, StoreFullError, StoreReadOnlyError
from ragkv.store import pages
from ragkv.store.files import disk_errors
from ragkv.store.rows import DATABASES, LAYOUT, Row, unpack_row
from ragkv.store.txn import IndexTxn

MAP_BYTES = 1 << 30
MAX_READERS = 1024
SNAPSHOTS_TRIED = 5

T = TypeVar("T")


class Index:
    """One LMDB environment. Safe to use from many threads, not across ``fork``.

    With ``verify`` every page of it is checked before LMDB is let near it.

    Raises:
        DamagedPagesError: a page is not sound.
    """

    def __init__(self, path: Path, *, read_only: bool, verify: bool = False, map_bytes: int = MAP_BYTES) -> None:
        self.path = path
        self.read_only = read_only
        self._pid = os.getpid()
        self._idle = threading.Condition()
        self._active = 0
        self._resizing = 0
        if not read_only:
            path.mkdir(mode=0o700, exist_ok=True)
        with contextlib.ExitStack() as undo, disk_errors(path), _lmdb_errors(path):
            if verify:
                pages.read_metas(path / "data.mdb")
            self._env = _environment(path, read_only, map_bytes)
            undo.callback(self._env.close)
            self._data_fd = os.open(path / "data.mdb", os.O_RDONLY | os.O_CLOEXEC)
            undo.callback(os.close, self._data_fd)
            self._data_bytes = 0
            with contextlib.suppress(lmdb.ReadonlyError):
                self._env.reader_check()
            if verify:
                self._verify()
            self._dbs = [self._env.open_db(name, create=not read_only) for name in DATABASES]
            undo.pop_all()

    @property
    def forked(self) -> bool:
        return os.getpid() != self._pid

    def check_process(self) -> None:
        """LMDB can be neither used nor opened again in a process that inherited it through ``fork``."""
        if self.forked:
            raise StoreError(
                f"the store {self.path.parent} was opened before this process was forked; open it in the child "
                "only, or start the child with the spawn method",
                path=str(self.path.parent),
            )

    def get_many(self, keys: Sequence[bytes]) -> list[Row | None]:
        """Look all ``keys`` up in one read transaction. A damaged row counts as missing."""

        def read(txn: Any) -> list[Row | None]:
            get, entries = txn.get, self._dbs[0]
            values = [get(key, db=entries) for key in keys]
            return [None if v is None else unpack_row(k, v) for k, v in zip(keys, values, strict=True)]

        return self._run(read, write=False)

    def read(self, work: Callable[[IndexTxn], T]) -> T:
        """Run ``work`` in a read transaction; it must change nothing."""
        return self._run(lambda txn: work(IndexTxn(txn, *self._dbs)), write=False)

    def write(self, work: Callable[[IndexTxn], T]) -> T:
        """Run ``work`` in the one write transaction there can be; it runs again if the map has to grow.

        Raises:
            StoreFullError: the disk is full.
            StoreReadOnlyError: the index was opened for reading only.
        """
        if self.read_only:
            raise StoreReadOnlyError(f"{self.path.parent} was opened with read_only=True", path=str(self.path))

        def run(txn: Any) -> T:
            rows = IndexTxn(txn, *self._dbs)
            result = work(rows)
            rows.save()
            return result

        return self._run(run, write=True)

    def close(self) -> None:
        with self._idle:
            self._idle.wait_for(lambda: not self._active)
            if self.forked:
                return  # the parent's to close
            self._env.close()
            fd, self._data_fd = self._data_fd, -1
            if fd >= 0:
                os.close(fd)

    def _verify(self) -> None:
        def verify(txn: Any) -> None:
            # The transaction keeps other processes from recycling the snapshot's pages meanwhile.
            names = pages.verify(self.path / "data.mdb", txn.id())
            if not names.issuperset(DATABASES):
                raise pages.DamagedPagesError("a database is missing")

        for attempt in range(1, SNAPSHOTS_TRIED + 1):
            try:
                self._run(verify, write=False)
                return
            except pages.DamagedPagesError:
                # Another process may have replaced both meta pages while they were being read.
                if attempt == SNAPSHOTS_TRIED:
                    raise

    def _run(self, work: Callable[[Any], T], *, write: bool) -> T:
        self.check_process()
        with _lmdb_errors(self.path):
            while True:
                try:
                    with self._transaction(write) as txn:
                        return work(txn)
                except lmdb.MapFullError:
                    self._resize(2 * self._env.info()["map_size"])
                except lmdb.MapResizedError:
                    self._resize(0)  # another process has grown it: adopt its size

    @contextlib.contextmanager
    def _transaction(self, write: bool) -> Iterator[Any]:
        self._check_file()
        with self._idle:
            self._idle.wait_for(lambda: not self._resizing)  # or many readers would keep it waiting for ever
            self._active += 1
        try:
            with self._env.begin(write=write) as txn:
                yield txn
        finally:
            with self._idle:
                self._active -= 1
                self._idle.notify_all()

    def _check_file(self) -> None:
        """LMDB would be killed by a file that somebody has truncated, and write on into one that is gone."""
        if self._data_fd < 0:
            return  # closed, which LMDB says itself
        seen = self._data_bytes  # read first: another thread may see the file grown, and say so, in between
        stat = os.fstat(self._data_fd)
        if stat.st_size < seen or not stat.st_nlink:
            happened = "truncated" if stat.st_nlink else "deleted"
            message = f"the index {self.path} was {happened} while it was open; close the store and open it again"
            raise StoreError(message, path=str(self.path))
        self._data_bytes = stat.st_size

    def _resize(self, map_bytes: int) -> None:
        with self._idle:
            self._resizing += 1
            try:
                # LMDB forbids resizing while any transaction of this process is open.
                self._idle.wait_for(lambda: not self._active)
                if map_bytes == 0 or map_bytes > self._env.info()["map_size"]:
                    self._env.set_mapsize(map_bytes)
            finally:
                self._resizing -= 1
                self._idle.notify_all()


def is_clean(path: Path) -> bool:
    """Whether the index is, byte for byte, as it was when last closed."""
    try:
        return (path / "clean").read_bytes() == _fingerprint(path)
    except OSError:
        return False


def mark_clean(path: Path) -> None:
    """Leave a checksum by which the next opening knows the file to be sound, if it is; nobody may have it open.

    What was damaged while it was open must not pass for sound from then on, so it is verified once more.
    """
    if is_clean(path):
        return
    with contextlib.suppress(OSError, pages.DamagedPagesError):
        data = path / "data.mdb"
        pages.verify(data, max(meta.txnid for meta in pages.read_metas(data)))
        (path / "clean").write_bytes(_fingerprint(path))


def move_aside(path: Path) -> None:
    """Keep a damaged index, the latest one only, for whoever wants to look at it."""
    aside = path.with_name("index.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)


def _environment(path: Path, read_only: bool, map_bytes: int) -> Any:
    def environment(*, lock: bool) -> Any:
        return lmdb.open(
            str(path),
            map_size=max(map_bytes, _data_bytes(path)),
            mode=0o600,
            readonly=read_only,
            create=not read_only,
            lock=lock,
            max_dbs=len(DATABASES),
            max_readers=MAX_READERS,
            # The last transaction may be lost with the power, never the others: its file is found by check().
            metasync=False,
            # Look-ups are random; reading ahead would push entries out of the page cache.
            readahead=False,
        )

    try:
        return environment(lock=True)
    except lmdb.Error:
        if not read_only or os.access(path, os.W_OK):
            raise
        return environment(lock=False)  # a read-only medium: nobody can write, so nobody need be locked out


def _data_bytes(path: Path) -> int:
    try:
        return (path / "data.mdb").stat().st_size
    except FileNotFoundError:
        return 0


def _fingerprint(path: Path) -> bytes:
    """Size and xxh3_64 of the layout and the data file. (1 GB takes about 0.1 s.)"""
    digest = xxhash.xxh3_64(LAYOUT)
    size = 0
    with open(path / "data.mdb", "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return size.to_bytes(8, "little") + digest.digest()


@contextlib.contextmanager
def _lmdb_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except lmdb.ReadonlyError as error:
        message = f"{path} cannot be written; make it writable or open the store with read_only=True"
        raise StoreReadOnlyError(message, path=str(path)) from error
    except lmdb.Error as error:
        if "No space left" in str(error):
            raise StoreFullError(f"the disk of {path} is full; free some space", path=str(path)) from error
        message = f"the index {path} failed ({error}); close the store and open it again to have it repaired"
        raise StoreError(message, path=str(path)) from error
