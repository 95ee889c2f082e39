"""Codecs against plain arithmetic: what they lose, what they must not lose, and how their slabs lie."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from ragkv.errors import StoreFormatError
from ragkv.store import CODECS, ChunkStore, Geometry, OpenEntry, chunk_key, codecs

DTYPES = ["bfloat16", "float16", "float32"]
SCALED = ["int8", "fp8"]
SHAPES = [(1, 1, 8), (3, 2, 5), (50, 2, 16), (129, 8, 64)]
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


def kv(shape, dtype, seed=0):
    """K whose channels, and V whose tokens, differ in size a thousandfold."""
    rng = np.random.default_rng(seed)
    both = rng.standard_normal((2, *shape))
    both[0] *= np.exp(rng.uniform(-3, 3, shape[1:]))
    both[1] *= np.exp(rng.uniform(-3, 3, (shape[0], shape[1], 1)))
    return both.astype(Geometry(1, 1, 1, dtype).numpy_dtype)


def geometry(shape, dtype, layers=1):
    return Geometry(layers, shape[1], shape[2], dtype)


def slab_of(codec, keys, values):
    return np.concatenate([part.reshape(-1).view(np.uint8) for part in CODECS[codec].encode(keys, values)])


def field(codec, slab, shape, dtype, name):
    [found] = [f for f in CODECS[codec].fields(geometry(shape, dtype), shape[0]) if f.name == name]
    kind = getattr(ml_dtypes, found.dtype, found.dtype)
    return slab[found.offset : found.offset + found.nbytes].view(kind).reshape(found.shape)


def round_trip(codec, keys, values):
    slab = slab_of(codec, keys, values)
    decoded = CODECS[codec].decode(slab, geometry(keys.shape, keys.dtype.name), len(keys))
    assert all(part.dtype == keys.dtype and part.shape == keys.shape for part in decoded)
    return [part.astype(np.float64) for part in decoded]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", CODECS)
def test_a_slab_is_its_fields(codec, dtype, shape):
    fields = CODECS[codec].fields(geometry(shape, dtype), shape[0])
    ends = [f.offset + f.nbytes for f in fields]
    slab = slab_of(codec, *kv(shape, dtype))
    assert len(slab) == CODECS[codec].slab_bytes(geometry(shape, dtype), shape[0]) == ends[-1]
    gaps = np.ones(len(slab), bool)
    for f, before in zip(fields, [0, *ends], strict=False):
        assert f.offset >= before
        assert codec == "raw" or f.offset % 64 == 0
        assert f.shape[0] in (1, shape[0])
        gaps[f.offset : f.offset + f.nbytes] = False
    assert not slab[gaps].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_raw_is_k_then_v_and_loses_nothing(dtype):
    keys, values = kv((7, 2, 16), dtype)
    keys[0, 0, :2] = np.inf, np.nan
    slab = slab_of("raw", keys, values)
    assert slab.tobytes() == keys.tobytes() + values.tobytes()
    decoded = CODECS["raw"].decode(slab, geometry(keys.shape, dtype), 7)
    assert [part.tobytes() for part in decoded] == [keys.tobytes(), values.tobytes()]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", SCALED)
def test_bytes_and_scales_are_what_plain_arithmetic_gives(codec, dtype, shape):
    keys, values = kv(shape, dtype)
    slab = slab_of(codec, keys, values)
    limit = np.float32({"int8": 127, "fp8": 448}[codec])
    for name, part, axis in (("key", keys, 0), ("value", values, 2)):
        x = part.astype(np.float32)
        largest = np.abs(x).max(axis, keepdims=True)
        assert np.array_equal(field(codec, slab, shape, dtype, f"{name}_scales"), largest / limit)
        scaled = x * (limit / largest)
        expected = np.rint(scaled).astype(np.int8) if codec == "int8" else scaled.astype(E4M3)
        assert field(codec, slab, shape, dtype, f"{name}s").tobytes() == expected.tobytes()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", SCALED)
def test_decoding_is_bytes_times_scales_rounded_once(codec, dtype, shape):
    slab = slab_of(codec, *kv(shape, dtype))
    decoded = CODECS[codec].decode(slab, geometry(shape, dtype), shape[0])
    for name, part in zip(("key", "value"), decoded, strict=True):
        packed = field(codec, slab, shape, dtype, f"{name}s").astype(np.float32)
        assert np.array_equal(part, (packed * field(codec, slab, shape, dtype, f"{name}_scales")).astype(part.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("codec", "absolute", "relative"), [("int8", 0.51 / 127, 0), ("fp8", 2**-10 / 448, 2**-4)])
def test_the_error_is_bounded_by_channel_for_k_and_by_token_for_v(codec, absolute, relative, dtype):
    keys, values = kv((200, 2, 32), dtype)
    rounding = 2.0**-8  # of the result to bfloat16
    for x, got, axis in zip((keys, values), round_trip(codec, keys, values), (0, 2), strict=True):
        x = x.astype(np.float64)
        bound = absolute * np.abs(x).max(axis, keepdims=True) + (relative + rounding) * np.abs(x)
        assert (np.abs(got - x) <= bound).all()


def test_fp8_bytes_are_those_of_ml_dtypes_for_every_number_and_between():
    numbers = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
    numbers = np.unique(numbers[np.isfinite(numbers)])
    middles = (numbers[1:] + numbers[:-1]) / 2
    floats = np.concatenate([numbers, middles, middles * (1 + 2**-12), middles * (1 - 2**-12), [-0.0]])
    floats = np.clip(floats, -448, 448).astype(np.float32)
    packed = np.empty(len(floats), np.uint8)
    codecs._pack_fp8(floats.copy(), packed)
    assert np.array_equal(packed, floats.astype(E4M3).view(np.uint8))
    unpacked = np.empty(len(floats), np.float32)
    codecs._unpack_fp8(packed, unpacked)
    assert np.array_equal(unpacked, packed.view(E4M3).astype(np.float32))


@pytest.mark.parametrize("codec", SCALED)
def test_working_in_blocks_changes_no_byte(codec, monkeypatch):
    keys, values = kv((50, 2, 16), "bfloat16")
    whole, decoded = slab_of(codec, keys, values), round_trip(codec, keys, values)
    monkeypatch.setattr(codecs, "BLOCK_ELEMENTS", 100)
    assert np.array_equal(slab_of(codec, keys, values), whole)
    assert np.array_equal(round_trip(codec, keys, values), decoded)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", SCALED)
def test_zeros_and_next_to_nothing_become_zeros(codec, dtype):
    keys, values = kv((5, 2, 8), dtype)
    keys[:, 1, 3] = values[2, 0] = 0
    keys[:, 0, 0] = np.finfo(np.float32).smallest_subnormal
    got_keys, got_values = round_trip(codec, keys, values)
    assert not got_keys[:, 1, 3].any()
    assert not got_keys[:, 0, 0].any()
    assert not got_values[2, 0].any()
    assert np.isfinite(got_keys).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", SCALED)
def test_the_largest_numbers_stay_finite(codec, dtype):
    largest = float(ml_dtypes.finfo(Geometry(1, 1, 1, dtype).numpy_dtype).max)
    keys, values = kv((5, 2, 8), dtype)
    keys[3], values[:, 1, 2] = -largest, largest
    got_keys, got_values = round_trip(codec, keys, values)
    assert np.allclose(got_keys[3], -largest, rtol=1e-6)
    assert np.allclose(got_values[:, 1, 2], largest, rtol=1e-6)


@pytest.mark.parametrize("codec", SCALED)
def test_all_finite_float32_stay_finite(codec):
    """Next to the largest one, a scale that is rounded up times the largest byte would be infinite."""
    near = np.float32(np.finfo(np.float32).max) * np.linspace(0.999999, 1, 4000, dtype=np.float32)
    for shape, which in (((1, 1, -1), 0), ((-1, 1, 1), 1)):  # each element with a scale of its own
        given = np.concatenate([near, -near]).reshape(shape)
        assert np.allclose(round_trip(codec, given, given)[which], given.astype(np.float64), rtol=1e-6)


@pytest.mark.parametrize("codec", SCALED)
def test_one_token_keeps_its_keys(codec):
    keys, values = kv((1, 2, 8), "float32")
    got, _ = round_trip(codec, keys, values)
    assert np.allclose(got, keys, rtol=1e-6)


@pytest.mark.parametrize("codec", SCALED)
def test_the_callers_arrays_are_left_alone(codec):
    both = kv((9, 2, 8), "bfloat16")
    before = both.tobytes()
    both.flags.writeable = False
    CODECS[codec].encode(*both)
    assert both.tobytes() == before


KEY = chunk_key(model="m", tokenizer="t", dtype="x", codec="x", context_policy="none", context=[], tokens=[1])


@pytest.fixture
def store(tmp_path):
    with ChunkStore(tmp_path / "store", capacity_bytes=1 << 24, ram_bytes=1 << 22, threads=2) as opened:
        yield opened


def layers_of(shape, dtype, layers=3):
    return [kv(shape, dtype, seed) for seed in range(layers)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", CODECS)
def test_what_is_put_comes_back_decoded_from_disk_and_ram(store, codec, dtype, shape):
    layers = layers_of(shape, dtype)
    given = [layers[0], (layers[1][0], layers[1][1]), (layers[2].tobytes()[:5], layers[2].tobytes()[5:])]
    assert store.put(KEY, geometry(shape, dtype, 3), given, tokens=shape[0], model="m", codec=codec)
    for tier in ("ssd", "ram"):
        [entry] = store.open([KEY])
        assert isinstance(entry, OpenEntry)
        with entry:
            assert (entry.tier, entry.header.codec) == (tier, codec)
            for layer, [slab] in zip(layers, store.open_layers([entry]), strict=True):
                assert slab.nbytes == entry.header.slab_bytes
                expected = CODECS[codec].decode(slab_of(codec, *layer), geometry(shape, dtype), shape[0])
                assert np.array_equal(entry.decode(slab), expected)
    assert store.check().clean


@pytest.mark.parametrize("codec", SCALED)
def test_an_entry_takes_half_the_disk(store, codec):
    shape = (512, 8, 64)
    store.put(KEY, geometry(shape, "bfloat16", 2), layers_of(shape, "bfloat16", 2), tokens=512, model="m", codec=codec)
    raw = 2 * geometry(shape, "bfloat16").slab_bytes(512)
    assert 0.5 < store.stats().bytes / raw < 0.55


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", SCALED)
@pytest.mark.parametrize(("part", "name"), [(0, "keys"), (1, "values")])
def test_inf_and_nan_are_refused_by_layer_and_leave_nothing(store, codec, dtype, bad, part, name):
    layers = layers_of((9, 2, 8), dtype)
    layers[1][part, 4, 1, 7] = bad
    with pytest.raises(StoreFormatError, match=f"layer 1: the {name} .*{codec}.*raw") as caught:
        store.put(KEY, geometry((9, 2, 8), dtype, 3), layers, tokens=9, model="m", codec=codec)
    assert caught.value.context == {"layer": 1, "codec": codec}
    assert KEY not in store
    assert store.check().clean


@pytest.mark.parametrize("codec", SCALED)
def test_slabs_of_another_size_are_refused_whatever_the_codec(store, codec):
    shape = (9, 2, 8)
    for layers in (layers_of(shape, "bfloat16", 2), layers_of(shape, "bfloat16", 4), layers_of((8, 2, 8), "bfloat16")):
        with pytest.raises(StoreFormatError, match="slab"):
            store.put(KEY, geometry(shape, "bfloat16", 3), layers, tokens=9, model="m", codec=codec)


def test_an_unknown_codec_is_refused_by_name(store):
    shape = (9, 2, 8)
    with pytest.raises(StoreFormatError, match=r"'zip'.*raw, int8, fp8"):
        store.put(KEY, geometry(shape, "bfloat16", 3), layers_of(shape, "bfloat16"), tokens=9, model="m", codec="zip")
