"""Proves that every page of an LMDB file is sound, without LMDB: it trusts its file, and a damaged one kills it.

LMDB follows page numbers and offsets unchecked in memory that it shares with the file, so what it would follow
is checked here first, in copies read with positional reads: of each page reachable from the snapshot's roots the
number, kind, fill, and the place and length of every node; of each tree the order of its keys, its depth and its
counts; and that every page is used once, or listed as free once. By induction LMDB then meets nothing that it
does not expect. What the values mean is not looked at: they have checksums of their own.

The layout is that of LMDB 0.9 (``lmdb.h``, ``mdb.c``: MDB_meta, MDB_page, MDB_node, MDB_db), 64-bit and little
endian. An index in any other layout counts as damaged, and is rebuilt.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

PAGES_AT_ONCE = 2048

_BRANCH, _LEAF, _OVERFLOW, _META = 1, 2, 4, 8
_BIG, _TREE = 1, 2
_HEADER = 16
_INTEGER_KEYS = 0x08
_NO_ROOT = 2**64 - 1
_LONGEST_KEY = 512  # LMDB's limit is 511
_MAGIC = 0xBEEFC0DE

_PAGE = struct.Struct("<QHHHH")
_NODE = struct.Struct("<HHHH")
_META_HEAD = struct.Struct("<IIQQ")
_TREE_RECORD = struct.Struct("<IHHQQQQQ")
_META_TAIL = struct.Struct("<QQ")
_META_BYTES = _META_HEAD.size + 2 * _TREE_RECORD.size + _META_TAIL.size

Numbers = NDArray[np.int64]
Bytes = NDArray[np.uint8]


class DamagedPagesError(Exception):
    """What is wrong with the file."""


class Tree(NamedTuple):
    """One B-tree (MDB_db)."""

    pad: int
    flags: int
    depth: int
    branches: int
    leaves: int
    overflows: int
    entries: int
    root: int


class Meta(NamedTuple):
    """One of the two meta pages: the state after one transaction."""

    page_bytes: int
    map_bytes: int
    free: Tree
    main: Tree
    last_page: int
    txnid: int


def read_metas(path: Path) -> list[Meta]:
    """Both meta pages of the LMDB file at ``path``.

    Raises:
        DamagedPagesError: one of them is damaged, or the file is too short to hold them.
        OSError: it cannot be read.
    """
    with _File(path) as file:
        return file.metas()


def verify(path: Path, txnid: int) -> set[bytes]:
    """Check all pages of the snapshot ``txnid``; the names of the databases in it.

    Nothing else may recycle the snapshot's pages meanwhile: hold a read transaction on it, or the whole store.

    Raises:
        DamagedPagesError: they are not sound.
        OSError: they cannot be read.
    """
    with _File(path) as file:
        for meta in file.metas():
            if meta.txnid == txnid:
                return _Snapshot(file, meta).verify()
        raise DamagedPagesError("the snapshot is gone")


class _File:
    """Pages by number, read into memory of our own."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.nbytes = os.fstat(self._fd).st_size
        self.page_bytes = 4096

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)

    def metas(self) -> list[Meta]:
        with _unreadable():
            first = self._meta(os.pread(self._fd, _HEADER + _META_BYTES, 0), 0)
            self.page_bytes = first.page_bytes
            second = self._meta(os.pread(self._fd, _HEADER + _META_BYTES, self.page_bytes), 1)
        _require(second.page_bytes == first.page_bytes, "the meta pages differ in the size of pages")
        return [first, second]

    def _meta(self, raw: bytes, number: int) -> Meta:
        _require(len(raw) == _HEADER + _META_BYTES, "the file is shorter than its meta pages")
        at, _, flags, _, _ = _PAGE.unpack_from(raw)
        magic, version, address, map_bytes = _META_HEAD.unpack_from(raw, _HEADER)
        trees = _HEADER + _META_HEAD.size
        free = Tree(*_TREE_RECORD.unpack_from(raw, trees))
        main = Tree(*_TREE_RECORD.unpack_from(raw, trees + _TREE_RECORD.size))
        last, txnid = _META_TAIL.unpack_from(raw, _HEADER + _META_BYTES - _META_TAIL.size)
        meta = Meta(free.pad, map_bytes, free, main, last, txnid)
        size = meta.page_bytes
        _require(at == number and flags == _META, "a meta page is no meta page")
        _require((magic, version, address) == (_MAGIC, 1, 0), "the file is not LMDB's, or of another version")
        _require(size in (4096, 8192, 16384, 32768, 65536), "the size of pages is damaged")
        _require(free.flags == _INTEGER_KEYS and main.flags == 0 and main.pad == 0, "a meta page's flags are damaged")
        # Pages given back in the transaction that took them are counted, listed as free, and never written.
        _require(last < self.nbytes // size + 65536 and last >= 1, "the number of pages is damaged")
        _require((last + 1) * size <= map_bytes < 2**48, "the size of the map is damaged")
        return meta

    def read(self, pages: Numbers) -> Bytes:
        """The pages' bytes, one behind the other, and zeros as long as a key."""
        size = self.page_bytes
        buffer = np.empty(len(pages) * size + _LONGEST_KEY, np.uint8)
        buffer[-_LONGEST_KEY:] = 0
        starts = np.flatnonzero(np.diff(pages, prepend=-2) != 1)
        ends = np.append(starts[1:], len(pages))
        view, places = buffer.data, (pages * size).tolist()
        with _unreadable():
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
                run = view[start * size : end * size]
                count = os.preadv(self._fd, [run], places[start])
                _require(count == len(run), "a page lies behind the end of the file")
        return buffer


class _Keys(NamedTuple):
    """Keys padded with zeros, and their lengths; compared as LMDB does: bytewise, the shorter of equals first."""

    padded: NDArray[np.bytes_]
    lengths: Numbers

    def below(self, other: _Keys) -> NDArray[np.bool_]:
        """Row by row, whether the key here comes strictly before the other's."""
        shorter: NDArray[np.bool_] = self.lengths < other.lengths
        less: NDArray[np.bool_] = (self.padded < other.padded) | ((self.padded == other.padded) & shorter)
        return less

    def at(self, rows: slice | Numbers) -> _Keys:
        return _Keys(self.padded[rows], self.lengths[rows])

    def replaced(self, rows: Numbers, by: _Keys) -> _Keys:
        padded = self.padded.astype(max(self.padded.dtype, by.padded.dtype, key=lambda dtype: dtype.itemsize))
        padded[rows] = by.padded
        lengths = self.lengths.copy()
        lengths[rows] = by.lengths
        return _Keys(padded, lengths)


class _Nodes(NamedTuple):
    """The nodes of some pages of one kind, in the order of their keys."""

    buffer: Bytes
    start: Numbers
    """Where in ``buffer`` each node begins."""
    key_bytes: Numbers
    flags: Numbers
    value: Numbers
    """In leaves the length of the value, in branches the number of the page below."""
    first: Numbers
    """Which node is each page's first."""

    def keys(self, *, integers: bool) -> _Keys:
        width = max(int(self.key_bytes.max()), 1)
        # A window of that width at every byte; taking one copies it whole.
        windows = np.ndarray(len(self.buffer) - width, f"S{width}", self.buffer, strides=(1,))
        padded = windows[self.start + _NODE.size]
        if int(self.key_bytes.min()) < width:
            padded.view(np.uint8).reshape(-1, width)[np.arange(width) >= self.key_bytes[:, None]] = 0
        if integers:  # little endian numbers, in the order of their value
            padded = padded.view(np.uint8).reshape(-1, width)[:, ::-1].copy().view(padded.dtype).reshape(-1)
        return _Keys(padded, self.key_bytes)

    def key(self, node: int) -> bytes:
        start = int(self.start[node]) + _NODE.size
        return self.buffer[start : start + int(self.key_bytes[node])].tobytes()

    def data(self, node: int) -> bytes:
        start = int(self.start[node] + _NODE.size + self.key_bytes[node])
        return self.buffer[start : start + _stored(self, node)].tobytes()


class _Snapshot:
    """The state after one transaction: all trees, and the list of free pages."""

    def __init__(self, file: _File, meta: Meta) -> None:
        self._file = file
        self._meta = meta
        self._used = np.zeros(meta.last_page + 1, bool)
        self._used[:2] = True  # the meta pages

    def verify(self) -> set[bytes]:
        names: set[bytes] = set()
        for name, value in self._tree(self._meta.main, flags=_TREE):
            _require(len(value) == _TREE_RECORD.size, "a database's record is damaged")
            tree = Tree(*_TREE_RECORD.unpack(value))
            _require(tree.flags == 0 and tree.pad == 0, "a database's flags are damaged")
            self._tree(tree)
            names.add(name)
        for key, ids in self._tree(self._meta.free, flags=0, integers=True):
            _require(len(key) == 8 and len(ids) >= 8 and not len(ids) % 8, "a list of free pages is damaged")
            _require(int.from_bytes(key, "little") <= self._meta.txnid, "a list of free pages is of the future")
            count, *pages = np.frombuffer(ids, "<i8").tolist()
            _require(0 <= count <= len(pages), "a list of free pages is damaged")
            listed = np.array(pages[:count], np.int64)
            _require((np.diff(listed) < 0).all(), "a list of free pages is out of order")
            self._use(listed)
        _require(self._used.all(), "a page is neither used nor free")
        return names

    def _tree(self, tree: Tree, *, flags: int = -1, integers: bool = False) -> list[tuple[bytes, bytes]]:
        """Walk a tree from level to level. With ``flags``, which all its values must have, returns all items."""
        if tree.root == _NO_ROOT:
            _require(not any(tree[2:7]), "an empty tree has pages")
            return []
        _require(1 <= tree.depth <= 32 and tree.root <= self._meta.last_page, "a tree's record is damaged")
        pages = np.array([tree.root], np.int64)
        # The least key that may stand below each page.
        fences = _Keys(np.array([b""], "S1"), np.zeros(1, np.int64))
        branches = 0
        for _ in range(tree.depth - 1):
            branches += len(pages)
            nodes = self._nodes(pages, _BRANCH, least=1 if integers else 2)
            # The first key of a branch page stands for whatever is lower, and is never looked at.
            keys = nodes.keys(integers=integers).replaced(nodes.first, fences)
            _require(keys.at(slice(None, -1)).below(keys.at(slice(1, None))).all(), "branches are out of order")
            pages, fences = nodes.value, keys
        return self._leaves(tree, branches, pages, fences, flags, integers)

    def _leaves(
        self, tree: Tree, branches: int, pages: Numbers, fences: _Keys, flags: int, integers: bool
    ) -> list[tuple[bytes, bytes]]:
        entries = overflows = 0
        items: list[tuple[bytes, bytes]] = []
        for start in range(0, len(pages), PAGES_AT_ONCE):
            some = slice(start, start + PAGES_AT_ONCE)
            nodes = self._nodes(pages[some], _LEAF, least=1)
            keys = nodes.keys(integers=integers)
            _require(keys.at(slice(None, -1)).below(keys.at(slice(1, None))).all(), "leaves are out of order")
            _require(not keys.at(nodes.first).below(fences.at(some)).any(), "a leaf holds a key of the one before")
            upper = fences.at(slice(start + 1, start + PAGES_AT_ONCE + 1))
            last = np.append(nodes.first[1:], len(nodes.start)) - 1
            _require(keys.at(last[: len(upper.lengths)]).below(upper).all(), "a leaf holds a key of the next")
            big = nodes.flags & _BIG
            _require(((nodes.flags ^ big) == max(flags, 0)).all(), "a value's flags are damaged")
            values = {node: self._overflow(nodes, node) for node in np.flatnonzero(big).tolist()}
            overflows += sum(count for count, _ in values.values())
            entries += len(nodes.start)
            if flags >= 0:
                every = range(len(nodes.start))
                items += [(nodes.key(i), values[i][1] if i in values else nodes.data(i)) for i in every]
        counted = (branches, len(pages), overflows, entries)
        _require(counted == tree[3:7], "a tree's counts are damaged")
        return items

    def _nodes(self, pages: Numbers, kind: int, *, least: int) -> _Nodes:
        """Read pages of one kind and check that their nodes tile them, from ``upper`` to the page's end."""
        self._use(pages)
        size = self._file.page_bytes
        buffer = self._file.read(pages)
        halves = buffer.view("<u2")
        page = np.arange(len(pages)) * size
        number = buffer.view("<i8")[page // 8]
        flags, lower, upper = (halves[page // 2 + i].astype(np.int64) for i in (5, 6, 7))
        _require(((number == pages) & (flags == kind)).all(), "a page is another, or of another kind")
        fits = (lower >= _PAGE.size + 2 * least) & (lower <= upper) & (upper < size) & ~((lower | upper) & 1)
        _require(fits.all(), "a page's fill is damaged")
        counts = (lower - _PAGE.size) // 2
        first = np.cumsum(counts) - counts
        owner = np.repeat(page, counts)
        slot = np.arange(len(owner)) - np.repeat(first, counts)
        offset = halves[(owner + _PAGE.size) // 2 + slot].astype(np.int64)
        inside = (offset >= np.repeat(upper, counts)) & (offset <= size - _NODE.size) & ~(offset & 1)
        _require(inside.all(), "a node lies outside its page")
        start = owner + offset
        low, high, marks, key_bytes = (halves[start // 2 + i].astype(np.int64) for i in range(4))
        value = low | high << 16
        if kind == _BRANCH:
            value, marks, stored = value | marks << 32, marks * 0, marks * 0
        else:
            _require((key_bytes > 0).all(), "a key is empty")
            stored = np.where(marks & _BIG, 8, value)
        end = start + (_NODE.size + key_bytes + stored + 1 & ~1)
        gaps = np.sort(start)[1:] - np.sort(end)[:-1]
        _require((end <= owner + size).all() and (gaps >= 0).all(), "nodes overlap")
        filled = np.add.reduceat(end - start, first)
        _require((filled == size - upper).all() and (key_bytes < _LONGEST_KEY).all(), "a node's length is damaged")
        return _Nodes(buffer, start, key_bytes, marks, value, first)

    def _overflow(self, nodes: _Nodes, node: int) -> tuple[int, bytes]:
        """How many pages of its own a long value takes, and the value."""
        nbytes, size = int(nodes.value[node]), self._file.page_bytes
        count = -(-(_PAGE.size + nbytes) // size)
        first = int.from_bytes(nodes.data(node), "little")
        _require(first + count <= len(self._used), "a long value lies behind the end of the file")
        pages = np.arange(first, first + count)
        self._use(pages)
        raw = self._file.read(pages).tobytes()
        number, _, flags, low, high = _PAGE.unpack_from(raw)
        _require((number, flags, low | high << 16) == (first, _OVERFLOW, count), "a long value's page is damaged")
        return count, raw[_PAGE.size : _PAGE.size + nbytes]

    def _use(self, pages: Numbers) -> None:
        """Count pages as used; none may be twice."""
        _require(((pages >= 2) & (pages < len(self._used))).all(), "a page's number is damaged")
        before = np.count_nonzero(self._used[pages])
        self._used[pages] = True
        _require(not before and len(np.unique(pages)) == len(pages), "a page is used twice")


def _stored(nodes: _Nodes, node: int) -> int:
    return 8 if nodes.flags[node] & _BIG else int(nodes.value[node])


def _require(holds: object, otherwise: str) -> None:
    if not holds:
        raise DamagedPagesError(otherwise)


@contextlib.contextmanager
def _unreadable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.EIO:
            raise DamagedPagesError("the disk cannot read it") from error
        raise
