"""A thread that moves blocks one way, and knows how long that takes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from ragkv.costs import Estimate

T = TypeVar("T")


class Lane:
    """Does one move after the other, in the order of asking.

    Attributes:
        blocks: moved so far.
    """

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._per_block = Estimate(1.0, guessed=True)
        self._asked = 0
        self.blocks = 0

    def submit(self, blocks: int, move: Callable[[], T], ready: Callable[[], object] | None = None) -> Future[T]:
        """Have ``move`` move ``blocks`` blocks. It begins when ``ready``, if given, returns: no time of the move's."""
        with self._lock:
            self._asked += blocks
        return self._thread.submit(self._run, blocks, move, ready)

    def seconds(self, blocks: int) -> float | None:
        """Until ``blocks`` more would be through, behind all that was asked for; None before anything was moved."""
        with self._lock:
            return None if self._per_block.guessed else (self._asked + blocks) * self._per_block.value

    def close(self) -> None:
        """Finish what was asked for."""
        self._thread.shutdown()

    def _run(self, blocks: int, move: Callable[[], T], ready: Callable[[], object] | None) -> T:
        try:
            if ready is not None:
                ready()
            began = time.perf_counter()
            moved = move()
            self._through(blocks, time.perf_counter() - began)
        finally:
            with self._lock:
                self._asked -= blocks
        return moved

    def _through(self, blocks: int, seconds: float) -> None:
        with self._lock:
            self.blocks += blocks
            if blocks and seconds > 0:
                self._per_block.observe(seconds / blocks)
