"""Loads for a serving engine: who asks what, when, and after which answer. Lengths and seeds, no texts.

A prompt is made of pieces. Pieces with the same seed are the same tokens, so a common beginning is known by its seeds.
A later turn's prompt is all of the conversation so far, with the replies that really came, and its own pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import NamedTuple

import numpy as np

from ragkv.errors import ConfigError
from ragkv.eval.arrivals import Seconds, poisson
from ragkv.eval.conversations import Turn, capped, from_trace, invented
from ragkv.eval.traces import BLOCK_TOKENS, TraceRequest

_GAMMA_SHAPE = 1 / 9  # a coefficient of variation of 3
_ON_S = 5.0
_TENANT_PROMPT, _TENANT_OUTPUT = 512, 64


class Piece(NamedTuple):
    seed: int
    tokens: int


@dataclass(frozen=True)
class Ask:
    """A request. ``at`` is in seconds from the start, or, for the turn ``after`` another request, from its end.

    ``output`` tokens are generated, no more and no fewer. ``chunks`` are numbers of stored chunks that stand between
    the conversation so far and the question.
    """

    number: int
    at: float
    pieces: tuple[Piece, ...]
    output: int
    tenant: str = ""
    weight: float = 1.0
    after: int | None = None
    chunks: tuple[int, ...] = ()

    @property
    def new_tokens(self) -> int:
        return sum(piece.tokens for piece in self.pieces)


@dataclass(frozen=True)
class Workload:
    """``updates``: how priorities of live requests change, see :mod:`ragkv.eval.priorities`."""

    asks: tuple[Ask, ...]
    updates: str | None = None


@dataclass(frozen=True)
class Shape:
    """What loads are made to. ``rate`` is in requests a second, all tenants together; lengths are caps.

    Raises:
        ConfigError: a value no load can be made to.
    """

    requests: int = 300
    rate: float = 4.0
    prompt_tokens: int = 2048
    output_tokens: int = 256
    context_tokens: int = 8192
    think_s: float = 5.0
    chunks: int = 4
    chunk_tokens: int = 512
    pool: int = 32
    seed: int = 0
    trace: Sequence[TraceRequest] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        counts = (self.requests, self.prompt_tokens, self.output_tokens, self.chunks, self.chunk_tokens)
        if min(counts) < 1 or self.rate <= 0 or self.think_s < 0 or self.chunks > self.pool:
            raise ConfigError("a load wants positive counts and rates, and no more chunks a turn than --pool has")
        if self.context_tokens < self.prompt_tokens + self.output_tokens:
            raise ConfigError(
                f"--context-tokens {self.context_tokens} has no room for a prompt of {self.prompt_tokens} and a reply "
                f"of {self.output_tokens}",
                context_tokens=self.context_tokens,
            )

    def rng(self, what: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, what])


def make_workload(name: str, shape: Shape) -> Workload:
    """Raises ConfigError: there is no such load, or it is of a trace and there is none."""
    if name not in LOADS:
        raise ConfigError(f"--load: {name!r} is not one of {', '.join(LOADS)}", load=name)
    return LOADS[name](shape)


# Conversations.


def _sessions(shape: Shape, chunks: int = 0, updates: str | None = None) -> Workload:
    """Conversations begin at random times (Poisson); each turn comes a thinking time (exponential) after the reply to
    the one before. ``rate`` counts turns."""
    conversations = list(_whole(_conversations(shape), shape.requests))
    begins = poisson(shape.rate * len(conversations) / shape.requests, len(conversations), shape.seed)
    rng, asks = shape.rng(1), list[Ask]()
    for begin, turns in zip(begins, conversations, strict=True):
        for place, turn in enumerate(turns):
            asks.append(
                Ask(
                    number=len(asks),
                    at=float(rng.exponential(shape.think_s)) if place else float(begin),
                    pieces=(Piece(len(asks), turn.new),),
                    output=turn.output,
                    after=len(asks) - 1 if place else None,
                    chunks=tuple(rng.choice(shape.pool, chunks, replace=False).tolist()),
                )
            )
    return Workload(tuple(asks), updates)


def _conversations(shape: Shape) -> Iterator[list[Turn]]:
    """Those of the trace from its beginning, over again when they are too few; invented ones without a trace."""
    found = from_trace(shape.trace) if shape.trace else invented(shape.requests, shape.rng(0))
    cap = {"prompt": shape.prompt_tokens, "output": shape.output_tokens, "context": shape.context_tokens}
    fitting = [kept for turns in found if len(kept := capped(turns, **cap)) > 1]
    if not fitting:
        raise ConfigError("no conversation of two turns fits --context-tokens; raise it, or lower --prompt-tokens")
    return (fitting[number % len(fitting)] for number in count())


def _whole(conversations: Iterator[list[Turn]], requests: int) -> Iterator[list[Turn]]:
    """Until there are ``requests`` turns; the last conversation is cut there."""
    while requests > 0:
        turns = next(conversations)[:requests]
        requests -= len(turns)
        yield turns


def _replay(shape: Shape) -> Workload:
    """The trace's own requests as they came, at its arrival times, made faster or slower to give ``rate``."""
    if not shape.trace:
        raise ConfigError("--load trace replays a trace; name its file with --trace")
    requests = list(islice(shape.trace, shape.requests))
    times = np.array([request.timestamp for request in requests])
    times = (times - times[0]) / max(float(times[-1] - times[0]), 1.0) * len(requests) / shape.rate
    return Workload(
        tuple(
            Ask(number, float(at), _blocks(request, shape.prompt_tokens), _reply(request, shape))
            for number, (at, request) in enumerate(zip(times, requests, strict=True))
        )
    )


def _blocks(request: TraceRequest, cap: int) -> tuple[Piece, ...]:
    left, pieces = min(request.input_length, cap), list[Piece]()
    for block in request.hash_ids[: -(-left // BLOCK_TOKENS)]:
        pieces.append(Piece(block, min(BLOCK_TOKENS, left)))
        left -= BLOCK_TOKENS
    return tuple(pieces)


def _reply(request: TraceRequest, shape: Shape) -> int:
    return max(1, min(request.output_length, shape.output_tokens))


# Single requests.


def bursty(rate: float, requests: int, seed: int) -> Seconds:
    """Gaps are gamma-distributed with a coefficient of variation of 3."""
    gaps = np.random.default_rng(seed).gamma(_GAMMA_SHAPE, 1 / (rate * _GAMMA_SHAPE), requests)
    return np.cumsum(gaps)


def on_off(rate: float, requests: int, seed: int, on_s: float = _ON_S) -> Seconds:
    """Five seconds at twice the rate, five seconds of nothing, and so on."""
    busy = poisson(2 * rate, requests, seed)
    return busy + on_s * np.floor(busy / on_s)


_Arrivals = Callable[[float, int, int], Seconds]


def _single(shape: Shape, arrivals: _Arrivals) -> Workload:
    times = arrivals(shape.rate, shape.requests, shape.seed)
    first = islice((turns[0] for turns in _conversations(shape)), shape.requests)
    return Workload(
        tuple(
            Ask(n, float(at), (Piece(n, turn.new),), turn.output)
            for n, (at, turn) in enumerate(zip(times, first, strict=True))
        )
    )


# Tenants.


class _Tenant(NamedTuple):
    """``share`` of the load's rate and requests; lengths of all its requests, within a fifth."""

    name: str
    share: float
    weight: float = 1.0
    prompt: int = _TENANT_PROMPT
    output: int = _TENANT_OUTPUT
    arrivals: _Arrivals = poisson


def _tenants(*tenants: _Tenant) -> Callable[[Shape], Workload]:
    def make(shape: Shape) -> Workload:
        # Each draws by itself, so that a tenant's requests are the same whoever is beside it.
        drawn = [ask for place, tenant in enumerate(tenants) for ask in _of(tenant, place, shape)]
        drawn.sort(key=lambda ask: ask.at)
        return Workload(tuple(_numbered(ask, number) for number, ask in enumerate(drawn)))

    return make


def _of(tenant: _Tenant, place: int, shape: Shape) -> Iterator[Ask]:
    many, rng = max(1, round(shape.requests * tenant.share)), shape.rng(10 + place)
    times = tenant.arrivals(shape.rate * tenant.share, many, shape.seed + place)
    spread = rng.uniform(0.8, 1.2, (many, 2))
    for number, (at, (longer, more)) in enumerate(zip(times, spread, strict=True)):
        prompt = min(round(tenant.prompt * longer), shape.prompt_tokens)
        output = max(1, min(round(tenant.output * more), shape.output_tokens))
        piece = Piece((place + 1) << 32 | number, prompt)
        yield Ask(number, float(at), (piece,), output, tenant.name, tenant.weight)


def _numbered(ask: Ask, number: int) -> Ask:
    return Ask(number, ask.at, ask.pieces, ask.output, ask.tenant, ask.weight)


LOADS: dict[str, Callable[[Shape], Workload]] = {
    "trace": _replay,
    "poisson": lambda shape: _single(shape, poisson),
    "bursty": lambda shape: _single(shape, bursty),
    "on-off": lambda shape: _single(shape, on_off),
    "sessions": _sessions,
    "sessions-rag": lambda shape: _sessions(shape, chunks=shape.chunks),
    "sessions-priority": lambda shape: _sessions(shape, updates="markov"),
    "sessions-random": lambda shape: _sessions(shape, updates="random"),
    "tenants-overload": _tenants(_Tenant("a", 1 / 2), _Tenant("b", 1 / 2)),
    "tenants-on-off": _tenants(_Tenant("steady", 1 / 2), _Tenant("on-off", 1 / 2, arrivals=on_off)),
    "tenants-weights": _tenants(_Tenant("one", 1 / 2), _Tenant("two", 1 / 2, weight=2.0)),
    "tenants-short-long": _tenants(
        _Tenant("short", 2 / 3, prompt=_TENANT_PROMPT // 2, output=_TENANT_OUTPUT // 2),
        _Tenant("long", 1 / 3, prompt=4 * _TENANT_PROMPT, output=4 * _TENANT_OUTPUT),
    ),
    # The pair to hold against each other: the first tenant's requests are the same in both.
    "tenants-honest": _tenants(_Tenant("honest", 1 / 10), _Tenant("other", 1 / 10)),
    "tenants-flood": _tenants(_Tenant("honest", 1 / 10), _Tenant("flood", 9 / 10)),
}
