"""What a prompt's own words say of which stored KV is stale, and of which documents a question is about."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from ragkv.chunks import ChunkTokens
from ragkv.echoes import hints, scarcity
from ragkv.plan import PlannedChunk, PromptPlan, make_plan
from ragkv.retrievers import Chunk

PREFIX = (1, 2, 3)


def prompt(*chunks: tuple[str, int, int, Sequence[int]], question: Sequence[int] = (900, 901)) -> PromptPlan:
    """Of chunks as (document, ordinal, chunks it was encoded behind, tokens), in this order."""
    return laid_out(((name, ordinal + 1, behind, ids) for name, ordinal, behind, ids in chunks), question)  # no heads


def laid_out(chunks: Iterable[tuple[str, int, int, Sequence[int]]], question: Sequence[int]) -> PromptPlan:
    planned = []
    for rank, (name, ordinal, behind, ids) in enumerate(chunks, 1):
        tokens = ChunkTokens(tuple(ids), (), behind, "document", bytes([rank]) * 32)
        planned.append(PlannedChunk(Chunk(f"{name}-{ordinal}", name, ordinal, ""), rank, 1.0, tokens))
    return make_plan(PREFIX, planned, question, budget=10_000)


def plain(first: int, n: int = 10) -> list[int]:
    return list(range(first, first + n))


def best(plan: PromptPlan, n: int) -> list[int]:
    return sorted(np.argsort(-hints(plan), kind="stable")[:n].tolist())


def test_a_word_met_again_in_another_document_and_what_follows_it_is_stale():
    said, again = [*plain(100, 4), 50, 51, *plain(104, 4)], [*plain(200, 6), 50, 51, *plain(206, 6)]
    plan = prompt(("book", 0, 0, said), ("file", 0, 0, again))
    at = plan.spans[1].start + 7  # where the word ends
    assert best(plan, 5) == [*range(at - 1, at + 4)]
    assert hints(plan)[at] == hints(plan).max()
    first = plan.spans[0]
    # Where it stood first there was nothing to read yet.
    assert len({*hints(plan)[first.start : first.end].tolist()}) == 1


def test_a_single_token_that_recurs_is_no_word():
    plan = prompt(("book", 0, 0, [*plain(100), 50, *plain(110)]), ("file", 0, 0, [*plain(200), 50, *plain(210)]))
    assert len({*hints(plan)[plan.spans[1].start : plan.question_start].tolist()}) == 1


def test_no_word_crosses_a_border_of_chunks():
    plan = prompt(("a", 0, 0, [*plain(100), 50]), ("b", 0, 0, [51, *plain(200)]), ("c", 0, 0, [*plain(300), 50, 51]))
    assert len({*hints(plan)[plan.spans[1].start : plan.question_start].tolist()}) == 1


def test_what_a_chunk_was_encoded_behind_it_has_read():
    """The same word in the chunk before: stale only where the chunk was encoded without it."""
    said, again = [50, 51, *plain(100)], [*plain(200), 50, 51, *plain(210)]
    behind = hints(prompt(("d", 0, 0, said), ("d", 1, 1, again)))
    assert len({*behind[len(PREFIX) : -2].tolist()}) == 1
    apart = prompt(("d", 0, 0, said), ("d", 1, 0, again))
    weights, later = hints(apart), apart.spans[1]
    assert weights[later.start + 11] == weights.max()
    # And all of it lacks what an earlier chunk of its document might have said.
    assert weights[later.start] > weights[apart.spans[0].start]


def test_only_the_context_that_a_chunk_was_encoded_behind_counts():
    """Encoded behind one chunk of two: a word of the first is met anew in the third."""
    chunks = [("d", 0, 0, [50, 51, *plain(100)]), ("d", 1, 1, plain(200)), ("d", 2, 1, [*plain(300), 50, 51])]
    plan = prompt(*chunks)
    assert int(hints(plan).argmax()) == plan.spans[2].end - 1
    chunks[2] = ("d", 2, 2, chunks[2][3])
    assert int(hints(prompt(*chunks)).argmax()) != plan.spans[2].end - 1


def test_rare_words_weigh_more_than_common_ones():
    documents = [(str(n), 0, 0, [*plain(100 * n + 100), 50, 51, *plain(100 * n + 110, 4)]) for n in range(6)]
    documents.append(("last", 0, 0, [*plain(800), 50, 51, *plain(810), 100, 101, *plain(820)]))
    plan = prompt(*documents)
    weights, start = hints(plan), plan.spans[-1].start
    common, rare = start + 11, start + 23
    assert weights[rare] > weights[common] > weights[start]


def test_the_documents_that_share_words_with_the_question_come_first():
    words = [60, 61], [70, 71]
    documents = [(str(n), 0, 0, [*plain(100 * n + 100), *(words[n] if n < 2 else [7, 8]), 5]) for n in range(4)]
    plan = prompt(*documents, question=(900, *words[1], 901))
    weights = hints(plan)
    per_document = [weights[s.start : s.end].min() for s in plan.spans]
    assert per_document[1] > 5 * max(per_document[0], *per_document[2:])
    # What the question names stands out in it.
    assert int(weights.argmax()) == plan.spans[1].start + 11


def test_words_that_all_documents_hold_tell_none_apart():
    documents = [(str(n), 0, 0, [*plain(100 * n + 100), 60, 61]) for n in range(3)]
    plan = prompt(*documents, question=(60, 61, 900))
    starts = [hints(plan)[span.start] for span in plan.spans[1:]]
    assert max(starts) == pytest.approx(min(starts))


def test_a_chunk_that_lacks_no_other_is_hardly_stale():
    """The first of the prompt, and what was encoded behind it alone; not if an earlier turn brought chunks."""
    plan = prompt(("a", 0, 0, plain(100)), ("a", 1, 1, plain(200)), ("b", 0, 0, plain(300)), ("b", 1, 1, plain(400)))
    first, behind, apart, last = (float(hints(plan)[span.start]) for span in plan.spans)
    assert first == behind < 0.2 * apart
    assert apart == last
    later = replace(plan, standing=(plan.spans[0].chunk,))
    assert hints(later)[later.spans[0].start] == pytest.approx(apart)


def per_document(plan: PromptPlan) -> list[float]:
    """What a token that no word speaks of has in each one-chunk document."""
    return [float(hints(plan)[span.end - 1]) for span in plan.spans]


def test_a_document_whose_head_the_question_names_comes_before_one_that_mentions_it():
    named, mentions = [50, 51, *plain(100, 40)], [*plain(200, 30), 50, 51, *plain(300, 20)]
    other = ("other", 0, 0, plain(400, 40))
    for order in ([named, mentions], [mentions, named]):
        texts = [other, *((str(n), 0, 0, ids) for n, ids in enumerate(order)), ("z", 0, 0, plain(500, 40))]
        plan = laid_out(texts, question=(900, 50, 51, 901))
        parts = per_document(plan)
        assert parts[1 + order.index(named)] > 2 * parts[1 + order.index(mentions)] > 4 * parts[3]


@pytest.mark.parametrize("mentioned", ["later", "earlier"])
def test_relevance_is_handed_on_between_a_document_and_one_that_names_what_stands_in_its_head(mentioned):
    """The question names one document; that one names the head of another, or is itself named by its head's word."""
    head, body = [70, 71, *plain(100, 40)], [*plain(200, 30), 70, 71, *plain(300, 20)]
    asked = body if mentioned == "later" else head
    asked.extend([50, 51, *plain(600, 20)])
    texts = (("other", 0, 0, plain(400, 40)), ("h", 0, 0, head), ("m", 0, 0, body), ("z", 0, 0, plain(500, 40)))
    parts = per_document(laid_out(texts, question=(900, 50, 51, 901)))
    asked_at, linked_at = (2, 1) if asked is body else (1, 2)
    assert parts[asked_at] > 2 * parts[linked_at] > 4 * parts[3]


def test_words_that_stand_in_no_head_or_in_many_documents_link_none():
    body = [*plain(200, 30), 70, 71, *plain(300, 20)]
    other = [*plain(800, 30), 70, 71, *plain(850, 20)]
    texts = [("x", 0, 0, plain(400, 40)), ("m", 0, 0, [*body, 50, 51, *plain(600, 20)]), ("o", 0, 0, other)]
    texts.append(("z", 0, 0, plain(500, 40)))
    parts = per_document(laid_out(texts, question=(900, 50, 51, 901)))
    assert parts[2] == parts[3]
    texts[2] = ("o", 0, 0, [70, 71, *plain(800, 40)])
    few = per_document(laid_out(texts, question=(900, 50, 51, 901)))
    texts += [(f"more{n}", 0, 0, [70, 71, *plain(1000 + 100 * n, 40)]) for n in range(6)]
    many = per_document(laid_out(texts, question=(900, 50, 51, 901)))
    assert few[2] > 2 * many[2] > many[3]


def corrected(question: Sequence[int], order: Sequence[str] = ("other", "file", "notice")) -> tuple[PromptPlan, int]:
    """A file, 50 51, whose head gives its number, 70 71, and a notice that knows it by its number alone; and where that
    ends in the one that stands behind the other."""
    texts = {
        "other": plain(400, 40),
        "file": [50, 51, 70, 71, *plain(100, 40)],
        "notice": [*plain(200, 20), 70, 71, *plain(220, 30)],
    }
    plan = laid_out(((name, 0, 0, texts[name]) for name in order), question)
    return plan, plan.spans[2].start + texts[order[2]].index(71)


@pytest.mark.parametrize("order", [("other", "file", "notice"), ("other", "notice", "file")])
def test_what_leads_from_the_head_that_is_asked_about_stands_out_where_it_is_met_again(order):
    plan, number = corrected((900, 50, 51, 901), order)
    weights, heads = hints(plan), {place for span in plan.spans for place in range(span.start, span.start + 12)}
    best = [int(place) for place in np.argsort(-weights) if place not in heads - {number}]
    assert best[0] == number
    assert weights[number] > 0.9 * weights.max()
    # What the question names itself it will find itself, and nothing leads on from what it does not ask about.
    for question in ((900, 50, 51, 70, 71, 901), (900, 400, 401, 901)):
        others = hints(corrected(question, order)[0])
        assert others[number] < 0.6 * weights[number]


def test_a_word_that_recurs_all_over_leads_on_less_than_a_name():
    def led(times: int) -> float:
        """The hint of a word of the head that is asked about, where it stands so often in another document."""
        texts = {"other": plain(400, 40), "file": [50, 51, 70, 71, *plain(100, 40)]}
        texts["more"] = [token for n in range(times) for token in (70, 71, *plain(1000 + 20 * n, 18))]
        plan = laid_out(((name, 0, 0, text) for name, text in texts.items()), (900, 50, 51, 901))
        return float(hints(plan)[plan.spans[2].start + 1])

    assert led(1) == led(3)
    assert led(30) < 0.7 * led(8) < 0.5 * led(1)


def test_a_word_met_again_is_read_on_for_a_clause():
    plan, number = corrected((900, 50, 51, 901))
    weights = hints(plan)[number : plan.spans[2].end]
    above = (weights - weights[-1]) / (weights[0] - weights[-1])
    assert above[:16] == pytest.approx(0.8 ** np.arange(16), rel=1e-4)
    assert not above[16:].any()


def test_only_chunks_have_hints():
    plan = prompt(("a", 0, 0, [50, 51, *plain(100)]), question=(50, 51))
    weights = hints(plan)
    assert weights.shape == (len(plan.ids),)
    assert not weights[: len(PREFIX)].any()
    assert not weights[plan.question_start :].any()
    assert weights[len(PREFIX) : plan.question_start].all()
    assert not hints(make_plan(PREFIX, [], (9,), budget=100)).any()


def test_the_head_of_a_document_comes_before_the_rest_of_it():
    plan = laid_out((("d", 0, 0, plain(100, 40)), ("d", 1, 1, plain(200, 40))), question=(900,))
    assert best(plan, 12) == [*range(len(PREFIX), len(PREFIX) + 12)]
    # A document whose first chunk was not retrieved has no head here.
    weights = hints(laid_out((("d", 1, 0, plain(200, 40)),), question=(900,)))
    assert len({*weights[len(PREFIX) : -1].tolist()}) == 1


@pytest.mark.parametrize("n", [1, 2, 3])
def test_chunks_of_a_token_or_two(n):
    plan = prompt(("a", 0, 0, plain(100, n)), ("b", 0, 0, plain(100, n)), question=(100,))
    assert np.isfinite(hints(plan)).all()


def test_a_token_that_stands_once_is_scarcest_and_one_that_recurs_hardly_counts():
    plan = prompt(("a", 0, 0, [7, 50, 7, 51, 7, 52, 8, 8]), ("b", 0, 0, [7, 60, 7, 61, 7, 62]))
    scarce = dict(zip(plan.ids, scarcity(plan).tolist(), strict=True))
    assert scarce[50] == scarce[62] == 1.0
    assert 0.1 < scarce[7] < 0.3 < scarce[8] < 1.0
