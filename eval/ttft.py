"""``ragkv eval ttft``: time to first token of every method on every tier, beside full prefill and the floor."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from typing import Any

import torch

from ragkv.checkpoint import load_checkpoint
from ragkv.config import Settings
from ragkv.errors import ConfigError, ModelError, PromptTooLongError
from ragkv.eval.rates import Rates, work_of
from ragkv.eval.ttft_bench import Bench, Place, Run, opened
from ragkv.prefill import FULL
from ragkv.runner import ModelRunner
from ragkv.selfcheck import find_fault
from ragkv.store import CODECS
from ragkv.store.remote import RemoteTier
from ragkv.types import Method

TIERS = ("ram", "ssd", "remote")
# Kernels are chosen and memory is mapped in the first passes on a GPU.
_WARM_UP = {"cpu": 0, "cuda": 2}
Row = dict[str, Any]
Say = Callable[[str, int, int], None]
Cell = tuple[Place, Method, float]
_FULL: tuple[Method, float] = ("full", 1.0)


@dataclass(frozen=True)
class Plan:
    """What to measure. ``asked`` are methods with their ratios; a full prefill is always measured.

    Raises:
        ConfigError: a value that cannot be measured.
    """

    contexts: tuple[int, ...]
    tiers: tuple[str, ...] = ("ram", "ssd")
    codecs: tuple[str, ...] = ("raw",)
    asked: tuple[tuple[Method, float], ...] = (_FULL,)
    chunk_tokens: int = 512
    question_tokens: int = 32
    batch: int = 1
    passes: int = 5

    def __post_init__(self) -> None:
        for tier in self.tiers:
            if tier not in TIERS:
                built = "is not built yet" if tier == "device" else "is no tier"
                raise ConfigError(f"--tiers: {tier!r} {built}; there are {', '.join(TIERS)}", tier=tier)
        for codec in self.codecs:
            if codec not in CODECS:
                raise ConfigError(f"--codec: {codec!r} is not one of {', '.join(CODECS)}", codec=codec)
        if self.batch != 1:
            raise ConfigError("--batch: prompts are prefilled one at a time, so 1 is all there is", batch=self.batch)
        if not (self.contexts and self.tiers and self.codecs and self.asked):
            raise ConfigError("nothing to measure: name --context, --tiers, --methods and --codec")
        if min(*self.contexts, self.chunk_tokens, self.question_tokens, self.passes) < 1:
            raise ConfigError("--context, --chunk-tokens, --question-tokens and --passes must be at least 1")

    @property
    def places(self) -> list[Place]:
        return [Place(tier, codec) for tier in self.tiers for codec in self.codecs]


def measure_ttft(settings: Settings, plan: Plan, *, remote: RemoteTier | None = None, say: Say) -> dict[str, Any]:
    """``rows``, one for each context, place and method, with the ``rates``, ``device`` and ``versions`` behind them.

    Every figure is the median of ``plan.passes`` passes in which everything takes its turn; docs/blending.md says
    what the columns mean. ``remote`` stands in for ``settings.remote_url``.

    Raises:
        ConfigError: the remote tier is asked for and none is configured.
        ModelError: the model cannot be used, or its KV cannot be moved.
        PromptTooLongError: a context does not fit the model's positions.
        StoreError: chunks did not come from the tier asked for.
    """
    url = settings.remote_url.get_secret_value() if settings.remote_url else None
    if "remote" in plan.tiers and not (remote or url):
        raise ConfigError("--tiers remote: set remote_url (RAGKV_REMOTE_URL=redis://…) first")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    folder = settings.data_dir.expanduser()
    checkpoint = load_checkpoint(settings.model, device=settings.device, dtype=settings.dtype, cache_dir=folder)
    runner = checkpoint.runner
    _check_positions(plan, runner)
    if fault := find_fault(runner):
        raise ModelError(f"the KV of {settings.model!r} cannot be reused: {fault}", model=settings.model)
    with (
        torch.inference_mode(),
        opened(
            checkpoint,
            plan.places,
            plan.contexts,
            chunk_tokens=plan.chunk_tokens,
            question_tokens=plan.question_tokens,
            folder=folder,
            remote=remote or url,
            remote_timeout_ms=settings.remote_timeout_ms,
        ) as bench,
    ):
        before = bench.rates(plan.contexts)
        timed = [(context, *_race(bench, plan, context, say)) for context in plan.contexts]
        rates = before.best(bench.rates(plan.contexts))
        rows = [
            row
            for context, runs, library in timed
            for row in _rows(settings.model, plan, runner, context, runs, library, rates)
        ]
    return {"rows": rows, "rates": rates.as_dict(), **environment(runner)}


def _check_positions(plan: Plan, runner: ModelRunner) -> None:
    longest = max(plan.contexts) + plan.question_tokens
    if longest >= runner.max_positions:
        raise PromptTooLongError(
            f"a prompt of {longest} tokens does not fit the model's {runner.max_positions} positions; "
            "ask for a smaller --context",
            tokens=longest,
            limit=runner.max_positions,
        )


def _race(bench: Bench, plan: Plan, context: int, say: Say) -> tuple[dict[Cell, list[Run]], list[float]]:
    """Runs of every cell, and seconds of the library's forward; in each pass everything takes its turn."""
    chunks = {codec: bench.chunks(context, codec) for codec in plan.codecs}
    for place in plan.places:
        bench.settle(place, chunks[place.codec])
    full: Cell = (plan.places[0], *_FULL)
    cells = [(place, *asked) for place in plan.places for asked in plan.asked if asked[0] != FULL]
    runs: dict[Cell, list[Run]] = {cell: [] for cell in [full, *cells]}
    library: list[float] = []
    warm_up = _WARM_UP[bench.runner.device.type]
    with closing(_Progress(say, context, (plan.passes + warm_up) * (len(runs) + 1))) as progress:
        for number in range(-warm_up, plan.passes):
            spent = bench.run_library(chunks[plan.codecs[0]])
            progress.step()
            if number >= 0:
                library.append(spent)
            for cell in runs:
                place, method, ratio = cell
                run = bench.run(place, chunks[place.codec], method, ratio)
                progress.step()
                if number >= 0:
                    runs[cell].append(run)
    return runs, library


class _Progress:
    def __init__(self, say: Say, context: int, total: int) -> None:
        self._say, self._name, self._done, self._total = say, f"{context} tokens", 0, total

    def step(self) -> None:
        self._done += 1
        self._say(self._name, self._done, self._total)

    def close(self) -> None:
        self._say(self._name, self._total, self._total)


def _rows(
    model: str,
    plan: Plan,
    runner: ModelRunner,
    context: int,
    runs: dict[Cell, list[Run]],
    library: Sequence[float],
    rates: Rates,
) -> list[Row]:
    own = next(iter(runs.values()))
    full = {"library": statistics.median(library), "ragkv": statistics.median(run.seconds for run in own)}
    by = min(full, key=lambda name: full[name])
    rows = []
    for place in plan.places:
        for method, ratio in plan.asked:
            timed = own if method == FULL else runs[place, method, ratio]
            rows.append(
                {
                    "model": model,
                    "tier": place.tier,
                    "codec": place.codec,
                    "context_tokens": context,
                    "method": method,
                    "ratio": ratio,
                    **_figures(runner, place, timed, full[by], rates),
                    "batch": plan.batch,
                    "full_prefill_by": by,
                    "library_prefill_ms": 1000 * full["library"],
                    "ragkv_prefill_ms": 1000 * full["ragkv"],
                }
            )
    return rows


def _figures(runner: ModelRunner, place: Place, runs: Sequence[Run], full_s: float, rates: Rates) -> Row:
    ttft = statistics.median(run.seconds for run in runs)
    typical = min(runs, key=lambda run: abs(run.seconds - ttft))
    pairs = list(zip(typical.plan.spans, typical.outcomes, strict=True))
    loaded = sum(runner.shape.entry_bytes(s.length, place.codec) for s, outcome in pairs if outcome.kv == place.tier)
    token_layers = typical.plan.context_tokens * runner.shape.layers
    floors = work_of(runner, typical.plan, typical.outcomes, loaded).floor_s(place.tier, rates)
    by = max(floors, key=lambda name: floors[name])
    return {
        "recomputed_share": sum(outcome.token_layers for outcome in typical.outcomes) / token_layers,
        "ttft_ms": 1000 * ttft,
        "full_prefill_ms": 1000 * full_s,
        "speedup": full_s / ttft,
        "floor_ms": 1000 * floors[by],
        "over_floor": ttft / floors[by],
        "bytes_loaded": loaded,
        "device": device_name(runner),
        "floor_by": by,
        "floors_ms": {name: 1000 * seconds for name, seconds in floors.items()},
        "parts_ms": {part: 1000 * seconds for part, seconds in typical.parts.items()},
        "fastest_ms": 1000 * min(run.seconds for run in runs),
        "slowest_ms": 1000 * max(run.seconds for run in runs),
    }


def device_name(runner: ModelRunner) -> str:
    if runner.device.type == "cuda":
        return str(torch.cuda.get_device_name(runner.device))
    return f"CPU, {os.cpu_count()} cores"


def environment(runner: ModelRunner) -> dict[str, Any]:
    """What a committed result says of where it comes from."""
    return {
        "date": date.today().isoformat(),
        "device": device_name(runner),
        "gpu": device_name(runner) if runner.device.type == "cuda" else None,
        "dtype": runner.shape.geometry.dtype,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("ragkv", "torch", "transformers")},
        },
    }
