from __future__ import annotations

import dataclasses
import struct

import numpy as np
import pytest

from ragkv.errors import CorruptEntryError, StoreError, StoreFormatError
from ragkv.store import EntryHeader, Geometry
from ragkv.store.header import header_size, unpack_header
from tests.store_kit import GEOMETRY, TOKENS, key_for, retold, sealed


def header() -> EntryHeader:
    plain = EntryHeader(key_for(1), GEOMETRY, TOKENS, "model-α", context_tokens=7, context_policy="document")
    return plain.with_checksums([11, 22, 33])


def resealed(raw: bytes, offset: int, new: bytes) -> bytes:
    return sealed(raw[:offset] + new + raw[offset + len(new) :])


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


@pytest.mark.parametrize("name", ["codec", "dtype", "source"])
def test_what_is_not_for_this_version_is_refused_by_name(name):
    packed = retold(header().pack(), lambda about: about.update({name: "zip"}))
    with pytest.raises(StoreFormatError, match=f"unknown {name} 'zip'") as caught:
        unpack_header(packed, None)
    assert caught.value.context == {name: "zip"}


SPELLINGS = [{"indent": 3}, {"ensure_ascii": False, "separators": (",", ":")}, {"indent": 200}]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_another_writers_spelling_is_read_and_kept(spelling):
    def change(about):
        about["zzz"] = {"of a": ["later version"]}
        about["created"] = 3

    packed = retold(header().pack(), change, **spelling)
    got = unpack_header(packed, len(packed) + 3 * 8192)
    assert dataclasses.replace(got, slabs=()) == dataclasses.replace(header(), created=3, slabs=())
    assert got.header_bytes == len(packed)
    assert [slab.offset for slab in got.slabs] == [len(packed) + n * 8192 for n in range(3)]
    assert got.pack() == got.with_checksums([11, 22, 33]).pack() == packed


def test_a_header_of_another_size_than_its_fields_take_is_refused():
    packed = header().pack() + bytes(4096)
    packed = sealed(packed[:20] + struct.pack("<I", 8192) + packed[24:])
    with pytest.raises(CorruptEntryError, match="8192 bytes"):
        unpack_header(packed, None)


@pytest.mark.parametrize("field", ["offset", "length"])
@pytest.mark.parametrize("layer", range(3))
def test_slabs_that_do_not_follow_each_other_are_refused(layer, field):
    at = 32 + 24 * layer + 8 * (field == "length")
    packed = header().pack()
    [value] = struct.unpack_from("<Q", packed, at)
    with pytest.raises(CorruptEntryError, match="slab table"):
        unpack_header(resealed(packed, at, struct.pack("<Q", value + 4096)), None)


FIELDS = ["key", "layers", "kv_heads", "head_dim", "dtype", "tokens"]
FIELDS += ["codec", "model", "source", "context_tokens", "context_policy", "created"]


@pytest.mark.parametrize("field", FIELDS)
def test_a_description_that_lacks_a_field_is_damaged(field):
    with pytest.raises(CorruptEntryError, match=field):
        unpack_header(retold(header().pack(), lambda about: about.pop(field)), None)


@pytest.mark.parametrize("value", [None, True, [], {}, -1, 2.5, "", 10**400, float("nan"), "\ud800"])
@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_another_type_or_out_of_range_is_never_used(field, value):
    packed = retold(header().pack(), lambda about: about.update({field: value}))
    if (field, value) in [("context_policy", ""), ("context_policy", "\ud800"), ("created", 2.5), ("created", -1)]:
        assert getattr(unpack_header(packed, None), field) == value
        return
    foreign = isinstance(value, str) and field in ("codec", "dtype", "source")
    with pytest.raises(StoreFormatError if foreign else CorruptEntryError):
        unpack_header(packed, None)


@pytest.mark.parametrize("text", [b"[]", b"7", b"{", b"\xff{}", b"[" * 3000])
def test_a_description_that_is_no_object_is_damaged(text):
    packed = header().pack()
    at = 32 + 24 * 3
    body = packed[16:28] + struct.pack("<I", len(text)) + packed[32:at] + text
    with pytest.raises(CorruptEntryError, match="description"):
        unpack_header(sealed(packed[:16] + body.ljust(4080, b"\0")), None)


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
        {"created": float("inf")},
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
