"""A request as the engine thread sees it: what of a known beginning a prefill can go on from."""

from __future__ import annotations

import threading

import pytest

from ragkv.active import Active, admit
from ragkv.clock import Stopwatch
from ragkv.generation import Generation
from ragkv.lineage import Lineage
from ragkv.paged import BLOCK_TOKENS
from ragkv.plan import PlannedChunk, PromptPlan, Span
from ragkv.pool import Table
from ragkv.sampling import SamplingParams


def request(spans: list[tuple[int, int]], known: int) -> Active:
    chunk: PlannedChunk = None  # type: ignore[assignment]  # only where it stands matters here
    plan = PromptPlan(tuple(range(200)), tuple(Span(chunk, start, end, True) for start, end in spans), 190, ())
    generation = Generation(
        id="r",
        plan=plan,
        strategy="none",
        ratio=0.0,
        sampling=SamplingParams(),
        max_tokens=8,
        stop_ids=frozenset(),
        watch=Stopwatch(),
        on_token=lambda *_: None,
        on_finish=lambda _: None,
        on_error=lambda _: None,
        stop=threading.Event(),
    )
    admitted = admit(generation)
    admitted.table = Table(Lineage(), tokens=known)
    return admitted


@pytest.mark.parametrize(
    ("spans", "known", "usable"),
    [
        ([], 64, 64),
        ([], 70, 64),
        ([(20, 50)], 16, 16),
        ([(20, 50)], 48, 16),
        ([(20, 50)], 64, 64),
        ([(10, 30), (30, 60)], 48, 0),  # the second chunk begins in the middle of a block, and that in the first
        ([(10, 34), (34, 60)], 48, 0),
        ([(10, 32), (32, 60)], 48, 32),
        ([(16, 40), (40, 44), (44, 70)], 64, 16),
    ],
)
def test_what_is_usable_is_whole_blocks_and_no_part_of_a_chunk(spans, known, usable):
    assert request(spans, known).usable == usable


@pytest.mark.parametrize("known", range(0, 190, 7))
def test_no_chunk_is_ever_cut(known):
    spans = [(10, 30), (30, 31), (31, 64), (64, 100), (103, 150)]
    usable = request(spans, known).usable
    assert usable % BLOCK_TOKENS == 0
    assert usable <= known
    assert not any(start < usable < end for start, end in spans)
