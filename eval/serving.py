"""``ragkv eval serving``: many requests on one engine, under every policy and way to preempt, at the same load."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ragkv.checkpoint import Checkpoint
from ragkv.config import Settings, load_settings
from ragkv.errors import InputError
from ragkv.eval.priorities import PriorityTrace
from ragkv.eval.rates import link_rate, ram_rate
from ragkv.eval.serving_drive import Driver, Say
from ragkv.eval.serving_engine import Prompts, Sizes, opened_loop, scheduler_options, sizes, warm_up
from ragkv.eval.serving_measures import Row
from ragkv.eval.serving_plan import Budget, Save, ServingPlan
from ragkv.eval.serving_simulated import as_json, simulated
from ragkv.eval.step_costs import StepCosts
from ragkv.eval.ttft import about, usable_model
from ragkv.eval.ttft_stores import Place, RandomChunks, opened_stores
from ragkv.eval.workloads import Shape, Workload
from ragkv.paged import BLOCK_TOKENS
from ragkv.plan import PlannedChunk
from ragkv.pool import Preemption
from ragkv.store import ChunkStore


def measure_serving(
    settings: Settings, plan: ServingPlan, *, say: Say, save: Save = lambda result: None
) -> dict[str, Any]:
    """``rows``, one for each load, policy, preemption and ``max_running``: the same requests, the model loaded once, a
    fresh pool each.

    ``save`` is called with what there is after every run.

    Raises:
        ConfigError: a setting that cannot be.
        InputError: the model's positions, or the pool, have no room for a request.
        ModelError, StoreError: as :func:`ragkv.eval.ttft.measure_ttft`.
    """
    clock = Budget(plan.budget_s)
    loads = plan.workloads()
    checkpoint = usable_model(settings, plan.shape.context_tokens + _chunk_room(loads, plan.shape))
    runs = list(product(loads, plan.policies, plan.preemptions, plan.max_running))
    result: dict[str, Any] = {"rows": [], **about(checkpoint.runner)}
    with _chunks(settings, checkpoint, loads, plan.shape, say) as (store, chunks):
        bench = _Bench(settings, plan, checkpoint, store, chunks)
        for done, (load, policy, preemption, most) in enumerate(runs):
            if (limit := clock.share(len(runs) - done)) <= 0:
                break
            row, costs = bench.run(load, loads[load], bench.settled(loads[load], policy, preemption, most), limit, say)
            result["rows"].append({**row, "device": result["device"]})
            if costs is not None:
                result["costs"] = as_json(costs)
            save(result)
    return result


def _chunk_room(loads: dict[str, Workload], shape: Shape) -> int:
    """Tokens of all chunks that may stand in one conversation."""
    asked = any(ask.chunks for workload in loads.values() for ask in workload.asks)
    return shape.pool * shape.chunk_tokens if asked else 0


@contextmanager
def _chunks(
    settings: Settings, checkpoint: Checkpoint, loads: dict[str, Workload], shape: Shape, say: Say
) -> Iterator[tuple[ChunkStore, Sequence[PlannedChunk]]]:
    """A store, with the pool of chunks where a load asks for any, in RAM."""
    folder, tokens = settings.data_dir.expanduser(), _chunk_room(loads, shape)
    if not tokens:
        with (
            TemporaryDirectory(prefix="ragkv-serving-") as empty,
            ChunkStore(Path(empty), capacity_bytes=1 << 20, ram_bytes=0) as store,
        ):
            yield store, ()
        return
    random, place = RandomChunks(checkpoint, shape.chunk_tokens), Place("ram", settings.kv_codec)
    with ExitStack() as stack:
        options: dict[str, Any] = {"folder": folder, "remote": None, "remote_timeout_ms": 1, "say": say}
        with torch.inference_mode():  # only here: a pool made in it could not be written by other threads
            stores = stack.enter_context(opened_stores(random, [tokens], [place], **options))
        yield stores[place], random.of(tokens, place.codec)


@dataclass(frozen=True)
class _Bench:
    settings: Settings
    plan: ServingPlan
    checkpoint: Checkpoint
    store: ChunkStore
    chunks: Sequence[PlannedChunk]

    def settled(self, workload: Workload, policy: str, preemption: Preemption, max_running: int | None) -> Settings:
        changes: dict[str, Any] = {
            "scheduler": policy or ("priority" if workload.updates else "vtc"),
            "preemption": preemption,
            "max_running": max_running or self.settings.max_running,
        }
        return load_settings(**{**self.settings.model_dump(), **changes})

    def run(
        self, load: str, workload: Workload, settings: Settings, limit: float, say: Say
    ) -> tuple[Row, StepCosts | None]:
        pool, options = sizes(settings, self.checkpoint), scheduler_options(settings, len(workload.asks))
        self._check_room(pool)
        prompts = Prompts(settings, self.checkpoint, self.chunks)
        runner, plan = self.checkpoint.runner, self.plan
        with opened_loop(settings, self.checkpoint, self.store, pool, options) as loop:
            rows = settings.max_running if runner.device.type == "cuda" else 2
            warm_up(loop, prompts, rows, plan.shape.prompt_tokens)
            warm = len(loop.records)
            driver = Driver(loop, prompts, workload, seed=plan.shape.seed, frequency=plan.frequency)
            drive = driver.run(limit, lambda stage, done, total: say(f"{load} {settings.preemption}", done, total))
            records = loop.records[warm:]
        row = {**plan.facts(load, workload), **self._facts(settings, pool), **plan.measured(drive)}
        if not plan.simulate:
            return row, None
        costs = plan.costs or self._fit(records, pool)
        again = simulated(
            drive,
            options,
            costs,
            pool,
            preemption=settings.preemption,
            stall_s=settings.stall_ms / 1000,
            trace=PriorityTrace(workload.updates, len(workload.asks), plan.shape.seed) if workload.updates else None,
            frequency=plan.frequency,
        )
        return {**row, "simulated": plan.measured(again)}, costs

    def _check_room(self, pool: Sizes) -> None:
        tokens, needed = BLOCK_TOKENS * pool.blocks, self.plan.shape.context_tokens
        if tokens < needed:
            raise InputError(
                f"the pool holds {tokens} tokens, a conversation may have {needed}: raise --pool-bytes to "
                f"{-(-needed // BLOCK_TOKENS) * pool.block_bytes} or more, or lower --context-tokens",
                tokens=tokens,
            )

    def _facts(self, settings: Settings, pool: Sizes) -> Row:
        return {
            "model": settings.model,
            "policy": settings.scheduler,
            "preemption": settings.preemption,
            "pool_tokens": BLOCK_TOKENS * pool.blocks,
            "pool_bytes": pool.blocks * pool.block_bytes,
            "host_bytes": pool.host_blocks * pool.block_bytes,
            "max_running": settings.max_running,
            "max_preemptions": settings.max_preemptions,
            "aging_s": settings.aging_s,
        }

    def _fit(self, records: Sequence[Any], pool: Sizes) -> StepCosts:
        rate = link_rate(self.checkpoint.runner) or ram_rate()
        return StepCosts.fit(records, block_bytes=pool.block_bytes, bytes_per_s=rate)
