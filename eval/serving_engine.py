"""The real engine's loop for a measurement: fresh pool and scheduler, prompts of token ids, no texts."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch

from ragkv.checkpoint import Checkpoint
from ragkv.clock import Stopwatch
from ragkv.config import Settings
from ragkv.controller import Controller
from ragkv.eval.serving_drive import Callbacks, Driver
from ragkv.eval.steps import drained
from ragkv.eval.workloads import Ask, Piece, Workload
from ragkv.generation import Generation, TokenScores
from ragkv.lineage import Lineage
from ragkv.loop import EngineLoop
from ragkv.machine import measure_machine
from ragkv.paged import block_bytes
from ragkv.pipeline import resolve_method
from ragkv.plan import PlannedChunk, make_plan
from ragkv.pool import KvPool
from ragkv.pool_size import pool_sizes
from ragkv.sampling import SamplingParams
from ragkv.scheduling import Scheduler
from ragkv.store import ChunkStore

_WARM_S = 120.0
_WARM_PROMPT = 32


class Sizes(NamedTuple):
    """Of the pool: blocks on the device and in RAM, bytes of one."""

    blocks: int
    host_blocks: int
    block_bytes: int


def sizes(settings: Settings, checkpoint: Checkpoint) -> Sizes:
    """Raises ConfigError: not even a short conversation would fit."""
    return Sizes(*pool_sizes(settings, checkpoint.runner), block_bytes(checkpoint.runner.shape))


def scheduler_options(settings: Settings, requests: int) -> dict[str, Any]:
    """Of :class:`Scheduler`, but for its clock. Nothing is refused: a measurement wants to see how long it waits."""
    return {
        "policy": settings.scheduler,
        "max_running": settings.max_running,
        "max_queued": max(requests, settings.max_running),
        "max_queued_tokens": 1 << 40,
        "max_preemptions": settings.max_preemptions,
        "aging_s": settings.aging_s,
    }


@contextmanager
def opened_loop(
    settings: Settings, checkpoint: Checkpoint, store: ChunkStore, pool: Sizes, options: dict[str, Any]
) -> Iterator[EngineLoop]:
    """A loop with nothing in its pool, that knows what its machine takes; its memory is given back at the end."""
    runner = checkpoint.runner
    with torch.inference_mode():
        machine = drained(measure_machine(runner))
    loop = EngineLoop(
        runner,
        store,
        KvPool(runner.shape, runner.device, pool.blocks, pool.host_blocks, settings.preemption),
        Scheduler(clock=time.monotonic, **options),
        max_running=settings.max_running,
        stall_s=settings.stall_ms / 1000,
        on_missing=lambda spans: None,
        controller=Controller(machine),
    )
    try:
        yield loop
    finally:
        loop.close()
        del loop
        gc.collect()
        if runner.device.type == "cuda":
            torch.cuda.empty_cache()


class _Turn(NamedTuple):
    """A conversation after it: all its ``ids``, the keys of the chunks that stand in it, and the request."""

    ids: Sequence[int] = ()
    standing: frozenset[bytes] = frozenset()
    generation: Generation | None = None


_NOTHING = _Turn()


def piece_ids(seed: int, count: int, vocab: int) -> list[int]:
    """The same seed gives the same ids, and a longer piece begins with a shorter one's."""
    ids: list[int] = np.random.default_rng(seed).integers(vocab, size=count).tolist()
    return ids


class Prompts:
    """Makes the loop's requests: greedy, of exactly as many tokens as asked for. A later turn's prompt is the whole
    conversation.

    Args:
        chunks: what an ask's chunk numbers mean.
    """

    def __init__(self, settings: Settings, checkpoint: Checkpoint, chunks: Sequence[PlannedChunk] = ()) -> None:
        self._strategy, self._ratio = resolve_method(settings.method), settings.ratio
        self._budget, self._chunks = checkpoint.runner.max_positions, chunks
        self._vocab, self._names = checkpoint.runner.vocab_size, count()
        self._last: dict[int, _Turn] = {}

    def __call__(self, ask: Ask, priority: int, callbacks: Callbacks) -> Generation:
        before = self._last.pop(ask.after, _NOTHING) if ask.after is not None else _NOTHING
        chunks = [replace(self._chunks[number], rank=rank) for rank, number in enumerate(ask.chunks, 1)]
        new = [token for piece in ask.pieces for token in piece_ids(*piece, self._vocab)]
        plan = make_plan(before.ids, chunks, new, budget=self._budget - ask.output, standing=before.standing)
        said = list(plan.ids)

        def on_token(token: int, scores: TokenScores | None) -> None:
            said.append(token)
            callbacks.on_token()

        generation = Generation(
            id=f"eval-{next(self._names)}",
            plan=plan,
            strategy=self._strategy,
            ratio=self._ratio,
            sampling=SamplingParams(),
            max_tokens=ask.output,
            stop_ids=frozenset(),
            watch=Stopwatch(),
            on_token=on_token,
            on_finish=lambda reason: callbacks.on_finish(reason, len(plan.ids), generation.known_tokens),
            on_error=callbacks.on_error,
            as_asked=True,
            lineage=before.generation.lineage if before.generation else Lineage(),
            tenant=ask.tenant,
            weight=ask.weight,
            priority=priority,
        )
        standing = before.standing | {chunk.tokens.key for chunk in chunks}
        self._last[ask.number] = _Turn(said, standing, generation)
        return generation


def warm_up(loop: EngineLoop, prompts: Prompts, rows: int, longest: int) -> None:
    """Every number of rows once, and the longest prompt: kernels are chosen and graphs captured before anything counts.

    Seeds of its own, so that nothing that is measured finds its KV.
    """
    asks = [Ask(n, 0.0, (Piece(1 << 60 | n, _WARM_PROMPT),), 2 + 2 * n) for n in range(rows)]
    asks.append(Ask(rows, 0.0, (Piece(1 << 60 | rows, longest),), 4))
    Driver(loop, prompts, Workload(tuple(asks))).run(_WARM_S)
