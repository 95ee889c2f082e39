"""What a quality run asks: contexts, the questions of each, and the chunks a question finds in its prompt.

Here the contexts are invented worlds; :mod:`ragkv.eval.data` makes them of a user's own file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from ragkv.errors import InputError
from ragkv.eval.worlds import KINDS, Question, World, WorldDocument, make_world
from ragkv.eval.worlds_names import Dice, Split

Condition = Literal["shuffled", "ordered", "neighbour-missing"]
CONDITIONS: tuple[Condition, ...] = get_args(Condition)
Place = tuple[str, int]
Count = Callable[[WorldDocument], int]

OFFERED_PER_KIND = 8
ASKED_PER_KIND = 2
WORLDS_PER_QUESTION = 20
PROBED_WORLDS = 30


@dataclass(frozen=True)
class Draw:
    """Which questions are asked: ``limit`` of them, the kinds in equal numbers, at most two of a kind a world.

    Attributes:
        size: chunks of a world.
        context_tokens: in place of ``size``: a world's documents are grown to about so many tokens.
        seed: of the first world; the worlds after it count on.
        neighbours: only questions that need a chunk which has another one before it in its document, of those kinds
            that know such questions (corrections of one-chunk notices do not).
    """

    limit: int
    size: int
    context_tokens: int | None
    seed: int
    split: Split
    neighbours: bool = False


class CaseDocument(NamedTuple):
    """A document as its chunks."""

    id: str
    chunks: tuple[str, ...]


class CaseQuestion(NamedTuple):
    """A question, the answers that count as right, and the chunks it needs, as far as they are known."""

    text: str
    kind: str
    answers: tuple[str, ...]
    evidence: tuple[Place, ...] = ()


@dataclass(frozen=True)
class Case:
    """A context and what is asked over it."""

    seed: int
    documents: tuple[CaseDocument, ...]
    questions: tuple[CaseQuestion, ...]


def draw_cases(draw: Draw, count: Count) -> list[Case]:
    """The cases of a run; a function of ``draw`` alone, as long as ``count`` tells the same tokens of a document.

    Raises:
        InputError: worlds of this size hold too few questions of some kind.
    """
    kinds = _kinds(draw, count)
    left = {kind: draw.limit // len(kinds) + (i < draw.limit % len(kinds)) for i, kind in enumerate(kinds)}
    cases: list[Case] = []
    for seed in range(draw.seed, draw.seed + WORLDS_PER_QUESTION * draw.limit):
        if not any(left.values()):
            return cases
        world = _world(draw, seed, count)
        chosen = list(_choose(world, left, draw.neighbours))
        for question in chosen:
            left[question.kind] -= 1
        if chosen:
            documents = _trimmed(seed, world, chosen, draw.context_tokens, count)
            cases.append(Case(seed, tuple(map(_document, documents)), tuple(map(_question, chosen))))
    if any(left.values()):
        short = ", ".join(kind for kind, missing in left.items() if missing)
        raise InputError(f"worlds of {draw.size} chunks hold too few questions of kind {short}; raise --size")
    return cases


def _world(draw: Draw, seed: int, count: Count) -> World:
    """A world of ``size`` chunks, or one of at least ``context_tokens`` tokens."""
    wanted = draw.context_tokens
    if wanted is None:
        return make_world(seed, draw.split, draw.size, OFFERED_PER_KIND)
    size = max(4, wanted // 100)
    while True:
        world = make_world(seed, draw.split, size, OFFERED_PER_KIND)
        tokens = sum(count(document) for document in world.documents)
        if tokens >= wanted:
            return world
        size = math.ceil(size * max(1.1, wanted / tokens))


def _kinds(draw: Draw, count: Count) -> Sequence[str]:
    if not draw.neighbours:
        return KINDS
    worlds = [_world(draw, draw.seed + i, count) for i in range(PROBED_WORLDS)]
    kinds = [kind for kind in KINDS if any(_fitting(world, kind, draw.neighbours) for world in worlds)]
    if not kinds:
        raise InputError(f"no question on worlds of {draw.size} chunks has a neighbour to miss; raise --size")
    return kinds


def _choose(world: World, left: dict[str, int], neighbours: bool) -> Iterator[Question]:
    for kind, wanted in left.items():
        yield from _fitting(world, kind, neighbours)[: min(wanted, ASKED_PER_KIND)]


def _fitting(world: World, kind: str, neighbours: bool) -> list[Question]:
    return [q for q in world.questions if q.kind == kind and (not neighbours or neighbour(q))]


def _trimmed(
    seed: int, world: World, chosen: Sequence[Question], tokens: int | None, count: Count
) -> Sequence[WorldDocument]:
    """The world's documents, as many distractors, documents no question needs, left out that they have about
    ``tokens``."""
    if tokens is None:
        return world.documents
    needed = {document for question in chosen for document, _ in question.evidence}
    tokens -= sum(count(document) for document in world.documents if document.id in needed)
    for document in Dice(f"distractors/{seed}").shuffled(world.documents):
        if document.id not in needed and count(document) <= tokens:
            needed.add(document.id)
            tokens -= count(document)
    return [document for document in world.documents if document.id in needed]


def _document(document: WorldDocument) -> CaseDocument:
    return CaseDocument(document.id, tuple(document.chunks))


def _question(question: Question) -> CaseQuestion:
    return CaseQuestion(question.text, question.kind, (question.answer,), tuple(question.evidence))


def neighbour(question: Question | CaseQuestion) -> Place | None:
    """The chunk before the first one the question needs that has a chunk before it in its document."""
    return next(((document, chunk - 1) for document, chunk in question.evidence if chunk), None)


def in_order(case: Case, condition: Condition) -> list[CaseDocument]:
    """The documents as they stand in the prompt: in the world's or file's own order, or shuffled."""
    if condition == "ordered":
        return list(case.documents)
    return Dice(f"order/{case.seed}").shuffled(case.documents)


def groups(case: Case, condition: Condition) -> list[tuple[Place | None, Sequence[CaseQuestion]]]:
    """Questions that share a context, with the chunk it lacks."""
    if condition != "neighbour-missing":
        return [(None, case.questions)]
    by_place: dict[Place | None, list[CaseQuestion]] = {}
    for question in case.questions:
        by_place.setdefault(neighbour(question), []).append(question)
    return list(by_place.items())
