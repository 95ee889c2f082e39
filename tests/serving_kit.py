"""An engine loop over a tiny model and a small pool, and what each request would answer if it were alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch

from ragkv.archive import Archive
from ragkv.clock import Stopwatch
from ragkv.controller import Controller
from ragkv.costs import Curve, Estimate, Machine
from ragkv.generation import Generation, TokenScores
from ragkv.lineage import Lineage
from ragkv.loop import EngineLoop
from ragkv.plan import PromptPlan
from ragkv.pool import KvPool
from ragkv.runner import ModelRunner
from ragkv.sampling import SamplingParams
from ragkv.scheduling import Scheduler
from ragkv.store import ChunkStore
from tests.families import make_runner

PATIENCE_S = 60.0
_NUMBERS = count()


@dataclass(eq=False)
class Asked:
    """A request that was submitted, and what came of it."""

    generation: Generation
    tokens: list[int] = field(default_factory=list)
    scores: list[TokenScores | None] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    ends: list[str | Exception] = field(default_factory=list)

    def wait(self) -> Asked:
        assert self.ended.wait(PATIENCE_S), "it never ended"
        return self


class Hall:
    """A loop, and the pool under it."""

    def __init__(self, loop: EngineLoop, pool: KvPool, runner: ModelRunner) -> None:
        self.loop, self.pool, self.runner = loop, pool, runner

    def ask(self, plan: PromptPlan | Sequence[int], max_tokens: int = 12, **fields: Any) -> Asked:
        if not isinstance(plan, PromptPlan):
            plan = plain_plan(plan)
        asked: Asked

        def told(token: int, scores: TokenScores | None) -> None:
            asked.tokens.append(token)
            asked.scores.append(scores)

        def ended(how: str | Exception) -> None:
            asked.ends.append(how)
            asked.ended.set()

        settings = {"strategy": "none", "ratio": 0.0, "sampling": SamplingParams(), **fields}
        generation = Generation(
            id=f"r{next(_NUMBERS)}",
            plan=plan,
            max_tokens=max_tokens,
            stop_ids=settings.pop("stop_ids", frozenset()),
            watch=Stopwatch(),
            on_token=told,
            on_finish=ended,
            on_error=ended,
            as_asked=True,
            **{"lineage": Lineage(), **settings},
        )
        asked = Asked(generation)
        self.loop.submit(generation)
        return asked

    def check(self) -> None:
        """Nothing is held by anybody any more, and the books are in order. Ends the loop."""
        self.loop.close()
        self.pool.poll()
        assert self.pool.check() == []
        assert self.pool.available == self.pool.memory.blocks
        assert self.loop.running == self.loop.queued == 0


def machine(*knots: tuple[int, float], overlapped: bool = False) -> Machine:
    """A layer over so many rows takes so many seconds; by default it is the same for any number that tests have."""
    curve = Curve(knots or [(4096, 1.0)], per_pair=0.0)
    return Machine(4, curve, curve, 0.0, {"ram": Estimate(1e-9)}, overlapped)


def plain_plan(ids: Sequence[int]) -> PromptPlan:
    return PromptPlan(tuple(ids), (), 0, ())


@contextmanager
def hall(
    root: Path,
    *,
    runner: ModelRunner | None = None,
    store: ChunkStore | None = None,
    blocks: int = 64,
    host_blocks: int = 128,
    preemption: str = "reuse",
    policy: str = "fcfs",
    max_running: int = 8,
    max_queued: int = 1000,
    max_preemptions: int = 100,
    stall_s: float = 0.0,
    late: bool = False,
    archived: bool = False,
    machine: Machine | None = None,
) -> Iterator[Hall]:
    """``archived``: idle conversations sink to ``root / "sessions"``. ``machine``: what layers take."""
    runner = runner or make_runner("llama")
    own = store or ChunkStore(root / "store", capacity_bytes=2**22, ram_bytes=0, threads=1)
    archive = None
    if archived:
        kept = ChunkStore(root / "sessions", capacity_bytes=2**22, policy="lru", ram_bytes=0, threads=1)
        archive = Archive(kept, "model float32")
    pool = KvPool(runner.shape, runner.device, blocks, host_blocks, preemption, archive)  # type: ignore[arg-type]
    ticks = count()
    scheduler = Scheduler(
        policy,
        clock=lambda: float(next(ticks)),
        max_running=max_running,
        max_queued=max_queued,
        max_queued_tokens=10**9,
        max_preemptions=max_preemptions,
        aging_s=1e9,
    )
    loop = EngineLoop(
        runner,
        own,
        pool,
        scheduler,
        max_running=max_running,
        on_missing=lambda _: None,
        stall_s=stall_s,
        controller=Controller(machine) if machine is not None else None,
    )
    loop._decodes.late = late
    try:
        yield Hall(loop, pool, runner)
    finally:
        loop.close()
        if store is None:
            own.close()


def alone(runner: ModelRunner, ids: Sequence[int], max_tokens: int) -> list[int]:
    """Greedy tokens of a prompt, one after the other, on a KV of its own."""
    with torch.inference_mode():
        kv = runner.new_kv(len(ids) + max_tokens)
        tokens = [int(runner.logits(runner.prefill(runner.tensor(list(ids)), kv)).argmax())]
        while len(tokens) < max_tokens:
            logits = runner.decode(tokens[-1], len(ids) + len(tokens) - 1, kv)
            tokens.append(int(logits.argmax()))
    return tokens
