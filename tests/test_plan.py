"""What stands where in a prompt, and what is left out."""

from __future__ import annotations

import pytest

from ragkv.chunks import ChunkTokens
from ragkv.errors import PromptTooLongError
from ragkv.plan import PlannedChunk, PromptPlan, make_plan
from ragkv.retrievers import Chunk

PREFIX, QUESTION = (1, 2, 3), (8, 9)


def chunk(document: str, ordinal: int, rank: int, *, length: int = 4, context: int = 0) -> PlannedChunk:
    ids = tuple(range(100 * rank, 100 * rank + length))
    tokens = ChunkTokens(ids, (7,) * context, context, "document", b"%d" % rank)
    return PlannedChunk(Chunk(f"{document}#{ordinal}", document, ordinal, "text"), rank, 1 / rank, tokens)


def plan_of(*chunks: PlannedChunk, budget: int = 1000) -> PromptPlan:
    return make_plan(PREFIX, chunks, QUESTION, budget=budget)


def order(plan: PromptPlan) -> list[str]:
    return [span.chunk.chunk.id for span in plan.spans]


def test_documents_stand_by_best_rank_and_chunks_in_document_order():
    plan = plan_of(chunk("b", 5, 1), chunk("a", 2, 2), chunk("b", 1, 3), chunk("c", 0, 4), chunk("a", 0, 5))
    assert order(plan) == ["b#1", "b#5", "a#0", "a#2", "c#0"]


def test_the_order_given_does_not_matter():
    chunks = [chunk("b", 5, 1), chunk("a", 2, 2), chunk("b", 1, 3)]
    assert order(plan_of(*chunks)) == order(plan_of(*reversed(chunks)))


def test_spans_hold_their_chunks_tokens_and_fill_the_prompt_without_gaps():
    plan = plan_of(chunk("a", 1, 1, length=5), chunk("b", 0, 2, length=3), chunk("a", 0, 3))
    at = len(PREFIX)
    for span in plan.spans:
        assert span.start == at
        assert plan.ids[span.start : span.end] == span.chunk.tokens.ids
        at = span.end
    assert plan.ids[: len(PREFIX)] == PREFIX
    assert plan.question_start == at
    assert plan.ids[at:] == QUESTION
    assert tuple(plan.array.tolist()) == plan.ids
    assert plan.context_tokens == 12


def test_the_lowest_ranked_are_dropped_first():
    chunks = [chunk("a", i, rank, length=10) for i, rank in enumerate([4, 1, 3, 2])]
    plan = plan_of(*chunks, budget=5 + 20)
    assert order(plan) == ["a#1", "a#3"]
    assert [c.rank for c in plan.dropped] == [3, 4]
    assert len(plan.ids) == 25


def test_a_small_chunk_does_not_overtake_a_better_one_that_was_dropped():
    plan = plan_of(chunk("a", 0, 1, length=10), chunk("b", 0, 2, length=90), chunk("c", 0, 3, length=2), budget=50)
    assert order(plan) == ["a#0"]
    assert [c.rank for c in plan.dropped] == [2, 3]


def test_no_room_for_any_chunk_is_no_error():
    plan = plan_of(chunk("a", 0, 1), budget=5)
    assert (plan.ids, plan.spans, len(plan.dropped)) == (PREFIX + QUESTION, (), 1)


def test_a_question_over_the_budget_is_an_error_with_the_facts():
    with pytest.raises(PromptTooLongError, match=r"5 tokens.*room\s+for 4") as caught:
        plan_of(budget=4)
    assert caught.value.context == {"tokens": 5, "limit": 4}


@pytest.mark.parametrize(
    ("before", "present"),
    [([1, 2], True), ([0, 1, 2], True), ([2], False), ([1], False), ([], False)],
)
def test_context_is_present_when_every_chunk_of_it_stands_before(before, present):
    chunks = [chunk("a", ordinal, rank=ordinal + 2) for ordinal in before]
    plan = plan_of(*chunks, chunk("a", 3, 1, context=2))
    assert plan.spans[-1].context_present is present


def test_context_of_another_document_does_not_count():
    plan = plan_of(chunk("a", 1, 1, context=1), chunk("b", 0, 2))
    assert plan.spans[0].context_present is False


def test_context_that_was_dropped_is_not_present():
    plan = plan_of(chunk("a", 1, 1, length=20, context=1), chunk("a", 0, 2, length=20), budget=30)
    assert [(s.chunk.rank, s.context_present) for s in plan.spans] == [(1, False)]


def test_a_chunk_without_context_misses_none():
    assert plan_of(chunk("a", 3, 1)).spans[0].context_present
