"""Rows for training and scoring: invented worlds turned into packed token rows, made by worker processes.

A sample is one context with many questions behind it; a row packs samples up to its length. Losses fall on
answers and on a sample of the context's tokens (0.05 of an answer token, taken over all of them). A third loss asks
middle layers for hints, two tokens each: where a word is met for the second time in another document, what the first
place told of it; where the answer to a ``bridge`` begins, the name it leads over.
"""

from __future__ import annotations

import multiprocessing as mp
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ragkv.eval.worlds import KINDS, Link, Question, World, make_world
from ragkv.eval.worlds_names import Dice, Split, atlas
from ragkv.eval.worlds_prompt import PromptIds, chunk_text, context_chunks, question_text
from ragkv.eval.worlds_text import ATLAS_ASKS, NUMBER_ASKS

ROW = 16384
CONTEXT_WEIGHT = 0.05
# Contexts whose documents stand in any order; the others begin with notices and code book.
SHUFFLED = 0.2
# Chunks of a world by curriculum level, and how many questions of a kind are asked behind one context.
LEVELS = ((3, 4), (3, 7), (6, 11), (10, 18), (14, 30), (24, 48), (40, 100), (80, 215))
PER_KIND = {"direct": 5, "coref": 4, "bridge": 9, "gloss": 6, "compare": 3, "update": 6, "memory": 2}
# Loss weight of an answer token by kind: what is learned last counts more.
WEIGHTS = np.array([{"bridge": 3.0, "gloss": 2.0, "update": 2.0}.get(kind, 1.0) for kind in KINDS], np.float32)
# A long context is dear and a question cheap: from so many chunks on twice as many are asked.
LONG = 40

Ints = NDArray[np.int32]
Told = tuple[int, int]


@dataclass
class Chain:
    """Questions one behind the other, with the spans of their answers as (start, end, kind).

    ``steps`` are (position in the chain, the two tokens that a later middle layer should know there).
    """

    ids: list[int] = field(default_factory=list)
    spans: list[tuple[int, int, int]] = field(default_factory=list)
    steps: list[tuple[int, Told]] = field(default_factory=list)


@dataclass
class Sample:
    """``context`` ids, then the question chains behind it.

    ``links`` are (position in the context, the two tokens that a middle layer should know there).
    """

    context: list[int]
    links: list[tuple[int, Told]] = field(default_factory=list)
    chains: list[Chain] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.context) + sum(len(chain.ids) for chain in self.chains)


@dataclass(frozen=True)
class Row:
    """``tokens`` (4, length): ids, position, context number, turn. ``losses`` (4, 3/16 length): position,
    target, kind (-1 for context tokens), answer number; ``weights`` (3/16 length,), 0 where unused. ``hints``
    (4, 1/32 length): position, two targets, -1 where unused, and 1 where a later layer is asked."""

    tokens: Ints
    losses: Ints
    hints: Ints
    weights: NDArray[np.float32]


class SampleMaker:
    def __init__(self, tokenizer_file: Path) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self.ids = PromptIds(Tokenizer.from_file(str(tokenizer_file)))

    def training(self, seed: int, size: int) -> Sample:
        """A context as users' prompts vary it: titles as headings, chunks missing, documents in any order,
        follow-up questions, and now and then bare documents as they are encoded for the store."""
        dice = Dice(f"sample/{seed}")
        world = make_world(seed, "train", size, per_kind=20 if size >= LONG else 10)
        drop = 0.12 if dice.random() < 0.3 else 0.0
        chunks = context_chunks(world, dice, drop, shuffle=dice.random() < SHUFFLED)
        if dice.random() < 0.2:
            chunks = [(d, n, "# " + text.replace("\n", "\n\n", 1) if n == 0 else text) for d, n, text in chunks]
        there = {(doc, number) for doc, number, _ in chunks}
        asked = [q for q in world.questions if there.issuperset(q.evidence)]
        asked = _balanced(asked, {kind: n * (2 if size >= LONG else 1) for kind, n in PER_KIND.items()})
        if dice.random() < 0.04:
            return self.context([self.ids.bos], chunks, world.links)
        asked += _by_heart(dice)
        start = self.ids.no_system if dice.random() < 0.06 else self.ids.system
        turns = 3 if dice.random() < 0.12 else 1
        return self._asked(self.context(start, chunks, world.links), dice.shuffled(asked), turns)

    def scoring(self, world: World, per_kind: int) -> Sample:
        """Every chunk, documents in the world's order, one question a turn."""
        chunks = context_chunks(world, Dice(""), shuffle=False)
        asked = _balanced(world.questions, dict.fromkeys(KINDS, per_kind))
        return self._asked(self.context(self.ids.system, chunks, world.links), asked, 1)

    def context(self, start: list[int], chunks: list[tuple[str, int, str]], links: list[Link]) -> Sample:
        """``start``, then the chunks; the links among them, each where its word is met for the second time."""
        parts = self.ids.texts([chunk_text(text) for _, _, text in chunks])
        ends = np.cumsum([len(start), *(len(ids) for ids in parts)])
        place = {(doc, number): i for i, (doc, number, _) in enumerate(chunks)}
        sample = Sample([*start, *(i for ids in parts for i in ids)])
        words = iter(self.ids.texts([" " + text for link in links for text in (link.word, *link.tells)]))
        for link, word, *tells in zip(links, words, words, words, strict=False):
            where = [place.get(at, -1) for at in link.places]
            if min(where) < 0:
                continue
            later = where.index(max(where))
            at = _find(parts[where[later]], word)
            if at is not None:
                sample.links.append((int(ends[where[later]]) + at, _told(tells[1 - later])))
        return sample

    def _asked(self, sample: Sample, asked: list[Question], turns: int) -> Sample:
        pieces = self.ids.texts([t for q in asked for t in (question_text(q.text), q.answer, " " + q.via)])
        for number, question in enumerate(asked):
            if number % turns == 0:
                sample.chains.append(Chain())
            chain = sample.chains[-1]
            asks, answer, via = pieces[3 * number : 3 * number + 3]
            # The end token of the answer before is already there.
            chain.ids += [*(self.ids.next_turn[1:] if chain.ids else []), *asks, *self.ids.to_answer]
            if question.via:
                chain.steps.append((len(chain.ids) - 1, _told(via)))
            chain.spans.append((len(chain.ids), len(chain.ids) + len(answer) + 1, KINDS.index(question.kind)))
            chain.ids += [*answer, self.ids.end]
        return sample


def _by_heart(dice: Dice) -> Iterator[Question]:
    """Now and then a question that needs no document: a town's country, the larger of two numbers."""
    if dice.random() < 0.25:
        town = dice.pick(list(atlas()))
        yield Question(dice.pick(ATLAS_ASKS).format(t=town), atlas()[town], "memory", [])
    if dice.random() < 0.4:
        a, b = dice.number(10, 99), dice.number(10, 98)
        b += b >= a
        least = dice.random() < 0.5
        text = dice.pick(NUMBER_ASKS[least]).format(a=a, b=b)
        yield Question(text, str(min(a, b) if least else max(a, b)), "compare", [])


def _find(ids: list[int], word: list[int]) -> int | None:
    """Where the last token of ``word`` first stands in ``ids``."""
    n = len(word)
    return next((i + n - 1 for i in range(len(ids) - n + 1) if ids[i : i + n] == word), None)


def _told(ids: list[int]) -> Told:
    return ids[0], ids[1] if len(ids) > 1 else -1


def _balanced(questions: list[Question], per_kind: dict[str, int]) -> list[Question]:
    left, out = dict(per_kind), []
    for question in questions:
        if left[question.kind] > 0:
            left[question.kind] -= 1
            out.append(question)
    return out


def pack(samples: list[Sample], dice: Dice, row: int = ROW) -> Row:
    """One row of ``row`` tokens from samples that fit it together."""
    tokens = np.zeros((4, row), np.int32)
    tokens[2] = len(samples)
    answers: list[tuple[int, int, int, int]] = []
    context_at: list[NDArray[np.int64]] = []
    hints: list[tuple[int, int, int, int]] = []
    at = turn = number = 0
    for index, sample in enumerate(samples):
        length = len(sample.context)
        tokens[:, at : at + length] = _columns(sample.context, 0, index, 0)
        context_at.append(np.arange(at, at + length - 1))
        hints += [(at + where, *told, 0) for where, told in sample.links]
        at += length
        for chain in sample.chains:
            turn += 1
            n = len(chain.ids)
            tokens[:, at : at + n] = _columns(chain.ids, length, index, turn)
            for start, end, kind in chain.spans:
                answers += [(at + i - 1, chain.ids[i], kind, number) for i in range(start, end)]
                number += 1
            hints += [(at + where, *told, 1) for where, told in chain.steps]
            at += n
    losses, weights = _losses(tokens[0], answers, np.concatenate(context_at), dice)
    asked = np.full((4, row // 32), -1, np.int32)
    asked[0] = 0
    some = dice.sample(hints, row // 32)
    asked[:, : len(some)] = np.array(some, np.int32).reshape(-1, 4).T
    return Row(tokens, losses, asked, weights)


def _columns(ids: list[int], start: int, context: int, turn: int) -> Ints:
    """(4, n): ids, positions from ``start``, context number, turn."""
    n = len(ids)
    parts = (np.array(ids), np.arange(start, start + n), np.full(n, context), np.full(n, turn))
    return np.stack(parts).astype(np.int32)


def _losses(
    ids: Ints, answers: list[tuple[int, int, int, int]], context_at: NDArray[np.int64], dice: Dice
) -> tuple[Ints, NDArray[np.float32]]:
    total = len(ids) * 3 // 16
    losses, weights = np.zeros((4, total), np.int32), np.zeros(total, np.float32)
    n = min(len(answers), total)
    losses[:, :n] = np.array(answers[:n], np.int32).reshape(-1, 4).T
    weights[:n] = WEIGHTS[losses[2, :n]]
    room = min(total - n, len(context_at))
    picks = np.sort(np.array(dice.sample(context_at.tolist(), room), np.int32)) if room else np.zeros(0, np.int32)
    none = np.full(room, -1)
    losses[:, n : n + room] = np.stack((picks, ids[picks + 1], none, none))
    weights[n : n + room] = CONTEXT_WEIGHT * len(context_at) / max(room, 1)
    return losses, weights


def training_rows(maker: SampleMaker, seed: int, level_of: LevelOf, row: int = ROW) -> Iterator[Row]:
    """Endless rows. A sample that does not fit waits for the next row; tiny ones fill the gap."""
    dice, number = Dice(f"rows/{seed}"), seed * 10_000_000
    waiting: Sample | None = None
    while True:
        samples: list[Sample] = []
        room = row
        while room > 600:
            if waiting is not None and len(waiting) <= room:
                sample, waiting = waiting, None
            else:
                number += 1
                low, high = LEVELS[0] if waiting is not None else LEVELS[level_of(dice)]
                sample = maker.training(number, dice.number(low, high))
            if len(sample) <= room:
                samples.append(sample)
                room -= len(sample)
            elif waiting is None and len(sample) <= row:
                waiting = sample
        yield pack(samples, dice, row)


class LevelOf:
    """Draws a sample's level: mostly the current one of the curriculum, some of all below; once the last is
    reached, from the final mixture (shares of samples, so that tokens spread evenly over the lengths)."""

    FINAL = (0.07, 0.09, 0.16, 0.24, 0.19, 0.14, 0.07, 0.04)

    def __init__(self, level: Any) -> None:
        self.level = level

    def __call__(self, dice: Dice) -> int:
        top = int(self.level.value)
        if top < len(LEVELS) - 1:
            # Samples of the longer levels are rare: a long context is worth many short ones in tokens.
            share = 0.6 if top < 5 else 0.2
            return top if dice.random() < share else dice.number(0, top)
        draw = dice.random()
        for level, share in enumerate(self.FINAL):
            draw -= share
            if draw < 0:
                return level
        return 3


def scoring_rows(maker: SampleMaker, split: Split, size: int, worlds: int, per_kind: int, row: int = ROW) -> list[Row]:
    """Rows of ``worlds`` worlds of ``size`` chunks, the same for the same arguments; what does not fit a row
    is left out."""
    rows: list[Row] = []
    samples: list[Sample] = []
    for seed in range(worlds):
        sample = maker.scoring(make_world(seed, split, size, per_kind), per_kind)
        if len(sample.context) > row:
            continue
        while len(sample) > row:
            sample.chains.pop()
        if sum(map(len, samples)) + len(sample) > row:
            rows.append(pack(samples, Dice("score"), row))
            samples = []
        samples.append(sample)
    return [*rows, pack(samples, Dice("score"), row)] if samples else rows


class Workers:
    """Processes that fill a queue with rows; ``level`` is read by all of them."""

    def __init__(self, tokenizer_file: Path, seed: int, workers: int, row: int = ROW) -> None:
        context = mp.get_context("spawn")
        self.level = context.Value("i", 0)
        self.queue: mp.Queue[Row] = context.Queue(maxsize=96)
        self.processes = [
            context.Process(
                target=_work, args=(tokenizer_file, seed * 1000 + i, row, self.level, self.queue), daemon=True
            )
            for i in range(workers)
        ]
        for process in self.processes:
            process.start()

    def rows(self, count: int) -> list[Row]:
        return [self.queue.get(timeout=120) for _ in range(count)]

    def close(self) -> None:
        for process in self.processes:
            process.terminate()


def _work(tokenizer_file: Path, seed: int, row: int, level: Any, rows: mp.Queue[Row]) -> None:
    for made in training_rows(SampleMaker(tokenizer_file), seed, LevelOf(level), row):
        rows.put(made)
