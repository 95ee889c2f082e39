"""Where chunks' KV is kept: RAM and SSD tiers, bytes and numpy only.

with ChunkStore("kv", capacity_bytes=10 << 30, ram_bytes=1 << 30) as store:
    store.put(key, geometry, slabs, tokens=512, model=fingerprint)
    [entry] = store.open([key])
    for [slab] in store.open_layers([entry]):
        keys, values = entry.decode(slab)
"""

from ragkv.store.check import CheckReport
from ragkv.store.codecs import CODECS, Codec, Field
from ragkv.store.geometry import Geometry
from ragkv.store.header import SOURCES, EntryHeader, Slab
from ragkv.store.keys import FORMAT_VERSION, KEY_BYTES, chunk_key
from ragkv.store.reader import LayerReader, OpenEntry
from ragkv.store.stats import EntryInfo, StoreStats
from ragkv.store.store import ChunkStore

__all__ = [
    "CODECS",
    "FORMAT_VERSION",
    "KEY_BYTES",
    "SOURCES",
    "CheckReport",
    "ChunkStore",
    "Codec",
    "EntryHeader",
    "EntryInfo",
    "Field",
    "Geometry",
    "LayerReader",
    "OpenEntry",
    "Slab",
    "StoreStats",
    "chunk_key",
]
