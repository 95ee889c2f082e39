"""Bringing stored chunks into a request's KV, layer by layer.

The store reads layers ahead on its own threads; a :class:`Stager` gathers a layer's slabs, as they are stored, in one
host buffer; the :class:`LayerLoader` moves it to the device, unpacks it there, rotates it to the chunks' positions in
this prompt and writes it into the request's slots. On CUDA these overlap: stages are page-locked and filled ahead by
threads, copies run on a stream of their own, and only the stream that computes waits for them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

import numpy as np
import torch

from ragkv.errors import CorruptEntryError, StoreError
from ragkv.kv import RequestKV
from ragkv.plan import Span
from ragkv.runner import ModelRunner
from ragkv.unpacking import Unpacker

Slabs = Iterator[list[np.ndarray | StoreError]]

CUDA_LAYERS_AHEAD = 3
# One thread copies 5 GB/s; a host's memory gives several times that, and a link to the device wants it.
_COPIERS = ThreadPoolExecutor(6, thread_name_prefix="ragkv-copier")


class ChunkLostError(Exception):
    """Chunks' stored KV turned out unreadable on the way; internal, answered by computing them.

    ``causes`` holds all that are lost in a layer: a remote tier that fails loses many at once.
    """

    def __init__(self, causes: Mapping[Span, StoreError]) -> None:
        super().__init__("; ".join(map(str, causes.values())))
        self.causes = causes


class Stager:
    """Hands out layer after layer of all spans, gathered in one host tensor.

    Args:
        slabs: for each layer, one uint8 slab per span, as stored.
        unpacker: says where their bytes go.
        layers: how many there are.
        ahead: layers to gather in advance, on threads; 0 gathers when asked, on the caller's thread.
        pinned: page-lock the stages.
    """

    def __init__(
        self, spans: Sequence[Span], slabs: Slabs, unpacker: Unpacker, *, layers: int, ahead: int, pinned: bool
    ) -> None:
        self._spans, self._slabs, self._unpacker = spans, slabs, unpacker
        self._stages = torch.empty((ahead + 1, unpacker.nbytes), dtype=torch.uint8, pin_memory=pinned)
        self._released: list[torch.cuda.Event | None] = [None] * (ahead + 1)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ragkv-stager") if ahead else None
        self._filling: deque[Future[torch.Tensor]] = deque()
        self._asked = 0
        self._layers = layers
        for _ in range(ahead):
            self._fill_ahead()

    def next_layer(self) -> torch.Tensor:
        """The stage, uint8 (unpacker.nbytes,), of the next layer. The caller's until it asks again, or, with
        :meth:`release_after`, until the event.

        Raises:
            ChunkLostError: a slab is unreadable.
        """
        if self._thread is None:
            return self._fill(0)
        self._fill_ahead()
        return self._filling.popleft().result()

    def release_after(self, event: torch.cuda.Event) -> None:
        """The stage handed out last is read by the device until ``event``."""
        self._released[(self._asked - len(self._filling) - 1) % len(self._stages)] = event

    def close(self) -> None:
        """Stop gathering. The slabs are not touched any more afterwards."""
        if self._thread:
            for future in self._filling:
                future.cancel()
            self._thread.shutdown()

    def _fill_ahead(self) -> None:
        if self._thread and self._asked < self._layers:
            self._filling.append(self._thread.submit(self._fill, self._asked % len(self._stages)))
            self._asked += 1

    def _fill(self, turn: int) -> torch.Tensor:
        if (event := self._released[turn]) is not None:
            event.synchronize()
        slabs = next(self._slabs)
        stage = self._stages[turn].numpy()
        jobs, lost = [], {}
        for i, (span, slab) in enumerate(zip(self._spans, slabs, strict=True)):
            if isinstance(slab, StoreError):
                lost[span] = slab
            elif slab.nbytes != self._unpacker.slab_bytes[i]:
                lost[span] = CorruptEntryError("its slab has another size than the model's KV")
            else:
                jobs.append(partial(_copy, stage, slab, self._unpacker.pieces[i]))
        if lost:
            raise ChunkLostError(lost)
        if self._thread:
            done, _ = wait([_COPIERS.submit(job) for job in jobs])
            for future in done:
                future.result()
        else:
            for job in jobs:
                job()
        return self._stages[turn]


class LayerLoader:
    """Places layer after layer of ``spans``, stored with ``codec``, into ``kv``; close it before closing ``slabs``."""

    def __init__(
        self, runner: ModelRunner, kv: RequestKV, spans: Sequence[Span], slabs: Slabs, codec: str = "raw"
    ) -> None:
        self._runner, self._kv = runner, kv
        self._next = 0
        positions = np.concatenate([np.arange(s.start, s.end) for s in spans])
        slots = _as_slice(positions, kv.base)
        self._slots = runner.tensor(positions - kv.base) if slots is None else slots
        self._angles = runner.rope.angles(runner.tensor(positions))
        cuda = runner.device.type == "cuda"
        self._stream: Any = torch.cuda.Stream(runner.device) if cuda else None  # type: ignore[no-untyped-call]
        self._unpacker = Unpacker(codec, runner.shape, [span.length for span in spans], runner.device)
        ahead = CUDA_LAYERS_AHEAD if cuda else 0
        self._stager = Stager(spans, slabs, self._unpacker, layers=runner.shape.layers, ahead=ahead, pinned=cuda)

    def ensure(self, layer: int) -> None:
        """Have all layers up to ``layer`` placed; waits for the disk where it must.

        Raises:
            ChunkLostError: a slab is unreadable; nothing of it was placed.
        """
        while self._next <= layer:
            keys, values = self._unpacker.unpack(self._on_device(self._stager.next_layer()))
            self._kv.write(self._next, self._slots, self._runner.rope.place(keys, self._angles, self._next), values)
            self._next += 1

    def close(self) -> None:
        self._stager.close()

    def _on_device(self, stage: torch.Tensor) -> torch.Tensor:
        if self._stream is None:
            return stage
        computing = torch.cuda.current_stream(self._runner.device)
        with torch.cuda.stream(self._stream):
            moved = stage.to(self._runner.device, non_blocking=True)
            event = self._stream.record_event()
        self._stager.release_after(event)
        computing.wait_event(event)
        moved.record_stream(computing)
        return moved


def _copy(stage: np.ndarray, slab: np.ndarray, pieces: Sequence[tuple[slice, slice]]) -> None:
    for to, source in pieces:
        np.copyto(stage[to], slab[source])


def _as_slice(positions: np.ndarray, base: int) -> slice | None:
    first, last = int(positions[0]) - base, int(positions[-1]) - base
    return slice(first, last + 1) if last - first + 1 == len(positions) else None
