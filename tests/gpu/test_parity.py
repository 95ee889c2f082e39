"""Blends on a CUDA device beside the library's own forward there: every family, and heads and lengths as real models
have them, on both sides of the blocks that kernels work in."""

from __future__ import annotations

import os

import pytest
import torch

from tests.parity_kit import FACTORS, SHARE, VARIANTS, Bench, Case, share

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = "cuda"
DTYPES = ("float32", "bfloat16", "float16")
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 4096,
}
# Windows that end within a block of keys, at its border, and behind all shorter prompts.
FAMILIES = {
    "llama": {},
    "mistral-windowed": {"sliding_window": 64},
    "qwen2-windowed": {"sliding_window": 100},
    "qwen3": {},
}
BORDERS = (1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1000)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Makes benches; what they hold ends with the test."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    benches = []

    def make(**options):
        benches.append(Bench(tmp_path / str(len(benches)), DEVICE, **options))
        return benches[-1]

    yield make
    for one in benches:
        one.close()


@pytest.mark.parametrize("family", VARIANTS)
def test_a_third_of_any_two_circumstances(bench, family):
    cases = share(family, SHARE, {**FACTORS, "dtype": DTYPES})
    assert bench().faults(cases) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_and_keys_at_the_borders_of_blocks(bench, family, dtype):
    """A question over a chunk, and over nothing: rows at every border, keys at the next ones."""
    options = {"family": family, "dtype": dtype, "prefix": "none", "library": "sdpa"}
    cases = [
        Case(layout=str(keys - rows) if keys > rows else "zero", question=rows, strategy="none", kv="moved", **options)
        for rows in BORDERS
        for keys in (rows, *[border for border in BORDERS if border > rows][:3], rows + 1000)
    ]
    made = bench(**WIDE, **FAMILIES[family])
    assert checked(made, cases) == []
    assert (made.world(family, dtype).runner.plain_because is None) == (dtype != "float32")  # else it says little


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_scattered_rows_among_many_keys(bench, family, dtype):
    """Repaired rows, spoilt beforehand, in prompts of a thousand tokens, alone and in turns with others."""
    cases = [
        Case(family, str(tokens), strategy, "poisoned", codec, "system", dtype, company, "ssd", ratio, "sdpa")
        for tokens, ratio in ((1000, 0.015), (1000, 0.15), (991, 1.0), (129, 0.5))
        for strategy in ("epic", "random", "question", "hkvd")
        for codec, company in (("raw", False), ("int8", True))
    ]
    assert checked(bench(**WIDE, **FAMILIES[family]), cases) == []


def checked(bench: Bench, cases: list[Case]) -> list[str]:
    """A few at a time, of like length: the library's attention in full needs its memory."""
    cases = sorted(cases, key=lambda case: sum(piece.tokens for piece in case.pieces) + case.question)
    return [line for start in range(0, len(cases), 8) for line in bench.faults(cases[start : start + 8], seed=start)]
