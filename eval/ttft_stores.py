"""Stores for a speed measurement: random chunks, encoded by the model itself, written once, opened for every tier."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ragkv.checkpoint import Checkpoint
from ragkv.chunks import ChunkTokens, EncodeGroup
from ragkv.encode import EncodedChunk, encode
from ragkv.errors import StoreError
from ragkv.eval.steps import drained
from ragkv.pinned import PageLocking
from ragkv.plan import PlannedChunk
from ragkv.retrievers import Chunk
from ragkv.store import ChunkStore, chunk_key
from ragkv.store.remote import RemoteTier

_WRITE_BACK_S = 600.0
_ENTRY_SLACK = 1 << 20
_WRITERS = 4

Say = Callable[[str, int, int], None]


class Place(NamedTuple):
    """Where chunks come from, and in what form."""

    tier: str
    codec: str


class RandomChunks:
    """Chunks of random ids, each a document of its own and encoded alone, so that all of it may be repaired."""

    def __init__(self, checkpoint: Checkpoint, chunk_tokens: int) -> None:
        self.checkpoint, self.tokens = checkpoint, chunk_tokens

    def of(self, context_tokens: int, codec: str) -> list[PlannedChunk]:
        """Enough for a context; the last one takes what is left. A longer context begins with the same chunks."""
        starts = range(0, context_tokens, self.tokens)
        return [self._chunk(i, min(self.tokens, context_tokens - start), codec) for i, start in enumerate(starts)]

    def ids(self, count: int, seed: int) -> tuple[int, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randint(self.checkpoint.runner.vocab_size, (count,), generator=generator).tolist())

    def nbytes(self, chunks: Sequence[PlannedChunk]) -> int:
        """Most bytes that the KV of ``chunks`` takes, with room for what lies around it."""
        shape = self.checkpoint.runner.shape
        # In memory a buffer takes up to an eighth more than it is long.
        return sum(shape.entry_bytes(len(c.tokens.ids), c.tokens.codec) * 9 // 8 + _ENTRY_SLACK for c in chunks)

    def _chunk(self, number: int, length: int, codec: str) -> PlannedChunk:
        ids = self.ids(self.tokens, seed=number)[:length]
        key = chunk_key(
            model=self.checkpoint.model_fingerprint,
            tokenizer="random ids",
            dtype=self.checkpoint.runner.shape.geometry.dtype,
            codec=codec,
            context_policy="alone",
            context=(),
            tokens=ids,
        )
        chunk = Chunk(f"{number}#0", str(number), 0, "")
        return PlannedChunk(chunk, number + 1, 0.0, ChunkTokens(ids, (), 0, "alone", key, codec))


@contextmanager
def opened_stores(
    random: RandomChunks,
    contexts: Sequence[int],
    places: Sequence[Place],
    *,
    folder: Path,
    remote: str | RemoteTier | None,
    remote_timeout_ms: int,
    say: Say,
) -> Iterator[dict[Place, ChunkStore]]:
    """A store for every place, all holding the chunks of ``contexts``; all of it is removed at the end.

    A chunk is encoded once and written once for each codec: the stores of a codec are openings of one folder. What
    comes from ``remote`` is written there besides.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chunks = {c: _distinct(random, contexts, c) for c in dict.fromkeys(place.codec for place in places)}
    device = random.checkpoint.runner.device
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ragkv-eval-ttft-", dir=folder)))

        def opening(name: str, codec: str, **options: Any) -> ChunkStore:
            room = 2 * random.nbytes(chunks[codec])
            return stack.enter_context(
                ChunkStore(
                    root / name,
                    capacity_bytes=room,
                    ram_allocate=PageLocking(device) if device.type == "cuda" else None,
                    **options,
                )
            )

        away: dict[Place, ChunkStore] = {}
        stores: dict[Place, ChunkStore] = {}
        for place in sorted(places, key=lambda place: place.tier != "ram"):  # the device tier shares its store
            tier, codec = place
            if tier == "remote":
                options = {"remote": remote, "remote_timeout_ms": remote_timeout_ms, "ram_bytes": 0}
                away[place] = opening(f"remote-{codec}", codec, **options)
            elif tier == "device" and Place("ram", codec) in stores:
                stores[place] = stores[Place("ram", codec)]
            else:
                stores[place] = opening(codec, codec, ram_bytes=random.nbytes(chunks[codec]))
        _fill(random.checkpoint, chunks, {**stores, **away}, say)
        for place, store in away.items():
            stack.callback(store.delete, [chunk.tokens.key for chunk in chunks[place.codec]])
            elsewhere = _elsewhere(store, root / f"away-{place.codec}", remote, remote_timeout_ms)
            stores[place] = stack.enter_context(elsewhere)
        yield {place: stores[place] for place in places}


def _distinct(random: RandomChunks, contexts: Sequence[int], codec: str) -> list[PlannedChunk]:
    return list({c.tokens.key: c for context in sorted(contexts) for c in random.of(context, codec)}.values())


def _fill(
    checkpoint: Checkpoint,
    chunks: dict[str, list[PlannedChunk]],
    stores: dict[Place, ChunkStore],
    say: Say,
) -> None:
    """Encode on this thread, compress and write on others."""
    targets: dict[str, dict[str, ChunkStore]] = {codec: {} for codec in chunks}
    for place, store in stores.items():
        targets[place.codec].setdefault(str(store.folder.root), store)
    total = len(next(iter(chunks.values())))
    writing: deque[Future[None]] = deque()
    say("encoding chunks", 0, total)
    with ThreadPoolExecutor(_WRITERS, thread_name_prefix="ragkv-eval-writer") as writers:
        for done, forms in enumerate(zip(*chunks.values(), strict=True)):
            tokens = forms[0].tokens
            [encoded] = drained(encode(checkpoint.runner, EncodeGroup((), (tokens.ids,), (tokens.key,), "alone")))
            for chunk in forms:
                into = list(targets[chunk.tokens.codec].values())
                writing.append(writers.submit(_put, checkpoint, chunk, encoded, into))
            while len(writing) > 2 * _WRITERS:
                writing.popleft().result()
            say("encoding chunks", done + 1, total)
        for future in writing:
            future.result()


def _put(checkpoint: Checkpoint, chunk: PlannedChunk, encoded: EncodedChunk, stores: Sequence[ChunkStore]) -> None:
    for store in stores:
        store.put(
            chunk.tokens.key,
            checkpoint.runner.shape.geometry,
            encoded.slabs,
            tokens=encoded.tokens,
            model=checkpoint.name,
            codec=chunk.tokens.codec,
        )


@contextmanager
def _elsewhere(
    writer: ChunkStore, folder: Path, remote: str | RemoteTier | None, remote_timeout_ms: int
) -> Iterator[ChunkStore]:
    """Another machine's store: empty, and kept so, since it may not write what it reads from the remote tier."""
    if not writer.drain(_WRITE_BACK_S):
        raise StoreError("the remote tier did not take the chunks in time; look at its memory and its log")
    ChunkStore(folder, capacity_bytes=1 << 20, ram_bytes=0).close()
    options = {"remote": remote, "remote_timeout_ms": remote_timeout_ms}
    with ChunkStore(folder, capacity_bytes=1 << 20, ram_bytes=0, read_only=True, **options) as store:  # type: ignore[arg-type]
        yield store
