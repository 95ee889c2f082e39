"""The indexes over a collection as it was at one moment, and their cache on disk.

The cache is derived data in one ``.npz`` file: replaced atomically, checked by its own CRCs, bound to the database by
its stamp, and rebuilt whenever it is missing, damaged or out of date. Vectors of unchanged chunks are taken over from
an outdated cache, so a small change costs a small number of embeddings.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import threading
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bm25 import Bm25Index
from .dense import DenseIndex, Vectors
from .embedders import Embedder, SentenceTransformerEmbedder, SvdEmbedder
from .filters import Filters, compile_filters
from .fusion import reciprocal_rank_fusion
from .ranking import Mask
from .types import Chunk, Hit, Metadata

log = logging.getLogger(__name__)

_FORMAT = "1"
_DEPTH = 100  # candidates each ranking brings to the fusion; fixed, so that a larger k only lengthens the list
_REFIT_BELOW = 4096  # chunks; under this a fit takes under a second
_REFIT_SHARE = 8  # a larger corpus is refitted when an eighth of its chunks is new to the fit
_CACHED_MASKS = 64

Arrays = Mapping[str, NDArray[Any]]


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
    cache: Path,
    stamp: str,
    documents: Sequence[tuple[Metadata, Sequence[Chunk]]],
    embedder: type[SvdEmbedder] | SentenceTransformerEmbedder,
) -> Snapshot:
    """The snapshot of ``documents``, from the cache file where it is of this stamp, else built and cached."""
    chunks = [chunk for _, own in documents for chunk in own]
    owner = np.repeat(np.arange(len(documents)), [len(own) for _, own in documents])
    key = f"{_FORMAT}/{stamp}/{embedder.name}/{len(chunks)}"
    old = _read(cache)
    fresh = old.get("key") is not None and bytes(old["key"]).decode() == key
    try:
        bm25, dense, fitted, arrays = _restore(old, embedder) if fresh else _build(chunks, old, embedder)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        log.warning("index cache %s cannot be used (%s); building it anew", cache, error)
        fresh = False
        bm25, dense, fitted, arrays = _build(chunks, {}, embedder)
    if not fresh:
        _write(cache, {**arrays, "key": np.frombuffer(key.encode(), np.uint8)})
    return Snapshot(stamp, chunks, [metadata for metadata, _ in documents], owner, bm25, dense, fitted)
