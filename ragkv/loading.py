"""Bringing stored chunks into a request's KV, layer by layer.

The store reads layers ahead on its own threads; here a layer's slabs are staged, moved to the device, rotated
to the chunks' positions in this prompt and written into the request's slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ragkv.errors import CorruptEntryError
from ragkv.kv import RequestKV
from ragkv.plan import Span
from ragkv.runner import ModelRunner

Slabs = Iterator[list[np.ndarray | CorruptEntryError]]


class ChunkLostError(Exception):
    """A chunk's stored KV turned out unreadable on the way; internal, answered by computing the chunk."""

    def __init__(self, span: Span, cause: CorruptEntryError) -> None:
        super().__init__(str(cause))
        self.span, self.cause = span, cause


class LayerLoader:
    """Places layer after layer of ``spans`` into ``kv``.

    Args:
        slabs: for each layer, one uint8 slab per span: K (tokens, kv_heads, head_dim), position-free, then V.
    """

    def __init__(self, runner: ModelRunner, kv: RequestKV, spans: Sequence[Span], slabs: Slabs) -> None:
        self._runner, self._kv, self._spans, self._slabs = runner, kv, spans, slabs
        self._next = 0
        positions = np.concatenate([np.arange(s.start, s.end) for s in spans])
        self._slots = _as_slice(positions, kv.base)
        if self._slots is None:
            self._index = runner.tensor(positions - kv.base)
        self._angles = runner.rope.angles(runner.tensor(positions))
        shape = runner.shape
        self._cuda = runner.device.type == "cuda"
        # Two stages in turn, so that the host fills one while the device still copies from the other.
        stages = 2 if self._cuda else 1
        self._stages = torch.empty(
            (stages, 2, len(positions), shape.kv_heads, shape.head_dim),
            dtype=shape.dtype,
            pin_memory=self._cuda,
        )
        self._copied: list[torch.cuda.Event | None] = [None] * stages

    def ensure(self, layer: int) -> None:
        """Have all layers up to ``layer`` placed; waits for the disk where it must.

        Raises:
            ChunkLostError: a slab is unreadable; nothing of it was placed.
        """
        while self._next <= layer:
            self._place(self._next, next(self._slabs))
            self._next += 1

    def _place(self, layer: int, slabs: list[np.ndarray | CorruptEntryError]) -> None:
        turn = layer % len(self._stages)
        if (event := self._copied[turn]) is not None:
            event.synchronize()
        stage = self._stages[turn]
        self._fill(stage.view(torch.uint8).flatten(2).numpy(), slabs)
        device = stage.to(self._runner.device, non_blocking=True)
        if self._cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._copied[turn] = event
        keys = self._runner.rope.place(device[0], self._angles, layer)
        self._kv.write(layer, self._index if self._slots is None else self._slots, keys, device[1])

    def _fill(self, stage: np.ndarray, slabs: list[np.ndarray | CorruptEntryError]) -> None:
        at = 0
        for span, slab in zip(self._spans, slabs, strict=True):
            if isinstance(slab, CorruptEntryError):
                raise ChunkLostError(span, slab)
            stage[:, at : at + span.length] = slab.reshape(2, span.length, -1)
            at += span.length


def _as_slice(positions: np.ndarray, base: int) -> slice | None:
    first, last = int(positions[0]) - base, int(positions[-1]) - base
    return slice(first, last + 1) if last - first + 1 == len(positions) else None
