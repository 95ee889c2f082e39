"""``ragkv eval serving``: many requests on one engine, under every policy and way to preempt, at the same load."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch

from ragkv.checkpoint import Checkpoint
from ragkv.config import Settings, load_settings
from ragkv.errors import ConfigError, InputError
from ragkv.eval.rates import link_rate, ram_rate
from ragkv.eval.serving_drive import Drive, Driver, Say
from ragkv.eval.serving_engine import Prompts, Sizes, opened_loop, scheduler_options, sizes, warm_up
from ragkv.eval.serving_measures import Row, row_of
from ragkv.eval.serving_simulated import as_json, simulated
from ragkv.eval.step_costs import StepCosts
from ragkv.eval.ttft import about, usable_model
from ragkv.eval.ttft_stores import Place, RandomChunks, opened_stores
from ragkv.eval.workloads import LOADS, Shape, Workload, make_workload
from ragkv.plan import PlannedChunk
from ragkv.pool import Preemption
from ragkv.scheduling import POLICIES
from ragkv.store import ChunkStore

PREEMPTIONS = get_args(Preemption)
_OF_BUDGET = 0.92  # the rest is for warming up, and for letting go of what runs at the end
_FOREVER = 1e9
Save = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class ServingPlan:
    """What to measure: every load under every policy and preemption. A policy of "" is the load's own: ``priority``
    where priorities change, else ``vtc``.

    Args:
        updates: random or markov, in place of the loads' own changes of priority.
        frequency: updates of priorities per step of the engine.
        slo_ttft_ms, slo_tbt_ms: what goodput keeps.
        budget_s: seconds for everything; each run gets the same share of it.
        simulate: run everything through the simulator as well, by ``costs`` or else by those fitted to each run.

    Raises:
        ConfigError: a value that cannot be measured.
    """

    loads: tuple[str, ...] = ("sessions-priority",)
    shape: Shape = field(default_factory=Shape)
    policies: tuple[str, ...] = ("",)
    preemptions: tuple[Preemption, ...] = ("reuse",)
    updates: str | None = None
    frequency: float = 0.02
    slo_ttft_ms: float = 1000.0
    slo_tbt_ms: float = 50.0
    budget_s: float | None = None
    simulate: bool = False
    costs: StepCosts | None = None

    def __post_init__(self) -> None:
        named = (
            ("--load", self.loads, tuple(LOADS)),
            ("--policies", self.policies, ("", *POLICIES)),
            ("--preemptions", self.preemptions, PREEMPTIONS),
        )
        for option, chosen, known in named:
            if not chosen:
                raise ConfigError(f"{option} names nothing to measure; choose {', '.join(filter(None, known))}")
            for name in chosen:
                if name not in known:
                    raise ConfigError(f"{option}: {name!r} is not one of {', '.join(filter(None, known))}")
        if not 0 < self.frequency <= 1 or min(self.slo_ttft_ms, self.slo_tbt_ms) <= 0:
            raise ConfigError("--frequency is above 0 and at most 1; limits are above 0 ms")

    def workloads(self) -> dict[str, Workload]:
        made = {load: make_workload(load, self.shape) for load in self.loads}
        return {load: replace(w, updates=self.updates) if self.updates else w for load, w in made.items()}


def measure_serving(
    settings: Settings, plan: ServingPlan, *, say: Say, save: Save = lambda result: None
) -> dict[str, Any]:
    """``rows``, one for each load, policy and preemption: the same requests, the model loaded once, a fresh pool each.

    ``save`` is called with what there is after every run.

    Raises:
        ConfigError: a setting that cannot be.
        InputError: the model's positions, or the pool, have no room for a request.
        ModelError, StoreError: as :func:`ragkv.eval.ttft.measure_ttft`.
    """
    clock = _Budget(plan.budget_s)
    loads = plan.workloads()
    checkpoint = usable_model(settings, plan.shape.context_tokens + _chunk_room(loads, plan.shape))
    runs = list(product(loads, plan.policies, plan.preemptions))
    result: dict[str, Any] = {"rows": [], **about(checkpoint.runner)}
    with _chunks(settings, checkpoint, loads, plan.shape, say) as (store, chunks):
        bench = _Bench(settings, plan, checkpoint, store, chunks)
        for done, (load, policy, preemption) in enumerate(runs):
            if (limit := clock.share(len(runs) - done)) <= 0:
                break
            row, costs = bench.run(load, loads[load], policy, preemption, limit, say)
            result["rows"].append({**row, "device": result["device"]})
            if costs is not None:
                result["costs"] = as_json(costs)
            save(result)
    return result


class _Budget:
    """Seconds for each run: an equal share, of what was there at the first one or is left now."""

    def __init__(self, seconds: float | None) -> None:
        self._until = time.perf_counter() + seconds if seconds else None
        self._fair = _FOREVER

    def share(self, runs: int) -> float:
        if self._until is None:
            return _FOREVER
        now = _OF_BUDGET * (self._until - time.perf_counter()) / runs
        self._fair = min(self._fair, now)
        return self._fair


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

    def run(
        self, load: str, workload: Workload, policy: str, preemption: Preemption, limit: float, say: Say
    ) -> tuple[Row, StepCosts | None]:
        policy = policy or ("priority" if workload.updates else "vtc")
        settings = load_settings(**{**self.settings.model_dump(), "scheduler": policy, "preemption": preemption})
        pool, options = sizes(settings, self.checkpoint), scheduler_options(settings, len(workload.asks))
        self._check_room(pool)
        prompts = Prompts(settings, self.checkpoint, self.chunks)
        runner, plan = self.checkpoint.runner, self.plan
        with opened_loop(settings, self.checkpoint, self.store, pool, options) as loop:
            rows = settings.max_running if runner.device.type == "cuda" else 2
            warm_up(loop, prompts, rows, plan.shape.prompt_tokens, runner.vocab_size)
            warm = len(loop.records)
            driver = Driver(
                loop, prompts, workload, vocab=runner.vocab_size, seed=plan.shape.seed, frequency=plan.frequency
            )
            drive = driver.run(limit, lambda stage, done, total: say(f"{load} {policy} {preemption}", done, total))
            records = loop.records[warm:]
        row = {**self._facts(load, workload, settings, pool), **self._measured(drive)}
        if not plan.simulate:
            return row, None
        costs = plan.costs or self._fit(records, pool)
        again = simulated(drive, options, costs, pool, preemption=preemption, stall_s=settings.stall_ms / 1000)
        return {**row, "simulated": self._measured(again)}, costs

    def _check_room(self, pool: Sizes) -> None:
        tokens, needed = 16 * pool.blocks, self.plan.shape.context_tokens
        if tokens < needed:
            raise InputError(
                f"the pool holds {tokens} tokens, a conversation may have {needed}: raise --pool-bytes to "
                f"{-(-needed // 16) * pool.block_bytes} or more, or lower --context-tokens",
                tokens=tokens,
            )

    def _measured(self, drive: Drive) -> Row:
        return row_of(drive, slo_ttft_ms=self.plan.slo_ttft_ms, slo_tbt_ms=self.plan.slo_tbt_ms)

    def _facts(self, load: str, workload: Workload, settings: Settings, pool: Sizes) -> Row:
        shape = self.plan.shape
        return {
            "model": settings.model,
            "load": load,
            "policy": settings.scheduler,
            "preemption": settings.preemption,
            "offered": len(workload.asks),
            "offered_per_s": shape.rate,
            "priority_updates": workload.updates,
            "update_frequency": self.plan.frequency if workload.updates else None,
            "pool_tokens": 16 * pool.blocks,
            "pool_bytes": pool.blocks * pool.block_bytes,
            "host_bytes": pool.host_blocks * pool.block_bytes,
            "max_running": settings.max_running,
            "max_preemptions": settings.max_preemptions,
            "aging_s": settings.aging_s,
            "seed": shape.seed,
        }

    def _fit(self, records: Sequence[Any], pool: Sizes) -> StepCosts:
        rate = link_rate(self.checkpoint.runner) or ram_rate()
        return StepCosts.fit(records, block_bytes=pool.block_bytes, bytes_per_s=rate)
