from __future__ import annotations

import numpy as np
import pytest

from ragkv.retrievers import reciprocal_rank_fusion
from ragkv.retrievers.bm25 import Bm25Index, tokenize
from ragkv.retrievers.dense import DenseIndex

TEXTS = [
    "The cat sat on the mat.",
    "Dogs and cats play.",
    "Stocks fell on Monday.",
    "",
    "Dogs and cats play.",
]


def test_words_are_folded() -> None:
    assert tokenize("The CATS' story-book, 3 Ｃities!") == ["the", "cat", "story", "book", "3", "city"]
    assert tokenize("glass bus is gas") == ["glass", "bus", "is", "gas"]
    assert tokenize("東京 tower") == ["東", "京", "tower"]
    assert tokenize(" ... \n") == []


def test_bm25_finds_what_shares_a_word() -> None:
    index = Bm25Index.build(TEXTS)
    ranking = index.search("dog play", 10)
    assert [position for position, _ in ranking] == [1, 4]
    assert ranking[0][1] == ranking[1][1]
    assert index.search("dog play", 1) == ranking[:1]


@pytest.mark.parametrize("query", ["", "...", "zebra"])
def test_bm25_finds_nothing_where_no_word_is_shared(query: str) -> None:
    assert Bm25Index.build(TEXTS).search(query, 5) == []


@pytest.mark.parametrize("texts", [[], [""], ["...", " "]])
def test_bm25_over_nothing(texts: list[str]) -> None:
    index = Bm25Index.build(texts)
    restored = Bm25Index.from_arrays(index.to_arrays())
    assert index.search("cat", 3) == restored.search("cat", 3) == []
    assert len(restored) == len(texts)


def test_bm25_filters_before_ranking() -> None:
    mask = np.array([True, False, True, True, False])
    assert [position for position, _ in Bm25Index.build(TEXTS).search("cats", 1, mask)] == [0]


def test_bm25_survives_a_round_trip() -> None:
    index = Bm25Index.build(TEXTS)
    restored = Bm25Index.from_arrays(index.to_arrays())
    for query in ("cat on mat", "monday", "dog", "zebra"):
        assert restored.search(query, 5) == index.search(query, 5)


def test_dense_matches_plain_cosines() -> None:
    rng = np.random.default_rng(0)
    vectors, query = rng.normal(size=(200, 12)).astype(np.float32), rng.normal(size=12).astype(np.float32)
    cosines = vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)
    mask = rng.random(200) < 0.3
    index = DenseIndex(vectors)
    assert [position for position, _ in index.search(query, 7)] == np.argsort(-cosines)[:7].tolist()
    permitted = [i for i in np.argsort(-cosines).tolist() if mask[i]]
    assert [position for position, _ in index.search(query, 7, mask)] == permitted[:7]
    assert len(index.search(query, 500, mask)) == mask.sum()


def test_dense_orders_equal_scores_by_position() -> None:
    vectors = np.tile(np.array([0.3, 0.7, 0.1], np.float32), (20, 1))
    assert [position for position, _ in DenseIndex(vectors).search(vectors[0], 5)] == [0, 1, 2, 3, 4]


def test_dense_with_nothing_to_find() -> None:
    index = DenseIndex(np.eye(3, dtype=np.float32))
    assert index.search(np.zeros(3, np.float32), 2) == []
    assert index.search(np.ones(3, np.float32), 2, np.zeros(3, np.bool_)) == []
    assert DenseIndex(np.zeros((0, 4), np.float32)).search(np.ones(4, np.float32), 2) == []


def test_fusion_by_hand() -> None:
    fused = reciprocal_rank_fusion({"bm25": ["a", "b", "c"], "dense": ["c", "d"]})
    assert [item for item, _, _ in fused] == ["c", "a", "b", "d"]
    assert fused[0][1] == pytest.approx(1 / 63 + 1 / 61)
    assert fused[0][2] == {"bm25": 3, "dense": 1}
    assert fused[1][2] == {"bm25": 1}


def test_fusion_breaks_ties_by_the_order_of_rankings() -> None:
    assert [item for item, _, _ in reciprocal_rank_fusion({"x": ["p", "q"], "y": ["q", "p"]})] == ["p", "q"]
    assert [item for item, _, _ in reciprocal_rank_fusion({"x": ["p"], "y": ["q"]})] == ["p", "q"]


def test_fusion_weights_votes() -> None:
    fused = reciprocal_rank_fusion({"x": ["p"], "y": ["q"]}, weights={"x": 0.5})
    assert [item for item, _, _ in fused] == ["q", "p"]
