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
        order: Sequence[int],
    ) -> None:
        self._runner, self._kv, self._spans, self._slabs = runner, kv, spans, slabs
        self._hits, self._fills = _held(spans, lease)
        self._read = [i for i in range(len(spans)) if i not in self._hits]
        self._order = iter(order)
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
        layer = next(self._order)
        self._gather(layer)
        keys, values = self._unpacker.unpack(self._stage.to(self._runner.device))
        self._kv.write(layer, self._slots, self._runner.rope.place(keys, self._angles, layer), values)

    def close(self) -> None:
        """Nothing is under way."""

    def _gather(self, layer: int) -> None:
        """Fill the stage with the layer's slabs: the store's, and those that are on the device."""
        sizes, read = self._unpacker.slab_bytes, self._read
        slabs = {i: rows[layer, : sizes[i]].cpu().numpy() for i, rows in self._hits.items()}
        if read:
            found = next_layer(self._slabs, [self._spans[i] for i in read], [sizes[i] for i in read])
            slabs.update(zip(read, found, strict=True))
        for i, rows in self._fills.items():
            rows[layer, : sizes[i]] = torch.from_numpy(np.array(slabs[i]))
        stage = self._stage.numpy()
        for i, slab in slabs.items():
            for to, source in self._unpacker.pieces[i]:
                np.copyto(stage[to], slab[source])


def _held(spans: Sequence[Span], lease: DeviceLease | None) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    """What the device has of the spans, and what it wants, by their index."""
    if lease is None:
        return {}, {}
    keys = {i: span.chunk.tokens.key for i, span in enumerate(spans)}
    hits = {i: lease.hits[key] for i, key in keys.items() if key in lease.hits}
    return hits, {i: lease.fills[key] for i, key in keys.items() if key in lease.fills}


def _as_slice(positions: np.ndarray, base: int) -> slice | None:
    first, last = int(positions[0]) - base, int(positions[-1]) - base
    return slice(first, last + 1) if last - first + 1 == len(positions) else None
