"""The value of one index row, and the walk that proves a whole index sound.

Run as a script (``python rows.py INDEX``) this walks an index and exits 0 only if all of it can be read: LMDB
trusts its file, and a damaged one can kill the process that reads it. It imports nothing of this package, so
that the child starts quickly.
"""

from __future__ import annotations

import struct
import sys
from collections import Counter
from typing import NamedTuple

import lmdb
import xxhash

DATABASES = (b"entries", b"order", b"models")
RANK = struct.Struct(">Q")
"""Big endian, so that LMDB's key order is the order of eviction."""
TALLY = struct.Struct("<QQ")
"""One model's entries and bytes."""

_ROW = struct.Struct("<QQdIHH")
_SUM = struct.Struct("<Q")


class Row(NamedTuple):
    """One entry as the index knows it. ``nbytes`` is what the disk counts; low ranks are evicted first."""

    nbytes: int
    tokens: int
    layers: int
    created: float
    model: str
    rank: int = 0
    flags: int = 0


def pack_row(key: bytes, row: Row) -> bytes:
    body = _ROW.pack(row.nbytes, row.rank, row.created, row.tokens, row.layers, row.flags) + row.model.encode()
    return body + _SUM.pack(xxhash.xxh3_64_intdigest(key + body))


def unpack_row(key: bytes, value: bytes) -> Row | None:
    """The row, or None when the value does not match its own checksum."""
    body = value[:-8]
    if len(body) <= _ROW.size or value[-8:] != _SUM.pack(xxhash.xxh3_64_intdigest(key + body)):
        return None
    nbytes, rank, created, tokens, layers, flags = _ROW.unpack_from(body)
    return Row(nbytes, tokens, layers, created, body[_ROW.size :].decode(), rank, flags)


def walk(path: str) -> bool:
    """Whether every row of the index can be read, matches its checksum, its rank and its model's tally."""
    with lmdb.open(path, mode=0o600, readonly=True, max_dbs=len(DATABASES), create=False, lock=True) as env:
        if env.info()["last_txnid"] == 0:
            return False  # created, and never written to
        entries, order, models = (env.open_db(name, create=False) for name in DATABASES)
        count: Counter[bytes] = Counter()
        nbytes: Counter[bytes] = Counter()
        with env.begin() as txn:
            for key, value in txn.cursor(entries):
                row = unpack_row(key, value)
                if row is None or txn.get(RANK.pack(row.rank), db=order) != key:
                    return False
                model = row.model.encode()
                count[model] += 1
                nbytes[model] += row.nbytes
            tallies = {model: TALLY.unpack(value) for model, value in txn.cursor(models)}
            return tallies == {m: (count[m], nbytes[m]) for m in count} and txn.stat(order)["entries"] == sum(
                count.values()
            )


if __name__ == "__main__":
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.exit(0 if walk(sys.argv[1]) else 1)
