"""What is read off a prompt's words is, bit for bit, what the plain twin reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from ragkv import echoes
from ragkv.checkpoint import BUNDLED_DIR
from ragkv.chunks import ChunkTokens
from ragkv.demo.run import HERE
from ragkv.plan import PlannedChunk, PromptPlan, make_plan
from ragkv.retrievers import Chunk
from ragkv.tokenizer import Tokenizer
from tests import plain_echoes

VOCABULARIES = {"few": 12, "some": 300, "many": 150_000, "huge": 2**31 - 1}


def same(plan: PromptPlan) -> None:
    for name in ("hints", "scarcity"):
        found, expected = getattr(echoes, name)(plan), getattr(plain_echoes, name)(plan)
        assert found.dtype == expected.dtype == np.float32
        np.testing.assert_array_equal(found.view(np.int32), expected.view(np.int32), name)


def planned(rank: int, name: str, ordinal: int, behind: int, ids: Sequence[int]) -> PlannedChunk:
    tokens = ChunkTokens(tuple(ids), (), behind, "document", rank.to_bytes(32, "big"))
    return PlannedChunk(Chunk(f"{name}-{ordinal}", name, ordinal, ""), rank, 1.0, tokens)


def some_plan(rng: Random, vocabulary: int) -> PromptPlan:
    """Documents of neighbouring chunks or with gaps, encoded behind some or none; passages said again, chunks twice,
    chunks of one token; with and without a prefix, and words of any of them in the question."""
    said: list[int] = []

    def tokens(most: int) -> list[int]:
        ids = [rng.randrange(vocabulary) for _ in range(rng.randint(1, most))]
        if said and rng.random() < 0.7:
            start = rng.randrange(len(said))
            ids[rng.randrange(len(ids)) :] = said[start : start + rng.randint(1, 8)]
        said.extend(ids)
        return ids

    prefix, most = tokens(40) if rng.random() < 0.7 else [], rng.choice([1, 3, 30, 200])
    chunks: list[PlannedChunk] = []
    for document in range(rng.choice([1, 2, 9])):
        for ordinal in sorted(rng.sample(range(6), rng.randint(1, 4))):
            ids = chunks[-1].tokens.ids if chunks and rng.random() < 0.1 else tokens(most)
            behind = rng.randint(0, ordinal)
            chunks.append(planned(len(chunks) + 1, str(document), ordinal, behind, ids))
            if rng.random() < 0.05:
                chunks.append(planned(len(chunks) + 1, str(document), ordinal, behind, ids))
    plan = make_plan(prefix, chunks, tokens(30), budget=100_000)
    return replace(plan, standing=(chunks[0],)) if rng.random() < 0.2 else plan


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("seed", range(3))
def test_any_prompt(vocabulary, seed):
    rng = Random(f"{vocabulary} {seed}")
    for _ in range(40):
        same(some_plan(rng, VOCABULARIES[vocabulary]))


@pytest.mark.parametrize("hashing", [0, 1, 1 << 62])
def test_words_whose_hashes_collide_are_told_apart(monkeypatch, hashing):
    """All of them, or nearly all: what is sorted then is the rule."""
    monkeypatch.setattr(echoes, "_GOLDEN", np.uint64(hashing))
    monkeypatch.setattr(echoes, "_MANY", 0)
    for seed in range(20):
        same(some_plan(Random(seed), 300))


def test_real_text():
    tokenizer = Tokenizer.load(BUNDLED_DIR)
    texts = [(path.stem, tokenizer.plain(path.read_text())) for path in sorted((HERE / "documents").iterdir())]
    rng = Random(0)
    for size in (16, 60, 400):
        for behind in (0, 2):
            rng.shuffle(texts)
            chunks = [
                planned(100 * n + at, name, at // size, min(at // size, behind), ids[at : at + size])
                for n, (name, ids) in enumerate(texts)
                for at in range(0, len(ids), size)
            ]
            question = tokenizer.plain("Who leads Project Relamis, and what is the number of the file?")
            same(make_plan(tokenizer.plain("Answer from these files."), chunks, question, budget=100_000))


def test_a_long_prompt_of_words_that_recur_as_in_text():
    rng = np.random.default_rng(0)
    ids = np.minimum(rng.zipf(1.3, 20_000), 2**40).tolist()
    chunks = [planned(n + 1, str(n // 3), n % 3, n % 3, ids[512 * n : 512 * n + 512]) for n in range(38)]
    same(make_plan(ids[-80:-40], chunks, ids[-40:], budget=100_000))


def test_a_prompt_without_chunks():
    same(make_plan((), [], (7,), budget=10))
    same(make_plan((1, 2, 1), [], (7, 7), budget=10))
