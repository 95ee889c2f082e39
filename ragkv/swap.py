"""Moving blocks of KV between the device and the host, on threads and streams of their own (FastSwitch, 2024).

Blocks that lie side by side on both sides go in one copy. Who asks is not kept waiting: a move is a future, and on CUDA
the copy is ordered behind what the asking thread had launched by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from ragkv.lane import Lane
from ragkv.paged import PagedKV

Pair = tuple[int, int]


class Mover:
    """Copies blocks from ``source`` to ``target``, in the order of asking.

    Args:
        piecewise: a copy for every block and layer, as engines do that keep each layer's cache apart.

    Attributes:
        lane: the thread that does it.
    """

    def __init__(self, source: PagedKV, target: PagedKV, *, piecewise: bool = False) -> None:
        self._source, self._target, self._piecewise = source, target, piecewise
        cuda = next((kv.data.device for kv in (source, target) if kv.data.is_cuda), None)
        self._stream: Any = torch.cuda.Stream(cuda) if cuda is not None else None  # type: ignore[no-untyped-call]
        self.lane = Lane("ragkv-mover")

    def move(self, pairs: Sequence[Pair]) -> Future[None]:
        """Copy block ``a`` of the source to block ``b`` of the target for every pair."""
        ready = None
        if self._stream is not None:
            ready = torch.cuda.current_stream(self._stream.device).record_event().synchronize
        return self.lane.submit(len(pairs), partial(self._copy, list(pairs)), ready)

    def close(self) -> None:
        """Finish what was asked for."""
        self.lane.close()

    def _copy(self, pairs: list[Pair]) -> None:
        if self._stream is None:
            self._launch(pairs)
            return
        with torch.cuda.stream(self._stream):
            self._launch(pairs)
        self._stream.synchronize()

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
