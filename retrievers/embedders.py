"""Texts to vectors: a latent-semantic embedder fitted to the collection, or a sentence-transformers model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ragkv.errors import ConfigError, MissingExtraError
from ragkv.retrievers.bm25 import tokenize
from ragkv.retrievers.dense import Vectors, normalized

MAX_DIM = 256
_MAX_FEATURES = 2**16
_BATCH = 4096


class Embedder(Protocol):
    """Texts to unit vectors.

    ``name`` identifies the vector space: vectors of equal names are comparable and may be cached under the
    text's hash. ``weight`` is the vote the dense ranking gets in fusion, where BM25 has 1. Methods are
    thread-safe and deterministic; a text without a known word is the zero vector, which finds nothing.
    """

    @property
    def name(self) -> str: ...
    @property
    def dim(self) -> int: ...
    @property
    def weight(self) -> float: ...

    def embed_documents(self, texts: Sequence[str]) -> Vectors:
        """``(len(texts), dim)`` float32."""
        ...

    def embed_query(self, text: str) -> Vectors:
        """``(dim,)`` float32."""
        ...


class SvdEmbedder:
    """Latent semantic analysis (Deerwester et al. 1990): TF-IDF over words on its first singular vectors.

    Needs no model file and no download. It sees the same words as BM25, so it gets half a vote in fusion.
    ``SvdEmbedder()`` is unfitted: it knows no word, every text is the zero vector.
    """

    name = "svd"
    weight = 0.5

    def __init__(
        self, vocabulary: Sequence[str] = (), idf: Vectors | None = None, components: Vectors | None = None
    ) -> None:
        self._vocabulary = list(vocabulary)
        self._idf = np.zeros(0, np.float32) if idf is None else idf
        self._components = np.zeros((0, 1), np.float32) if components is None else components  # (words, dim)
        if len(self._vocabulary) != len(self._idf) or len(self._vocabulary) != len(self._components):
            raise ValueError("vocabulary, idf and components differ in length")
        self._vectorizer = _vectorizer(vocabulary=self._vocabulary) if self._vocabulary else None
        if self._vectorizer is not None:
            self._vectorizer.idf_ = self._idf

    @classmethod
    def fit(cls, texts: Sequence[str]) -> SvdEmbedder:
        """Fit to a corpus of any size; the dimension is at most 256, the number of texts and of words."""
        if not any(map(tokenize, texts)):
            return cls()
        from sklearn.utils.extmath import randomized_svd

        vectorizer = _vectorizer(max_features=_MAX_FEATURES)
        matrix = vectorizer.fit_transform(texts)
        dim = min(MAX_DIM, *matrix.shape)
        _, _, components = randomized_svd(matrix, n_components=dim, n_iter=5, random_state=0)
        words = vectorizer.get_feature_names_out().tolist()
        return cls(words, vectorizer.idf_.astype(np.float32), np.ascontiguousarray(components.T, np.float32))

    @property
    def dim(self) -> int:
        return int(self._components.shape[1])

    def embed_documents(self, texts: Sequence[str]) -> Vectors:
        vectors = np.zeros((len(texts), self.dim), np.float32)
        if self._vectorizer is not None:
            for start in range(0, len(texts), _BATCH):
                batch = self._vectorizer.transform(texts[start : start + _BATCH])
                vectors[start : start + _BATCH] = batch @ self._components
        return normalized(vectors)

    def embed_query(self, text: str) -> Vectors:
        vector: Vectors = self.embed_documents([text])[0]
        return vector

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Everything needed to restore the embedder exactly, as plain arrays."""
        words = np.frombuffer(json.dumps(self._vocabulary, ensure_ascii=False).encode(), np.uint8)
        return {"vocabulary": words, "idf": self._idf, "components": self._components}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> SvdEmbedder:
        """The inverse of ``to_arrays``. Raises KeyError or ValueError for arrays of another kind."""
        return cls(json.loads(arrays["vocabulary"].tobytes()), arrays["idf"], arrays["components"])


class SentenceTransformerEmbedder:
    """A sentence-transformers model from a folder or the hub; a model's own code is never run.

    Queries and documents get the prompts the model's configuration names for them, where it has any.
    Raises MissingExtraError without the ``embeddings`` extra, ConfigError where the model cannot be loaded.
    """

    weight = 1.0

    def __init__(self, path_or_id: str) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise MissingExtraError(
                f"embedder {path_or_id!r} needs sentence-transformers: pip install 'ragkv[embeddings]'",
                extra="embeddings",
                embedder=path_or_id,
            ) from error
        self.name = path_or_id
        try:
            self._model: Any = SentenceTransformer(path_or_id, trust_remote_code=False)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"cannot load embedder {path_or_id!r}: {error}; give the folder or hub id of a "
                "sentence-transformers model, or 'svd'",
                setting="embedder",
                value=path_or_id,
            ) from error
        self.dim = len(self.embed_query("dimension"))  # the method that tells it was renamed between versions

    def embed_documents(self, texts: Sequence[str]) -> Vectors:
        if not texts:
            return np.zeros((0, self.dim), np.float32)
        vectors = self._model.encode_document(list(texts), show_progress_bar=False, convert_to_numpy=True)
        return normalized(np.asarray(vectors, np.float32))

    def embed_query(self, text: str) -> Vectors:
        vectors = self._model.encode_query([text], show_progress_bar=False, convert_to_numpy=True)
        vector: Vectors = normalized(np.asarray(vectors, np.float32))[0]
        return vector


def make_embedder(spec: str) -> SvdEmbedder | SentenceTransformerEmbedder:
    """``"svd"`` gives an unfitted SvdEmbedder; anything else is a model's folder or hub id."""
    if not spec or spec != spec.strip():
        raise ConfigError(
            f"embedder = {spec!r} is not valid; use 'svd', a folder or a hub id",
            setting="embedder",
            value=spec,
        )
    return SvdEmbedder() if spec == SvdEmbedder.name else SentenceTransformerEmbedder(spec)


def _vectorizer(**options: Any) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(
        tokenizer=tokenize,
        token_pattern=None,
        lowercase=False,
        sublinear_tf=True,
        dtype=np.float32,
        **options,
    )
