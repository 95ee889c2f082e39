"""Answer quality of blending on invented worlds: every question under every method, ratio, policy and condition.

Most methods choose what to repair without looking at the question. Their context is blended once for all questions
of a world, which are then answered together on top of it. Only methods that look at the question blend anew for each.
``each_alone`` is the plain twin of this shortcut: every question from scratch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from ragkv.eval.cases import Case, Condition, Place, groups, in_order
from ragkv.eval.steps import drained
from ragkv.eval.worlds import Question, WorldDocument
from ragkv.pipeline import resolve_method
from ragkv.plan import PlannedChunk, PromptPlan, make_plan
from ragkv.prefill import FULL, Prefill, PrefillResult
from ragkv.retrievers import Chunk
from ragkv.store import ChunkStore
from ragkv.tokenizer import question_text
from ragkv.types import ContextPolicy, Method

MAX_ANSWER_TOKENS = 16
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
    """How one question fared under one setting. ``ttft_ms`` only where it was asked from scratch."""

    kind: str
    right: bool
    share: float
    context_tokens: int
    chunks: int
    ttft_ms: float | None


Marks = dict[tuple[Condition, Setting], list[Mark]]


@dataclass(frozen=True)
class Bench:
    """All that a process needs to take part in a run.

    Attributes:
        context_tokens: document context that a chunk is encoded behind.
        threads: of the CPU; 0 leaves it to torch.
        each_alone: ask every question from scratch.
        codec: of the stored KV.
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

    @contextmanager
    def asker(self, folder: Path) -> Iterator[Asker]:
        """An asker with a model of its own, and a store in ``folder``."""
        if self.threads:
            torch.set_num_threads(self.threads)
        checkpoint = load_checkpoint(self.model, device=self.device, dtype=self.dtype, cache_dir=self.cache_dir)
        with ChunkStore(folder, capacity_bytes=64 << 30, ram_bytes=4 << 30, threads=1) as store:
            yield Asker(checkpoint, store, self)


class Asker:
    """Asks one world after the other. The store holds one world's chunks at a time."""

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
        self._limit = checkpoint.runner.max_positions - MAX_ANSWER_TOKENS
        self._prefix, self._suffix = checkpoint.tokenizer.frame(DEFAULT_SYSTEM_PROMPT, [])

    def ask(self, case: Case) -> Marks:
        """Marks of all questions, for each condition and each setting's :attr:`Setting.work`, in one order.

        Raises:
            PromptTooLongError: the world does not fit the model.
        """
        marks: Marks = {(condition, work): [] for condition in self._conditions for work in self._works}
        tokens = {
            policy: {d.id: self._chunks.document(d.chunks, policy) for d in case.documents}
            for policy in dict.fromkeys(work.policy for work in self._works)
        }
        self._check(tokens[self._works[0].policy], max(len(self._prompt(question)) for question in case.questions))
        with torch.inference_mode(), self._stored(tokens):
            for condition in self._conditions:
                documents = in_order(case, condition)
                for away, questions in groups(case, condition):
                    for work in self._works:
                        context = _context(documents, tokens[work.policy], away)
                        plans = [self._plan(context, question) for question in questions]
                        marks[condition, work] += self._answers(questions, plans, work, case.seed)
        return marks

    def _plan(self, context: Sequence[PlannedChunk], question: Question) -> PromptPlan:
        return make_plan(self._prefix, context, self._prompt(question), budget=self._limit)

    def _prompt(self, question: Question) -> tuple[int, ...]:
        return (*self._tokenizer.plain(question_text(question.text)), *self._suffix)

    def _check(self, tokens: _Tokens, question: int) -> None:
        prompt = len(self._prefix) + sum(len(part.ids) for parts in tokens.values() for part in parts) + question
        if prompt > self._limit:
            raise PromptTooLongError(
                f"a world's prompt of {prompt} tokens does not fit the {self._limit} that the model's positions leave "
                "beside the answer; ask for a smaller context",
                tokens=prompt,
                limit=self._limit,
            )

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
        self, questions: Sequence[Question], plans: Sequence[PromptPlan], work: Setting, seed: int
    ) -> list[Mark]:
        if self._each_alone or work.method not in BLIND:
            return [self._answer(q, plan, work, seed) for q, plan in zip(questions, plans, strict=True)]
        start = plans[0].question_start
        prompts = [plan.ids[start:] for plan in plans]
        room = slots_behind(prompts, MAX_ANSWER_TOKENS) - len(prompts[0])
        result = self._prefill(plans[0], work, seed, room, Stopwatch())
        answers = generate_all(self._runner, result.kv, start, prompts, ends=self._ends, room=MAX_ANSWER_TOKENS)
        return [
            self._mark(question, plan, result, tokens)
            for question, plan, tokens in zip(questions, plans, answers, strict=True)
        ]

    def _answer(self, question: Question, plan: PromptPlan, work: Setting, seed: int) -> Mark:
        watch = Stopwatch()
        result = self._prefill(plan, work, seed, MAX_ANSWER_TOKENS, watch)
        token = int(result.logits.argmax())
        watch.lap("first_token")
        tokens: list[int] = []
        while token not in self._ends and len(tokens) < MAX_ANSWER_TOKENS:
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
        question: Question,
        plan: PromptPlan,
        result: PrefillResult,
        tokens: Sequence[int],
        ttft_ms: float | None = None,
    ) -> Mark:
        right = self._tokenizer.decode(tokens).strip() == question.answer
        recomputed = sum(outcome.token_layers for outcome in result.outcomes)
        share = recomputed / (plan.context_tokens * self._runner.shape.layers)
        return Mark(question.kind, right, share, plan.context_tokens, len(plan.spans), ttft_ms)


def _context(documents: Sequence[WorldDocument], tokens: _Tokens, away: Place | None) -> list[PlannedChunk]:
    planned: list[PlannedChunk] = []
    for document in documents:
        for ordinal, part in enumerate(tokens[document.id]):
            if (document.id, ordinal) != away:
                chunk = Chunk(f"{document.id}#{ordinal}", document.id, ordinal, document.chunks[ordinal])
                planned.append(PlannedChunk(chunk, len(planned) + 1, 0.0, part))
    return planned
