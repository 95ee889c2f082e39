"""Index and files reconciled, both ways: what a crash, a person or a dying disk can bring apart."""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import xxhash

from ragkv.errors import CorruptEntryError, StoreFormatError
from ragkv.store.files import Folder, disk_bytes, key_of, read_header, read_into
from ragkv.store.header import EntryHeader
from ragkv.store.index import Index
from ragkv.store.lease import lease
from ragkv.store.rows import QUEUES, Row
from ragkv.store.txn import IndexTxn

ROWS_PER_TRANSACTION = 1000


@dataclass(slots=True)
class CheckReport:
    """What ``ChunkStore.check`` found, as chunk keys; with ``fix`` it has been repaired.

    ``tables_sound`` says whether the order of eviction and the tallies agreed with the rows.
    """

    entries: int = 0
    orphans: list[bytes] = field(default_factory=list)
    missing: list[bytes] = field(default_factory=list)
    corrupt: list[bytes] = field(default_factory=list)
    miscounted: list[bytes] = field(default_factory=list)
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
            header = _verified(folder, key)
        except (CorruptEntryError, StoreFormatError):
            report.corrupt.append(key)
            header = None
            if fix:
                index.write(partial(_expel, folder, key))
            continue
        # Files and rows were listed at different moments: what was written or evicted since is no fault.
        row = index.get_many([key])[0]
        if header is None and row is not None:
            report.missing.append(key)
        elif header is not None and row is None:
            report.orphans.append(key)
        elif row is not None and row.nbytes != disk_bytes(folder.entry_path(key)):
            report.miscounted.append(key)
        else:
            continue
        if fix:
            index.write(partial(_reindex, folder, key, header))
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


def recover(folder: Folder, txn: IndexTxn) -> None:
    """Clear up after writers that died: drop what they had not finished, take in what only lacked its row."""
    for temp in folder.stale_temps():
        key = key_of(temp.name)
        if key is not None and txn.get(key) is None:
            path = folder.entry_path(key)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samefile(temp, path):
                    adopt(folder, txn, key)
        temp.unlink(missing_ok=True)  # its writer may just have finished


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


def _reindex(folder: Folder, key: bytes, header: EntryHeader | None, txn: IndexTxn) -> None:
    nbytes = disk_bytes(folder.entry_path(key))
    if not nbytes:
        txn.delete(key)
    elif header is not None:
        txn.put(key, row_of(header, nbytes))


def _adopt_all(folder: Folder, keys: list[bytes], txn: IndexTxn) -> None:
    for key in keys:
        adopt(folder, txn, key)


def adopt(folder: Folder, txn: IndexTxn, key: bytes) -> None:
    """Index an entry's file by its header; quarantine it if that is damaged."""
    with _leased(folder, key) as fd:
        if fd is None:
            return
        try:
            header = read_header(fd)
        except (CorruptEntryError, StoreFormatError):
            folder.quarantine(key, fd)
            return
        if header.key == key:
            txn.put(key, row_of(header, os.fstat(fd).st_blocks * 512))
        else:
            folder.quarantine(key, fd)


def _verified(folder: Folder, key: bytes) -> EntryHeader | None:
    """The entry's header, it and its slabs verified; None if there is no such file (any more)."""
    with _leased(folder, key) as fd:
        if fd is None:
            return None
        header = read_header(fd)
        if header.key != key:
            raise CorruptEntryError("the file holds another chunk's entry")
        buffer = np.empty(header.slab_bytes, np.uint8)
        for slab in header.slabs:
            read_into(fd, buffer, slab.offset)
            if xxhash.xxh3_64_intdigest(buffer.data) != slab.checksum:
                raise CorruptEntryError("a slab does not match its checksum")
        return header


@contextlib.contextmanager
def _leased(folder: Folder, key: bytes) -> Iterator[int | None]:
    fd = lease(folder.entry_path(key))
    try:
        yield fd
    finally:
        if fd is not None:
            os.close(fd)


def modified(path: str) -> float:
    try:
        return os.stat(path).st_mtime
    except FileNotFoundError:
        return 0.0
