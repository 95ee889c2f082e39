"""How fast bytes came: what was read from each tier, and the time it took by itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Traffic:
    """One tier's part of a reading.

    ``nbytes`` were read in ``seconds`` in which at least one thread was at it: times with nothing to read do not count,
    whatever the reason, and neither does what two threads do at once count twice.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.nbytes = 0
        self.seconds = 0.0
        self._clock, self._lock = clock, threading.Lock()
        self._active = 0
        self._since = 0.0

    @contextmanager
    def reading(self, nbytes: int) -> Iterator[None]:
        with self._lock:
            if not self._active:
                self._since = self._clock()
            self._active += 1
        try:
            yield
        finally:
            with self._lock:
                self._active -= 1
                self.nbytes += nbytes
                if not self._active:
                    self.seconds += self._clock() - self._since
