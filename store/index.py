"""The LMDB index: key → row, the order of eviction, and a tally per model, always in step.

The write transaction is also the store's mutex between threads and processes: whoever makes room,
publishes or removes a file does it inside one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import lmdb
import xxhash

from ragkv.errors import StoreError, StoreFullError, StoreReadOnlyError
from ragkv.store import rows
from ragkv.store.rows import DATABASES, RANK, TALLY, Row, pack_row, unpack_row

MAP_BYTES = 1 << 30
MAX_READERS = 1024
PROBE_SECONDS = 300

T = TypeVar("T")


class IndexTxn:
    """A write transaction. Everything it changes appears at once, or not at all."""

    def __init__(self, txn: Any, entries: Any, order: Any, models: Any) -> None:
        self._txn = txn
        self._entries = entries
        self._order = order
        self._models = models

    def get(self, key: bytes) -> Row | None:
        value = self._txn.get(key, db=self._entries)
        return None if value is None else unpack_row(key, value)

    def put(self, key: bytes, row: Row) -> None:
        """Insert or replace a row as the last one to be evicted."""
        self.delete(key)
        with self._txn.cursor(self._order) as cursor:
            # A counter and no clock: the order survives clocks that jump.
            rank = RANK.unpack(cursor.key())[0] + 1 if cursor.last() else 1
        row = row._replace(rank=rank)
        self._txn.put(key, pack_row(key, row), db=self._entries)
        self._txn.put(RANK.pack(rank), key, db=self._order, append=True)
        self._tally(row, 1)

    def touch(self, keys: Sequence[bytes]) -> None:
        """Move rows to the end of the order of eviction."""
        for key in keys:
            row = self.get(key)
            if row is not None:
                self.put(key, row)

    def delete(self, key: bytes) -> bool:
        row = self.get(key)
        if row is None:
            return False
        self._txn.delete(key, db=self._entries)
        self._txn.delete(RANK.pack(row.rank), db=self._order)
        self._tally(row, -1)
        return True

    def oldest(self) -> Iterator[tuple[bytes, Row]]:
        """Rows in the order of eviction. Rows seen may be deleted on the way."""
        rank = b""
        with self._txn.cursor(self._order) as cursor:
            while cursor.set_range(rank) if rank else cursor.first():
                at, key = cursor.item()
                row = self.get(key)
                if row is not None:
                    yield key, row
                rank = at + b"\0"

    def models(self) -> dict[str, tuple[int, int]]:
        """Entries and bytes per model fingerprint."""
        with self._txn.cursor(self._models) as cursor:
            return {model.decode(): TALLY.unpack(value) for model, value in cursor}

    def nbytes(self) -> int:
        """Bytes of all entries, as the disk counts them."""
        return sum(nbytes for _, nbytes in self.models().values())

    def keys(self) -> list[bytes]:
        with self._txn.cursor(self._entries) as cursor:
            return list(cursor.iternext(values=False))

    def _tally(self, row: Row, sign: int) -> None:
        model = row.model.encode()
        count, nbytes = TALLY.unpack(self._txn.get(model, bytes(TALLY.size), db=self._models))
        count, nbytes = count + sign, nbytes + sign * row.nbytes
        if count:
            self._txn.put(model, TALLY.pack(count, nbytes), db=self._models)
        else:
            self._txn.delete(model, db=self._models)


class Index:
    """One LMDB environment. Safe to use from many threads, not across ``fork``."""

    def __init__(self, path: Path, *, read_only: bool, map_bytes: int = MAP_BYTES) -> None:
        self.path = path
        self.read_only = read_only
        self._pid = os.getpid()
        self._idle = threading.Condition()
        self._active = 0
        if not read_only:
            path.mkdir(mode=0o700, exist_ok=True)
        with _lmdb_errors(path):
            self._env = _environment(path, read_only, map_bytes)
            with contextlib.suppress(lmdb.ReadonlyError):
                self._env.reader_check()
            self._dbs = [self._env.open_db(name, create=not read_only) for name in DATABASES]

    def check_process(self) -> None:
        """LMDB can be neither used nor opened again in a process that inherited it through ``fork``."""
        if os.getpid() != self._pid:
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
        return self._run(lambda txn: work(IndexTxn(txn, *self._dbs)), write=True)

    def close(self) -> None:
        """Close, and leave a checksum by which the next opening knows the file to be sound."""
        with self._idle:
            self._idle.wait_for(lambda: not self._active)
            if os.getpid() != self._pid:
                return  # the parent's to close
            self._env.close()
        if not self.read_only:
            with contextlib.suppress(OSError):
                (self.path / "clean").write_bytes(_fingerprint(self.path))

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
        with self._idle:
            self._active += 1
        try:
            with self._env.begin(write=write) as txn:
                yield txn
        finally:
            with self._idle:
                self._active -= 1
                self._idle.notify_all()

    def _resize(self, map_bytes: int) -> None:
        with self._idle:
            # LMDB forbids resizing while any transaction of this process is open.
            self._idle.wait_for(lambda: not self._active)
            if map_bytes == 0 or map_bytes > self._env.info()["map_size"]:
                self._env.set_mapsize(map_bytes)


def is_clean(path: Path) -> bool:
    """Whether the index is, byte for byte, as it was when last closed."""
    try:
        return (path / "clean").read_bytes() == _fingerprint(path)
    except OSError:
        return False


def is_sound(path: Path) -> bool:
    """Whether a child process could walk all of the index; LMDB may crash on a damaged one."""
    # -P, and the paths by hand: the script's own folder must not shadow other packages.
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-P", rows.__file__, str(path)]
    try:
        probe = subprocess.run(command, env=env, capture_output=True, timeout=PROBE_SECONDS, check=False)  # noqa: S603 - our own interpreter and script
    except subprocess.TimeoutExpired:
        return False
    return probe.returncode == 0


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
    """Size and xxh3_64 of the data file. (1 GB takes about 0.1 s.)"""
    digest = xxhash.xxh3_64()
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
