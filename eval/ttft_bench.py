"""What ``ragkv eval ttft`` times: prompts over stored random chunks, on every tier, beside a full prefill."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ragkv.attention import NAME
from ragkv.checkpoint import Checkpoint
from ragkv.clock import Stopwatch
from ragkv.controller import Controller
from ragkv.costs import Machine
from ragkv.device_tier import DeviceTier
from ragkv.errors import StoreError
from ragkv.eval.rates import Rates, disk_rate, link_rate, matrix_rate, memory_rate, ram_rate
from ragkv.eval.steps import drained
from ragkv.eval.store_load import drop_files
from ragkv.eval.ttft_stores import Place, RandomChunks, Say, opened_stores
from ragkv.machine import measure_machine
from ragkv.pipeline import resolve_method
from ragkv.plan import PlannedChunk, PromptPlan, make_plan
from ragkv.prefill import FULL, Prefill, PrefillResult, SpanOutcome
from ragkv.runner import ModelRunner
from ragkv.store import ChunkStore
from ragkv.store.remote import RemoteTier
from ragkv.types import Forecast, Method

_TRIES, _SETTLE_TRIES = 5, 200
_RATE_BYTES = 512 << 20


class Request(NamedTuple):
    """What somebody asks: chunks in the order of their ranks, and a question's token ids."""

    chunks: Sequence[PlannedChunk]
    question: tuple[int, ...]


class Run(NamedTuple):
    """Requests that came at once, prefilled one after the other.

    ``seconds`` is the median time from their coming to a first token on the host, ``service`` what one takes by
    itself. ``parts`` (seconds by name, as a request's own report has them), plan, outcomes and what the controller
    chose are those of the request in the middle.
    """

    seconds: float
    service: float
    parts: dict[str, float]
    plan: PromptPlan
    outcomes: list[SpanOutcome]
    forecast: Forecast | None


class Bench:
    """Stores of every place, all holding the same chunks, and prompts over them. Made by :func:`opened`."""

    def __init__(self, random: RandomChunks, stores: dict[Place, ChunkStore], question_tokens: int) -> None:
        self.runner: ModelRunner = random.checkpoint.runner
        self._random, self._stores, self._question_tokens = random, stores, question_tokens
        self._tiers = {
            place: DeviceTier(store.capacity_bytes, self.runner.device)
            for place, store in stores.items()
            if place.tier == "device"
        }
        self._machines: dict[str, Machine] = {}
        self._controllers: dict[Place, Controller] = {}

    def requests(self, context_tokens: int, codec: str, count: int = 1) -> list[Request]:
        """``count`` different prompts over the same chunks: each begins with another one, and asks something else."""
        chunks = self._random.of(context_tokens, codec)
        return [self.request([*chunks[i % len(chunks) :], *chunks[: i % len(chunks)]], i) for i in range(count)]

    def request(self, chunks: Sequence[PlannedChunk], number: int) -> Request:
        """The ``number``-th question, about ``chunks`` in this order."""
        ranked = [replace(chunk, rank=rank) for rank, chunk in enumerate(chunks, 1)]
        return Request(ranked, self._random.ids(self._question_tokens, seed=-1 - number))

    def pool(self, chunks: int, codec: str) -> list[PlannedChunk]:
        """The first ``chunks`` whole chunks."""
        return self._random.of(chunks * self._random.tokens, codec)

    def run(self, place: Place, requests: Sequence[Request], method: Method, ratio: float, tries: int = _TRIES) -> Run:
        """From the requests' token ids to the first new token of each on the host.

        Entries move between tiers in the background; a run that finds a chunk elsewhere does not count.

        Raises:
            StoreError: a chunk did not come from the tier, in none of ``tries`` runs.
        """
        for _ in range(tries - 1):
            with suppress(StoreError):
                return self._run(place, requests, method, ratio)
            time.sleep(0.01)
        return self._run(place, requests, method, ratio)

    def settle(self, place: Place, requests: Sequence[Request]) -> None:
        """Use the chunks until all come from the tier, as those of a busy server do."""
        self.run(place, requests, "none", 0.0, tries=_SETTLE_TRIES)

    def _run(self, place: Place, requests: Sequence[Request], method: Method, ratio: float) -> Run:
        if method == "default":
            self._controller(place)
        if place.tier == "ssd":
            self._stores[place].clear_ram()
            drop_files(path for path in self._files(place, requests[0].chunks) if path.exists())
        self.runner.synchronize()
        watches = [Stopwatch() for _ in requests]
        done = [
            self.first_token(place, request, method, ratio, watch)
            for request, watch in zip(requests, watches, strict=True)
        ]
        times = [watch.total_ms / 1000 for watch in watches]
        middle = (len(done) - 1) // 2
        return Run(statistics.median(times), times[-1] / len(times), dict(watches[middle].parts), *done[middle])

    def first_token(
        self, place: Place, request: Request, method: Method, ratio: float, watch: Stopwatch
    ) -> tuple[PromptPlan, list[SpanOutcome], Forecast | None]:
        """Prefill one request until its first token is on the host.

        Raises:
            StoreError: a chunk did not come from the tier.
        """
        if place.tier == "ssd":
            self._stores[place].clear_ram()  # of what a request before this one has read
        watch.lap("queue")
        plan = make_plan((), request.chunks, request.question, budget=self.runner.max_positions)
        watch.lap("plan")
        options: dict[str, Any] = {"device_tier": self._tiers[place]} if place in self._tiers else {}
        prefill = Prefill(
            self.runner,
            self._stores[place],
            plan,
            strategy=resolve_method(method),
            ratio=ratio,
            room=1,
            watch=watch,
            controller=self._controller(place) if method == "default" else None,
            **options,
        )
        result = drained(prefill.run())
        int(result.logits.argmax())
        watch.lap("first_token")
        forecast = result.learn()
        if method != FULL:
            _check(place, plan, result, chosen=forecast is not None)
        return plan, result.outcomes, forecast

    def run_library(self, requests: Sequence[Request]) -> tuple[float, float]:
        """The library's own forward over the same ids, with its own attention and cache, to the first token; logits of
        the last position only. Returns seconds as in a run: ``seconds`` and ``service``."""
        self.runner.synchronize()
        started = time.perf_counter()
        times = []
        for request in requests:
            self.library_token(request)
            times.append(time.perf_counter() - started)
        return statistics.median(times), times[-1] / len(times)

    def library_token(self, request: Request) -> int:
        ids = [token for chunk in request.chunks for token in chunk.tokens.ids] + [*request.question]
        model = self.runner.model
        model.set_attn_implementation("sdpa")
        try:
            return int(model(self.runner.tensor(ids)[None], logits_to_keep=1).logits[0, -1].argmax())
        finally:
            model.set_attn_implementation(NAME)

    def rates(self, context_tokens: int) -> Rates:
        runner = self.runner
        tiers: dict[str, float] = {}
        for place in self._stores:
            if place.tier not in tiers:
                tiers[place.tier] = self._tier_rate(place, context_tokens)
        return Rates(matrix_rate(runner), memory_rate(runner), link_rate(runner), tiers)

    def _tier_rate(self, place: Place, context_tokens: int) -> float:
        chunks = self._random.of(context_tokens, place.codec)
        some = max(1, len(chunks) * _RATE_BYTES // max(_RATE_BYTES, self._random.nbytes(chunks)))
        if place.tier == "device":
            return memory_rate(self.runner)
        if place.tier == "ram":
            return link_rate(self.runner) or ram_rate()
        if place.tier == "ssd":
            return disk_rate(self._files(place, chunks[:some]))
        return max(_read_rate(self._stores[place], [c.tokens.key for c in chunks[:some]]) for _ in range(3))

    def _controller(self, place: Place) -> Controller:
        """As a server has it whose chunks all come from this place."""
        if place not in self._controllers:
            if place.codec not in self._machines:
                self._machines[place.codec] = drained(measure_machine(self.runner, place.codec))
            self._controllers[place] = Controller(deepcopy(self._machines[place.codec]))
        return self._controllers[place]

    def _files(self, place: Place, chunks: Sequence[PlannedChunk]) -> list[Path]:
        folder = self._stores[place].folder
        return [Path(folder.entry_path(chunk.tokens.key)) for chunk in chunks]


@contextmanager
def opened(
    checkpoint: Checkpoint,
    places: Sequence[Place],
    contexts: Sequence[int],
    *,
    chunk_tokens: int,
    question_tokens: int,
    folder: Path,
    remote: str | RemoteTier | None,
    remote_timeout_ms: int,
    say: Say = lambda stage, done, total: None,
) -> Iterator[Bench]:
    """A bench whose chunks are encoded by the model itself and stored everywhere; all of it is removed at the end."""
    random = RandomChunks(checkpoint, chunk_tokens)
    with opened_stores(
        random, contexts, places, folder=folder, remote=remote, remote_timeout_ms=remote_timeout_ms, say=say
    ) as stores:
        yield Bench(random, stores, question_tokens)


def free_device(runner: ModelRunner) -> None:
    """Give back memory in sizes that the next context will not ask for."""
    if runner.device.type == "cuda":
        torch.cuda.empty_cache()


def _read_rate(store: ChunkStore, keys: Sequence[bytes]) -> float:
    """Bytes/s of the store's own reader with nothing computed meanwhile."""
    started, nbytes = time.perf_counter(), 0
    with ExitStack() as stack:
        entries = []
        for entry in store.open(keys):
            if isinstance(entry, StoreError):
                raise entry
            entries.append(stack.enter_context(entry))
        for slabs in stack.enter_context(store.open_layers(entries)):
            for slab in slabs:
                if isinstance(slab, StoreError):
                    raise slab
                nbytes += slab.nbytes
    return nbytes / (time.perf_counter() - started)


def _check(place: Place, plan: PromptPlan, result: PrefillResult, *, chosen: bool) -> None:
    """Chunks came from the tier, but for those that the controller chose to compute."""
    for span, outcome in zip(plan.spans, result.outcomes, strict=True):
        computed = chosen and outcome.kv == "computed" and span not in result.to_encode
        if outcome.kv != place.tier and not computed:
            why = outcome.why or "it was found there"
            raise StoreError(
                f"a chunk's KV came from {outcome.kv!r}, not {place.tier!r}: {why}; the tier cannot be measured",
                tier=place.tier,
            )
