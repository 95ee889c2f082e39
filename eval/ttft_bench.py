"""What ``ragkv eval ttft`` times: one prompt over stored random chunks, on every tier, beside a full prefill."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from ragkv.attention import NAME
from ragkv.checkpoint import Checkpoint
from ragkv.chunks import ChunkTokens, EncodeGroup
from ragkv.clock import Stopwatch
from ragkv.encode import encode
from ragkv.errors import StoreError
from ragkv.eval.rates import Rates, disk_rate, link_rate, matrix_rate, memory_rate, ram_rate
from ragkv.eval.steps import drained
from ragkv.eval.store_load import drop_cached
from ragkv.pipeline import resolve_method
from ragkv.plan import PlannedChunk, PromptPlan, make_plan
from ragkv.prefill import FULL, Prefill, SpanOutcome
from ragkv.retrievers import Chunk
from ragkv.store import ChunkStore, chunk_key
from ragkv.store.remote import RemoteTier
from ragkv.types import Method

_WRITE_BACK_S = 600.0
_SETTLE_TRIES = 200
_ENTRY_SLACK = 1 << 20


class Place(NamedTuple):
    """Where chunks come from, and in what form."""

    tier: str
    codec: str


class Run(NamedTuple):
    """One timed prefill; ``parts`` are seconds by name, as the request's own report has them."""

    seconds: float
    parts: dict[str, float]
    plan: PromptPlan
    outcomes: list[SpanOutcome]


class Bench:
    """A store for each place, all holding the same chunks, and prompts over them. Made by :func:`opened`."""

    def __init__(
        self, checkpoint: Checkpoint, stores: dict[Place, ChunkStore], chunk_tokens: int, question_tokens: int
    ) -> None:
        self.runner, self._model = checkpoint.runner, checkpoint.model_fingerprint
        self._stores, self._chunk_tokens = stores, chunk_tokens
        self._question = self._random(question_tokens, seed=-1)

    def chunks(self, context_tokens: int, codec: str) -> list[PlannedChunk]:
        """Chunks of random ids, each its own document and encoded alone; the last one takes what is left."""
        starts = range(0, context_tokens, self._chunk_tokens)
        lengths = [min(self._chunk_tokens, context_tokens - start) for start in starts]
        return [self._chunk(number, length, codec) for number, length in enumerate(lengths)]

    def run(self, place: Place, chunks: Sequence[PlannedChunk], method: Method, ratio: float) -> Run:
        """From the request's token ids to the first new token on the host.

        Raises:
            StoreError: a chunk did not come from the tier.
        """
        store = self._stores[place]
        if place.tier == "ssd":
            drop_cached(store.folder.root)
        self.runner.synchronize()
        watch = Stopwatch()
        plan = make_plan((), chunks, self._question, budget=self.runner.max_positions)
        watch.lap("plan")
        prefill = Prefill(
            self.runner, store, plan, strategy=resolve_method(method), ratio=ratio, room=1, watch=watch
        )  # fmt: skip
        result = drained(prefill.run())
        int(result.logits.argmax())
        watch.lap("first_token")
        if method != FULL:
            _check(place, result.outcomes)
        return Run(watch.total_ms / 1000, dict(watch.parts), plan, result.outcomes)

    def run_library(self, chunks: Sequence[PlannedChunk]) -> float:
        """Seconds of the library's own forward over the same ids, with its own attention and cache, to the first
        token; logits of the last position only."""
        ids = [token for chunk in chunks for token in chunk.tokens.ids] + [*self._question]
        model = self.runner.model
        model.set_attn_implementation("sdpa")
        try:
            self.runner.synchronize()
            started = time.perf_counter()
            int(model(self.runner.tensor(ids)[None], logits_to_keep=1).logits[0, -1].argmax())
            return time.perf_counter() - started
        finally:
            model.set_attn_implementation(NAME)

    def settle(self, place: Place, chunks: Sequence[PlannedChunk]) -> None:
        """Use the chunks until all come from the tier, as those of a busy server do."""
        for _ in range(_SETTLE_TRIES):
            try:
                self.run(place, chunks, "none", 0.0)
                return
            except StoreError:
                time.sleep(0.01)  # entries move into RAM in the background
        self.run(place, chunks, "none", 0.0)

    def rates(self, contexts: Sequence[int]) -> Rates:
        tiers = {place.tier: self._tier_rate(place, max(contexts)) for place in self._stores}
        runner = self.runner
        return Rates(matrix_rate(runner), memory_rate(runner), link_rate(runner), tiers)

    def _tier_rate(self, place: Place, context_tokens: int) -> float:
        store = self._stores[place]
        keys = [chunk.tokens.key for chunk in self.chunks(context_tokens, place.codec)]
        if place.tier == "ram":
            return ram_rate()
        if place.tier == "ssd":
            return disk_rate([Path(store.folder.entry_path(key)) for key in keys])
        return max(_read_rate(store, keys) for _ in range(3))

    def _chunk(self, number: int, length: int, codec: str) -> PlannedChunk:
        ids = self._random(self._chunk_tokens, seed=number)[:length]
        key = chunk_key(
            model=self._model,
            tokenizer="random ids",
            dtype=self.runner.shape.geometry.dtype,
            codec=codec,
            context_policy="alone",
            context=(),
            tokens=ids,
        )
        chunk = Chunk(f"{number}#0", str(number), 0, "")
        return PlannedChunk(chunk, number + 1, 0.0, ChunkTokens(ids, (), 0, "alone", key, codec))

    def _random(self, count: int, seed: int) -> tuple[int, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randint(self.runner.vocab_size, (count,), generator=generator).tolist())


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
) -> Iterator[Bench]:
    """A bench whose chunks are encoded by the model itself and stored everywhere; all of it is removed at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    blank = Bench(checkpoint, {}, chunk_tokens, question_tokens)
    chunks = _distinct(
        chunk for place in places for context in contexts for chunk in blank.chunks(context, place.codec)
    )
    room = sum(checkpoint.runner.shape.entry_bytes(len(c.tokens.ids), "raw") + _ENTRY_SLACK for c in chunks)
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ragkv-eval-ttft-", dir=folder)))
        stores = {
            place: stack.enter_context(
                ChunkStore(
                    root / "-".join(place),
                    capacity_bytes=2 * room,
                    ram_bytes=room if place.tier == "ram" else 0,
                    remote=remote if place.tier == "remote" else None,
                    remote_timeout_ms=remote_timeout_ms,
                )
            )
            for place in places
        }
        for chunk in chunks:
            _store(checkpoint, chunk, [store for place, store in stores.items() if place.codec == chunk.tokens.codec])
        for place, store in [(place, store) for place, store in stores.items() if place.tier == "remote"]:
            stack.callback(store.delete, [chunk.tokens.key for chunk in chunks])
            away = _away(store, root / f"away-{place.codec}", remote, remote_timeout_ms)
            stores[place] = stack.enter_context(away)
        yield Bench(checkpoint, stores, chunk_tokens, question_tokens)


def _distinct(chunks: Iterable[PlannedChunk]) -> list[PlannedChunk]:
    return list({chunk.tokens.key: chunk for chunk in chunks}.values())


def _store(checkpoint: Checkpoint, chunk: PlannedChunk, stores: Sequence[ChunkStore]) -> None:
    tokens = chunk.tokens
    [encoded] = drained(encode(checkpoint.runner, EncodeGroup((), (tokens.ids,), (tokens.key,), "alone")))
    for store in stores:
        store.put(
            tokens.key,
            checkpoint.runner.shape.geometry,
            encoded.slabs,
            tokens=encoded.tokens,
            model=checkpoint.name,
            codec=tokens.codec,
        )


@contextmanager
def _away(
    writer: ChunkStore, folder: Path, remote: str | RemoteTier | None, remote_timeout_ms: int
) -> Iterator[ChunkStore]:
    """Another machine's store: empty, and kept so, since it may not write what it reads from the remote tier."""
    if not writer.drain(_WRITE_BACK_S):
        raise StoreError("the remote tier did not take the chunks in time; look at its memory and its log")
    ChunkStore(folder, capacity_bytes=1 << 20, ram_bytes=0).close()
    options = {"remote": remote, "remote_timeout_ms": remote_timeout_ms}
    with ChunkStore(folder, capacity_bytes=1 << 20, ram_bytes=0, read_only=True, **options) as store:  # type: ignore[arg-type]
        yield store


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


def _check(place: Place, outcomes: Sequence[SpanOutcome]) -> None:
    for outcome in outcomes:
        if outcome.kv != place.tier:
            why = outcome.why or "it was found there"
            raise StoreError(
                f"a chunk's KV came from {outcome.kv!r}, not {place.tier!r}: {why}; the tier cannot be measured",
                tier=place.tier,
            )
