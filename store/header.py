"""The self-describing header of an entry file. The table below is the format, byte by byte.

All integers are little endian. The header is a whole number of 4 KiB blocks; slabs follow, each on a 4 KiB
boundary, and the file ends on one.

====== ===== ==========================================================================================
offset bytes field
====== ===== ==========================================================================================
0      8     magic ``RAGKV\\0KV``
8      8     xxh3_64 of bytes 16 … header_bytes
16     4     format version
20     4     header_bytes, a multiple of 4096 (the four fields so far keep their meaning in every version)
24     4     number of layers ``n``
28     4     length ``j`` of the JSON description
32     24·n  per layer: offset in the file, length in bytes, xxh3_64 of the slab
32+24n j     JSON description, UTF-8; zeros up to header_bytes, the next multiple of 4096
====== ===== ==========================================================================================

The description may be spelt in any way and say more than this version knows: nothing but ``j`` depends on it.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, NamedTuple

import xxhash

from ragkv.errors import CorruptEntryError, StoreFormatError
from ragkv.store.codecs import CODECS
from ragkv.store.geometry import DTYPES, Geometry
from ragkv.store.keys import FORMAT_VERSION, KEY_BYTES

BLOCK = 4096
MAX_HEADER_BYTES = 1 << 20
MAX_TOKENS = (1 << 32) - 1
MAX_CREATED = 1 << 53
SOURCES = ("exact", "predicted", "int8", "image")

_MAGIC = b"RAGKV\0KV"
_PREFIX = struct.Struct("<8sQIIII")
_SLAB = struct.Struct("<QQQ")


def aligned(nbytes: int) -> int:
    """``nbytes`` rounded up to whole 4 KiB blocks."""
    return -(-nbytes // BLOCK) * BLOCK


class Slab(NamedTuple):
    """Where one layer's bytes lie in the file, and their xxh3_64."""

    offset: int
    nbytes: int
    checksum: int


@dataclass(frozen=True, slots=True)
class EntryHeader:
    """Everything needed to use an entry's bytes, and to rebuild its index row.

    ``source`` says who computed the KV, ``context_tokens`` behind how many tokens of its document (chosen by
    ``context_policy``) it was encoded. ``created`` is in seconds since 1970.
    """

    key: bytes
    geometry: Geometry
    tokens: int
    model: str
    codec: str = "raw"
    source: str = "exact"
    context_tokens: int = 0
    context_policy: str = "none"
    created: float = 0.0
    slabs: tuple[Slab, ...] = ()
    _description: bytes = field(init=False, repr=False, compare=False, default=b"")

    def __post_init__(self) -> None:
        if len(self.key) != KEY_BYTES:
            raise StoreFormatError(f"a chunk key has {KEY_BYTES} bytes, not {len(self.key)}; use chunk_key()")
        for name in ("codec", "source"):
            _check_name(name, getattr(self, name))
        if not isinstance(self.model, str) or not 0 < len(self.model.encode()) <= 255:
            raise StoreFormatError("a model fingerprint has 1 to 255 bytes", model=str(self.model)[:64])
        for name, least in (("tokens", 1), ("context_tokens", 0)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= MAX_TOKENS:
                message = f"{name} must be a whole number from {least} to {MAX_TOKENS}, not {value!r}"
                raise StoreFormatError(message, name=name, value=value)
        if not isinstance(self.context_policy, str):
            raise StoreFormatError("context_policy must be a string", context_policy=repr(self.context_policy))
        if type(self.created) not in (int, float) or not -MAX_CREATED <= self.created <= MAX_CREATED:
            raise StoreFormatError(f"created must be seconds since 1970, not {self.created!r}")

    @property
    def description(self) -> bytes:
        """The JSON as it stands in the file, whoever wrote it: a copy on another tier has the same bytes."""
        if not self._description:
            self._described(self._describe())
        return self._description

    @property
    def slab_bytes(self) -> int:
        """Bytes of each layer's slab."""
        return CODECS[self.codec].slab_bytes(self.geometry, self.tokens)

    @property
    def header_bytes(self) -> int:
        size = aligned(_PREFIX.size + _SLAB.size * self.geometry.layers + len(self.description))
        if size > MAX_HEADER_BYTES:
            message = f"the entry's header would take {size} bytes; at most {MAX_HEADER_BYTES} can be read again"
            raise StoreFormatError(message, layers=self.geometry.layers)
        return size

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole file: header and slabs, each in whole blocks."""
        return self.header_bytes + self.geometry.layers * aligned(self.slab_bytes)

    @property
    def offsets(self) -> range:
        """Where in the file each layer's slab begins."""
        start, step = self.header_bytes, aligned(self.slab_bytes)
        return range(start, start + self.geometry.layers * step, step)

    def with_checksums(self, checksums: Sequence[int]) -> EntryHeader:
        """The same header, naming the slabs as written."""
        at, nbytes = self.offsets, self.slab_bytes
        slabs = tuple(Slab(at.start + i * at.step, nbytes, checksum) for i, checksum in enumerate(checksums))
        return dataclasses.replace(self, slabs=slabs)._described(self.description)

    def pack(self) -> bytes:
        """The header as it stands in the file."""
        size = self.header_bytes
        body = struct.pack("<IIII", FORMAT_VERSION, size, len(self.slabs), len(self.description))
        body += b"".join(_SLAB.pack(*slab) for slab in self.slabs) + self.description
        body = body.ljust(size - 16, b"\0")
        return _MAGIC + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little") + body

    def _described(self, description: bytes) -> EntryHeader:
        object.__setattr__(self, "_description", description)
        return self

    def _describe(self) -> bytes:
        fields = {
            "key": self.key.hex(),
            **{name: getattr(self.geometry, name) for name in Geometry.__slots__},
            **{name: getattr(self, name) for name in _DESCRIBED},
        }
        return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


_DESCRIBED = ("tokens", "model", "codec", "source", "context_tokens", "context_policy", "created")
_NAMES: dict[str, Collection[str]] = {"dtype": DTYPES, "codec": CODECS, "source": SOURCES}


def header_size(first: bytes) -> int:
    """How many bytes the header whose first block is ``first`` has.

    Raises:
        CorruptEntryError: these are not the first bytes of an entry.
    """
    if len(first) < _PREFIX.size or first[:8] != _MAGIC:
        raise CorruptEntryError("the file does not begin with an entry's header")
    size: int = _PREFIX.unpack_from(first)[3]
    if size % BLOCK or not BLOCK <= size <= MAX_HEADER_BYTES:
        raise CorruptEntryError("the header's length is damaged", header_bytes=size)
    return size


def unpack_header(raw: bytes, file_bytes: int | None) -> EntryHeader:
    """Read a header from the first ``header_size`` bytes of a file of ``file_bytes`` bytes (None: unknown).

    Raises:
        CorruptEntryError: the bytes do not match their checksum, or each other, or lack a field.
        StoreFormatError: a sound header that is not for this version: of another format version, or with a codec,
            dtype or source it does not know, which the message names.
    """
    size = header_size(raw)
    _, checksum, version, _, layers, described = _PREFIX.unpack_from(raw)
    # Before the version: a flipped bit must not pass for a file from the future.
    if len(raw) < size or xxhash.xxh3_64_intdigest(raw[16:size]) != checksum:
        raise CorruptEntryError("the header does not match its checksum")
    if version != FORMAT_VERSION:
        raise StoreFormatError(
            f"entry format version {version}; this version reads {FORMAT_VERSION}; upgrade ragkv",
            version=version,
        )
    start = _PREFIX.size + _SLAB.size * layers
    if start + described > size:
        raise CorruptEntryError("the header's tables do not fit in it", layers=layers)
    slabs = tuple(map(Slab._make, _SLAB.iter_unpack(raw[_PREFIX.size : start])))
    header = _parse(raw[start : start + described], slabs)
    if layers != header.geometry.layers:
        raise CorruptEntryError("the header's slab table does not fit its geometry", layers=layers)
    if header.header_bytes != size:
        message = f"the header says it has {size} bytes; its fields take {header.header_bytes}"
        raise CorruptEntryError(message, header_bytes=size)
    if [slab[:2] for slab in slabs] != [*zip(header.offsets, repeat(header.slab_bytes), strict=False)]:
        raise CorruptEntryError("the header's slab table does not fit its geometry", layers=layers)
    if file_bytes not in (None, header.file_bytes):
        raise CorruptEntryError(
            f"the file has {file_bytes} bytes, its header says {header.file_bytes}", file_bytes=file_bytes
        )
    return header


def _parse(description: bytes, slabs: tuple[Slab, ...]) -> EntryHeader:
    try:
        fields: dict[str, Any] = json.loads(description.decode())
        names = {name: fields[name] for name in _NAMES}
        if not all(isinstance(value, str) for value in names.values()):
            raise TypeError(f"{', '.join(names)} must be strings")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptEntryError(f"the header's description cannot be read: {error!r}") from error
    for name, value in names.items():
        _check_name(name, value)
    try:
        key = bytes.fromhex(fields["key"])
        if key.hex() != fields["key"]:
            raise ValueError("the key is not in lower-case hex digits")
        geometry = Geometry(*(fields[name] for name in Geometry.__slots__))
        header = EntryHeader(key, geometry, slabs=slabs, **{name: fields[name] for name in _DESCRIBED})
    except (ValueError, KeyError, TypeError, StoreFormatError) as error:
        raise CorruptEntryError(f"the header's description cannot be used: {error!r}") from error
    return header._described(description)


def _check_name(name: str, value: object) -> None:
    known = _NAMES[name]
    if not isinstance(value, str) or value not in known:
        message = f"unknown {name} {value!r}; this version of ragkv knows {', '.join(known)}"
        raise StoreFormatError(message, **{name: value})
