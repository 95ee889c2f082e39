"""Bringing stored chunks into a request's KV, the plain way: gather a layer's slabs, unpack, rotate, write."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ragkv.device_tier import DeviceLease
from ragkv.kv import RequestKV
from ragkv.plan import Span
from ragkv.runner import ModelRunner
from ragkv.slabs import Slabs, next_layer
from ragkv.unpacking import Unpacker


class Gathering:
    """Places one layer after the other, on the thread that asks. The twin of :class:`ragkv.streaming.Streaming`."""

    def __init__(
        self,
        runner: ModelRunner,
        kv: RequestKV,
        spans: Sequence[Span],
        slabs: Slabs,
        codec: str,
        lease: DeviceLease | None,
    ) -> None:
        self._runner, self._kv, self._spans, self._slabs = runner, kv, spans, slabs
        self._hits, self._fills = (lease.hits, lease.fills) if lease else ({}, {})
        self._next = 0
        positions = np.concatenate([np.arange(s.start, s.end) for s in spans])
        slots = _as_slice(positions, kv.base)
        self._slots = runner.tensor(positions - kv.base) if slots is None else slots
        self._angles = runner.rope.angles(runner.tensor(positions))
        self._unpacker = Unpacker(codec, runner.shape, [span.length for span in spans], runner.device)
        self._stage = torch.empty(self._unpacker.nbytes, dtype=torch.uint8)

    def place_next(self) -> None:
        """Place the next layer; waits for the disk where it must.

        Raises:
            ChunkLostError: a slab is unreadable; nothing of it was placed.
        """
        self._gather()
        keys, values = self._unpacker.unpack(self._stage.to(self._runner.device))
        self._kv.write(self._next, self._slots, self._runner.rope.place(keys, self._angles, self._next), values)
        self._next += 1

    def close(self) -> None:
        """Nothing is under way."""

    def _gather(self) -> None:
        sizes = self._unpacker.slab_bytes
        keys = [span_key(span) if self._hits or self._fills else b"" for span in self._spans]
        read = [i for i, key in enumerate(keys) if key not in self._hits]
        found = next_layer(self._slabs, [self._spans[i] for i in read], [sizes[i] for i in read]) if read else []
        stage, slabs = self._stage.numpy(), dict(zip(read, found, strict=True))
        for i, key in enumerate(keys):
            if i not in slabs:
                slab = self._hits[key][self._next, : sizes[i]].cpu().numpy()
            else:
                slab = slabs[i]
                if key in self._fills:
                    self._fills[key][self._next, : sizes[i]] = torch.from_numpy(np.array(slab))
            for to, source in self._unpacker.pieces[i]:
                np.copyto(stage[to], slab[source])


def span_key(span: Span) -> bytes:
    """The key of a chunk's entry."""
    return span.chunk.tokens.key


def _as_slice(positions: np.ndarray, base: int) -> slice | None:
    first, last = int(positions[0]) - base, int(positions[-1]) - base
    return slice(first, last + 1) if last - first + 1 == len(positions) else None
