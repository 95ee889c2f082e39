"""Lexical ranking: BM25 (Robertson & Zaragoza 2009) with scores computed ahead of time (BM25S, Lù 2024)."""

from __future__ import annotations

import json
import logging
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragkv.retrievers.ranking import Mask, Ranking, rank

# Scripts written without spaces are indexed by character: a run of them is a phrase, not a word.
_WORD = re.compile(r"[\u3040-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u9fff\uf900-\ufaff]+")
_NOT_PLURAL = ("us", "ss", "aies", "eies", "aes", "ees", "oes")


def tokenize(text: str) -> list[str]:
    """Case-folded words, English plurals reduced to their singular (Harman's S-stemmer, 1991)."""
    words: list[str] = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return [_singular(word) for word in words]


class Bm25Index:
    """A BM25 index over a fixed list of texts. Immutable once built, so safe to share between threads."""

    def __init__(self, scores: dict[str, Any] | None, vocabulary: dict[str, int], size: int) -> None:
        self._bm25 = _restore(scores, vocabulary) if scores is not None else None
        self._vocabulary = vocabulary
        self._size = size

    @classmethod
    def build(cls, texts: Sequence[str]) -> Bm25Index:
        """Index ``texts``; a text's position in the list is its position in rankings."""
        vocabulary: dict[str, int] = {}
        ids = [[vocabulary.setdefault(word, len(vocabulary)) for word in tokenize(text)] for text in texts]
        if not vocabulary:
            return cls(None, {}, len(texts))
        bm25 = _new_bm25()
        bm25.index((ids, vocabulary), create_empty_token=False, show_progress=False)
        return cls(bm25.scores, vocabulary, len(texts))

    def __len__(self) -> int:
        return self._size

    def search(self, query: str, k: int, mask: Mask | None = None) -> Ranking:
        """The best ``k`` texts that share a word with the query, where ``mask`` (len,) is true."""
        ids = [self._vocabulary[word] for word in tokenize(query) if word in self._vocabulary]
        if self._bm25 is None or not ids:
            return []
        scores: NDArray[np.float32] = self._bm25.get_scores_from_ids(ids)
        matches = scores > 0 if mask is None else (scores > 0) & mask
        positions = np.flatnonzero(matches)
        return rank(positions, scores[positions], k)

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Everything needed to restore the index, as plain arrays."""
        words = np.frombuffer(json.dumps(list(self._vocabulary), ensure_ascii=False).encode(), np.uint8)
        arrays: dict[str, NDArray[Any]] = {"size": np.array(self._size), "vocabulary": words}
        if self._bm25 is not None:
            arrays |= {name: self._bm25.scores[name] for name in ("data", "indices", "indptr")}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Bm25Index:
        """The inverse of ``to_arrays``. Raises KeyError or ValueError for arrays of another kind."""
        size = int(arrays["size"])
        words = json.loads(arrays["vocabulary"].tobytes())
        if not words:
            return cls(None, {}, size)
        scores = {name: arrays[name] for name in ("data", "indices", "indptr")} | {"num_docs": size}
        return cls(scores, {word: i for i, word in enumerate(words)}, size)


def _restore(scores: dict[str, Any], vocabulary: dict[str, int]) -> Any:
    # bm25s's own save() writes a folder of loose files without checksums; its state is these attributes.
    bm25 = _new_bm25()
    bm25.scores = scores
    bm25.vocab_dict = vocabulary
    bm25.unique_token_ids_set = set(vocabulary.values())
    bm25.nonoccurrence_array = None
    return bm25


def _new_bm25() -> Any:
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # importing it turns on its debug messages
    return bm25s.BM25()


def _singular(word: str) -> str:
    if len(word) < 4 or not word.endswith("s") or word.endswith(_NOT_PLURAL):
        return word
    return word[:-3] + "y" if word.endswith("ies") else word[:-1]
