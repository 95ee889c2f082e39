"""Chunks of random tokens, encoded and stored for real, and prompts over them."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from ragkv.attention import NAME
from ragkv.chunks import ChunkTokens, EncodeGroup
from ragkv.clock import Stopwatch
from ragkv.encode import EncodedChunk, encode
from ragkv.eval.steps import drained
from ragkv.kv import RequestKV
from ragkv.plan import PlannedChunk, PromptPlan, Span, make_plan
from ragkv.prefill import Prefill, PrefillResult
from ragkv.retrievers import Chunk
from ragkv.runner import ModelRunner
from ragkv.store import ChunkStore, Geometry, chunk_key
from ragkv.store.remote import RemoteTier
from tests.families import make_runner

BOS = (1,)
AWAY = 61  # positions by which chunks are encoded away from where prompts will have them
T = TypeVar("T")


def drain(steps: Generator[None, None, T]) -> T:
    """Run a generator to its end, as the engine thread does."""
    with torch.inference_mode():
        return drained(steps)


def token_ids(n: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(3, 256, (n,), generator=torch.Generator().manual_seed(seed)).tolist())


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


class Desk:
    """A runner, a store, and chunks of documents given as lengths: ``document("d", 20, 13)``."""

    def __init__(
        self, root: Path, family: str = "llama", *, ram_bytes: int = 0, remote: RemoteTier | None = None
    ) -> None:
        self.runner: ModelRunner = make_runner(family)
        self.store = ChunkStore(
            root / "store", capacity_bytes=2**26, ram_bytes=ram_bytes, threads=2, remote=remote, remote_timeout_ms=1000
        )
        shape = self.runner.shape
        self.geometry = Geometry(shape.layers, shape.kv_heads, shape.head_dim, "float32")
        self.seed = 10

    def document(self, name: str, *lengths: int, alone: bool = False) -> list[PlannedChunk]:
        """Chunks of a document; each is to be encoded behind all chunks before it, or alone."""
        chunks: list[PlannedChunk] = []
        context: tuple[int, ...] = ()
        for ordinal, length in enumerate(lengths):
            self.seed += 1
            ids = token_ids(length, self.seed)
            behind = () if alone else context
            key = chunk_key(
                model="m",
                tokenizer="t",
                dtype="float32",
                codec="raw",
                context_policy="document",
                context=(*BOS, *behind),
                tokens=ids,
            )
            tokens = ChunkTokens(ids, behind, 0 if alone else ordinal, "alone" if alone else "document", key)
            chunk = Chunk(f"{name}-{ordinal}", name, ordinal, f"text {ordinal}")
            chunks.append(PlannedChunk(chunk, self.seed, 1.0, tokens))
            context += ids
        return chunks

    def again(self, chunk: PlannedChunk, document: str) -> PlannedChunk:
        """The same text as the only chunk of another document."""
        self.seed += 1
        return PlannedChunk(Chunk(f"{document}-0", document, 0, chunk.chunk.text), self.seed, 1.0, chunk.tokens)

    def group(self, chunk: PlannedChunk) -> EncodeGroup:
        tokens = chunk.tokens
        return EncodeGroup((*BOS, *tokens.context), (tokens.ids,), (tokens.key,), tokens.policy)

    def encode(self, chunk: PlannedChunk) -> EncodedChunk:
        """``chunk`` encoded behind its context, at positions far from those of any prompt here."""
        away = _Away(self.runner)
        [encoded] = drain(encode(away, self.group(chunk)))  # type: ignore[arg-type]
        return encoded

    def put(self, *chunks: PlannedChunk, poison: dict[PlannedChunk, Sequence[int]] | None = None) -> None:
        """Encode and store; ``poison`` names tokens of a chunk whose K and V are spoilt in every layer."""
        for chunk in chunks:
            encoded = self.encode(chunk)
            slabs = [slab.copy() for slab in encoded.slabs]
            for slab in slabs:
                rows = slab.view(np.float32).reshape(2, encoded.tokens, -1)
                rows[:, list((poison or {}).get(chunk, []))] += 3.0
            assert self.store.put(
                encoded.key,
                self.geometry,
                slabs,
                tokens=encoded.tokens,
                model="m",
                context_tokens=encoded.context_tokens,
                context_policy=encoded.context_policy,
            )

    def plan(self, *chunks: PlannedChunk, question: int = 9, prefix: tuple[int, ...] = BOS) -> PromptPlan:
        return make_plan(prefix, chunks, token_ids(question, 99), budget=500)

    def prefill(self, plan: PromptPlan, strategy: str, ratio: float = 0.0, **options: Any) -> Prefill:
        settings = {"room": 4, "watch": Stopwatch(), **options}
        return Prefill(self.runner, self.store, plan, strategy=strategy, ratio=ratio, **settings)

    def run(self, plan: PromptPlan, strategy: str, ratio: float = 0.0, **options: Any) -> PrefillResult:
        return drain(self.prefill(plan, strategy, ratio, **options).run())

    def library(self, plan: PromptPlan) -> torch.Tensor:
        """Next-token logits of the library's own forward over the whole prompt."""
        model = self.runner.model
        model.set_attn_implementation("eager")
        try:
            with torch.inference_mode():
                return model(torch.tensor([plan.ids]), use_cache=False).logits[0, -1].float()
        finally:
            model.set_attn_implementation(NAME)

    def kv(self, result: PrefillResult, span: Span) -> torch.Tensor:
        """(layers, 2, tokens, kv_heads, head_dim) of a span after the prefill."""
        layers = range(self.runner.shape.layers)
        return torch.stack([torch.stack(result.kv.read(i, span.end))[:, span.start :] for i in layers]).clone()

    def free(self, chunk: PlannedChunk) -> bool:
        """Whether nobody holds a lease on the stored chunk (it is removed to find out)."""
        return self.store.delete([chunk.tokens.key]) == 1


class _Away:
    """A runner whose every KV begins at position AWAY."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def new_kv(self, capacity: int) -> RequestKV:
        return self._runner.new_kv(capacity, base=AWAY)
