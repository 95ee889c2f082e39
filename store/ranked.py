"""Threads that do the most urgent work first."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from ragkv.errors import StoreError


class RankedExecutor:
    """Like a ThreadPoolExecutor of ``threads`` threads, but work of the lowest rank goes first.

    Entries that are written at the same time share the disk. Taking turns they would all be whole at the same
    time, and the disk idle while all are being committed; ranked by age, one is committed while another is written.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._waiting: list[tuple[int, int, Future[None], Callable[[], None]]] = []
        self._count = itertools.count()
        self._lock = threading.Lock()

    def submit(self, rank: int, work: Callable[[], None]) -> Future[None]:
        """Have ``work`` done.

        Raises:
            StoreError: the executor was shut down.
        """
        future: Future[None] = Future()
        with self._lock:
            try:
                self._executor.submit(self._next)
            except RuntimeError as error:  # shut down; and nothing may wait that would take another's turn
                raise StoreError("the store was closed while an entry was being written") from error
            heapq.heappush(self._waiting, (rank, next(self._count), future, work))
        return future

    def shutdown(self) -> None:
        """Return when all that was submitted is done."""
        self._executor.shutdown()

    def _next(self) -> None:
        with self._lock:
            _, _, future, work = heapq.heappop(self._waiting)
        try:
            work()
        except BaseException as error:  # whoever waits for the future has to know
            future.set_exception(error)
        else:
            future.set_result(None)
