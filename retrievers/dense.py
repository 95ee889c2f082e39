"""Dense ranking: exact inner-product search over unit vectors (FAISS ``IndexFlatIP``)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragkv.retrievers.ranking import Mask, Ranking, rank

Vectors = NDArray[np.float32]
_TIES = 32  # FAISS leaves the order of equal scores open; this many more are fetched and ordered by position


def normalized(vectors: Vectors) -> Vectors:
    """Rows scaled to unit length, float32, C-contiguous; zero rows stay zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.ascontiguousarray(vectors / np.where(norms == 0, 1, norms), dtype=np.float32)


class DenseIndex:
    """Cosine search over a fixed ``(n, dim)`` matrix. Immutable once built, so safe to share."""

    def __init__(self, vectors: Vectors) -> None:
        import faiss

        self._faiss: Any = faiss
        self._index = faiss.IndexFlatIP(vectors.shape[1])
        self._index.add(normalized(vectors))

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def search(self, query: Vectors, k: int, mask: Mask | None = None) -> Ranking:
        """The ``k`` rows closest to ``query`` ``(dim,)``, among those where ``mask`` ``(n,)`` is true.

        A zero query knows nothing and finds nothing.
        """
        available = len(self) if mask is None else int(mask.sum())
        if not available or not np.any(query):
            return []
        scores, positions = self._index.search(
            normalized(query.reshape(1, -1)), min(k + _TIES, available), params=self._selection(mask)
        )
        found = positions[0] >= 0
        return rank(positions[0][found], scores[0][found], k)

    def _selection(self, mask: Mask | None) -> Any:
        if mask is None:
            return None
        bits = np.packbits(mask, bitorder="little")
        return self._faiss.SearchParameters(sel=self._faiss.IDSelectorBitmap(bits))
