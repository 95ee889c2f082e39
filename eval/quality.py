"""Answer quality of blending on invented worlds: exact match by kind of question, against full prefill."""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch

from ragkv.checkpoint import Checkpoint
from ragkv.chunks import ChunkTokenizer, ChunkTokens
from ragkv.clock import Stopwatch
from ragkv.config import DEFAULT_SYSTEM_PROMPT
from ragkv.encode import encode
from ragkv.eval.worlds import KINDS, Question, World, make_world
from ragkv.eval.worlds_names import Split
from ragkv.pipeline import resolve_method
from ragkv.plan import PlannedChunk, PromptPlan, make_plan
from ragkv.prefill import Prefill, PrefillResult
from ragkv.retrievers import Chunk
from ragkv.store import ChunkStore, Geometry
from ragkv.tokenizer import question_text
from ragkv.types import ContextPolicy, Method

Condition = Literal["shuffled", "ordered", "neighbour-missing"]
CONDITIONS: tuple[Condition, ...] = get_args(Condition)
MAX_ANSWER_TOKENS = 16
_Say = Callable[[str, int, int], None]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Setting:
    """What is compared: a method at a ratio over chunks encoded under a policy."""

    method: Method
    ratio: float
    policy: ContextPolicy


@dataclass
class _Score:
    right: list[bool]
    kinds: list[str]
    shares: list[float]
    ttft_ms: list[float]


class WorldsSuite:
    """Questions over invented worlds, each asked under every setting.

    Args:
        checkpoint: the model under test.
        size, seed, split: of the worlds; a world's chunks are all in the prompt, except where the condition
            takes the chunk before the one with the answer away.
    """

    def __init__(self, checkpoint: Checkpoint, *, size: int, seed: int, split: Split, context_tokens: int) -> None:
        self._checkpoint, self._size, self._seed, self._split = checkpoint, size, seed, split
        shape = checkpoint.runner.shape
        dtype = str(shape.dtype).removeprefix("torch.")
        self._geometry = Geometry(shape.layers, shape.kv_heads, shape.head_dim, dtype)
        self._tokens = ChunkTokenizer(
            checkpoint.tokenizer,
            model_fingerprint=checkpoint.model_fingerprint,
            dtype=dtype,
            context_tokens=context_tokens,
        )

    def run(self, settings: Sequence[Setting], *, condition: Condition, limit: int, say: _Say) -> list[dict[str, Any]]:
        """One row per setting, over the same ``limit`` questions."""
        scores = [_Score([], [], [], []) for _ in settings]
        with torch.inference_mode():
            for number, (world, question) in enumerate(self._questions(limit)):
                say("ask", number, limit)
                self._ask(world, question, settings, condition, random.Random(number), scores)
        say("ask", limit, limit)
        return [_row(setting, score, condition) for setting, score in zip(settings, scores, strict=True)]

    def _questions(self, limit: int) -> list[tuple[World, Question]]:
        """Kinds in turn, so that any limit holds about as many of each."""
        asked: list[tuple[World, Question]] = []
        seed = self._seed
        while len(asked) < limit:
            world = make_world(seed, self._split, self._size, per_kind=2)
            by_kind = {kind: [q for q in world.questions if q.kind == kind] for kind in KINDS}
            asked += [(world, by_kind[kind][0]) for kind in KINDS if by_kind[kind]]
            seed += 1
        return asked[:limit]

    def _ask(
        self,
        world: World,
        question: Question,
        settings: Sequence[Setting],
        condition: Condition,
        dice: random.Random,
        scores: list[_Score],
    ) -> None:
        documents = list(world.documents)
        if condition != "ordered":
            dice.shuffle(documents)
        away = _neighbour(question) if condition == "neighbour-missing" else None
        with tempfile.TemporaryDirectory() as folder:
            store = ChunkStore(folder, capacity_bytes=4 << 30, ram_bytes=1 << 30, threads=1)
            with store:
                plans: dict[ContextPolicy, PromptPlan] = {}
                for setting, score in zip(settings, scores, strict=True):
                    if setting.policy not in plans:
                        plans[setting.policy] = self._plan(store, documents, question, setting.policy, away)
                    text, result, ttft = self._answer(store, plans[setting.policy], setting)
                    layers = self._checkpoint.runner.shape.layers
                    done = sum(outcome.token_layers for outcome in result.outcomes)
                    score.shares.append(done / (plans[setting.policy].context_tokens * layers))
                    score.right.append(text == question.answer)
                    score.kinds.append(question.kind)
                    score.ttft_ms.append(ttft)

    def _plan(
        self,
        store: ChunkStore,
        documents: Sequence[Any],
        question: Question,
        policy: ContextPolicy,
        away: tuple[str, int] | None,
    ) -> PromptPlan:
        planned: list[PlannedChunk] = []
        for document in documents:
            tokens = self._tokens.document(document.chunks, policy)
            self._store(store, tokens)
            for ordinal, part in enumerate(tokens):
                if (document.id, ordinal) != away:
                    chunk = Chunk(f"{document.id}#{ordinal}", document.id, ordinal, document.chunks[ordinal])
                    planned.append(PlannedChunk(chunk, len(planned) + 1, 0.0, part))
        tokenizer = self._checkpoint.tokenizer
        prefix, suffix = tokenizer.frame(DEFAULT_SYSTEM_PROMPT, [])
        asked = (*tokenizer.plain(question_text(question.text)), *suffix)
        return make_plan(prefix, planned, asked, budget=self._checkpoint.runner.max_positions - MAX_ANSWER_TOKENS)

    def _store(self, store: ChunkStore, tokens: Sequence[ChunkTokens]) -> None:
        for group in self._tokens.groups(tokens, {part.key for part in tokens}):
            for chunk in _drain(encode(self._checkpoint.runner, group)):
                store.put(chunk.key, self._geometry, chunk.slabs, tokens=chunk.tokens, model="eval")

    def _answer(self, store: ChunkStore, plan: PromptPlan, setting: Setting) -> tuple[str, PrefillResult, float]:
        runner, watch = self._checkpoint.runner, Stopwatch()
        prefill = Prefill(
            runner,
            store,
            plan,
            strategy=resolve_method(setting.method),
            ratio=setting.ratio,
            room=MAX_ANSWER_TOKENS,
            watch=watch,
        )
        result = _drain(prefill.run())
        token = int(result.logits.argmax())
        watch.lap("first_token")
        ttft = watch.total_ms
        tokens: list[int] = []
        ends = self._checkpoint.tokenizer.eos_ids | runner.eos_ids
        while token not in ends and len(tokens) < MAX_ANSWER_TOKENS:
            tokens.append(token)
            token = int(runner.decode(token, len(plan.ids) + len(tokens) - 1, result.kv).argmax())
        return self._checkpoint.tokenizer.decode(tokens).strip(), result, ttft


def _neighbour(question: Question) -> tuple[str, int] | None:
    document, chunk = question.evidence[0]
    return (document, chunk - 1) if chunk > 0 else None


def _row(setting: Setting, score: _Score, condition: Condition) -> dict[str, Any]:
    by_kind = {kind: [r for r, k in zip(score.right, score.kinds, strict=True) if k == kind] for kind in KINDS}
    return {
        "method": setting.method,
        "ratio": setting.ratio,
        "context_policy": setting.policy,
        "condition": condition,
        "exact_match": statistics.fmean(score.right),
        "by_kind": {kind: statistics.fmean(right) for kind, right in by_kind.items() if right},
        "recomputed_share": statistics.fmean(score.shares),
        "median_ttft_ms": statistics.median(score.ttft_ms),
        "questions": len(score.right),
    }


def relate_to_full(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add ``relative_to_full``: exact match ÷ that of the ``full`` row, or None without one."""
    full = next((row["exact_match"] for row in rows if row["method"] == "full"), None)
    return [{**row, "relative_to_full": row["exact_match"] / full if full else None} for row in rows]


def _drain(steps: Generator[None, None, _T]) -> _T:
    """The result of a generator nobody else waits for."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
