"""The chunk store: one API over the RAM and SSD tiers, under one byte cap."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from ragkv.errors import (
    CorruptEntryError,
    MissingEntryError,
    StoreError,
    StoreFormatError,
    StoreReadOnlyError,
)
from ragkv.store import check as checks
from ragkv.store.buffers import Allocate, Array
from ragkv.store.files import Folder, disk_errors, is_there, read_header
from ragkv.store.geometry import Geometry
from ragkv.store.header import EntryHeader
from ragkv.store.headers import Headers
from ragkv.store.index import Index
from ragkv.store.lease import lease
from ragkv.store.policies import DEFAULT_POLICY, make_policy
from ragkv.store.ram import RamTier
from ragkv.store.reader import LayerReader, OpenEntry
from ragkv.store.remote import Remote, RemoteSource, RemoteTier, connect
from ragkv.store.rows import Row
from ragkv.store.session import Session
from ragkv.store.slabs import SlabInput, encoded
from ragkv.store.source import FileSource, Lease, RamSource
from ragkv.store.space import Recency, Space
from ragkv.store.stats import EntryInfo, StoreStats
from ragkv.store.txn import IndexTxn
from ragkv.store.writer import EntryWriter


class ChunkStore:
    """Keeps chunks' KV, layer by layer, in a folder on the SSD and the most used of it in RAM.

    Args:
        path: the store's folder; created if missing.
        capacity_bytes: the most that entry files may take, as the disk counts; held during writes too. Entries
            make room as ``policy`` says, open ones excepted.
        ram_bytes: the most that the RAM tier may take.
        threads: how many threads read, and how many write.
        read_only: never write anything; ``put`` and ``delete`` are refused.
        policy: who makes room: ``cost``, ``s3-fifo`` or ``lru`` (see docs/store.md). All that have a folder open
            should name the same.
        ram_allocate: provides the memory of the RAM tier, and of slabs on their way there: takes a number of
            bytes, returns a uint8 array, such as page-locked memory. It is used again and again.
        remote: the URL of a server that keeps entries for several stores (``redis://…``), or a tier of your own,
            closed with the store.
        on_gone: called with the key of an entry that has been deleted, evicted or found wrong, for caches above the
            store; on any thread, with the index locked: it must return at once, and not call the store.
        remote_timeout_ms: the most that asking it may add to ``open`` and ``lookup`` when something is missing
            here; ten times that is the most a layer waits for it.

    Every method may be called from any thread, and several processes may have the same folder open.

    Raises:
        StoreFormatError: the folder is something else, or written by another version.
        StoreReadOnlyError: the folder cannot be written, and ``read_only`` is off.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        capacity_bytes: int,
        ram_bytes: int,
        threads: int = 4,
        read_only: bool = False,
        policy: str = DEFAULT_POLICY,
        ram_allocate: Allocate | None = None,
        remote: str | RemoteTier | None = None,
        remote_timeout_ms: int = 50,
        on_gone: Callable[[bytes], None] | None = None,
    ) -> None:
        for name, value, least in (
            ("capacity_bytes", capacity_bytes, 1),
            ("ram_bytes", ram_bytes, 0),
            ("threads", threads, 1),
            ("remote_timeout_ms", remote_timeout_ms, 1),
        ):
            if value < least:
                raise StoreError(f"{name} must be at least {least}, not {value}", setting=name, value=value)
        chosen = make_policy(policy)
        timeout = remote_timeout_ms / 1000
        tier = connect(remote, timeout=timeout, transfer_timeout=10 * timeout) if isinstance(remote, str) else remote
        self._remote: Remote | None = None
        self.folder = Folder(path)
        self.folder.prepare(read_only=read_only)
        self.capacity_bytes = capacity_bytes
        self.read_only = read_only
        self.policy = policy
        self._ram = RamTier(ram_bytes, ram_allocate)
        self._on_gone = on_gone
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._recency = Recency()
        self._headers = Headers()
        self._space = Space(self.folder, capacity_bytes, chosen, self._recency, self._ram, self._evicted)
        self._closed = False
        self._session = Session(self.folder, read_only=read_only, tidy=self._tidy)
        self._index: Index = self._session.index
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="ragkv-store")
        self._writer = EntryWriter(self.folder, self._index, self._space, self._ram.buffers, threads)
        if tier is not None:
            self._remote = Remote(
                tier,
                timeout=timeout,
                transfer_timeout=10 * timeout,
                file_of=self.folder.entry_path,
                keep=None if read_only else self._keep,
            )

    # Reading

    def lookup(self, keys: Sequence[bytes]) -> list[EntryInfo | None]:
        """Say of each key where it would be read from, None if it is nowhere; one index transaction.

        What is missing here is asked of the remote tier in one round trip (of 256 keys). Only
        asking: it counts as no use of the entry, neither for eviction nor in the statistics.
        """
        rows = self._index_open().get_many(keys)
        ram = self._ram
        infos: list[EntryInfo | None] = []
        for key, row in zip(keys, rows, strict=True):
            if row is None:
                self._gone(key)  # removed by another process
                infos.append(None)
            else:
                infos.append(EntryInfo("ram" if key in ram else "ssd", row.tokens, row.nbytes))
        afar = self._find_remote([key for key, info in zip(keys, infos, strict=True) if info is None])
        return [
            EntryInfo("remote", afar[key].tokens, afar[key].file_bytes) if info is None and key in afar else info
            for key, info in zip(keys, infos, strict=True)
        ]

    def open(self, keys: Sequence[bytes]) -> list[OpenEntry | StoreError]:
        """Open the entries of ``keys``, under a lease each or from RAM (see ``OpenEntry``). One that is missing or
        corrupt comes back as an error, and so does one for another version of ragkv (StoreFormatError), which stays.

        What is not here is asked of the remote tier, all of it in one round trip (of 256 keys). An entry there
        has no lease: it may vanish while it is read.
        """
        index = self._index_open()
        index.check_process()
        opened = self._open_here(index, keys)
        self._touch([entry.header.key for entry in opened if isinstance(entry, OpenEntry)])
        if self._remote is not None:
            opened = self._open_remote(self._remote, keys, opened)
        self._count_hits(opened)
        return opened

    def open_layers(
        self,
        entries: Sequence[OpenEntry],
        *,
        depth: int = 2,
        allocate: Allocate | None = None,
        order: Sequence[int] | None = None,
    ) -> LayerReader:
        """Read ``entries`` layer by layer, ``depth`` layers ahead of the caller.

        Yields, for layer 0, 1, 2 … (or the layers as ``order`` names them, each once), one uint8 array (a slab: K,
        then V) per entry, in the order given. A slab that does not match its checksum gives a CorruptEntryError in its
        entry's place, from then on; the entry is quarantined. A remote tier that fails gives another StoreError there.
        Entries read to the end move into the RAM tier, and from the remote tier to the SSD, in the background.

        ``allocate(nbytes)`` provides the buffers for what is read from the SSD; they stay the caller's,
        who may use one again once he is done with its slab. It is called on the reading threads, and up to
        ``depth + 1`` layers are out at a time (if layer i is done with before layer i + 1 is asked for).
        Without it, and for entries in RAM, the arrays are the store's own and read-only.

        Closing the iterator stops reading; after that no buffer is written to any more.

        Raises:
            StoreError: an entry is closed, the entries differ in their number of layers, or ``order`` does not name
                each layer once.
        """
        self._index_open()
        if depth < 1:
            raise StoreError(f"depth must be at least 1, not {depth}", setting="depth", value=depth)
        return LayerReader(entries, depth=depth, allocate=allocate, ram=self._ram, order=order)

    def __contains__(self, key: object) -> bool:
        """Whether the entry is here, on this machine."""
        return isinstance(key, bytes) and self._index_open().get_many([key])[0] is not None

    # Writing

    def put(
        self,
        key: bytes,
        geometry: Geometry,
        slabs: Iterable[SlabInput],
        *,
        tokens: int,
        model: str,
        codec: str = "raw",
        source: str = "exact",
        context_tokens: int = 0,
        context_policy: str = "none",
    ) -> bool:
        """Store a chunk's KV durably. False if it is there already, readable for this version or not.

        ``slabs`` gives ``geometry.layers`` slabs in order: each the bytes of K, then V, both
        (tokens, kv_heads, head_dim) in the geometry's dtype, as one buffer or array or as a tuple of them. They
        are taken in turn, and encoded by ``codec`` (one of ``CODECS``) on the caller's thread.

        Raises:
            StoreFullError: it does not fit the capacity (or what is not leased of it), or the disk is full.
            StoreReadOnlyError: the store was opened with ``read_only``, or its folder has become so.
            StoreFormatError: a field cannot be stored, ``slabs`` do not have the geometry's size, or hold inf or nan
                where the codec cannot.
        """
        header = EntryHeader(
            key, geometry, tokens, model, codec, source, context_tokens, context_policy, created=time.time()
        )
        self._writable()
        if key in self and is_there(self.folder.entry_path(key)):
            self._touch([key])
            return False
        fresh = self._writer.write(header, encoded(header, slabs))
        if fresh and self._remote is not None:
            self._remote.add(key, header.file_bytes)
        return fresh

    def delete(self, keys: Sequence[bytes]) -> int:
        """Remove entries; says how many were removed here. Open ones stay, and so does what is not here.

        They are deleted on the remote tier too, best effort: see ``RemoteStats.deletes_failed``.
        """
        removed = self._delete_here(keys)
        if self._remote is not None and keys:
            self._remote.delete(keys)
            for key in keys:
                self._gone(key)  # caches above may have what was never stored here
        return removed

    def _delete_here(self, keys: Sequence[bytes]) -> int:
        index, removed = self._writable(), 0
        with disk_errors(self.folder.root):
            for start in range(0, len(keys), checks.ROWS_PER_TRANSACTION):  # others may want to write
                some = dict.fromkeys(keys[start : start + checks.ROWS_PER_TRANSACTION])
                removed += index.write(partial(self._remove_all, some))
        return removed

    def clear(self) -> int:
        """Remove every entry here that is not open, and the quarantine; says how many entries.

        The remote tier keeps what it has: others use it.
        """
        index = self._writable()
        with disk_errors(self.folder.root):
            self.folder.purge_quarantine()
        return self._delete_here(index.read(lambda txn: txn.keys()))

    # Housekeeping

    def clear_ram(self) -> None:
        """Empty the RAM tier. Its memory stays, for what is read next."""
        self._ram.clear()

    def stats(self) -> StoreStats:
        models = self._index_open().read(lambda txn: txn.models())
        with self._lock:
            counts = Counter(self._counts)
        return StoreStats(
            entries=sum(count for count, _ in models.values()),
            bytes=sum(nbytes for _, nbytes in models.values()),
            capacity_bytes=self.capacity_bytes,
            ram_entries=len(self._ram),
            ram_bytes=self._ram.nbytes,
            ram_capacity_bytes=self._ram.capacity,
            hits_ram=counts["ram"],
            hits_ssd=counts["ssd"],
            misses=counts["miss"],
            corrupt=counts["corrupt"],
            evictions=counts["evictions"],
            models={model: count for model, (count, _) in models.items()},
            hits_remote=counts["remote"],
            remote=self._remote.stats() if self._remote is not None else None,
        )

    def check(self, *, fix: bool = False) -> checks.CheckReport:
        """Compare index and files both ways and verify every checksum; with ``fix`` repair what is wrong.

        Whole orphans are taken into the index (if the capacity allows), damaged ones and damaged entries are
        quarantined, rows without a file are dropped, those that say something else than their file are corrected.
        Entries for another version are only counted (``foreign``). What is being repaired in the background since the
        store was opened is finished first.
        """
        self._session.wait_reconciled()
        report = checks.check(self.folder, self._writable() if fix else self._index_open(), fix=fix)
        if fix:
            self._count("corrupt", len(report.corrupt))
            for key in report.corrupt:
                self._gone(key)
            self._tidy(self._index)
        return report

    def drain(self, timeout: float) -> bool:
        """Wait until what was put has been uploaded to the remote tier, and what was read there is stored here.

        False if that takes longer than ``timeout`` seconds, or the server is down.
        """
        return self._remote is None or self._remote.drain(timeout)

    def close(self) -> None:
        """Flush and close. Open entries keep their lease; what is being read is finished first.

        Uploads still waiting get five seconds; :meth:`drain` first if they must all arrive.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self._remote is not None:
            self._remote.close()
        self._executor.shutdown()
        self._writer.close()
        try:
            self._flush()
        finally:
            self._session.close()
            self._ram.clear()
            self._ram.buffers.close()

    def __enter__(self) -> ChunkStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Inside

    def _index_open(self) -> Index:
        if self._closed:
            raise StoreError("the store is closed", path=str(self.folder.root))
        return self._index

    def _writable(self) -> Index:
        if self.read_only:
            message = f"{self.folder.root} was opened with read_only=True; open it without to change it"
            raise StoreReadOnlyError(message, path=str(self.folder.root))
        self._session.wait_counted()
        return self._index_open()

    def _tidy(self, index: Index) -> None:
        """A smaller cap than last time, or writers that died: both are put right before anything is written."""
        while index.write(self._space.tidy):
            pass  # in small transactions: others may want to write

    def _open_here(self, index: Index, keys: Sequence[bytes]) -> list[OpenEntry | StoreError]:
        """Open what is on this machine. A function of its own: frames of an error further on would keep its leases."""
        in_ram = self._open_in_ram(keys)
        rest = [key for key, entry in zip(keys, in_ram, strict=True) if entry is None]
        rows = dict(zip(rest, index.get_many(rest), strict=True)) if rest else {}
        # The disk is asked for all headers before the first is waited for.
        found = [entry or self._lease(key, rows[key]) for key, entry in zip(keys, in_ram, strict=True)]
        return [self._open(key, one) if isinstance(one, Lease) else one for key, one in zip(keys, found, strict=True)]

    def _open_in_ram(self, keys: Sequence[bytes]) -> list[OpenEntry | None]:
        """Open what lies in RAM and is still in the store. Its file tells, which goes first, whoever removes it: the
        index need not be asked.
        """
        opened: list[OpenEntry | None] = [None] * len(keys)
        path, reject = self.folder.entry_path, self._reject
        for i, found in enumerate(self._ram.open(keys)):
            if found is not None:
                if is_there(path(keys[i])):
                    entry, hold = found
                    opened[i] = OpenEntry(RamSource(entry, hold, reject))
                else:
                    self._gone(keys[i])
        return opened

    def _lease(self, key: bytes, row: Row | None) -> Lease | StoreError:
        missing = MissingEntryError("the chunk is not in the store; encode it again", key=key.hex())
        if row is None:
            return missing
        try:
            fd = lease(self.folder.entry_path(key))
        except OSError as error:
            return StoreError(f"the entry cannot be opened: {error.strerror}", key=key.hex(), errno=error.errno)
        if fd is None:
            self._forget_missing(key)
            return missing
        held = Lease(fd)
        self._headers.expect(key, fd)
        return held

    def _open(self, key: bytes, held: Lease) -> OpenEntry | StoreError:
        try:
            header = self._headers.read(key, held.fd)
            if header.key != key:
                raise CorruptEntryError("the file holds another chunk's entry")
        except StoreFormatError as error:  # sound, and for another version of ragkv: it stays
            error.context["key"] = key.hex()
            return _bare(error)
        except CorruptEntryError as error:
            error.context["key"] = key.hex()
            self._quarantine(key, held.fd)
            return _bare(error)
        return OpenEntry(FileSource(header, held, self._executor, self._ram.buffers, self._quarantine))

    def _find_remote(self, keys: Sequence[bytes]) -> dict[bytes, EntryHeader]:
        return self._remote.find(list(dict.fromkeys(keys))) if self._remote is not None and keys else {}

    def _open_remote(
        self, remote: Remote, keys: Sequence[bytes], opened: list[OpenEntry | StoreError]
    ) -> list[OpenEntry | StoreError]:
        """``opened`` with what the remote tier has in the places of errors."""
        afar = self._find_remote([k for k, entry in zip(keys, opened, strict=True) if isinstance(entry, StoreError)])
        return [
            OpenEntry(RemoteSource(afar[key], remote, self._ram.buffers))
            if isinstance(entry, StoreError) and key in afar
            else entry
            for key, entry in zip(keys, opened, strict=True)
        ]

    def _keep(self, header: EntryHeader, slabs: Sequence[Array]) -> bool:
        """Store an entry of the remote tier as it is. False if it is here by now."""
        self._session.wait_counted()
        if self._index.get_many([header.key])[0] is not None:
            return False
        return self._writer.write(header, ([slab.data] for slab in slabs))

    def _remove_all(self, keys: Iterable[bytes], txn: IndexTxn) -> int:
        return sum(self._remove(txn, key) for key in keys if txn.get(key) is not None)

    def _remove(self, txn: IndexTxn, key: bytes) -> bool:
        if not self._ram.let_go(key, self.folder.remove):
            return False
        self._gone(key)
        return txn.delete(key)

    def _quarantine(self, key: bytes, fd: int) -> None:
        self._count("corrupt")
        self._gone(key)
        if not self.read_only:
            with contextlib.suppress(StoreError, OSError):  # the caller has the error that matters
                self._index.write(lambda txn: self.folder.quarantine(key, fd) and txn.delete(key))

    def _reject(self, header: EntryHeader) -> None:
        """Quarantine what was opened from RAM, unless another entry has taken its file's place."""
        key = header.key
        with contextlib.suppress(StoreError, OSError):
            fd = lease(self.folder.entry_path(key))
            if fd is not None:
                try:
                    if read_header(fd) == header:
                        self._quarantine(key, fd)
                        return
                finally:
                    os.close(fd)
        self._count("corrupt")
        self._gone(key)

    def _forget_missing(self, key: bytes) -> None:
        """Drop a row whose file somebody removed by hand (or a crash, halfway through an eviction)."""
        self._gone(key)
        if not self.read_only:
            with contextlib.suppress(StoreError):
                self._index.write(lambda txn: not is_there(self.folder.entry_path(key)) and txn.delete(key))

    def _count_hits(self, opened: Sequence[OpenEntry | StoreError]) -> None:
        tiers = [entry.tier if isinstance(entry, OpenEntry) else "miss" for entry in opened]
        with self._lock:
            self._counts.update(tiers)

    def _touch(self, keys: Sequence[bytes]) -> None:
        if keys and self._recency.note(keys):
            with contextlib.suppress(RuntimeError):  # the store is being closed, which flushes too
                self._executor.submit(self._flush)

    def _flush(self) -> None:
        self._ram.settle()
        uses = self._recency.take()
        if uses and not self.read_only:
            with contextlib.suppress(StoreError):  # the order of use is a hint; losing it harms nobody
                self._index.write(lambda txn: self._space.use(txn, uses))

    def _gone(self, key: bytes) -> None:
        self._ram.drop(key)
        self._headers.drop(key)
        if self._on_gone is not None:
            self._on_gone(key)

    def _evicted(self, key: bytes) -> None:
        self._gone(key)
        self._count("evictions")

    def _count(self, event: str, by: int = 1) -> None:
        with self._lock:
            self._counts[event] += by


def _bare(error: StoreError) -> StoreError:
    """Without the frames of what raised it, and of what that came of: they would keep leases."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
