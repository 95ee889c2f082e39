"""``ragkv eval ttft``: time to first token of every method on every tier, beside full prefill and the floor."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ragkv.checkpoint import Checkpoint, load_checkpoint
from ragkv.config import Settings
from ragkv.errors import ConfigError, ModelError, PromptTooLongError
from ragkv.eval.machine import environment
from ragkv.eval.rates import Rates
from ragkv.eval.ttft_bench import Bench, free_device, opened
from ragkv.eval.ttft_rows import FULL_CELL, Asked, Cell, Race, Row, rows_of
from ragkv.eval.ttft_stores import Place, Say
from ragkv.prefill import FULL
from ragkv.runner import ModelRunner
from ragkv.selfcheck import find_fault
from ragkv.store import CODECS
from ragkv.store.remote import RemoteTier

TIERS = ("device", "ram", "ssd", "remote")
LEAST_PASSES = 3
_LIBRARY = None  # the library's forward, among cells
# Kernels are chosen and memory is mapped in the first passes on a GPU.
_WARM_UP = {"cpu": 0, "cuda": 2}
Save = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Plan:
    """What to measure. ``asked`` are methods with their ratios; a full prefill is always measured. ``batch`` requests
    come at once. With ``budget_s`` there are fewer passes, three at the least, where that many seconds ask for it.

    Raises:
        ConfigError: a value that cannot be measured.
    """

    contexts: tuple[int, ...]
    tiers: tuple[str, ...] = ("ram", "ssd")
    codecs: tuple[str, ...] = ("raw",)
    asked: tuple[Asked, ...] = (FULL_CELL,)
    chunk_tokens: int = 512
    question_tokens: int = 32
    batch: int = 1
    passes: int = 5
    budget_s: float | None = None

    def __post_init__(self) -> None:
        for tier in self.tiers:
            if tier not in TIERS:
                raise ConfigError(f"--tiers: {tier!r} is no tier; there are {', '.join(TIERS)}", tier=tier)
        for codec in self.codecs:
            if codec not in CODECS:
                raise ConfigError(f"--codec: {codec!r} is not one of {', '.join(CODECS)}", codec=codec)
        if not (self.contexts and self.tiers and self.codecs and self.asked):
            raise ConfigError("nothing to measure: name --context, --tiers, --methods and --codec")
        if min(*self.contexts, self.chunk_tokens, self.question_tokens, self.batch, self.passes) < 1:
            raise ConfigError("--context, --chunk-tokens, --question-tokens, --batch and --passes must be at least 1")

    @property
    def places(self) -> list[Place]:
        return [Place(tier, codec) for tier in self.tiers for codec in self.codecs]


def measure_ttft(
    settings: Settings,
    plan: Plan,
    *,
    remote: RemoteTier | None = None,
    say: Say,
    save: Save = lambda result: None,
) -> dict[str, Any]:
    """``rows``, one for each context, place and method, with the ``rates``, ``device`` and ``versions`` behind them.

    Every figure is the median of the passes in which everything takes its turn; docs/blending.md says what the columns
    mean. ``remote`` stands in for ``settings.remote_url``; ``save`` is called with what there is after every pass.

    Raises:
        ConfigError: the remote tier is asked for and none is configured.
        ModelError: the model cannot be used, or its KV cannot be moved.
        PromptTooLongError: a context does not fit the model's positions.
        StoreError: chunks did not come from the tier asked for.
    """
    url = settings.remote_url.get_secret_value() if settings.remote_url else None
    if "remote" in plan.tiers and not (remote or url):
        raise ConfigError("--tiers remote: set remote_url (RAGKV_REMOTE_URL=redis://…) first")
    started = time.perf_counter()
    say("load", 0, 1)
    checkpoint = usable_model(settings, max(plan.contexts) + plan.question_tokens)
    say("load", 1, 1)
    with (
        torch.inference_mode(),
        opened(
            checkpoint,
            plan.places,
            plan.contexts,
            chunk_tokens=plan.chunk_tokens,
            question_tokens=plan.question_tokens,
            folder=settings.data_dir.expanduser(),
            remote=remote or url,
            remote_timeout_ms=settings.remote_timeout_ms,
            say=say,
        ) as bench,
    ):
        result = _Result(settings.model, plan, checkpoint.runner, _rates(bench, plan, say))
        clock = _Budget(plan, started)
        for context in plan.contexts:
            for race in _race(bench, plan, context, clock.share(context), say):
                save(result.as_dict(race))
            free_device(bench.runner)
            result.add(race, _rates(bench, plan, say))
            save(result.as_dict())
    return result.as_dict()


def usable_model(settings: Settings, positions: int) -> Checkpoint:
    """The model of the settings, loaded, its KV proven movable.

    Raises:
        ModelError: it cannot be used.
        PromptTooLongError: prompts of ``positions`` tokens do not fit it.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    folder = settings.data_dir.expanduser()
    checkpoint = load_checkpoint(settings.model, device=settings.device, dtype=settings.dtype, cache_dir=folder)
    runner = checkpoint.runner
    runner.check_layer = settings.check_layer
    if positions >= runner.max_positions:
        raise PromptTooLongError(
            f"a prompt of {positions} tokens does not fit the model's {runner.max_positions} positions; "
            "ask for a smaller --context",
            tokens=positions,
            limit=runner.max_positions,
        )
    if fault := find_fault(runner):
        raise ModelError(f"the KV of {settings.model!r} cannot be reused: {fault}", model=settings.model)
    return checkpoint


def about(runner: ModelRunner) -> dict[str, Any]:
    """What a committed result says of the model's run."""
    return {"dtype": runner.shape.geometry.dtype, "layers": runner.layer_loop, **environment(runner.device)}


@dataclass
class _Result:
    """Races so far, and the best rates of all measurements: rows of earlier contexts gain by later ones."""

    model: str
    plan: Plan
    runner: ModelRunner
    rates: Rates
    races: list[Race] = field(default_factory=list)

    def add(self, race: Race, rates: Rates) -> None:
        self.races.append(race)
        self.rates = self.rates.best(rates)

    def as_dict(self, *going_on: Race) -> dict[str, Any]:
        plan = self.plan
        rows: list[Row] = [
            {"model": self.model, **row, "batch": plan.batch}
            for race in (*self.races, *going_on)
            for row in rows_of(self.runner, race, plan.places, plan.asked, plan.batch, self.rates)
        ]
        return {"rows": rows, "rates": self.rates.as_dict(), **about(self.runner)}


class _Budget:
    """Shares what time is left out among the contexts to come, in proportion to their tokens."""

    def __init__(self, plan: Plan, started: float) -> None:
        self._left = sum(plan.contexts)
        self._end = None if plan.budget_s is None else started + plan.budget_s

    def share(self, context: int) -> float | None:
        """When a context should be done with, by the clock; None if it may take what it takes."""
        now, part = time.perf_counter(), context / self._left
        self._left -= context
        return None if self._end is None else now + max(0.0, self._end - now) * part


def _rates(bench: Bench, plan: Plan, say: Say) -> Rates:
    say("measuring the machine", 0, 1)
    rates = bench.rates(max(plan.contexts))
    say("measuring the machine", 1, 1)
    return rates


def _race(bench: Bench, plan: Plan, context: int, until: float | None, say: Say) -> Iterator[Race]:
    """Runs of every cell, and of the library's forward; in each pass everything takes its turn, in another order, so
    that none has the same before it every time. Yields the one race after each pass."""
    requests = {codec: bench.requests(context, codec, plan.batch) for codec in plan.codecs}
    first = plan.places[0]
    cells: list[Cell] = [(first, FULL_CELL)]
    cells += [(place, asked) for place in plan.places for asked in plan.asked if asked[0] != FULL]
    race = Race(context, {cell: [] for cell in cells}, [])
    # A cell's kernels are those of its method and codec, whatever the tier; a controller learns about each.
    warm = [cell for cell in cells if cell[0].tier == first.tier or cell[1][0] == "default"]
    warm_up = _WARM_UP[bench.runner.device.type]
    steps = len(plan.places) + warm_up * (len(warm) + 1) + plan.passes * (len(cells) + 1)
    progress = _Progress(say, context, steps)
    for place in plan.places:
        progress.step(f"all chunks into {place.tier}, {place.codec}")
        bench.settle(place, requests[place.codec])
    unheeded = Race(context, {cell: [] for cell in warm}, [])
    for _ in range(warm_up):
        _pass(bench, requests, unheeded, [_LIBRARY, *warm], progress)
    turns = random.Random(context)
    for number in range(plan.passes):
        began = time.perf_counter()
        _pass(bench, requests, race, turns.sample([_LIBRARY, *cells], len(cells) + 1), progress)
        now = time.perf_counter()
        yield race
        if until is not None and number + 1 >= LEAST_PASSES and 2 * now - began > until:
            break
    progress.close()


def _pass(
    bench: Bench, requests: dict[str, Any], race: Race, turns: Sequence[Cell | None], progress: _Progress
) -> None:
    """Run ``turns`` in this order, and add what they took to the race."""
    for turn in turns:
        if turn is _LIBRARY:
            progress.step("the library's full prefill")
            race.library.append(bench.run_library(next(iter(requests.values()))))
            continue
        place, (method, ratio) = turn
        share = f" {ratio:.0%}" if 0 < ratio < 1 else ""
        progress.step("full prefill" if method == FULL else f"{method}{share} from {place.tier}, {place.codec}")
        race.runs[turn].append(bench.run(place, requests[place.codec], method, ratio))


class _Progress:
    """Says of a context what is being done now, and how much of it is done."""

    def __init__(self, say: Say, context: int, total: int) -> None:
        self._say, self._name, self._done, self._total = say, f"{context} tokens", 0, total

    def step(self, what: str) -> None:
        self._say(f"{self._name}: {what}", self._done, self._total)
        self._done += 1

    def close(self) -> None:
        self._say(self._name, self._total, self._total)
