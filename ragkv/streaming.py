"""Bringing stored chunks into a request's KV on CUDA: copied and placed ahead of whoever computes.

Layer after layer is taken from the store. The copy engine brings its slabs over the link as they are, and a kernel
writes them decoded and rotated into their slots (:mod:`ragkv.kernels.slabs`). Each has a stream of its own, so that the
link never waits for a kernel nor the multiprocessors for the link; the stream that computes waits for the layers it
needs. A kernel that reads the slabs where they are, in the host's memory, was slower on hosts that are far from their
device, and took multiprocessors from matrix products, which then need another wave (docs/blending.md).

What is in memory already is launched some layers ahead by the thread that computes; a second one would only take the
interpreter from it. What has to be read first is waited for by a thread of its own.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import accumulate
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ragkv.device_tier import DeviceLease
from ragkv.kv import RequestKV
from ragkv.pinned import are_page_locked, is_page_locked
from ragkv.plan import Span
from ragkv.runner import ModelRunner
from ragkv.slabs import Slabs, in_memory, next_layer
from ragkv.store import LayerReader
from ragkv.uploading import copy_over, uploaded_together

if TYPE_CHECKING:
    from ragkv.kernels.slabs import SlabPlacer

# Layers launched before they are needed.
LAUNCHED_AHEAD = 12
# Batches whose slabs are on the device at a time. So many are on their way before the first is needed, which keeps the
# link busy while the host selects.
_STAGED = 4
# Two layers to a batch, which halves what launching takes the host, but for large ones and the last: what computes the
# first of them waits for both. Those that are needed together are one batch, but for large ones.
_TOGETHER, _LARGE, _LAST = 2, 64 << 20, 2
# Layers of which a thread that reads holds page-locked copies.
LAYERS_UNDER_WAY = 3
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
        behind: torch.cuda.Event | None = None,
        together: int = 0,
    ) -> None:
        self._runner, self._codec, self._spans = runner, codec, spans
        self._kv, self._slabs, self._rotates = kv, slabs, runner.rope.rotates
        self._device, ready = runner.device, in_memory(slabs)
        sizes = [runner.shape.slab_bytes(span.length, codec) for span in spans]
        alone = not ready or sum(sizes) > _LARGE
        most, first = (1, 0) if alone else (_TOGETHER, together)
        self._coming = deque(enumerate(_batches(order, self._rotates, most, first)))
        self._stage = _Stage(spans, sizes, [batch for _, batch in self._coming], lease, runner.device)
        self._read = [spans[i] for i in self._stage.read]
        self._sizes = [sizes[i] for i in self._stage.read]
        self._ready: SimpleQueue[Any] = SimpleQueue()
        self._copied: deque[torch.cuda.Event] = deque()
        self._placed: list[torch.cuda.Event] = []
        self._under_way: deque[tuple[torch.cuda.Event, list[Any]]] = deque()
        self._thread: threading.Thread | None = None
        self._stop = False
        self._lying = _lying(slabs, self._sizes)
        self._copying, self._placing = (_stream_behind(self._device, behind) for _ in range(2))
        if ready:
            self._copy_first()
        try:
            self._sources, self._placer = self._make_placer()
        except BaseException:
            self.close()  # copies are on their way into memory that is given back now
            raise
        if not ready:
            self._thread = threading.Thread(target=self._feed, name="ragkv-loader", daemon=True)
            self._thread.start()

    def _make_placer(self) -> tuple[torch.Tensor, SlabPlacer]:
        """Where all slabs are to lie, on the device, and what places them from there. Placing need not wait for what
        the stream that computes has launched."""
        from ragkv.kernels.slabs import SlabPlacer, span_table  # needs Triton

        shape, angles = self._runner.shape, self._runner.rope.table(self._spans[-1].end)
        lengths, starts = [span.length for span in self._spans], [span.start for span in self._spans]
        table = span_table(self._codec, shape, lengths, [start - self._kv.base for start in starts], starts)
        sources, table = uploaded_together((self._stage.sources, table), self._device, self._placing)
        return sources, SlabPlacer(self._codec, shape, table, max(lengths), angles)

    def place_next(self) -> None:
        """Have the current stream wait until the next layer is placed.

        Raises:
            ChunkLostError: a slab is unreadable; nothing of it was placed.
        """
        if self._thread is None and self._coming and self._wanted():
            self._launch_or_tell()
        placed = self._ready.get()
        if isinstance(placed, BaseException):
            raise placed
        torch.cuda.current_stream(self._device).wait_event(placed)

    def close(self) -> None:
        """Stop. No slab is read and no slot written afterwards."""
        self._stop = True
        if self._thread is not None:
            self._thread.join()
        if self._placed:
            self._placed[-1].synchronize()
        self._copying.synchronize()  # it may be ahead of what is placed
        self._under_way.clear()

    def _wanted(self) -> bool:
        """Whether to launch another batch: not yet while slabs are on their way that nobody waits for. What is on the
        device already can be placed as soon as who computes, which is ahead of it, asks."""
        ahead = LAUNCHED_AHEAD if self._read and not self._copied else 1
        return self._ready.qsize() < ahead

    def _copy_first(self) -> None:
        try:
            for turn, layers in list(self._coming)[:_STAGED]:
                self._copy(turn, layers)
        except Exception as error:
            self._give_up(error)

    def _feed(self) -> None:
        with torch.cuda.device(self._device):
            self._copying.query()  # makes the device's context this thread's, which the driver wants
            while self._coming and not self._stop:
                self._launch_or_tell()

    def _launch_or_tell(self) -> None:
        try:
            self._launch(*self._coming.popleft())
        except BaseException as error:
            self._give_up(error)

    def _give_up(self, error: BaseException) -> None:
        """What went wrong with a layer is raised for whoever needs it, and nothing comes behind it."""
        self._coming.clear()
        self._ready.put(error)

    def _launch(self, turn: int, layers: list[int]) -> None:
        if self._read:
            if not self._copied:
                self._copy(turn, layers)
            self._placing.wait_event(self._copied.popleft())
        k, v = self._kv.read(layers[0], self._kv.capacity)
        sources, rotated, stride = self._sources[turn], self._rotates[layers[0]], self._kv.layer_stride
        with torch.cuda.stream(self._placing):
            self._placer.place(sources[: len(layers)], k, v, rotated=rotated, layer_stride=stride)
        placed = self._placing.record_event()
        self._placed.append(placed)
        for _ in layers:
            self._ready.put(placed)

    def _copy(self, turn: int, layers: list[int]) -> None:
        if not self._read:
            return
        if turn >= _STAGED:
            self._copying.wait_event(self._placed[turn - _STAGED])
        held, targets = list[Any](), self._stage.targets[turn, : len(layers)]
        if self._lying is not None:
            sources = self._lying[layers[0] : layers[-1] + 1]
        else:
            found = [_readable(next_layer(self._slabs, self._read, self._sizes)) for _ in layers]
            held, sources = [readable for readable, _ in found], np.array([addresses for _, addresses in found])
        copy_over(targets, sources, np.array(self._sizes), self._copying)
        copied = self._copying.record_event()
        self._copied.append(copied)
        self._hold(copied, held)

    def _hold(self, copied: torch.cuda.Event, readable: list[Any]) -> None:
        """What is copied must stay where it is until then: page-locked copies would be lent to the next otherwise."""
        self._under_way.append((copied, readable))
        # The thread that computes must not wait.
        if self._thread is not None and len(self._under_way) > LAYERS_UNDER_WAY:
            self._under_way.popleft()[0].synchronize()


class _Stage:
    """Where slabs lie on the device: in the device tier, in what it wants to have filled in, or here.

    Attributes:
        read: indices of the spans that the store has to read.
        sources: int64 (batches, layers of a batch, spans): addresses of all spans' slabs.
        targets: the same of those that are read, which is where to copy them.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        sizes: Sequence[int],
        batches: Sequence[list[int]],
        lease: DeviceLease | None,
        device: torch.device,
    ) -> None:
        hits, fills = (lease.hits, lease.fills) if lease is not None else ({}, {})
        keys = [span.chunk.tokens.key for span in spans]
        self.read = [i for i, key in enumerate(keys) if key not in hits]
        own = [i for i in self.read if keys[i] not in fills]
        *starts, nbytes = accumulate((-(-sizes[i] // _ALIGNMENT) * _ALIGNMENT for i in own), initial=0)
        # A place for each batch that is staged at a time, as large as the largest that comes there.
        rooms = [max(map(len, batches[turn::_STAGED]), default=0) for turn in range(_STAGED)]
        self._memory = torch.empty((sum(rooms), nbytes), dtype=torch.uint8, device=device)
        firsts = [self._memory.data_ptr() + room * nbytes for room in accumulate(rooms, initial=0)]
        most = max(rooms)
        sources = np.zeros((len(batches), most, len(spans)), np.int64)
        staged = [[firsts[turn % _STAGED] + nbytes * at for at in range(most)] for turn in range(len(batches))]
        sources[:, :, own] = np.array(staged)[:, :, None] + np.array(starts, np.int64)
        layers = np.array([batch + batch[-1:] * (most - len(batch)) for batch in batches])
        for i, key in enumerate(keys):
            held = hits.get(key, fills.get(key))
            if held is not None:
                sources[:, :, i] = held.data_ptr() + held.stride(0) * layers
        self.sources, self.targets = torch.from_numpy(sources), sources[:, :, self.read]


def _batches(order: Sequence[int], rotates: Sequence[bool], most: int, together: int) -> list[list[int]]:
    """The order cut where a launch ends: layers of a batch follow each other in the KV, and rotate alike. The first are
    of the layers that are needed ``together``."""
    batches: list[list[int]] = []
    for turn, layer in enumerate(order):
        last = batches[-1] if batches else []
        room = last and (turn < together or (turn > together and len(last) < most and turn < len(order) - _LAST))
        if room and layer == last[-1] + 1 and rotates[layer] == rotates[last[-1]]:
            last.append(layer)
        else:
            batches.append([layer])
    return batches


def _stream_behind(device: torch.device, event: torch.cuda.Event | None) -> Any:
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_event(event or torch.cuda.current_stream(device).record_event())
    return stream


def _lying(slabs: Slabs, sizes: Sequence[int]) -> NDArray[np.int64] | None:
    """int64 (layers, slabs): where they lie, if the copy engine can read all of them there until they are closed."""
    entries = slabs.lying(sizes) if isinstance(slabs, LayerReader) else None
    if entries is None or not all(are_page_locked(entry.pages) for entry in entries):
        return None
    return np.array([entry.addresses for entry in entries]).T


def _readable(slabs: Sequence[np.ndarray]) -> tuple[list[Any], list[int]]:
    """Where the copy engine can read these slabs, and what must be held meanwhile: they, or page-locked copies."""
    held: list[Any] = list(slabs)
    addresses = [slab.__array_interface__["data"][0] for slab in slabs]
    far = [i for i, slab in enumerate(slabs) if not is_page_locked(addresses[i], slab.nbytes)]
    if not far:
        return held, addresses
    sizes = [-(-slabs[i].nbytes // _ALIGNMENT) * _ALIGNMENT for i in far]
    stage = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
    start, copying = 0, []
    for i, nbytes in zip(far, sizes, strict=True):
        copying.append(_COPIERS.submit(np.copyto, stage.numpy()[start : start + slabs[i].nbytes], slabs[i]))
        addresses[i] = stage.data_ptr() + start
        start += nbytes
    for copied in wait(copying).done:
        copied.result()
    return [*held, stage], addresses
