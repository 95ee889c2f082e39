"""Unpacking on a device against its plain twin, the store's own numpy decoders: bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ragkv.kv import KvShape
from ragkv.store import CODECS
from ragkv.unpacking import Unpacker, _shrunk
from tests.codec_kit import encoded, random_kv

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LENGTHS = [[1], [9], [7, 1, 70], [128, 128], [1, 1, 1]]


def gathered(unpacker, slabs):
    """A stage filled as the loader fills it; what no chunk owns is spoilt."""
    stage = np.full(unpacker.nbytes, 0xEE, np.uint8)
    for slab, nbytes, pieces in zip(slabs, unpacker.slab_bytes, unpacker.pieces, strict=True):
        assert slab.nbytes == nbytes
        for to, source in pieces:
            stage[to] = slab[source]
    return torch.from_numpy(stage)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", CODECS)
def test_unpacking_equals_the_stores_own_decoding(codec, dtype, lengths):
    shape = KvShape(1, 3, 20, dtype)
    slabs = [encoded(random_kv(shape, n, seed=n + i), codec) for i, n in enumerate(lengths)]
    unpacker = Unpacker(codec, shape, lengths, torch.device("cpu"))
    keys, values = unpacker.unpack(gathered(unpacker, slabs))
    assert keys.dtype == values.dtype == dtype
    plain = [CODECS[codec].decode(slab, shape.geometry, n) for slab, n in zip(slabs, lengths, strict=True)]
    for got, part in ((keys, 0), (values, 1)):
        assert got.shape == (sum(lengths), 3, 20)
        expected = np.concatenate([both[part] for both in plain])
        assert np.array_equal(got.float().numpy(), expected.astype(np.float32))


@pytest.mark.parametrize("codec", ["int8", "fp8"])
def test_scales_gathered_per_token_equal_those_applied_per_chunk(codec):
    """What runs where starting a kernel is dear, against what runs on a CPU."""
    shape, lengths = KvShape(1, 2, 16, torch.bfloat16), [5, 1, 30]
    unpacker = Unpacker(codec, shape, lengths, torch.device("cpu"))
    slabs = [encoded(random_kv(shape, n, seed=n), codec) for n in lengths]
    stage = gathered(unpacker, slabs)
    fields = {name: stage[p.start : p.end].view(p.dtype).view(p.shape) for name, p in unpacker._places.items()}
    keys = unpacker._scale(fields["keys"], fields["key_scales"][unpacker._owner])
    assert torch.equal(keys, unpacker.unpack(stage)[0])


def test_every_float8_has_its_place_in_float16():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    exact = codes.to(torch.float16)
    finite = exact.isfinite()
    assert finite.sum() == 254
    assert torch.equal(_shrunk(codes)[finite] * 256, exact[finite])


@pytest.mark.parametrize("codec", CODECS)
def test_a_stage_is_as_compact_as_the_slabs(codec):
    shape, lengths = KvShape(1, 8, 64, torch.bfloat16), [128, 200, 512]
    unpacker = Unpacker(codec, shape, lengths, torch.device("cpu"))
    assert sum(unpacker.slab_bytes) <= unpacker.nbytes < sum(unpacker.slab_bytes) + 4 * 64
    assert unpacker.nbytes % 64 == 0
