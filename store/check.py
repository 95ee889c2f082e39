"""Index and files reconciled, both ways: what a crash, a person or a dying disk can bring apart."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import xxhash

from ragkv.errors import CorruptEntryError, StoreFormatError
from ragkv.store.files import Folder, disk_bytes, key_of, read_header, read_into
from ragkv.store.header import EntryHeader
from ragkv.store.index import Index, IndexTxn
from ragkv.store.lease import lease
from ragkv.store.rows import Row

ROWS_PER_TRANSACTION = 1000


@dataclass(slots=True)
class CheckReport:
    """What ``ChunkStore.check`` found, as chunk keys; with ``fix`` it has been repaired."""

    entries: int = 0
    orphans: list[bytes] = field(default_factory=list)
    missing: list[bytes] = field(default_factory=list)
    corrupt: list[bytes] = field(default_factory=list)
    miscounted: list[bytes] = field(default_factory=list)
    fixed: bool = False

    @property
    def clean(self) -> bool:
        """Whether nothing was wrong."""
        return not (self.orphans or self.missing or self.corrupt or self.miscounted)


def row_of(header: EntryHeader, nbytes: int) -> Row:
    """The index row of an entry whose file takes ``nbytes`` of the disk."""
    return Row(nbytes, header.tokens, header.geometry.layers, header.created, header.model)


def check(folder: Folder, index: Index, *, fix: bool) -> CheckReport:
    """Compare rows with files and verify every checksum; with ``fix`` repair, key by key."""
    report = CheckReport(fixed=fix)
    known = set(index.read(lambda txn: txn.keys()))
    report.entries = len(known)
    found = set(folder.entry_keys())
    for key in sorted(known | found):
        # Files and rows were listed at different moments: what was written or evicted since is no fault.
        row = index.get_many([key])[0]
        present = os.path.exists(folder.entry_path(key))
        if row is None and not present:
            continue
        header = _verified(folder, key) if present else None
        if not present:
            report.missing.append(key)
        elif header is None:
            report.corrupt.append(key)
        elif row is None:
            report.orphans.append(key)
        elif row.nbytes != disk_bytes(folder.entry_path(key)):
            report.miscounted.append(key)
        else:
            continue
        if fix:
            _repair(folder, index, key, header, present)
    return report


def recover(folder: Folder, txn: IndexTxn) -> None:
    """Clear up after writers that died: drop what they had not finished, take in what only lacked its row."""
    for temp in folder.stale_temps():
        key = key_of(temp.name)
        if key is not None and txn.get(key) is None:
            path = folder.entry_path(key)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samefile(temp, path):
                    _adopt(folder, txn, key)
        temp.unlink()


def rebuild(folder: Folder, index: Index) -> None:
    """Fill an empty index from the headers of the entry files, oldest first; damaged ones are quarantined."""
    keys = sorted(folder.entry_keys(), key=lambda key: _modified(folder.entry_path(key)))
    for start in range(0, len(keys), ROWS_PER_TRANSACTION):
        some = keys[start : start + ROWS_PER_TRANSACTION]
        index.write(partial(_adopt_all, folder, some))


def _repair(folder: Folder, index: Index, key: bytes, header: EntryHeader | None, present: bool) -> None:
    def repair(txn: IndexTxn) -> None:
        path = folder.entry_path(key)
        if os.path.exists(path) != present:
            return  # changed meanwhile
        if header is None and present:
            folder.quarantine(key)
        txn.delete(key)
        if header is not None:
            txn.put(key, row_of(header, disk_bytes(path)))

    index.write(repair)


def _adopt_all(folder: Folder, keys: list[bytes], txn: IndexTxn) -> None:
    for key in keys:
        _adopt(folder, txn, key)


def _adopt(folder: Folder, txn: IndexTxn, key: bytes) -> None:
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
    """The entry's header if every byte of it matches its checksum, None if not."""
    with _leased(folder, key) as fd:
        if fd is None:
            return None
        try:
            header = read_header(fd)
            buffer = np.empty(header.slab_bytes, np.uint8)
            for slab in header.slabs:
                read_into(fd, buffer, slab.offset)
                if xxhash.xxh3_64_intdigest(buffer.data) != slab.checksum:
                    return None
        except (CorruptEntryError, StoreFormatError):
            return None
        return header if header.key == key else None


@contextlib.contextmanager
def _leased(folder: Folder, key: bytes) -> Iterator[int | None]:
    fd = lease(folder.entry_path(key))
    try:
        yield fd
    finally:
        if fd is not None:
            os.close(fd)


def _modified(path: str) -> float:
    try:
        return os.stat(path).st_mtime
    except FileNotFoundError:
        return 0.0
