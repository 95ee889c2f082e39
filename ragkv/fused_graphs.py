"""Layers captured in CUDA graphs: one launch a layer, whatever a prompt's length.

A graph works on memory that stays where it is. So one prompt at a time has its KV in a workspace, and its rows are
copied into a room, of as many rows as the next greater graph; how many keys each row sees is read from its slot when
the graph runs. Where rows do not fill their graph, the first one is computed several times: it writes what it has
written before, and sees the fewest keys.

Between layers nothing is captured, since stored KV arrives there.
"""

from __future__ import annotations

import logging
import statistics
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from ragkv.attention import AttentionStep
from ragkv.capture import captured, capturing
from ragkv.kv import KvShape, RequestKV
from ragkv.rows import Rows

log = logging.getLogger("ragkv")

# What launching takes does not show behind more rows.
MOST_ROWS = 2048
# Of the numbers of rows that there may be graphs for, and how much less than the next greater one they must take.
_STEP, _PAYS = 32, 0.99
_TIMED_LAYERS, _TIMES = 2, 3
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
        self._memory = torch.cuda.graph_pool_handle()
        self._room: _Room | None = None
        self._sizes: list[int] = []
        self._captured: dict[int, Captured] = {}

    def lease(self, capacity: int) -> RequestKV | None:
        """The workspace, until what is returned is let go of; None while somebody has it, or where it is too small."""
        if capacity >= self._kv.capacity or (self._user is not None and self._user() is not None):
            return None
        kv = self._kv.first(capacity)
        self._user = weakref.ref(kv)
        return kv

    def taking(self, step: AttentionStep, hidden: torch.Tensor, rotary: torch.Tensor) -> Captured | None:
        """The graphs for rows of ``step``, of the widths, dtypes and device of ``hidden`` and ``rotary``, or None."""
        if self._user is None or step.kv is not self._user() or not step.last_only:
            return None
        if step.score_rows or step.kept or step.rows > MOST_ROWS:
            return None
        if not self._sizes:
            self._room = _Room(hidden, rotary)
            # These are kept, and with them the memory that all others use too.
            self._captured[MOST_ROWS] = self._capture(MOST_ROWS)
            self._sizes = sizes_that_pay(self._time)
        least = bisect_left(self._sizes, step.rows)
        return self._captured[next(size for size in self._sizes[least:] if self._has(size))]

    def _has(self, size: int) -> bool:
        """Whether there are graphs of ``size`` rows, from now on at least: without memory for them, never."""
        if size not in self._captured:
            try:
                self._captured[size] = self._capture(size)
            except RuntimeError as failed:
                log.warning("graphs of more than %d rows have to do for as many: %r", size, failed)
                self._sizes = [other for other in self._sizes if other != size]
        return size in self._captured

    def capture_all(self) -> Iterator[None]:
        """Capture every graph that there is to be, but for those whose turn comes while somebody has the workspace."""
        for size in self._sizes:
            kv = self.lease(1) if size not in self._captured else None
            if kv is not None:
                self._has(size)
                del kv  # others may have it now
                yield

    def _time(self, size: int) -> float:
        """What some layers take, in ms, for so many rows that see a key each."""
        rows = self._rows(size, RequestKV(self._kv.shape, 1, self._device))
        with capturing(self._device):
            graphs = [self._graph(layer, rows) for layer in range(min(_TIMED_LAYERS, self._layers))]
            marks = []
            for _ in range(_TIMES):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                start.record()
                for graph in graphs:
                    graph.replay()
                end.record()
                marks.append((start, end))
            end.synchronize()
        return float(statistics.median(start.elapsed_time(end) for start, end in marks))

    def _capture(self, size: int) -> Captured:
        rows = self._rows(size, self._kv)
        with capturing(self._device):
            return Captured(rows, [self._graph(layer, rows) for layer in range(self._layers)])

    def _rows(self, size: int, kv: RequestKV) -> Rows:
        """The first ones of the room, all standing at the last slot."""
        if self._room is None:
            raise RuntimeError("the room is made for the first rows that enter it")
        slots = torch.full((size,), kv.capacity - 1, device=self._device)
        step = AttentionStep(kv, slots, kv.capacity, contiguous=False, last_only=True)
        return self._room.first(step)

    def _graph(self, layer: int, rows: Rows) -> Any:
        """Of one layer. What it needs on the way is no other's at the same time, so that all use the same memory."""

        def launch() -> None:
            self._launch(layer, replace(rows))  # a copy's room is let go of

        launch()  # what is compiled once must be before
        graph, _ = captured(launch, self._memory)
        return graph


def sizes_that_pay(ms: Callable[[int], float]) -> list[int]:
    """For how many rows there are to be graphs, where ``ms`` says what so many take: libraries choose kernels by the
    number of rows, and some take longer for fewer (cuBLAS, 8B shapes, H200: for 448 rows 1.3 times as long as for 512).
    """
    sizes, least = [], float("inf")
    for size in range(MOST_ROWS, 0, -_STEP):
        took = ms(size)
        if took < _PAYS * least:
            sizes.append(size)
            least = took
    return sizes[::-1]


class _Room:
    """Memory for most rows, of which a graph of fewer uses the first ones'."""

    def __init__(self, hidden: torch.Tensor, rotary: torch.Tensor) -> None:
        self._hidden, *self._rotary = (
            part.new_zeros((1, MOST_ROWS, part.shape[-1])) for part in (hidden, rotary, rotary)
        )

    def first(self, step: AttentionStep) -> Rows:
        hidden, cos, sin = (part[:, : step.rows] for part in (self._hidden, *self._rotary))
        return Rows(hidden, (cos, sin), step)


class Captured:
    """Graphs of all layers for a number of rows.

    Attributes:
        rows: memory that they work on, in the room. Where fewer rows use it, these stand last, and those before them
            are all as the first.
    """

    def __init__(self, rows: Rows, graphs: list[Any]) -> None:
        self.rows, self._graphs = rows, graphs
        self._turns = torch.arange(rows.step.rows, device=rows.hidden.device)

    def enter(self, rows: Rows) -> None:
        """Have ``rows``, at the beginning of some layer, go on here."""
        spare, mine = self._spare(rows.step), self.rows
        index = (self._turns - spare).clamp(min=0)
        torch.index_select(rows.hidden, 1, index, out=mine.hidden)
        for theirs, own in zip(rows.rotary, mine.rotary, strict=True):
            torch.index_select(theirs, 1, index, out=own)
        torch.index_select(rows.step.slots, 0, index, out=mine.step.slots)
        rows.hidden, rows.room = mine.hidden[:, spare:], self

    def taken(self, step: AttentionStep) -> Rows:
        """The last ones of :attr:`rows`, which have been filled in for the rows of ``step``."""
        spare = self._spare(step)
        hidden, cos, sin = (part[:, spare:] for part in (self.rows.hidden, *self.rows.rotary))
        return Rows(hidden, (cos, sin), step, self)

    def _spare(self, step: AttentionStep) -> int:
        return self.rows.step.rows - step.rows

    def replay(self, layer: int) -> None:
        self._graphs[layer].replay()
