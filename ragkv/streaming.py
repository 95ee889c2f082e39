"""Bringing stored chunks into a request's KV on CUDA, layer by layer, ahead of whoever computes.

Layer after layer is taken from the store and copied to the device as it is, by the copy engine, which takes nothing
from what computes meanwhile: a kernel that reads over the link would hold multiprocessors as long as that takes. What
has arrived is decoded, rotated and written into its slots by a short kernel (:mod:`ragkv.kernels.slabs`). All that runs
on a stream of its own, as fast as tier and link allow; the stream that computes waits for the layers it needs.

What is in memory already is launched a few layers ahead by the thread that computes; a second one would only take the
interpreter from it. What has to be read first is waited for by a thread of its own.
"""

from __future__ import annotations

import ctypes
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
LAUNCHED_AHEAD = 6
_ALIGNMENT = 64
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
        self._arrived = _cut(torch.empty(_room(self._sizes), dtype=torch.uint8, device=runner.device), self._sizes)
        self._sources[:, self._read] = torch.tensor([part.data_ptr() for part in self._arrived], dtype=torch.int64)
        self._ready: SimpleQueue[Any] = SimpleQueue()
        self._under_way: deque[tuple[torch.cuda.Event, list[Any]]] = deque()
        self._stop = False
        # What computes has many blocks waiting: those of the short kernel go first.
        self._stream: Any = torch.cuda.Stream(self._device, priority=-1)  # type: ignore[no-untyped-call]
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
                    self._launch(self._order.popleft())
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
            with torch.inference_mode(), torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                while self._order and not self._stop:
                    self._launch(self._order.popleft())
        except BaseException as error:
            self._ready.put(error)

    def _launch(self, layer: int) -> None:
        slabs = next_layer(self._slabs, self._spans, self._sizes) if self._spans else []
        locked = _locked(slabs)
        if locked:
            torch._foreach_copy_(self._arrived, locked, non_blocking=True)
        k, v = self._kv.read(layer, self._kv.capacity)
        copies = self._copies[layer] if self._copies is not None else None
        self._placer.place(self._sources[layer], k, v, rotated=self._rotates[layer], copies=copies)
        placed = self._stream.record_event()
        self._ready.put(placed)
        # What a kernel reads must stay where it is until then. What is in memory stays there for nothing.
        self._under_way.append((placed, [slabs, locked]))
        while self._thread is not None and len(self._under_way) > LAYERS_UNDER_WAY:
            self._under_way[0][0].synchronize()
            self._under_way.popleft()


def _addresses(
    layers: int, spans: Sequence[Span], lease: DeviceLease | None
) -> tuple[torch.Tensor, torch.Tensor | None, list[int]]:
    """Where slabs are on the device, as far as they are, and where they are copied besides, int64 (layers, spans) each;
    and which spans the store has to read. Rows are padded to 16 bytes: the kernel is compiled for such."""
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


def _locked(slabs: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """The slabs in page-locked memory: they, or copies of them. They do not keep ``slabs`` alive."""
    addresses = [slab.__array_interface__["data"][0] for slab in slabs]
    locked = [_memory(address, slab.nbytes) for address, slab in zip(addresses, slabs, strict=True)]
    far = [i for i, slab in enumerate(slabs) if not is_page_locked(addresses[i], slab.nbytes)]
    if not far:
        return locked
    sizes = [slabs[i].nbytes for i in far]
    parts = _cut(torch.empty(_room(sizes), dtype=torch.uint8, pin_memory=True), sizes)
    copying = [_COPIERS.submit(np.copyto, part.numpy(), slabs[i]) for i, part in zip(far, parts, strict=True)]
    for copied in wait(copying).done:
        copied.result()
    for i, part in zip(far, parts, strict=True):
        locked[i] = part
    return locked


def _memory(address: int, nbytes: int) -> torch.Tensor:
    """uint8 (nbytes,), to be read only: arrays of the store do not let themselves be taken for tensors."""
    return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8)


def _room(sizes: Sequence[int]) -> int:
    return sum(-(-nbytes // _ALIGNMENT) * _ALIGNMENT for nbytes in sizes)


def _cut(memory: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    """Pieces of these sizes, aligned."""
    starts = [_room(sizes[:i]) for i in range(len(sizes))]
    return [memory[start : start + nbytes] for start, nbytes in zip(starts, sizes, strict=True)]
