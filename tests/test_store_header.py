from __future__ import annotations

import dataclasses
import struct

import numpy as np
import pytest
import xxhash

from ragkv.errors import CorruptEntryError, StoreError, StoreFormatError
from ragkv.store import EntryHeader, Geometry
from ragkv.store.header import header_size, unpack_header
from tests.store_kit import GEOMETRY, TOKENS, key_for


def header() -> EntryHeader:
    plain = EntryHeader(key_for(1), GEOMETRY, TOKENS, "model-α", context_tokens=7, context_policy="document")
    return plain.with_checksums([11, 22, 33])


def resealed(raw: bytes, offset: int, new: bytes) -> bytes:
    raw = raw[:offset] + new + raw[offset + len(new) :]
    return raw[:8] + xxhash.xxh3_64_intdigest(raw[16:]).to_bytes(8, "little") + raw[16:]


def test_round_trip():
    packed = header().pack()
    assert header_size(packed[:4096]) == len(packed) == 4096
    assert unpack_header(packed, header().file_bytes) == header()


def test_layout_is_whole_blocks_even_for_many_layers():
    many = EntryHeader(key_for(1), Geometry(500, 1, 8, "float32"), 3, "m").with_checksums(range(500))
    assert len(many.pack()) == many.header_bytes == 3 * 4096
    assert many.file_bytes % 4096 == 0
    assert all(slab.offset % 4096 == 0 and slab.nbytes == 2 * 3 * 8 * 4 for slab in many.slabs)
    assert unpack_header(many.pack(), many.file_bytes) == many


def test_every_flipped_bit_is_noticed():
    packed = header().pack()
    used = len(packed.rstrip(b"\0")) * 8
    rng = np.random.default_rng(0)
    for bit in [*range(32 * 8), *rng.integers(0, used, 300), *rng.integers(used, 4096 * 8, 50)]:
        damaged = bytearray(packed)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptEntryError):
            unpack_header(bytes(damaged), header().file_bytes)


@pytest.mark.parametrize("length", [0, 7, 31, 4095])
def test_a_truncated_header_is_noticed(length):
    with pytest.raises(CorruptEntryError):
        unpack_header(header().pack()[:length], header().file_bytes)


def test_a_truncated_file_is_noticed():
    with pytest.raises(CorruptEntryError, match="bytes"):
        unpack_header(header().pack(), header().file_bytes - 4096)


def test_another_version_is_refused_by_name():
    packed = resealed(header().pack(), 16, struct.pack("<I", 2))
    with pytest.raises(StoreFormatError, match="version 2"):
        unpack_header(packed, header().file_bytes)


def test_an_unknown_codec_is_refused_by_name():
    packed = header().pack()
    packed = resealed(packed, packed.index(b'"raw"'), b'"zip"')
    with pytest.raises(StoreFormatError, match="zip"):
        unpack_header(packed, header().file_bytes)


def test_a_description_that_contradicts_the_table_is_noticed():
    packed = header().pack()
    packed = resealed(packed, packed.index(b'"tokens":50'), b'"tokens":49')
    with pytest.raises(CorruptEntryError):
        unpack_header(packed, header().file_bytes)


@pytest.mark.parametrize(
    "change",
    [
        {"key": b"short"},
        {"codec": "zip"},
        {"source": "guess"},
        {"model": ""},
        {"model": "x" * 256},
        {"tokens": 0},
        {"tokens": 50.0},
        {"tokens": 1 << 32},
        {"context_tokens": -1},
        {"context_policy": 3},
        {"created": "yesterday"},
    ],
)
def test_fields_that_cannot_be_stored_are_refused(change):
    with pytest.raises(StoreError):
        dataclasses.replace(header(), **change)


def test_a_header_that_could_not_be_read_again_is_not_written():
    with pytest.raises(StoreFormatError, match="1048576"):
        _ = dataclasses.replace(header(), context_policy="x" * (1 << 20)).file_bytes


@pytest.mark.parametrize("shape", [(0, 1, 1, "float16"), (1, -1, 1, "float16"), (1, 1, 1, "float64")])
def test_impossible_geometries_are_refused(shape):
    with pytest.raises(StoreFormatError):
        Geometry(*shape)


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float16", 2), ("float32", 4)])
def test_slab_bytes(dtype, size):
    assert Geometry(5, 4, 64, dtype).slab_bytes(512) == 2 * 512 * 4 * 64 * size
