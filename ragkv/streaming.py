"""Bringing stored chunks into a request's KV on CUDA: one launch for some layers, ahead of whoever computes.

Layer after layer is taken from the store, and a kernel launched that reads the slabs where they are, in page-locked
memory or on the device, and writes them decoded and rotated into their slots (:mod:`ragkv.kernels.slabs`). That runs on
a stream of its own, as fast as the tier and the link allow; the stream that computes waits for the layers it needs.
Copies by the copy engine were slower: a call for each of many slabs takes the host longer than the link.

What is in memory already is launched a few layers ahead by the thread that computes; a second one would only take the
interpreter from it. What has to be read first is waited for by a thread of its own.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from ragkv.device_tier import DeviceLease
from ragkv.kv import RequestKV
from ragkv.pinned import is_page_locked
from ragkv.plan import Span
from ragkv.runner import ModelRunner
from ragkv.slabs import Slabs, in_memory, next_layer

LAYERS_UNDER_WAY = 3
LAUNCHED_AHEAD = 12
# In one launch: what computes the first of them waits for the last.
_TOGETHER = 2
_STAGE_ALIGNMENT = 64
# One thread copies 5 GB/s; a host's memory gives several times that, and a link to the device wants it.
_COPIERS = ThreadPoolExecutor(6, thread_name_prefix="ragkv-copier")


class Streaming:
    """Places one layer after the other, without waiting on the thread that asks for more than the launch."""

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
        from ragkv.kernels.slabs import SlabPlacer  # needs Triton

        self._kv, self._slabs, self._rotates = kv, slabs, runner.rope.rotates
        self._device, self._order = runner.device, deque(order)
        positions = runner.tensor(np.concatenate([np.arange(span.start, span.end) for span in spans]))
        lengths, slots = [span.length for span in spans], [span.start - kv.base for span in spans]
        self._placer = SlabPlacer(codec, runner.shape, lengths, slots, runner.rope.angles(positions))
        self._sources, self._copies, self._read = _addresses(runner.shape.layers, spans, lease)
        self._spans = [spans[i] for i in self._read]
        self._sizes = [self._placer.slab_bytes[i] for i in self._read]
        self._ready: SimpleQueue[Any] = SimpleQueue()
        self._under_way: deque[tuple[torch.cuda.Event, list[Any]]] = deque()
        self._stop = False
        self._stream: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._thread: threading.Thread | None = None
        if not in_memory(slabs):
            self._thread = threading.Thread(target=self._feed, name="ragkv-loader", daemon=True)
            self._thread.start()

    def place_next(self) -> None:
        """Have the current stream wait until the next layer is placed.

        Raises:
            ChunkLostError: a slab is unreadable; nothing of it was placed.
        """
        if self._thread is None:
            with torch.cuda.stream(self._stream):
                while self._order and self._ready.qsize() < LAUNCHED_AHEAD:
                    self._launch(self._next_layers())
        placed = self._ready.get()
        if isinstance(placed, BaseException):
            raise placed
        torch.cuda.current_stream(self._device).wait_event(placed)

    def close(self) -> None:
        """Stop. No slab is read and no slot written afterwards."""
        self._stop = True
        if self._thread is not None:
            self._thread.join()
        if self._under_way:
            self._under_way[-1][0].synchronize()
        self._under_way.clear()

    def _feed(self) -> None:
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                while self._order and not self._stop:
                    self._launch([self._order.popleft()])
        except BaseException as error:
            self._ready.put(error)

    def _next_layers(self) -> list[int]:
        """Layers that follow each other in the KV, and rotate alike."""
        found = [self._order.popleft()]
        while self._order and len(found) < _TOGETHER:
            layer, last = self._order[0], found[-1]
            if layer != last + 1 or self._rotates[layer] != self._rotates[last]:
                break
            found.append(self._order.popleft())
        return found

    def _launch(self, layers: list[int]) -> None:
        held = []
        for layer in layers:
            if self._spans:
                readable, addresses = _readable(next_layer(self._slabs, self._spans, self._sizes))
                self._sources[layer].numpy()[self._read] = addresses
                held.append(readable)
        first, those = layers[0], slice(layers[0], layers[-1] + 1)
        k, v = self._kv.read(first, self._kv.capacity)
        copies = self._copies[those] if self._copies is not None else None
        rotated, stride = self._rotates[first], self._kv.layer_stride
        self._placer.place(self._sources[those], k, v, rotated=rotated, copies=copies, layer_stride=stride)
        placed = self._stream.record_event()
        for _ in layers:
            self._ready.put(placed)
        # What a kernel reads must stay where it is until then. What is in memory stays there for nothing.
        self._under_way.append((placed, held))
        while self._thread is not None and len(self._under_way) > LAYERS_UNDER_WAY:
            self._under_way[0][0].synchronize()
            self._under_way.popleft()


def _addresses(
    layers: int, spans: Sequence[Span], lease: DeviceLease | None
) -> tuple[torch.Tensor, torch.Tensor | None, list[int]]:
    """Where slabs are read, and where they are copied besides, int64 (layers, spans) each; and which spans the store
    has to read. Rows are padded to 16 bytes: the kernel is compiled for such."""
    width = len(spans) + len(spans) % 2
    sources = torch.zeros((layers, width), dtype=torch.int64, pin_memory=True)
    if lease is None:
        return sources, None, list(range(len(spans)))
    copies = torch.zeros_like(sources, pin_memory=True) if lease.fills else None
    read = []
    for i, span in enumerate(spans):
        key = span.chunk.tokens.key
        if (hit := lease.hits.get(key)) is not None:
            sources[:, i] = hit.data_ptr() + hit.stride(0) * torch.arange(layers)
            continue
        read.append(i)
        fill = lease.fills.get(key)
        if copies is not None and fill is not None:
            copies[:, i] = fill.data_ptr() + fill.stride(0) * torch.arange(layers)
    return sources, copies, read


def _readable(slabs: Sequence[np.ndarray]) -> tuple[list[Any], list[int]]:
    """Where a kernel can read these slabs, and what must be held meanwhile: they, or page-locked copies of them."""
    held: list[Any] = list(slabs)
    addresses = [slab.__array_interface__["data"][0] for slab in slabs]
    far = [i for i, slab in enumerate(slabs) if not is_page_locked(addresses[i], slab.nbytes)]
    if not far:
        return held, addresses
    sizes = [-(-slabs[i].nbytes // _STAGE_ALIGNMENT) * _STAGE_ALIGNMENT for i in far]
    stage = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
    start, copying = 0, []
    for i, nbytes in zip(far, sizes, strict=True):
        copying.append(_COPIERS.submit(np.copyto, stage.numpy()[start : start + slabs[i].nbytes], slabs[i]))
        addresses[i] = stage.data_ptr() + start
        start += nbytes
    for copied in wait(copying).done:
        copied.result()
    return [*held, stage], addresses
