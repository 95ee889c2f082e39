"""Answers under every method, ratio, policy and condition, to every question of a case.

Most methods choose what to repair without looking at the question. Their context is blended once for all questions
of a case, which are then answered together on top of it. Only methods that look at the question blend anew for each.
``each_alone`` is the plain twin of this shortcut: every question from scratch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from ragkv.checkpoint import Checkpoint, load_checkpoint
from ragkv.chunks import ChunkTokenizer, ChunkTokens
from ragkv.clock import Stopwatch
from ragkv.config import DEFAULT_SYSTEM_PROMPT
from ragkv.encode import encode
from ragkv.errors import PromptTooLongError
from ragkv.eval.branches import generate_all, slots_behind
from ragkv.eval.cases import Case, CaseDocument, CaseQuestion, Condition, Place, groups, in_order
from ragkv.eval.steps import drained
from ragkv.methods import CHECK_LAYER
from ragkv.pipeline import resolve_method
from ragkv.plan import PlannedChunk, PromptPlan, make_plan
from ragkv.prefill import FULL, Prefill, PrefillResult
from ragkv.retrievers import Chunk
from ragkv.store import ChunkStore
from ragkv.tokenizer import chunk_text, question_text
from ragkv.types import ContextPolicy, Method

# What these repair does not depend on the question, so that questions may share a blended context.
BLIND = frozenset({FULL, "none", "epic", "random", "hkvd"})
_Tokens = dict[str, list[ChunkTokens]]


class Setting(NamedTuple):
    """What is compared: a method at a ratio over chunks encoded under a policy."""

    method: Method
    ratio: float
    policy: ContextPolicy

    @property
    def work(self) -> Setting:
        """The setting that gives the same answers and stands for all that do, so that they are asked once.

        A repair of nothing is ``none``, and a full prefill looks at no stored KV.
        """
        method = resolve_method(self.method)
        if method == FULL:
            return Setting("full", 1.0, "document")
        return Setting(method if self.ratio else "none", self.ratio, self.policy)


class Mark(NamedTuple):
    """How one question was answered under one setting; :mod:`ragkv.eval.score` judges it.

    Attributes:
        golds: the answers that count as right.
        tokens: of the answer, without the one that ended it.
        share: recomputed token-layers ÷ all of the context's.
        cut: the context did not fit the model, and chunks at its end were left out.
        ttft_ms: only where the question was asked from scratch.
    """

    kind: str
    golds: tuple[str, ...]
    answer: str
    tokens: tuple[int, ...]
    share: float
    context_tokens: int
    chunks: int
    cut: bool = False
    ttft_ms: float | None = None


Marks = dict[tuple[Condition, Setting], list[Mark]]


@dataclass(frozen=True)
class Bench:
    """All that a process needs to take part in a run.

    Attributes:
        context_tokens: document context that a chunk is encoded behind.
        threads: of the CPU; 0 leaves it to torch.
        each_alone: ask every question from scratch.
        codec: of the stored KV.
        check_layer: of `hkvd`.
        answer_tokens: most tokens of an answer.
        cuts: a context that does not fit the model loses the chunks at its end, as a prompt of the pipeline's does; if
            not, it is an error.
    """

    model: str
    device: str
    dtype: str
    cache_dir: Path
    context_tokens: int
    threads: int
    settings: tuple[Setting, ...]
    conditions: tuple[Condition, ...]
    each_alone: bool = False
    codec: str = "raw"
    check_layer: int = CHECK_LAYER
    answer_tokens: int = 16
    cuts: bool = False

    @contextmanager
    def asker(self, folder: Path) -> Iterator[Asker]:
        """An asker with a model of its own, and a store in ``folder``."""
        if self.threads:
            torch.set_num_threads(self.threads)
        checkpoint = load_checkpoint(self.model, device=self.device, dtype=self.dtype, cache_dir=self.cache_dir)
        checkpoint.runner.check_layer = self.check_layer
        with ChunkStore(folder, capacity_bytes=64 << 30, ram_bytes=4 << 30, threads=1) as store:
            yield Asker(checkpoint, store, self)


class Asker:
    """Asks one case after the other. The store holds one case's chunks at a time."""

    def __init__(self, checkpoint: Checkpoint, store: ChunkStore, bench: Bench) -> None:
        self._runner, self._tokenizer, self._store = checkpoint.runner, checkpoint.tokenizer, store
        self._geometry, self._codec = checkpoint.runner.shape.geometry, bench.codec
        self._chunks = ChunkTokenizer(
            checkpoint.tokenizer,
            model_fingerprint=checkpoint.model_fingerprint,
            dtype=self._geometry.dtype,
            context_tokens=bench.context_tokens,
            codec=bench.codec,
        )
        self._works = list(dict.fromkeys(setting.work for setting in bench.settings))
        self._conditions, self._each_alone = bench.conditions, bench.each_alone
        self._ends = checkpoint.tokenizer.eos_ids | checkpoint.runner.eos_ids
        self._room, self._cuts = bench.answer_tokens, bench.cuts
        self._limit = checkpoint.runner.max_positions - self._room
        self._prefix, self._suffix = checkpoint.tokenizer.frame(DEFAULT_SYSTEM_PROMPT, [])

    def ask(self, case: Case) -> Marks:
        """Marks of all questions, for each condition and each setting's :attr:`Setting.work`, in one order.

        Raises:
            PromptTooLongError: the context does not fit the model, or not one chunk of it where it may be cut.
        """
        fitting = self._fitting(case)
        cut, case = fitting != case, fitting
        marks: Marks = {(condition, work): [] for condition in self._conditions for work in self._works}
        tokens = {
            policy: {d.id: self._chunks.document(d.chunks, policy) for d in case.documents}
            for policy in dict.fromkeys(work.policy for work in self._works)
        }
        with torch.inference_mode(), self._stored(tokens):
            for condition in self._conditions:
                documents = in_order(case, condition)
                for away, questions in groups(case, condition):
                    for work in self._works:
                        context = _context(documents, tokens[work.policy], away)
                        plans = [self._plan(context, question) for question in questions]
                        answers = self._answers(questions, plans, work, case.seed)
                        marks[condition, work] += [mark._replace(cut=cut) for mark in answers]
        return marks

    def _plan(self, context: Sequence[PlannedChunk], question: CaseQuestion) -> PromptPlan:
        return make_plan(self._prefix, context, self._prompt(question), budget=self._limit)

    def _prompt(self, question: CaseQuestion) -> tuple[int, ...]:
        return (*self._tokenizer.plain(question_text(question.text)), *self._suffix)

    def _fitting(self, case: Case) -> Case:
        """The case, without the chunks at the end of its context that do not fit beside its longest question."""
        question = max(len(self._prompt(question)) for question in case.questions)
        left = self._limit - len(self._prefix) - question
        documents = []
        for document in case.documents:
            kept: list[str] = []
            for chunk in document.chunks:
                left -= len(self._tokenizer.plain(chunk_text(chunk)))
                if left >= 0:
                    kept.append(chunk)
            if kept:
                documents.append(CaseDocument(document.id, tuple(kept)))
        if left < 0 and not (self._cuts and documents):
            advice = "shorten the question, or lower chunk_tokens" if self._cuts else "ask for a smaller context"
            raise PromptTooLongError(
                f"a prompt of {self._limit - left} tokens does not fit the {self._limit} that the model's positions "
                f"leave beside the answer; {advice}",
                tokens=self._limit - left,
                limit=self._limit,
            )
        return replace(case, documents=tuple(documents))

    @contextmanager
    def _stored(self, tokens: dict[ContextPolicy, _Tokens]) -> Iterator[None]:
        """The KV of all chunks in the store meanwhile."""
        keys: set[bytes] = set()
        for documents in tokens.values():
            for parts in documents.values():
                missing = {part.key for part in parts} - keys
                for group in self._chunks.groups(parts, missing):
                    for chunk in drained(encode(self._runner, group)):
                        self._store.put(
                            chunk.key,
                            self._geometry,
                            chunk.slabs,
                            tokens=chunk.tokens,
                            model="eval",
                            codec=self._codec,
                        )
                keys |= missing
        try:
            yield
        finally:
            self._store.delete(list(keys))

    def _answers(
        self, questions: Sequence[CaseQuestion], plans: Sequence[PromptPlan], work: Setting, seed: int
    ) -> list[Mark]:
        if self._each_alone or work.method not in BLIND:
            return [self._answer(q, plan, work, seed) for q, plan in zip(questions, plans, strict=True)]
        start = plans[0].question_start
        prompts = [plan.ids[start:] for plan in plans]
        room = slots_behind(prompts, self._room) - len(prompts[0])
        result = self._prefill(plans[0], work, seed, room, Stopwatch())
        answers = generate_all(self._runner, result.kv, start, prompts, ends=self._ends, room=self._room)
        return [
            self._mark(question, plan, result, tokens)
            for question, plan, tokens in zip(questions, plans, answers, strict=True)
        ]

    def _answer(self, question: CaseQuestion, plan: PromptPlan, work: Setting, seed: int) -> Mark:
        watch = Stopwatch()
        result = self._prefill(plan, work, seed, self._room, watch)
        token = int(result.logits.argmax())
        watch.lap("first_token")
        tokens: list[int] = []
        while token not in self._ends and len(tokens) < self._room:
            tokens.append(token)
            token = int(self._runner.decode(token, len(plan.ids) + len(tokens) - 1, result.kv).argmax())
        return self._mark(question, plan, result, tokens, watch.total_ms if self._each_alone else None)

    def _prefill(self, plan: PromptPlan, work: Setting, seed: int, room: int, watch: Stopwatch) -> PrefillResult:
        prefill = Prefill(
            self._runner,
            self._store,
            plan,
            strategy=work.method,
            ratio=work.ratio,
            room=room,
            watch=watch,
            seed=seed,
        )
        return drained(prefill.run())

    def _mark(
        self,
        question: CaseQuestion,
        plan: PromptPlan,
        result: PrefillResult,
        tokens: Sequence[int],
        ttft_ms: float | None = None,
    ) -> Mark:
        recomputed = sum(outcome.token_layers for outcome in result.outcomes)
        return Mark(
            kind=question.kind,
            golds=question.answers,
            answer=self._tokenizer.decode(tokens).strip(),
            tokens=tuple(tokens),
            share=recomputed / (plan.context_tokens * self._runner.shape.layers),
            context_tokens=plan.context_tokens,
            chunks=len(plan.spans),
            ttft_ms=ttft_ms,
        )


def _context(documents: Sequence[CaseDocument], tokens: _Tokens, away: Place | None) -> list[PlannedChunk]:
    planned: list[PlannedChunk] = []
    for document in documents:
        for ordinal, part in enumerate(tokens[document.id]):
            if (document.id, ordinal) != away:
                chunk = Chunk(f"{document.id}#{ordinal}", document.id, ordinal, document.chunks[ordinal])
                planned.append(PlannedChunk(chunk, len(planned) + 1, 0.0, part))
    return planned
