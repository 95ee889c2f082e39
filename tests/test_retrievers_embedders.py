from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ragkv.errors import ConfigError, MissingExtraError
from ragkv.retrievers import SentenceTransformerEmbedder, SvdEmbedder, make_embedder

TEXTS = [
    "cats chase mice",
    "dogs chase cats",
    "stocks fell on monday",
    "bonds rose on monday",
    "mice fear cats",
]


def test_svd_puts_like_beside_like() -> None:
    embedder = SvdEmbedder.fit(TEXTS)
    vectors = embedder.embed_documents(TEXTS)
    assert vectors.shape == (5, embedder.dim)
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
    scores = vectors @ embedder.embed_query("a cat and a mouse")
    assert int(scores.argmax()) in (0, 4)
    assert scores[2] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("texts", [[], [""], ["one"], ["one two"], ["same", "same"], ["a b", ""]])
def test_svd_fits_tiny_collections(texts: list[str]) -> None:
    embedder = SvdEmbedder.fit(texts)
    vectors = embedder.embed_documents(texts)
    assert vectors.shape == (len(texts), embedder.dim)
    assert np.isfinite(vectors).all()


def test_svd_of_unknown_words_is_zero() -> None:
    assert not SvdEmbedder.fit(TEXTS).embed_query("zebra").any()
    assert not SvdEmbedder().embed_query("cat").any()


def test_svd_dimension_is_bounded() -> None:
    rng = np.random.default_rng(1)
    texts = [" ".join(f"word{i}" for i in rng.integers(0, 600, 12)) for _ in range(400)]
    assert SvdEmbedder.fit(texts).dim == 256


def test_svd_survives_a_round_trip_exactly() -> None:
    embedder = SvdEmbedder.fit(TEXTS)
    restored = SvdEmbedder.from_arrays(embedder.to_arrays())
    assert np.array_equal(restored.embed_documents(TEXTS), embedder.embed_documents(TEXTS))
    assert np.array_equal(SvdEmbedder.fit(TEXTS).embed_documents(TEXTS), embedder.embed_documents(TEXTS))


def test_svd_refuses_arrays_that_do_not_fit_together() -> None:
    arrays = SvdEmbedder.fit(TEXTS).to_arrays()
    with pytest.raises(ValueError, match="differ in length"):
        SvdEmbedder.from_arrays(arrays | {"idf": arrays["idf"][:-1]})


def test_a_missing_extra_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ragkv\[embeddings\]'"):
        make_embedder("some/model")


@pytest.mark.parametrize("spec", ["", " svd"])
def test_an_impossible_embedder_is_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match="embedder"):
        make_embedder(spec)


class FakeModel:
    """The part of SentenceTransformer's interface that is used."""

    def __init__(self, name: str, trust_remote_code: bool) -> None:
        if name == "missing":
            raise OSError("no such model")
        assert trust_remote_code is False

    def encode_document(self, texts: list[str], **_: Any) -> np.ndarray:
        return np.array([[3.0, 4.0]] * len(texts))

    def encode_query(self, texts: list[str], **_: Any) -> np.ndarray:
        return np.array([[0.0, 2.0]] * len(texts))


def test_sentence_transformers_are_normalised(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("sentence_transformers")
    module.SentenceTransformer = FakeModel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    embedder = make_embedder("some/model")
    assert isinstance(embedder, SentenceTransformerEmbedder)
    assert (embedder.name, embedder.dim, embedder.weight) == ("some/model", 2, 1.0)
    assert embedder.embed_documents(["a", "b"]).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)]] * 2
    assert embedder.embed_documents([]).shape == (0, 2)
    assert embedder.embed_query("q").tolist() == [0.0, 1.0]
    with pytest.raises(ConfigError, match="cannot load embedder 'missing'"):
        make_embedder("missing")
