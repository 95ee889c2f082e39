"""Layers captured in CUDA graphs: one launch a layer, whatever a prompt's length.

A graph works on memory that stays where it is. So one prompt at a time has its KV in a workspace, and its rows are
copied into rooms of a few sizes; how many keys each row sees is read from its slot when the graph runs. Where rows do
not fill their room, the first one is computed several times: it writes what it has written before, and sees the fewest
keys.

Between layers nothing is captured, since stored KV arrives there.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch

from ragkv.attention import AttentionStep
from ragkv.kv import KvShape, RequestKV
from ragkv.rows import Rows

# What launching takes does not show behind more rows than the last. 448 are missing: cuBLAS takes 1.7 times as long for
# them as for 450 (8B shapes, H200).
SIZES = (*range(64, 385, 64), *range(512, 1025, 128), *range(1280, 2049, 256))
_SHARE = 0.03  # of the device's memory, for the workspace
_LEAST = 1024

Run = Callable[[int, Rows], None]


class LayerGraphs:
    """A workspace for one prompt's KV, and graphs over it.

    Args:
        run: advances rows through a layer, launching its kernels one by one.
    """

    def __init__(self, shape: KvShape, most: int, device: torch.device, run: Run) -> None:
        self._layers, self._device, self._launch = shape.layers, device, run
        token = 2 * shape.layers * shape.kv_heads * shape.head_dim * shape.dtype.itemsize
        room = int(_SHARE * torch.cuda.get_device_properties(device).total_memory) // token
        # The last slot is nobody's: what is captured writes there.
        self._kv = RequestKV(shape, max(_LEAST, min(most, room)) + 1, device)
        self._user: weakref.ref[RequestKV] | None = None
        self._rooms: dict[int, Captured] = {}
        self._memory = torch.cuda.graph_pool_handle()

    def lease(self, capacity: int) -> RequestKV | None:
        """The workspace, until what is returned is let go of; None while somebody has it, or where it is too small."""
        if capacity >= self._kv.capacity or (self._user is not None and self._user() is not None):
            return None
        kv = self._kv.first(capacity)
        self._user = weakref.ref(kv)
        return kv

    def room(self, rows: Rows) -> Captured | None:
        """Where ``rows``, at the beginning of some layer, have been moved to; None where graphs do not take them."""
        step = rows.step
        if self._user is None or step.kv is not self._user() or not step.last_only:
            return None
        if step.score_rows or step.kept or step.rows > SIZES[-1]:
            return None
        size = SIZES[bisect_left(SIZES, step.rows)]
        if size not in self._rooms:
            self._rooms[size] = self._capture(size, rows)
        self._rooms[size].enter(rows)
        return self._rooms[size]

    def _capture(self, size: int, like: Rows) -> Captured:
        """Graphs of every layer. Other threads may go on with what they do on streams of their own."""
        hidden = torch.zeros((1, size, like.hidden.shape[-1]), dtype=like.hidden.dtype, device=self._device)
        cos, sin = (part.new_zeros((1, size, part.shape[-1])) for part in like.rotary)
        slots = torch.full((size,), self._kv.capacity - 1, device=self._device)
        step = AttentionStep(self._kv, slots, self._kv.capacity, contiguous=False, last_only=True)
        rows = Rows(hidden, (cos, sin), step)
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        graphs = []
        with torch.cuda.stream(stream):
            for layer in range(self._layers):
                self._launch(layer, rows)  # what is compiled or allocated once must be before
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
                try:
                    self._launch(layer, rows)
                finally:
                    graph.capture_end()
                graphs.append(graph)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        return Captured(rows, graphs)


class Captured:
    """Graphs of all layers for a number of rows, and the rows' memory."""

    def __init__(self, rows: Rows, graphs: list[Any]) -> None:
        self._rows, self._graphs = rows, graphs
        self._turns = torch.arange(rows.step.rows, device=rows.hidden.device)

    def enter(self, rows: Rows) -> None:
        count = rows.step.rows
        spare = len(self._turns) - count
        index = (self._turns - spare).clamp(min=0)
        mine = self._rows
        torch.index_select(rows.hidden, 1, index, out=mine.hidden)
        for theirs, own in zip(rows.rotary, mine.rotary, strict=True):
            torch.index_select(theirs, 1, index, out=own)
        torch.index_select(rows.step.slots, 0, index, out=mine.step.slots)
        rows.hidden = mine.hidden[:, spare:]

    def replay(self, layer: int) -> None:
        self._graphs[layer].replay()
