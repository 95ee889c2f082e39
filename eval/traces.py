"""Streams of requests for chunks, real and invented, for trying cache policies on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ragkv.errors import InputError

BLOCK_TOKENS = 512
CONTEXT_TOKENS = 1024
CHUNKS_PER_REQUEST = 10

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Trace:
    """Requests for chunks. ``chunks`` (references,) are chunk numbers in the order of time, request by request.

    ``starts`` (requests,) says where in it each request begins; ``tokens`` and ``context`` (chunks,) are each
    chunk's own tokens, and those of its document that it has to be encoded behind.
    """

    name: str
    chunks: Ints
    starts: Ints
    tokens: Ints
    context: Ints

    @property
    def cost(self) -> Ints:
        """Tokens to prefill for having a chunk again."""
        return self.tokens + self.context

    @property
    def equal_sizes(self) -> bool:
        return bool((self.tokens == self.tokens[0]).all())

    def score(self, found: NDArray[np.bool_]) -> dict[str, float]:
        """Shares of what was asked for that was ``found`` (references,).

        ``hits`` counts references, ``tokens`` their tokens, ``saved`` the tokens that need not be prefilled,
        context included, and ``requests`` is the mean over requests of the share of tokens found.
        """
        tokens, cost = self.tokens[self.chunks], self.cost[self.chunks]
        asked = np.add.reduceat(tokens, self.starts)
        got = np.add.reduceat(tokens * found, self.starts)
        return {
            "hits": float(found.mean()),
            "tokens": float(got.sum() / asked.sum()),
            "saved": float(cost[found].sum() / cost.sum()),
            "requests": float((got / asked).mean()),
        }


class TraceRequest(BaseModel):
    """A line of a conversation trace; ``timestamp`` in ms."""

    model_config = ConfigDict(extra="ignore")
    timestamp: float
    input_length: int = Field(ge=1)
    output_length: int = 0
    hash_ids: list[int] = Field(min_length=1)


def read_requests(path: Path) -> list[TraceRequest]:
    """A conversation trace, by time: JSON lines of ``timestamp``, ``input_length``, ``output_length``, ``hash_ids``.

    The ids stand for blocks of 512 tokens, each together with all before it (the format of Mooncake, FAST 2025).

    Raises:
        InputError: the file cannot be read, or a line is no such request.
    """
    requests = [_parse(path, number, line) for number, line in enumerate(_lines(path), 1) if line.strip()]
    if not requests:
        raise InputError(f"{path} holds no request; give a JSONL conversation trace", path=str(path))
    return sorted(requests, key=lambda request: request.timestamp)


def read_trace(path: Path) -> Trace:
    """The same as chunks: a block counts as a chunk encoded behind up to 1,024 tokens of those before it.

    Raises:
        InputError: as :func:`read_requests`.
    """
    requests = read_requests(path)
    ids: dict[int, int] = {}
    context: list[int] = []
    chunks: list[int] = []
    for request in requests:
        for place, block in enumerate(request.hash_ids):
            if block not in ids:
                ids[block] = len(ids)
                context.append(min(CONTEXT_TOKENS, place * BLOCK_TOKENS))
            chunks.append(ids[block])
    starts = np.cumsum([0] + [len(request.hash_ids) for request in requests[:-1]])
    return Trace(
        path.stem, np.array(chunks), starts, np.full(len(ids), BLOCK_TOKENS, np.int64), np.array(context, np.int64)
    )


def zipf_trace(
    exponent: float, *, seed: int = 0, chunks: int = 10_000, references: int = 60_000, scan_share: float = 0.2
) -> Trace:
    """Chunks asked for by Zipf's law, with scans of chunks that are never asked for again, and of many sizes.

    In each tenth of the trace a twentieth of the chunks trade popularity, and one scan comes; ``scan_share`` of
    all references are scans. Sizes are log-normal around 300 tokens; a chunk is 0 to 7 chunks into its document.
    """
    rng = np.random.default_rng(seed)
    weights = np.arange(1, chunks + 1) ** -exponent
    ranks = rng.choice(chunks, references, p=weights / weights.sum())
    popular = rng.permutation(chunks)
    new = chunks
    parts = []
    for part in np.array_split(ranks, 10):
        trading = rng.choice(chunks, chunks // 20, replace=False)
        popular[trading] = popular[rng.permutation(trading)]
        asked = popular[part]
        start, count = len(asked) // 3, int(len(asked) * scan_share)
        asked[start : start + count] = np.arange(new, new + count)
        new += count
        parts.append(asked)
    tokens = np.clip(rng.lognormal(np.log(300), 0.6, new), 32, 1024).astype(np.int64)
    context = np.minimum(CONTEXT_TOKENS, rng.integers(0, 8, new) * tokens)
    starts = np.arange(0, references, CHUNKS_PER_REQUEST)
    return Trace(f"zipf {exponent:g}", np.concatenate(parts), starts, tokens, context)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a trace: {error}", path=str(path)) from error


def _parse(path: Path, number: int, line: str) -> TraceRequest:
    try:
        fields: Any = json.loads(line)
        return TraceRequest.model_validate(fields)
    except (ValueError, ValidationError) as error:
        raise InputError(
            f"{path}, line {number} is no request; it wants timestamp, input_length, output_length and hash_ids",
            path=str(path),
            line=number,
        ) from error
