"""Layers of stored chunks on their way into a request's KV."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ragkv.chunks import ChunkTokens
from ragkv.device_tier import DeviceTier
from ragkv.errors import CorruptEntryError
from ragkv.loading import ChunkLostError, LayerLoader
from ragkv.plan import PlannedChunk, Span
from ragkv.retrievers import Chunk
from ragkv.runner import ModelRunner
from ragkv.store import EntryHeader
from tests.blend_kit import close
from tests.codec_kit import decoded, encoded, random_kv
from tests.families import make_model, make_runner


def spans(*places):
    return [Span(None, start, end, True) for start, end in places]


def slabs_of(runner, spans, seed=0):
    """For each layer, for each span, float tensors (2, tokens, kv_heads, head_dim)."""
    generator = torch.Generator().manual_seed(seed)
    shape = runner.shape
    return [
        [torch.randn(2, s.length, shape.kv_heads, shape.head_dim, generator=generator).to(shape.dtype) for s in spans]
        for _ in range(shape.layers)
    ]


def as_bytes(layers, codec="raw"):
    for slabs in layers:
        yield [encoded(slab, codec) for slab in slabs]


def sentinel(runner, capacity, base=0):
    kv = runner.new_kv(capacity, base)
    for layer in range(runner.shape.layers):
        for part in kv.read(layer, capacity):
            part.fill_(777.0)
    return kv


@pytest.mark.parametrize("places", [[(3, 10), (10, 12)], [(3, 10), (15, 22)], [(0, 1)], [(29, 30)]])
@pytest.mark.parametrize(("family", "base"), [("llama", 0), ("smollm3", 0), ("phi3-partial", 0), ("llama", -5)])
def test_every_span_lands_in_its_slots_and_nowhere_else(family, base, places):
    runner, places = make_runner(family), spans(*places)
    layers = slabs_of(runner, places)
    kv = sentinel(runner, 40, base)
    loader = LayerLoader(runner, kv, places, as_bytes(layers))
    loader.ensure(runner.shape.layers - 1)
    for layer, slabs in enumerate(layers):
        keys, values = kv.read(layer, 40)
        untouched = torch.ones(40, dtype=torch.bool)
        for span, slab in zip(places, slabs, strict=True):
            where = slice(span.start - base, span.end - base)
            angles = runner.rope.angles(torch.arange(span.start, span.end))
            close(keys[where], runner.rope.place(slab[0], angles, layer), 1e-6)
            assert torch.equal(values[where], slab[1])
            untouched[where] = False
        assert (keys[untouched] == 777.0).all()
        assert (values[untouched] == 777.0).all()


def test_half_precision_moves_unchanged():
    runner = ModelRunner(make_model("llama").to(torch.bfloat16))
    places = spans((2, 9), (11, 14))
    layers = slabs_of(runner, places)
    kv = sentinel(runner, 20)
    LayerLoader(runner, kv, places, as_bytes(layers)).ensure(3)
    for layer, slabs in enumerate(layers):
        assert torch.equal(kv.read(layer, 9)[1][2:], slabs[0][1])
        assert torch.equal(kv.read(layer, 14)[1][11:], slabs[1][1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("codec", ["int8", "fp8"])
def test_coded_slabs_are_placed_as_their_plain_decoding_would_be(codec, dtype):
    runner = ModelRunner(make_model("llama").to(dtype))
    places = spans((2, 9), (11, 12), (12, 40))
    layers = [[random_kv(runner.shape, s.length, seed=7 * i + s.start) for s in places] for i in range(4)]
    coded = list(as_bytes(layers, codec))
    plain = [
        [decoded(slab, runner.shape, s.length, codec) for slab, s in zip(slabs, places, strict=True)] for slabs in coded
    ]
    by_codec, by_raw = sentinel(runner, 45), sentinel(runner, 45)
    LayerLoader(runner, by_codec, places, iter(coded), codec).ensure(3)
    LayerLoader(runner, by_raw, places, as_bytes(plain)).ensure(3)
    for layer in range(4):
        for one, other in zip(by_codec.read(layer, 45), by_raw.read(layer, 45), strict=True):
            assert torch.equal(one, other)


def test_a_slab_of_another_size_is_a_lost_chunk():
    runner, places = make_runner("llama"), spans((0, 4), (6, 9))
    layers = list(as_bytes(slabs_of(runner, places)))
    layers[0][0] = layers[0][0][:-4]
    with pytest.raises(ChunkLostError, match="size") as caught:
        LayerLoader(runner, runner.new_kv(9), places, iter(layers)).ensure(0)
    assert list(caught.value.causes) == [places[0]]


def test_layers_are_read_once_in_order_and_no_further_than_asked():
    runner, places = make_runner("llama"), spans((0, 4))
    asked = []

    def source():
        for layer, slabs in enumerate(as_bytes(slabs_of(runner, places))):
            asked.append(layer)
            yield slabs

    loader = LayerLoader(runner, runner.new_kv(4), places, source())
    assert asked == []
    loader.ensure(0)
    loader.ensure(0)
    assert asked == [0]
    loader.ensure(2)
    assert asked == [0, 1, 2]
    loader.ensure(1)
    assert asked == [0, 1, 2]


def test_an_unreadable_slab_names_its_chunk_and_places_nothing_of_the_layer():
    runner, places = make_runner("llama"), spans((0, 4), (6, 9))
    layers = list(as_bytes(slabs_of(runner, places)))
    layers[1][1] = CorruptEntryError("bad checksum")
    kv = sentinel(runner, 10)
    loader = LayerLoader(runner, kv, places, iter(layers))
    loader.ensure(0)
    with pytest.raises(ChunkLostError, match="bad checksum") as caught:
        loader.ensure(3)
    assert list(caught.value.causes) == [places[1]]
    assert (kv.read(1, 10)[0] == 777.0).all()


def test_the_stores_read_only_buffers_are_left_alone():
    runner, places = make_runner("llama"), spans((5, 9))
    layers = list(as_bytes(slabs_of(runner, places)))
    before = [slab.copy() for [slab] in layers]
    for [slab] in layers:
        slab.flags.writeable = False
    LayerLoader(runner, runner.new_kv(9), places, iter(layers)).ensure(3)
    assert all(np.array_equal(a, b) for a, [b] in zip(before, layers, strict=True))


def planned(runner, tier_name, places):
    """Spans of chunks that have keys, and an entry's header for each."""
    found = []
    for number, (start, end) in enumerate(places):
        key = f"{tier_name}{number}".encode().ljust(32, b".")
        tokens = ChunkTokens((), tuple(range(end - start)), 0, "alone", key)
        found.append(Span(PlannedChunk(Chunk("", "", 0, ""), 1, 0.0, tokens), start, end, True))
    return found


@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_what_the_device_tier_holds_is_not_read_and_what_it_wants_is_filled_in(codec):
    runner = make_runner("llama")
    places = planned(runner, "chunk", [(0, 4), (6, 9), (9, 11)])
    layers = list(as_bytes(slabs_of(runner, places), codec))
    tier = DeviceTier(1 << 20, runner.device)
    for missing in ({0, 1, 2}, {1}):
        for key in [places[i].chunk.tokens.key for i in missing]:
            tier.drop(key)
        shape = runner.shape.geometry
        headers = [EntryHeader(s.chunk.tokens.key, shape, s.length, "m", codec) for s in places]
        lease = tier.lease(headers)
        assert {i for i, span in enumerate(places) if span.chunk.tokens.key not in lease.hits} == missing
        kv, expected = sentinel(runner, 12), sentinel(runner, 12)
        to_read = [[slab for i, slab in enumerate(slabs) if i in missing] for slabs in layers]
        LayerLoader(runner, kv, places, iter(to_read), codec, lease).ensure(3)
        LayerLoader(runner, expected, places, iter(layers), codec).ensure(3)
        lease.commit()
        for layer in range(4):
            for one, other in zip(kv.read(layer, 12), expected.read(layer, 12), strict=True):
                assert torch.equal(one, other)
    assert len(tier) == 3
