"""Slabs read by a kernel where they lie: against their plain twin, the gathering of layers."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch

from ragkv.chunks import ChunkTokens
from ragkv.device_tier import DeviceTier
from ragkv.errors import CorruptEntryError
from ragkv.gathering import Gathering
from ragkv.kv import KvShape, RequestKV
from ragkv.pinned import PageLocking
from ragkv.plan import PlannedChunk, Span
from ragkv.retrievers import Chunk
from ragkv.rope import Rope
from ragkv.slabs import ChunkLostError
from ragkv.store import EntryHeader
from ragkv.streaming import Streaming
from tests.codec_kit import encoded, random_kv

pytestmark = pytest.mark.gpu
LAYERS, CAPACITY = 5, 700


class Runner:
    """As much of a model runner as loaders need, with a layer that does not rotate."""

    def __init__(self, head_dim=64, rotary=64, dtype=torch.bfloat16):
        self.device = torch.device("cuda")
        self.shape = KvShape(LAYERS, 3, head_dim, dtype)
        frequencies = 1.0 / 10000 ** (torch.arange(rotary // 2, device="cuda") * 2 / rotary)
        self.rope = Rope(frequencies, tuple(layer != 2 for layer in range(LAYERS)), None)

    def tensor(self, ids):
        return torch.as_tensor(ids, dtype=torch.long, device=self.device)

    def new_kv(self):
        kv = RequestKV(self.shape, CAPACITY, self.device)
        for layer in range(LAYERS):
            for part in kv.read(layer, CAPACITY):
                part.fill_(7.0)
        return kv


def planned(*places):
    found = []
    for number, (start, end) in enumerate(places):
        tokens = ChunkTokens((), (), 0, "alone", f"chunk{number}".encode().ljust(32, b"."))
        found.append(Span(PlannedChunk(Chunk("", "", 0, ""), 1, 0.0, tokens), start, end, True))
    return found


def slabs_of(runner, spans, codec, *, locked):
    allocate = PageLocking(runner.device)
    layers = []
    for layer in range(LAYERS):
        layers.append([])
        for span in spans:
            slab = encoded(random_kv(runner.shape, span.length, seed=100 * layer + span.start), codec)
            if locked:
                memory = allocate(2 << 20)[: slab.nbytes]
                memory[:] = slab
                slab = memory
            layers[-1].append(slab)
    return layers


def placed(way, runner, spans, layers, codec, lease=None):
    kv = runner.new_kv()
    with closing(way(runner, kv, spans, iter(layers), codec, lease, range(LAYERS))) as loader:
        for _ in range(LAYERS):
            loader.place_next()
        torch.cuda.synchronize()
    return [torch.stack(kv.read(layer, CAPACITY)).float().cpu() for layer in range(LAYERS)]


def same(one, other, dtype=torch.bfloat16):
    tolerance = {torch.bfloat16: 2**-7, torch.float16: 2**-9, torch.float32: 1e-6}[dtype]
    for layer, (a, b) in enumerate(zip(one, other, strict=True)):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=f"layer {layer}")


@pytest.mark.parametrize("locked", [True, False])
@pytest.mark.parametrize("codec", ["raw", "int8", "fp8"])
@pytest.mark.parametrize(("head_dim", "rotary"), [(64, 64), (128, 128), (96, 96), (80, 32), (32, 16)])
def test_streamed_as_gathered(head_dim, rotary, codec, locked):
    runner = Runner(head_dim, rotary)
    spans = planned((0, 1), (3, 40), (40, 45), (120, 633))
    layers = slabs_of(runner, spans, codec, locked=locked)
    same(placed(Streaming, runner, spans, layers, codec), placed(Gathering, runner, spans, layers, codec))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("codec", ["raw", "int8", "fp8"])
def test_other_dtypes(codec, dtype):
    runner = Runner(dtype=dtype)
    spans = planned((2, 100), (100, 131))
    layers = slabs_of(runner, spans, codec, locked=True)
    same(placed(Streaming, runner, spans, layers, codec), placed(Gathering, runner, spans, layers, codec), dtype)


@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_the_device_tier_is_filled_on_the_way_and_read_afterwards(codec):
    runner = Runner()
    spans = planned((0, 65), (70, 90), (200, 555))
    layers = slabs_of(runner, spans, codec, locked=True)
    expected = placed(Gathering, runner, spans, layers, codec)
    tier = DeviceTier(64 << 20, runner.device)
    headers = [EntryHeader(s.chunk.tokens.key, runner.shape.geometry, s.length, "m", codec) for s in spans]
    with closing(tier.lease(headers)) as lease:
        assert len(lease.fills) == 3
        same(placed(Streaming, runner, spans, layers, codec, lease), expected)
        lease.commit()
    tier.drop(headers[1].key)
    with closing(tier.lease(headers)) as lease:
        assert len(lease.hits) == 2
        only = [[slabs[1]] for slabs in layers]
        same(placed(Streaming, runner, spans, only, codec, lease), expected)
        lease.commit()
    with closing(tier.lease(headers)) as lease:
        assert len(lease.hits) == 3
        same(placed(Streaming, runner, spans, [], codec, lease), expected)


def test_a_lost_chunk_is_told_in_its_layer_and_closing_early_is_safe():
    runner, spans = Runner(), planned((0, 40), (40, 90))
    layers = slabs_of(runner, spans, "raw", locked=True)
    layers[3][1] = CorruptEntryError("flipped")
    loader = Streaming(runner, runner.new_kv(), spans, iter(layers), "raw", None, range(LAYERS))
    for _ in range(3):
        loader.place_next()
    with pytest.raises(ChunkLostError) as lost:
        loader.place_next()
    assert list(lost.value.causes) == [spans[1]]
    loader.close()
    loader = Streaming(runner, runner.new_kv(), spans, iter(layers), "raw", None, range(LAYERS))
    loader.place_next()
    loader.close()


@pytest.mark.parametrize("given", [True, False])
def test_copies_wait_for_a_moment_and_not_for_what_was_launched_since(given):
    runner, spans = Runner(), planned((0, 40), (40, 90))
    layers = slabs_of(runner, spans, "raw", locked=True)
    placed(Streaming, runner, spans, layers, "raw")  # compiles
    behind = torch.cuda.current_stream().record_event() if given else None
    torch.cuda._sleep(1_000_000_000)  # half a second
    awake = torch.cuda.current_stream().record_event()
    loader = Streaming(runner, runner.new_kv(), spans, iter(layers), "raw", None, range(LAYERS), behind)
    with closing(loader):
        loader.place_next()  # its copies are launched
        loader._copying.synchronize()
        assert awake.query() == (not given)
    torch.cuda.synchronize()
