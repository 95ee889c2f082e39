"""Moving blocks of KV between the device and the host, on threads and streams of their own (FastSwitch, 2024).

Blocks that lie side by side on both sides go in one copy. Who asks is not kept waiting: a move is a future, and on CUDA
the copy is ordered behind what the asking thread had launched by then.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import torch

from ragkv.paged import PagedKV

Pair = tuple[int, int]


class Mover:
    """Copies blocks from ``source`` to ``target``, in the order of asking.

    Args:
        piecewise: a copy for every block and layer, as engines do that keep each layer's cache apart.

    Attributes:
        blocks: copied so far.
        seconds: that took.
    """

    def __init__(self, source: PagedKV, target: PagedKV, *, piecewise: bool = False) -> None:
        self._source, self._target, self._piecewise = source, target, piecewise
        self.blocks, self.seconds = 0, 0.0
        cuda = next((kv.data.device for kv in (source, target) if kv.data.is_cuda), None)
        self._stream: Any = torch.cuda.Stream(cuda) if cuda is not None else None  # type: ignore[no-untyped-call]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ragkv-mover")

    def move(self, pairs: Sequence[Pair]) -> Future[None]:
        """Copy block ``a`` of the source to block ``b`` of the target for every pair."""
        ready = None
        if self._stream is not None:
            ready = torch.cuda.current_stream(self._stream.device).record_event()
        return self._thread.submit(self._copy, list(pairs), ready)

    @property
    def seconds_per_block(self) -> float | None:
        """As measured, or None before anything was moved."""
        return self.seconds / self.blocks if self.blocks else None

    def close(self) -> None:
        """Finish what was asked for."""
        self._thread.shutdown()

    def _copy(self, pairs: list[Pair], ready: Any) -> None:
        began = time.perf_counter()
        if self._stream is None:
            self._launch(pairs)
        else:
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(ready)
                self._launch(pairs)
                copied = self._stream.record_event()
            copied.synchronize()
        self.blocks += len(pairs)
        self.seconds += time.perf_counter() - began

    def _launch(self, pairs: list[Pair]) -> None:
        source, target = self._source.data, self._target.data
        for a, b, length in stretches(pairs):
            from_, to = source[a : a + length], target[b : b + length]
            if not self._piecewise:
                to.copy_(from_, non_blocking=True)
                continue
            for block in range(length):
                for layer in range(from_.shape[1]):
                    to[block, layer].copy_(from_[block, layer], non_blocking=True)


def stretches(pairs: Sequence[Pair]) -> list[tuple[int, int, int]]:
    """``pairs`` as (first source, first target, length) of the stretches that are consecutive on both sides."""
    ordered = sorted(pairs)
    cuts = [0, *(i + 1 for i, (p, q) in enumerate(pairwise(ordered)) if (p[0] + 1, p[1] + 1) != q), len(ordered)]
    return [(*ordered[a], b - a) for a, b in pairwise(cuts) if b > a]
