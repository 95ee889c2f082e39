"""The indexes over a collection as it was at one moment, and their cache on disk.

The cache is derived data in one ``.npz`` file: replaced atomically, checked by its own CRCs, bound to the
database by its stamp, and rebuilt whenever it is missing, damaged or out of date. Vectors of unchanged chunks
are taken over from an outdated cache, so a small change costs a small number of embeddings.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragkv.retrievers.bm25 import Bm25Index
from ragkv.retrievers.dense import DenseIndex, Vectors
from ragkv.retrievers.embedders import Embedder, SvdEmbedder
from ragkv.retrievers.filters import Filters, compile_filters
from ragkv.retrievers.fusion import reciprocal_rank_fusion
from ragkv.retrievers.ranking import Mask
from ragkv.retrievers.types import Chunk, Hit, Metadata

log = logging.getLogger(__name__)

_FORMAT = "1"
_DEPTH = 100  # candidates each ranking brings to the fusion; fixed, so that a larger k only lengthens the list
_REFIT_BELOW = 4096  # chunks; under this a fit takes under a second
_REFIT_SHARE = 8  # a larger corpus is refitted when an eighth of its chunks is new to the fit
_CACHED_MASKS = 64

Arrays = Mapping[str, NDArray[Any]]
Indexes = tuple[Bm25Index, DenseIndex, Embedder]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Chunks and indexes of one stamp. Never changes, so queries run on it while the next one is built."""

    stamp: str
    chunks: list[Chunk]
    metadata: list[Metadata]  # one per document
    owner: NDArray[np.int64]  # (chunks,) position of each chunk's document in ``metadata``
    bm25: Bm25Index
    dense: DenseIndex
    embedder: Embedder
    _masks: dict[str, Mask] = field(default_factory=dict)

    def search(self, query: str, k: int, mode: str, filters: Filters | None) -> list[Hit]:
        """At most ``k`` hits; ``mode`` is ``fused``, ``bm25`` or ``dense``."""
        mask = self._mask(filters) if filters else None
        depth = max(k, _DEPTH) if mode == "fused" else k
        rankings = {}
        if mode != "dense":
            rankings["bm25"] = self.bm25.search(query, depth, mask)
        if mode != "bm25":
            rankings["dense"] = self.dense.search(self.embedder.embed_query(query), depth, mask)
        if mode != "fused":
            return [
                Hit(self.chunks[i], score, rank, {mode: rank})
                for rank, (i, score) in enumerate(rankings[mode], start=1)
            ]
        fused = reciprocal_rank_fusion(
            {name: [i for i, _ in ranking] for name, ranking in rankings.items()},
            weights={"dense": self.embedder.weight},
        )
        return [Hit(self.chunks[i], score, rank, ranks) for rank, (i, score, ranks) in enumerate(fused[:k], start=1)]

    def _mask(self, filters: Filters) -> Mask:
        """``(chunks,)`` of what the filter permits. The same few access filters come again and again."""
        permits = compile_filters(filters)
        key = json.dumps(filters, sort_keys=True, default=repr)
        mask = self._masks.get(key)
        if mask is None:
            documents = np.fromiter(map(permits, self.metadata), np.bool_, len(self.metadata))
            mask = documents[self.owner]
            if len(self._masks) < _CACHED_MASKS:
                self._masks[key] = mask
        return mask


def load_or_build(
    cache: Path, stamp: str, documents: Sequence[tuple[Metadata, Sequence[Chunk]]], embedder: Embedder
) -> Snapshot:
    """The snapshot of ``documents``, from the cache file where it is of this stamp, else built and cached.

    ``embedder`` is fitted here if it is an SvdEmbedder. Up to 4,096 chunks the result depends on the content
    alone; above, new chunks are projected by the older fit until they are an eighth of the collection.
    """
    chunks = [chunk for _, own in documents for chunk in own]
    owner = np.repeat(np.arange(len(documents)), np.array([len(own) for _, own in documents], np.int64))
    key = f"{_FORMAT}/{stamp}/{embedder.name}"
    try:
        indexes = _load(cache, key, len(chunks), embedder)
    except Exception as error:  # whatever damaged bytes can cause: the cache is never worth a failed query
        log.warning("index cache %s cannot be used (%s: %s); building it anew", cache, type(error).__name__, error)
        indexes = None
    bm25, dense, fitted = indexes or _build(cache, key, [chunk.index_text for chunk in chunks], embedder)
    return Snapshot(stamp, chunks, [metadata for metadata, _ in documents], owner, bm25, dense, fitted)


def _load(cache: Path, key: str, size: int, embedder: Embedder) -> Indexes | None:
    """The cached indexes; None where the cache is missing or of another key."""
    if not cache.exists():
        return None
    with _open(cache) as arrays:
        if _text(arrays["key"]) != key:
            return None
        bm25, dense = Bm25Index.from_arrays(_part(arrays, "bm25")), DenseIndex(arrays["vectors"])
        if isinstance(embedder, SvdEmbedder):
            embedder = SvdEmbedder.from_arrays(_part(arrays, "svd"))
        dim = arrays["vectors"].shape[1]
    if not len(bm25) == len(dense) == size or embedder.dim != dim:
        raise ValueError("its parts do not belong together")
    return bm25, dense, embedder


def _build(cache: Path, key: str, texts: Sequence[str], embedder: Embedder) -> Indexes:
    hashes = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts]
    old = _old_vectors(cache, embedder)
    if isinstance(embedder, SvdEmbedder):
        foreign = sum(digest not in old.in_fit for digest in hashes)
        if old.svd is None or len(texts) < _REFIT_BELOW or foreign * _REFIT_SHARE > len(texts):
            old, embedder = _OldVectors(), SvdEmbedder.fit(texts)
            old.in_fit.update(hashes)
        else:
            embedder = old.svd
    vectors = np.zeros((len(texts), embedder.dim), np.float32)
    missing = [i for i, digest in enumerate(hashes) if digest not in old.rows]
    for i, digest in enumerate(hashes):
        if digest in old.rows:
            vectors[i] = old.rows[digest]
    vectors[missing] = embedder.embed_documents([texts[i] for i in missing])
    bm25 = Bm25Index.build(texts)
    fit = embedder.to_arrays() if isinstance(embedder, SvdEmbedder) else {}
    _write(
        cache,
        {
            "key": _bytes(key),
            "embedder": _bytes(embedder.name),
            "hashes": np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 16),
            "in_fit": np.array([digest in old.in_fit for digest in hashes], np.bool_),
            "vectors": vectors,
            **{f"bm25.{name}": array for name, array in bm25.to_arrays().items()},
            **{f"svd.{name}": array for name, array in fit.items()},
        },
    )
    return bm25, DenseIndex(vectors), embedder


@dataclass(slots=True)
class _OldVectors:
    """What an outdated cache still knows: vectors by text hash, and which texts the fit has seen."""

    rows: dict[bytes, Vectors] = field(default_factory=dict)
    in_fit: set[bytes] = field(default_factory=set)
    svd: SvdEmbedder | None = None


def _old_vectors(cache: Path, embedder: Embedder) -> _OldVectors:
    try:
        with _open(cache) as arrays:
            if _text(arrays["embedder"]) != embedder.name:
                return _OldVectors()
            hashes = [row.tobytes() for row in arrays["hashes"]]
            rows = dict(zip(hashes, arrays["vectors"], strict=True))
            in_fit = {digest for digest, known in zip(hashes, arrays["in_fit"], strict=True) if known}
            svd = SvdEmbedder.from_arrays(_part(arrays, "svd")) if isinstance(embedder, SvdEmbedder) else None
    except Exception:  # missing, or damaged in any way: there is nothing to take over
        return _OldVectors()
    return _OldVectors(rows, in_fit, svd)


@contextlib.contextmanager
def _open(cache: Path) -> Iterator[Arrays]:
    # numpy leaves a path it opened itself open when the file is not a zip file
    with cache.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        yield arrays


def _write(cache: Path, arrays: Arrays) -> None:
    """Replace the cache file. A disk that is full or read-only costs only the time to build again."""
    try:
        for leftover in cache.parent.glob(f"{cache.name}.*.tmp"):
            if leftover.stat().st_mtime < time.time() - 3600:
                leftover.unlink(missing_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=cache.parent, prefix=f"{cache.name}.", suffix=".tmp", delete=False
        ) as file:
            try:
                np.savez(file, allow_pickle=False, **arrays)
                file.flush()
                os.replace(file.name, cache)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(file.name)
                raise
    except OSError as error:
        log.warning("cannot cache the index at %s (%s); it will be built again on the next start", cache, error)


def _part(arrays: Arrays, prefix: str) -> dict[str, NDArray[Any]]:
    return {name.removeprefix(f"{prefix}."): arrays[name] for name in arrays if name.startswith(f"{prefix}.")}


def _bytes(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode(), np.uint8)


def _text(array: NDArray[Any]) -> str:
    return array.tobytes().decode()
