"""Bringing stored chunks into a request's KV, layer by layer, ahead of the layers that compute on them.

The store reads layers ahead on its own threads. What it hands out is streamed to the device on CUDA
(:mod:`ragkv.streaming`), and gathered, rotated and written layer by layer elsewhere (:mod:`ragkv.gathering`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from ragkv.device_tier import DeviceLease
from ragkv.gathering import Gathering
from ragkv.kv import RequestKV
from ragkv.plan import Span
from ragkv.runner import ModelRunner
from ragkv.slabs import ChunkLostError, Slabs
from ragkv.streaming import Streaming

__all__ = ["ChunkLostError", "LayerLoader", "Slabs"]


class LayerLoader:
    """Places layer after layer of ``spans``, stored with ``codec``, into ``kv``; close it before closing ``slabs``.

    ``slabs`` gives layers in ``order``, by default the model's. It has those of the spans, in their order, that
    ``lease`` does not have on the device already; what the lease wants filled in is filled in on the way.

    On CUDA loading begins behind ``behind``, an event of the current stream, or behind all that was launched on it: no
    memory may have been given back since that is still in use. The first layers, so many as are needed ``together``,
    come as one.
    """

    def __init__(
        self,
        runner: ModelRunner,
        kv: RequestKV,
        spans: Sequence[Span],
        slabs: Slabs,
        codec: str = "raw",
        lease: DeviceLease | None = None,
        order: Sequence[int] | None = None,
        behind: torch.cuda.Event | None = None,
        together: int = 0,
    ) -> None:
        order = range(runner.shape.layers) if order is None else order
        self._way: Streaming | Gathering
        if runner.device.type == "cuda" and runner.fused is not None:
            self._way = Streaming(runner, kv, spans, slabs, codec, lease, order, behind, together)
        else:
            self._way = Gathering(runner, kv, spans, slabs, codec, lease, order)
        self._coming = deque(order)

    def ensure(self, layer: int) -> None:
        """Have ``layer``, and all before it in the order, placed for what the current stream does next.

        Raises:
            ChunkLostError: a slab is unreadable; nothing of it was placed.
        """
        while layer in self._coming:
            self._way.place_next()
            self._coming.popleft()

    def close(self) -> None:
        self._way.close()
