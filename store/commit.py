"""Group commit: changes of the index asked for at the same time share one transaction, and so one wait for the disk."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from ragkv.store.files import disk_errors, sync_folder
from ragkv.store.index import Index
from ragkv.store.txn import IndexTxn

T = TypeVar("T")


class _Job(Generic[T]):
    def __init__(self, work: Callable[[IndexTxn], T], folder: str | None) -> None:
        self.work = work
        self.folder = folder
        self.done = False
        self.error: Exception | None = None
        self._answer: list[T] = []

    def run(self, txn: IndexTxn) -> None:
        self._answer = [self.work(txn)]

    def answer(self) -> T:
        if self.error is not None:
            raise self.error
        return self._answer[0]


class GroupCommit:
    """Runs pieces of work in write transactions. Whoever comes while one commits is served by the next, together."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._waiting: list[_Job[Any]] = []
        self._lock = threading.Lock()
        self._turn = threading.Lock()

    def run(self, work: Callable[[IndexTxn], T], *, folder: str | None = None) -> T:
        """Do ``work`` in a transaction, make the names in ``folder`` durable, commit; answers as ``work`` does.

        ``work`` may be run again, after a run that was rolled back: because the index has to grow, or because
        somebody else's work failed. Its own errors are its caller's alone.
        """
        job = _Job(work, folder)
        with self._lock:
            self._waiting.append(job)
        with self._turn:
            if not job.done:
                with self._lock:
                    batch, self._waiting = self._waiting, []
                try:
                    self._commit(batch)
                except BaseException:  # ours was interrupted; the others still wait
                    with self._lock:
                        self._waiting[:0] = [other for other in batch if not other.done and other is not job]
                    raise
        return job.answer()

    def _commit(self, batch: Sequence[_Job[Any]]) -> None:
        try:
            self._index.write(lambda txn: _run(batch, txn))
        except Exception as error:
            if len(batch) > 1:
                for job in batch:
                    self._commit([job])
                return
            batch[0].error = error
        for job in batch:
            job.done = True


def _run(batch: Sequence[_Job[Any]], txn: IndexTxn) -> None:
    for job in batch:
        job.run(txn)
    for folder in {job.folder for job in batch if job.folder is not None}:
        with disk_errors(folder):
            sync_folder(folder)
