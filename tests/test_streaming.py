"""Which slabs are copied where, which layers placed when, and what is held meanwhile: without a device."""

from __future__ import annotations

import ctypes
import weakref
from contextlib import closing, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ragkv import streaming, uploading
from ragkv.chunks import ChunkTokens
from ragkv.errors import CorruptEntryError
from ragkv.kv import KvShape, RequestKV
from ragkv.plan import PlannedChunk, Span
from ragkv.retrievers import Chunk
from ragkv.slabs import ChunkLostError
from ragkv.streaming import Streaming

LAYERS, CPU = 9, torch.device("cpu")
SHAPE = KvShape(LAYERS, 2, 8, torch.float32)


class Stream:
    """Does everything at once."""

    cuda_stream = 0

    def wait_event(self, event): ...
    def wait_stream(self, stream): ...
    def synchronize(self): ...
    def query(self): ...
    def record_event(self):
        return self


class Held(np.ndarray):
    """An array that can be referred to weakly."""


class Placer:
    """Reads what lies where the kernel would read it."""

    def __init__(self, sizes):
        self.sizes, self.placed = sizes, []

    def place(self, sources, k, v, *, rotated, layer_stride):
        for row in sources.tolist():
            self.placed.append([ctypes.string_at(at, size) for at, size in zip(row, self.sizes, strict=True)])


def copied(targets, sources, sizes, stream):
    for target, source, nbytes in np.broadcast(targets, sources, sizes):
        ctypes.memmove(int(target), int(source), int(nbytes))


@pytest.fixture
def spans():
    tokens = [ChunkTokens((), (), 0, "alone", bytes([i])) for i in range(3)]
    planned = [PlannedChunk(Chunk("", "", 0, ""), 1, 0.0, one) for one in tokens]
    places = [(0, 4), (4, 5), (9, 20)]
    return [Span(chunk, *place, True) for chunk, place in zip(planned, places, strict=True)]


@pytest.fixture
def opened(monkeypatch, spans):
    """A loader and its placer, with all in memory or with a thread that reads."""
    sizes = [SHAPE.entry_bytes(span.length, "raw") // LAYERS for span in spans]
    placer = Placer(sizes)
    monkeypatch.setattr(streaming, "_stream_behind", lambda device, event: Stream())
    monkeypatch.setattr(streaming, "copy_over", copied)
    monkeypatch.setattr(streaming, "_readable", lambda slabs: ([*slabs], [slab.ctypes.data for slab in slabs]))
    monkeypatch.setattr(Streaming, "_make_placer", lambda self: (self._stage.sources, placer))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    runner = SimpleNamespace(device=CPU, shape=SHAPE, rope=SimpleNamespace(rotates=(True,) * 4 + (False,) * 5))

    def make(slabs, order=range(LAYERS), *, in_memory=True, together=0):
        monkeypatch.setattr(streaming, "in_memory", lambda slabs: in_memory)
        kv = RequestKV(SHAPE, 20, CPU)
        return Streaming(runner, kv, spans, slabs, "raw", None, order, together=together), placer

    return make


def slabs_of(spans, order):
    rng = np.random.default_rng(0)
    layers = [
        [rng.integers(0, 256, SHAPE.entry_bytes(s.length, "raw") // LAYERS, np.uint8).view(Held) for s in spans]
        for _ in range(LAYERS)
    ]
    return [layers[layer] for layer in order]


def all_placed(loader):
    for _ in range(LAYERS):
        loader.place_next()


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("together", [0, 1, 2, 4])
@pytest.mark.parametrize("order", [range(LAYERS), [5, 6, 0, 1, 2, 3, 4, 7, 8], range(LAYERS)[::-1]], ids=str)
def test_each_layer_is_placed_from_its_own_slabs(opened, spans, order, together, in_memory):
    slabs = slabs_of(spans, order)
    loader, placer = opened(iter(slabs), order, in_memory=in_memory, together=together)
    with closing(loader):
        for turn in range(LAYERS):
            loader.place_next()
            assert len(placer.placed) > turn
    assert placer.placed == [[slab.tobytes() for slab in layer] for layer in slabs]


@pytest.mark.parametrize(
    ("order", "together", "expected"),
    [
        (range(9), 0, [[0, 1], [2, 3], [4, 5], [6], [7], [8]]),  # where the KV stops rotating, and at the end
        ([2, 3, 4, 0, 1, 5, 6, 7, 8], 3, [[2, 3, 4], [0, 1], [5], [6], [7], [8]]),
        ([5, 6, 0, 1, 2, 3, 4, 7, 8], 2, [[5], [6], [0, 1], [2, 3], [4], [7], [8]]),
        ([3, 0, 1, 2, 4, 5, 6, 7, 8], 1, [[3], [0, 1], [2], [4, 5], [6], [7], [8]]),
    ],
)
def test_what_is_needed_together_is_a_batch_and_nothing_else_is_in_it(order, together, expected):
    assert streaming._batches(order, (True,) * 6 + (False,) * 3, 2, together) == expected


def test_what_is_being_copied_is_held_until_the_loader_is_closed(opened, spans):
    """The driver reads it when it comes to it, and nobody else knows."""
    slabs = slabs_of(spans, range(LAYERS))
    alive = [weakref.ref(slab) for layer in slabs for slab in layer]
    loader, _ = opened(slabs.pop(0) for _ in range(LAYERS))
    all_placed(loader)
    assert not slabs
    assert all(ref() is not None for ref in alive)
    loader.close()
    assert not any(ref() is not None for ref in alive)


def test_copies_have_ended_when_placing_cannot_be_made_ready(opened, spans, monkeypatch):
    """Their memory is others' then."""
    calls = []

    class Slow(Stream):
        def synchronize(self):
            calls.append("waited")

    monkeypatch.setattr(streaming, "_stream_behind", lambda device, event: Slow())
    monkeypatch.setattr(streaming, "copy_over", lambda *_: calls.append("copied"))
    monkeypatch.setattr(Streaming, "_make_placer", lambda self: nothing_left())
    with pytest.raises(torch.OutOfMemoryError):
        opened(iter(slabs_of(spans, range(LAYERS))))
    assert calls == ["copied"] * streaming._STAGED + ["waited"]


def nothing_left():
    raise torch.OutOfMemoryError("nothing is left")


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("bad", [0, 1, 4, LAYERS - 1])
def test_a_lost_chunk_is_told_before_its_layer_is_placed(opened, spans, bad, in_memory):
    slabs = slabs_of(spans, range(LAYERS))
    slabs[bad][1] = CorruptEntryError("flipped")
    loader, placer = opened(iter(slabs), in_memory=in_memory)
    with closing(loader), pytest.raises(ChunkLostError) as lost:
        all_placed(loader)
    assert list(lost.value.causes) == [spans[1]]
    assert len(placer.placed) <= bad


def test_one_call_for_many_copies_says_what_one_each_says(monkeypatch):
    """The batch as the driver reads it, out of memory."""

    def batch(targets, sources, sizes, count, attributes, index, kinds, failed, stream):
        table = [ctypes.cast(row, ctypes.POINTER(ctypes.c_int64))[:count] for row in (targets, sources, sizes)]
        copied(*table, stream)
        return 0

    def one(target, source, nbytes, stream):
        ctypes.memmove(target, source, nbytes)
        return 0

    driver = SimpleNamespace(cuMemcpyHtoDAsync_v2=one)
    monkeypatch.setattr(uploading, "driver", lambda: driver)
    source = np.random.default_rng(0).integers(0, 256, 1000, np.uint8)
    places = [(0, 64, 100), (500, 0, 64), (200, 300, 250)]  # to, from, bytes
    results = []
    for way in (batch, None):
        monkeypatch.setattr(uploading, "_batch", lambda way=way: way)
        target = np.zeros_like(source)
        targets = [target.ctypes.data + to for to, _, _ in places]
        sources = [source.ctypes.data + at for _, at, _ in places]
        sizes = [nbytes for _, _, nbytes in places]
        uploading.copy_over(*(np.array(part, np.int64) for part in (targets, sources, sizes)), Stream())
        results.append(target)
    assert results[0].any()
    assert np.array_equal(*results)
    monkeypatch.setattr(uploading, "_batch", lambda: lambda *arguments: 1)
    with pytest.raises(RuntimeError, match="CUDA error 1"):
        uploading.copy_over(*np.ones((3, 1), np.int64), Stream())
