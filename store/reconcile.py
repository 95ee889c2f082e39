"""What an unclean end can leave behind, put right in the background while the store is in use.

Reading goes on meanwhile: an index that has been verified page by page gives no wrong answer, at worst too few.
Who wants to write waits until the index is known to count every file, because the byte cap depends on it; in every
process (see counting.py).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial

from ragkv.errors import StoreError
from ragkv.store.check import adopt, modified, tables_sound
from ragkv.store.counting import Counting
from ragkv.store.files import Folder, disk_bytes, disk_errors, is_there
from ragkv.store.index import Index
from ragkv.store.txn import IndexTxn

SECONDS_BETWEEN_LOOKS = 0.01

log = logging.getLogger("ragkv")


class Reconciler:
    """One thread over one index. ``tidy`` is called once every file is counted, to bring them under the cap.

    While another process counts, it waits for that one, and takes over if it dies.
    """

    def __init__(self, folder: Folder, index: Index, counting: Counting, tidy: Callable[[Index], None]) -> None:
        self._folder = folder
        self._index = index
        self._counting = counting
        self._tidy = tidy
        self._stop = threading.Event()
        self._counted = threading.Event()
        self._finished = False
        self._thread = threading.Thread(target=self._run, name="ragkv-reconcile", daemon=True)
        self._thread.start()

    def wait_counted(self) -> None:
        """Wait until the index has a row for every file, and no other."""
        if threading.current_thread() is not self._thread:
            self._counted.wait()

    def wait_finished(self) -> None:
        self._thread.join()

    def close(self) -> bool:
        """Stop; says whether everything had been done."""
        self._stop.set()
        self._thread.join()
        return self._finished

    def _run(self) -> None:
        try:
            with disk_errors(self._folder.root):
                while not self._counting.begin():
                    self._pause(SECONDS_BETWEEN_LOOKS)
                ours = not self._counting.known()
                counted = False
                try:
                    if ours:
                        self._count()
                    self._tidy(self._index)
                    counted = True
                finally:
                    self._counting.end(counted=counted)
                self._counted.set()
                for shard in range(256 if ours else 0):
                    self._bytes(bytes([shard]))
            self._finished = True
        except _StoppedError:
            pass
        except StoreError as error:
            log.warning("the store could not be reconciled: %s; run its check(fix=True)", error)
        finally:
            self._counted.set()

    def _pause(self, seconds: float = 0.0) -> None:
        if self._stop.wait(seconds):
            raise _StoppedError

    def _count(self) -> None:
        if not self._index.read(partial(tables_sound, pause=self._pause)):
            self._index.write(lambda txn: txn.rebuild())
        for shard in range(256):
            self._names(bytes([shard]))

    def _names(self, shard: bytes) -> None:
        """Compare a shard's rows with its file names, both ways."""
        self._pause()
        rows = set(self._index.read(lambda txn: txn.keys(shard)))
        files = set(self._folder.shard_keys(shard))
        if rows != files:
            self._index.write(partial(self._settle, rows=rows - files, files=files - rows))

    def _settle(self, txn: IndexTxn, rows: set[bytes], files: set[bytes]) -> None:
        # Listed at different moments, without the lock that this transaction holds: look again.
        for key in rows:
            if not is_there(self._folder.entry_path(key)):
                txn.delete(key)
        for key in sorted(files, key=lambda key: modified(self._folder.entry_path(key))):
            if txn.get(key) is None:
                adopt(self._folder, txn, key)

    def _bytes(self, shard: bytes) -> None:
        """Compare what a shard's rows count with what the disk counts."""
        self._pause()
        keys = self._index.read(lambda txn: txn.keys(shard))
        counts = {key: disk_bytes(self._folder.entry_path(key)) for key in keys}
        rows = zip(keys, self._index.get_many(keys), strict=True)
        wrong = [key for key, row in rows if row is not None and row.nbytes != counts[key]]
        if wrong:
            self._index.write(partial(self._recount, wrong))

    def _recount(self, keys: list[bytes], txn: IndexTxn) -> None:
        for key in keys:
            row, nbytes = txn.get(key), disk_bytes(self._folder.entry_path(key))
            if row is not None and nbytes:
                txn.put(key, row._replace(nbytes=nbytes))
            else:
                txn.delete(key)


class _StoppedError(Exception):
    pass
