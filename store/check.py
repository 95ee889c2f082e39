"""Index and files reconciled, both ways: what a crash, a person or a dying disk can bring apart."""

from __future__ import annotations

import contextlib
import errno
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import xxhash

from ragkv.errors import CorruptEntryError, StoreFormatError
from ragkv.store.files import Folder, disk_bytes, key_of, read_header, read_into
from ragkv.store.header import EntryHeader
from ragkv.store.index import Index
from ragkv.store.lease import lease
from ragkv.store.rows import QUEUES, Row, foreign_row
from ragkv.store.txn import IndexTxn

ROWS_PER_TRANSACTION = 1000
OF_ONE_FILE = (errno.EACCES, errno.EPERM, errno.EIO, errno.ENXIO)  # what opening may say that is no fault of others


@dataclass(slots=True)
class CheckReport:
    """What ``ChunkStore.check`` found, as chunk keys; with ``fix`` it has been repaired.

    ``tables_sound`` says whether the order of eviction and the tallies agreed with the rows. ``foreign`` entries have
    a sound header that is not for this version of ragkv (codec, source, …): nothing is wrong with them, and they stay.
    """

    entries: int = 0
    orphans: list[bytes] = field(default_factory=list)
    missing: list[bytes] = field(default_factory=list)
    corrupt: list[bytes] = field(default_factory=list)
    miscounted: list[bytes] = field(default_factory=list)
    foreign: list[bytes] = field(default_factory=list)
    tables_sound: bool = True
    fixed: bool = False

    @property
    def clean(self) -> bool:
        """Whether nothing was wrong."""
        return self.tables_sound and not (self.orphans or self.missing or self.corrupt or self.miscounted)


def row_of(header: EntryHeader, nbytes: int) -> Row:
    """The index row of an entry whose file takes ``nbytes`` of the disk."""
    return Row(nbytes, header.tokens, header.geometry.layers, header.created, header.model, header.context_tokens)


def check(folder: Folder, index: Index, *, fix: bool) -> CheckReport:
    """Compare rows with files and verify every checksum; with ``fix`` repair, key by key."""
    report = CheckReport(fixed=fix, tables_sound=index.read(tables_sound))
    if fix and not report.tables_sound:
        index.write(lambda txn: txn.rebuild())
    known = set(index.read(lambda txn: txn.keys()))
    report.entries = len(known)
    found = set(folder.entry_keys())
    for key in sorted(known | found):
        try:
            right = _verified(folder, key)
        except CorruptEntryError:
            report.corrupt.append(key)
            if fix:
                index.write(partial(_expel, folder, key))
            continue
        if right is not None and right.foreign:
            report.foreign.append(key)
        # Files and rows were listed at different moments: what was written or evicted since is no fault.
        row = index.get_many([key])[0]
        if right is None and row is not None:
            report.missing.append(key)
        elif right is not None and row is None:
            report.orphans.append(key)
        elif right is not None and row is not None and not _agrees(row, right):
            report.miscounted.append(key)
        else:
            continue
        if fix:
            index.write(partial(_reindex, folder, key, right))
    return report


def tables_sound(txn: IndexTxn, pause: Callable[[], None] = lambda: None) -> bool:
    """Whether each row is sound and has its place in the order of eviction, and the tallies are their sums.

    ``pause`` is called now and then, and may raise to stop.
    """
    tallies: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    queued = [0] * QUEUES
    count = 0
    for count, (key, row) in enumerate(txn.rows(), 1):
        if row is None or not txn.in_order(key, row):
            return False
        tally = tallies[row.model]
        tally[0] += 1
        tally[1] += row.nbytes
        queued[row.place.queue] += row.nbytes
        if not count % ROWS_PER_TRANSACTION:
            pause()
    if txn.state.nbytes != queued:
        return False
    return txn.ordered() == count and txn.models() == {model: tuple(tally) for model, tally in tallies.items()}


def recover(folder: Folder, txn: IndexTxn) -> list[Path]:
    """Clear up after writers that died: drop what they had not finished, take in what only lacked its row.

    Returns names under which the latter is still counted, should the transaction fail: ``drop`` them at its end.
    """
    spare: list[Path] = []
    for temp in folder.stale_temps():
        key = key_of(temp.name)
        if key is not None and txn.get(key) is None:
            path = folder.entry_path(key)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.lstat(temp), os.lstat(path)):
                    adopt(folder, txn, key)
                    spare.append(temp)
                    continue
        temp.unlink(missing_ok=True)  # its writer may just have finished
    return spare


def drop(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def adopt_orphans(folder: Folder, index: Index) -> None:
    """Index the entry files that have no row by their headers, oldest first; damaged ones are quarantined.

    On an empty index this rebuilds all of it.
    """
    known = set(index.read(lambda txn: txn.keys()))
    orphans = [key for key in folder.entry_keys() if key not in known]
    keys = sorted(orphans, key=lambda key: modified(folder.entry_path(key)))
    for start in range(0, len(keys), ROWS_PER_TRANSACTION):
        some = keys[start : start + ROWS_PER_TRANSACTION]
        index.write(partial(_adopt_all, folder, some))


def _expel(folder: Folder, key: bytes, txn: IndexTxn) -> None:
    folder.quarantine(key)
    txn.delete(key)


def _agrees(row: Row, right: Row) -> bool:
    return row.nbytes == right.nbytes and (right.foreign or row.at(right.place) == right)


def _reindex(folder: Folder, key: bytes, right: Row | None, txn: IndexTxn) -> None:
    nbytes = disk_bytes(folder.entry_path(key))
    if not nbytes:
        txn.delete(key)
    elif right is not None:
        # Of a foreign entry, the row that its own version wrote says more.
        known = txn.get(key) if right.foreign else None
        txn.put(key, (known or right)._replace(nbytes=nbytes))


def _adopt_all(folder: Folder, keys: list[bytes], txn: IndexTxn) -> None:
    for key in keys:
        adopt(folder, txn, key)


def adopt(folder: Folder, txn: IndexTxn, key: bytes) -> None:
    """Index an entry's file by its header; quarantine it if that is damaged.

    One that is not for this version has a row all the same: the byte cap counts it, and it can be evicted.
    """
    try:
        with _leased(folder, key) as fd:
            if fd is not None:
                txn.put(key, _row_at(fd, key)[0])
    except CorruptEntryError:
        folder.quarantine(key)


def _row_at(fd: int, key: bytes) -> tuple[Row, EntryHeader | None]:
    """The row of an open entry file, and its header, or None if that is not for this version."""
    stat = os.fstat(fd)
    nbytes = stat.st_blocks * 512
    try:
        header = read_header(fd)
    except StoreFormatError:
        return foreign_row(nbytes, stat.st_mtime), None
    if header.key != key:
        raise CorruptEntryError("the file holds another chunk's entry")
    return row_of(header, nbytes), header


def _verified(folder: Folder, key: bytes) -> Row | None:
    """The row that the entry should have, header and slabs verified; None if there is no such file (any more)."""
    with _leased(folder, key) as fd:
        if fd is None:
            return None
        row, header = _row_at(fd, key)
        if header is None:
            return row
        buffer = np.empty(header.slab_bytes, np.uint8)
        for slab in header.slabs:
            read_into(fd, buffer, slab.offset)
            if xxhash.xxh3_64_intdigest(buffer.data) != slab.checksum:
                raise CorruptEntryError("a slab does not match its checksum")
        return row


@contextlib.contextmanager
def _leased(folder: Folder, key: bytes) -> Iterator[int | None]:
    path = folder.entry_path(key)
    try:
        fd = lease(path)
    except OSError as error:
        if error.errno not in OF_ONE_FILE:
            raise
        raise CorruptEntryError(f"the entry's file cannot be opened: {error.strerror}") from error
    if fd is None and os.path.islink(path):
        raise CorruptEntryError("a link is where the entry's file should be")
    try:
        yield fd
    finally:
        if fd is not None:
            os.close(fd)


def modified(path: str) -> float:
    try:
        return os.lstat(path).st_mtime
    except FileNotFoundError:
        return 0.0
