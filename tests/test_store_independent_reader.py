"""Entries of the store, read back by a reader that knows docs/store.md only."""

import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray

from ragkv.errors import CorruptEntryError, StoreFormatError
from ragkv.store import ChunkStore, Geometry
from ragkv.store.header import unpack_header
from tests.independent_reader import DamagedError, ForeignError, read_entry

Slabs = list[tuple[NDArray[Any], NDArray[Any]]]

CODECS = ["raw", "int8", "fp8"]
DTYPES = ["bfloat16", "float16", "float32"]
SHAPES = [(1, 1, 1, 1), (3, 2, 5, 7), (2, 3, 1, 13), (1, 4, 64, 33), (170, 1, 2, 3)]  # layers, heads, dim, tokens


def _key(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


def _slabs(geometry: Geometry, tokens: int) -> Slabs:
    """Of many magnitudes, with zeros of either sign, a channel of keys and a token of values that are all zero."""
    random = np.random.default_rng(tokens)
    shape = (2, tokens, geometry.kv_heads, geometry.head_dim)
    slabs: Slabs = []
    for _ in range(geometry.layers):
        both = random.standard_normal(shape) * np.exp2(random.integers(-20, 12, shape))
        both[random.random(shape) < 0.05] *= 0.0
        if geometry.head_dim > 1:
            both[0, :, 0, 0] = 0
        if tokens > 1:
            both[1, 0] = 0
        keys, values = both.astype(np.float32).astype(geometry.numpy_dtype)
        slabs.append((keys, values))
    return slabs


class Writer:
    """Writes entries to a store, one of each kind."""

    def __init__(self, folder: Path, store: ChunkStore) -> None:
        self._folder, self._store = folder, store

    def __call__(self, codec: str, dtype: str, shape: tuple[int, int, int, int]) -> tuple[bytes, Slabs, Slabs]:
        """The file of a new entry, what went into it, and what the store makes of it."""
        layers, heads, dim, tokens = shape
        geometry, key = Geometry(layers, heads, dim, dtype), _key(codec, dtype, shape)
        slabs = _slabs(geometry, tokens)
        self._store.put(key, geometry, slabs, tokens=tokens, model="a modél", codec=codec)
        [entry] = self._store.open([key])
        assert not isinstance(entry, Exception)
        decoded = []
        for [slab] in self._store.open_layers([entry]):
            assert not isinstance(slab, Exception)
            decoded.append(entry.decode(slab))
        return (self._folder / "entries" / key.hex()[:2] / f"{key.hex()}.kv").read_bytes(), slabs, decoded


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Writer]:
    folder = tmp_path_factory.mktemp("store")
    with ChunkStore(folder, capacity_bytes=1 << 26, ram_bytes=0) as store:
        yield Writer(folder, store)


def _assert_same(found: Slabs, expected: Slabs) -> None:
    assert len(found) == len(expected)
    for pair, other in zip(found, expected, strict=True):
        for array, wanted in zip(pair, other, strict=True):
            assert (array.shape, array.dtype) == (wanted.shape, wanted.dtype)
            assert array.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", CODECS)
def test_reads_what_the_store_reads(write: Writer, codec: str, dtype: str, shape: tuple[int, int, int, int]) -> None:
    data, given, decoded = write(codec, dtype, shape)
    description, layers = read_entry(data)
    names = ("layers", "kv_heads", "head_dim", "tokens", "codec", "dtype", "model", "key")
    assert [description[name] for name in names] == [*shape, codec, dtype, "a modél", _key(codec, dtype, shape).hex()]
    _assert_same(layers, decoded)
    if codec == "raw":
        _assert_same(layers, given)


@pytest.fixture(scope="module")
def sounds(write: Writer) -> dict[str, bytes]:
    """A small entry of two layers in every codec."""
    return {codec: write(codec, "bfloat16", (2, 1, 3, 5))[0] for codec in CODECS}


@pytest.fixture(scope="module")
def sound(sounds: dict[str, bytes]) -> bytes:
    """The one with the most fields."""
    return sounds["int8"]


def _table(data: bytes) -> list[tuple[int, int, int]]:
    return [struct.unpack_from("<QQQ", data, 32 + 24 * i) for i in range(2)]


def _sealed(data: bytes | bytearray) -> bytes:
    """With the header's checksum put right."""
    [header_bytes] = struct.unpack_from("<I", data, 20)
    return bytes(data[:8]) + struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(data[16:header_bytes]))) + data[16:]


def _patched(data: bytes, offset: int, field: bytes) -> bytes:
    return data[:offset] + field + data[offset + len(field) :]


def _described(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """With another description, everything else as it was."""
    [length] = struct.unpack_from("<I", data, 28)
    description = json.loads(data[80 : 80 + length])
    change(description)
    text = json.dumps(description).encode()
    return _sealed(_patched(data, 28, struct.pack("<I", len(text)) + data[32:80] + text.ljust(4096 - 80, b"\0")))


@pytest.mark.parametrize("codec", CODECS)
def test_every_flipped_byte_is_refused(sounds: dict[str, bytes], codec: str) -> None:
    sound = sounds[codec]
    covered = [range(4096), *(range(offset, offset + length) for offset, length, _ in _table(sound))]
    for at in (at for part in covered for at in part):
        with pytest.raises(DamagedError):
            read_entry(_patched(sound, at, bytes([sound[at] ^ (1 << at % 8)])))


@pytest.mark.parametrize("codec", CODECS)
def test_zeros_behind_slabs_are_not_looked_at(sounds: dict[str, bytes], codec: str) -> None:
    sound = sounds[codec]
    _, layers = read_entry(sound)
    for offset, length, _ in _table(sound):
        assert sound[offset + length : offset + 4096] == bytes(4096 - length)
        _assert_same(read_entry(_patched(sound, offset + length, b"\1"))[1], layers)


@pytest.mark.parametrize("codec", CODECS)
def test_another_length_is_refused(sounds: dict[str, bytes], codec: str) -> None:
    sound = sounds[codec]
    for length in [*range(0, len(sound), 61), 23, 24, 4095, 4096, 4097, 8192, len(sound) - 4096, len(sound) - 1]:
        with pytest.raises(DamagedError):
            read_entry(sound[:length])
    for more in (1, 4095, 4096, 8192):
        with pytest.raises(DamagedError):
            read_entry(sound + bytes(more))


@pytest.mark.parametrize(
    ("offset", "field"),
    [
        (0, b"RAGKV\0KW"),
        *((20, struct.pack("<I", size)) for size in (0, 1, 4095, 4097, 8192 + 64, (1 << 20) + 4096, 0xFFFFF000)),
        (20, struct.pack("<I", 8192)),
        *((24, struct.pack("<I", n)) for n in (0, 1, 3, 171, 0xFFFFFFFF)),
        *((28, struct.pack("<I", j)) for j in (0, 1, 4096 - 80, 4096 - 79, 0xFFFFFFFF)),
        *((32, struct.pack("<Q", at)) for at in (0, 4095, 4097, 8192, 1 << 63)),
        *((56, struct.pack("<Q", at)) for at in (4096, 8193, 12288)),
        *((40, struct.pack("<Q", size)) for size in (0, 1, 4096, (1 << 64) - 1)),
        (48, bytes(8)),
        (80, b"["),
        (80, b"\xff"),
    ],
)
def test_damage_under_a_right_checksum_is_refused(sound: bytes, offset: int, field: bytes) -> None:
    with pytest.raises(DamagedError):
        read_entry(_sealed(_patched(sound, offset, field)))


FIELDS = ["key", "layers", "kv_heads", "head_dim", "dtype", "tokens", "codec", "model", "source"]
FIELDS += ["context_tokens", "context_policy", "created"]


@pytest.mark.parametrize("name", FIELDS)
def test_a_missing_field_is_damage(sound: bytes, name: str) -> None:
    with pytest.raises(DamagedError):
        read_entry(_described(sound, lambda description: description.pop(name)))


@pytest.mark.parametrize("name", ["layers", "kv_heads", "head_dim", "tokens"])
@pytest.mark.parametrize("number", [17, 1 << 31, 1 << 80])
def test_numbers_that_do_not_fit_the_slabs_are_damage(sound: bytes, name: str, number: int) -> None:
    with pytest.raises(DamagedError):
        read_entry(_described(sound, lambda description: description.update({name: number})))


@pytest.mark.parametrize("version", [0, 2, 1 << 16, 0xFFFFFFFF])
def test_another_version_is_not_for_this_reader(sound: bytes, version: int) -> None:
    """Whatever it holds behind the header's first fields."""
    for data in (sound, _patched(sound, 24, b"\xff" * 200), sound[:4096], sound + b"more"):
        with pytest.raises(ForeignError):
            read_entry(_sealed(_patched(data, 16, struct.pack("<I", version))))
    with pytest.raises(DamagedError):
        read_entry(_patched(sound, 16, struct.pack("<I", version)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("codec", value) for value in ("int4", "", "RAW")),
        *(("dtype", value) for value in ("float64", "bf16")),
    ],
)
def test_an_unknown_name_is_not_for_this_reader(sound: bytes, name: str, value: str) -> None:
    foreign = _described(sound, lambda description: description.update({name: value}))
    with pytest.raises(ForeignError):
        read_entry(foreign)
    with pytest.raises(StoreFormatError, match=f"'{value}'"):
        unpack_header(foreign, len(foreign))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("codec", "dtype") for value in (8, None)),
        *((name, value) for name in ("layers", "kv_heads", "head_dim", "tokens") for value in (0, -1, "2", 2.5, True)),
        *(("context_tokens", value) for value in (-1, 1 << 32, "0", None)),
        *(("created", value) for value in ("now", None)),
    ],
)
def test_a_field_that_cannot_be_is_damage(sound: bytes, name: str, value: object) -> None:
    damaged = _described(sound, lambda description: description.update({name: value}))
    with pytest.raises(DamagedError):
        read_entry(damaged)
    with pytest.raises(CorruptEntryError):
        unpack_header(damaged, len(damaged))


@pytest.mark.parametrize("codec", CODECS)
def test_unknown_fields_are_ignored(sounds: dict[str, bytes], codec: str) -> None:
    sound = sounds[codec]
    description, layers = read_entry(_described(sound, lambda description: description.update(later=[1, {}])))
    assert description["later"] == [1, {}]
    _assert_same(layers, read_entry(sound)[1])
