"""A circuit breaker: after failures in a row the remote tier is left alone, until a probe finds it well again."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Literal

log = logging.getLogger("ragkv")

State = Literal["closed", "open", "half-open"]


class Breaker:
    """Closed (in use) → open (nobody asks) → half-open (one probe, in the background) → closed or open again.

    Failures are counted by ``kind``: a server that answers questions at once but transfers too slowly would else
    never open it. Whatever opened it does so again at its first failure, and for twice as long.

    Args:
        failures: how many in a row open it.
        backoff: seconds until the first probe; doubled each time, up to ``longest``.
        on_change: called without locks held, when it opens or closes.
    """

    def __init__(
        self,
        *,
        failures: int = 3,
        backoff: float = 1.0,
        longest: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._failures, self._first, self._longest, self._clock = failures, backoff, longest, clock
        self._backoff = backoff
        self._counts: Counter[str] = Counter()
        self._state: State = "closed"
        self._probe_at = 0.0
        self._lock = threading.Lock()
        self.on_change: Callable[[], None] = lambda: None

    @property
    def state(self) -> State:
        return self._state

    @property
    def closed(self) -> bool:
        return self._state == "closed"

    def success(self, kind: str) -> None:
        """Something of this kind went well. While open that says nothing: it was begun before."""
        with self._lock:
            if self._state == "closed":
                self._counts.pop(kind, None)
                if not self._counts:
                    self._backoff = self._first

    def failure(self, kind: str, reason: str) -> None:
        """Something of this kind went wrong; opens the breaker if it is one time too many."""
        with self._lock:
            self._counts[kind] += 1
            if self._state != "closed" or self._counts[kind] < self._failures:
                return
            self._open()
        log.warning("remote tier left alone: %s", reason)
        self.on_change()

    def trip(self, reason: str) -> None:
        """Open at once: the server is known to be down."""
        with self._lock:
            if self._state != "closed":
                return
            self._open()
        log.warning("remote tier left alone: %s", reason)
        self.on_change()

    def seconds_to_probe(self) -> float | None:
        """How long until a probe is due; None when none is wanted."""
        with self._lock:
            return None if self._state != "open" else max(0.0, self._probe_at - self._clock())

    def probe(self, ask: Callable[[], bool]) -> None:
        """Half-open it, ``ask`` whether the server is well, and close or open it accordingly."""
        with self._lock:
            if self._state != "open":
                return
            self._state = "half-open"
        well = ask()
        with self._lock:
            if well:
                self._state = "closed"
                self._counts = Counter(dict.fromkeys(self._counts, self._failures - 1))
            else:
                self._open()
        if well:
            log.info("remote tier in use again")
            self.on_change()

    def _open(self) -> None:
        self._state = "open"
        self._probe_at = self._clock() + self._backoff
        self._backoff = min(self._longest, 2 * self._backoff)
