"""Where chunks' KV is kept: RAM and SSD tiers, bytes and numpy only.

with ChunkStore("kv", capacity_bytes=10 << 30, ram_bytes=1 << 30) as store:
    store.put(key, geometry, slabs, tokens=512, model=fingerprint)
    [entry] = store.open([key])
    for [slab] in store.open_layers([entry]):
        ...
"""

from ragkv.store.check import CheckReport
from ragkv.store.header import CODECS, SOURCES, EntryHeader, Geometry, Slab
from ragkv.store.keys import FORMAT_VERSION, KEY_BYTES, chunk_key
from ragkv.store.reader import LayerReader, OpenEntry
from ragkv.store.store import ChunkStore, EntryInfo, StoreStats

__all__ = [
    "CODECS",
    "FORMAT_VERSION",
    "KEY_BYTES",
    "SOURCES",
    "CheckReport",
    "ChunkStore",
    "EntryHeader",
    "EntryInfo",
    "Geometry",
    "LayerReader",
    "OpenEntry",
    "Slab",
    "StoreStats",
    "chunk_key",
]
