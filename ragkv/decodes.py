"""One decode step for all requests at once, read by the host a step late.

On a GPU a step is launched before the host knows what the step before it chose: tokens stay on the device, and it never
waits for Python. A request that turns out to have ended meanwhile has one token computed for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ragkv.active import Active, Phase
from ragkv.decoding import Decoder
from ragkv.generation import TokenScores
from ragkv.pool import KvPool
from ragkv.sampling import Sampled, Sampler, sample

Deliver = Callable[[Active, int, TokenScores | None], None]


@dataclass
class _Launched:
    """A step under way: whose it is, what it chose, and the event behind the copy to the host."""

    requests: list[Active]
    sampled: Sampled
    event: Any


class Decodes:
    """The requests that decode. ``deliver`` is told every token, in the order of the steps.

    Attributes:
        late: tokens are delivered once the next step is launched.
    """

    def __init__(self, decoder: Decoder, pool: KvPool, device: torch.device, lanes: int, deliver: Deliver) -> None:
        self._decoder, self._pool, self._device, self._deliver = decoder, pool, device, deliver
        self.late = device.type == "cuda"
        self._lanes = list(range(lanes - 1, -1, -1))
        self._under_way: _Launched | None = None
        self.requests: list[Active] = []

    def enter(self, request: Active) -> None:
        """``request`` goes on behind its last token, whose KV is not written."""
        if request.table is None:
            raise RuntimeError("a request without a table cannot decode")
        request.lane, request.phase = self._lanes.pop(), Phase.DECODE
        request.written = len(request.ids) - 1
        request.sampled = len(request.ids) - len(request.generation.plan.ids)
        self._decoder.enter(request.lane, request.ids[-1], request.written, request.table.places)
        self.requests.append(request)

    def leave(self, request: Active) -> None:
        """Its lane is free; what is under way for it is dropped, unless it was collected before."""
        if request.lane is not None:
            self.requests.remove(request)
            self._decoder.left(request.lane)
            self._lanes.append(request.lane)
            request.lane = None

    def step(self, among: Sequence[Active] | None = None) -> tuple[int, int]:
        """Launch a step for everybody who has room and is not done, and deliver the one before. Returns how many rows
        it has, and how many tokens they see."""
        among = self.requests if among is None else among
        going = [r for r in among if r.sampled < r.generation.max_tokens and self._fits(r)]
        before, self._under_way = self._under_way, self._launch(going) if going else None
        self._collect(before)
        if not self.late:
            self.collect()
        return len(going), sum([r.written for r in going])

    def step_each(self, failed: Callable[[Active, Exception], None]) -> None:
        """After a step that failed: one for each request by itself, so that only those end that are to blame."""
        self.collect()
        for request in list(self.requests):  # they may have been moved on before it failed
            self.leave(request)
            self.enter(request)
        for request in list(self.requests):
            try:
                self.step([request])
            except Exception as error:
                failed(request, error)

    def collect(self) -> None:
        """Deliver what is under way."""
        before, self._under_way = self._under_way, None
        self._collect(before)

    def _fits(self, request: Active) -> bool:
        table, lane = request.table, request.lane
        if table is None or lane is None:
            return False
        had = len(table.blocks)
        if not self._pool.grow(table, request.written + 1):
            return False
        if len(table.blocks) > had:
            self._decoder.extend(lane, table.places[had:])
        return True

    def _launch(self, going: list[Active]) -> _Launched:
        lanes = [r.lane for r in going if r.lane is not None]
        logits = self._decoder.step(lanes)
        sampled = sample(logits, [r.sampler for r in going if r.sampler is not None])
        self._decoder.put_tokens(lanes, sampled.tokens)
        for request in going:
            request.written += 1
            request.sampled += 1
        if self._device.type != "cuda":
            return _Launched(going, sampled, None)
        on_host = sampled.to_host()
        return _Launched(going, on_host, torch.cuda.current_stream(self._device).record_event())

    def _collect(self, step: _Launched | None) -> None:
        if step is None:
            return
        if step.event is not None:
            step.event.synchronize()
        for index, (request, token) in enumerate(zip(step.requests, step.sampled.tokens.tolist(), strict=True)):
            if request.phase is Phase.DECODE:
                request.ids.append(token)
                self._deliver(request, token, scores_of(step.sampled, index, request.sampler))


def scores_of(sampled: Sampled, row: int, sampler: Sampler | None) -> TokenScores | None:
    """What the request of ``row`` asked to know of its token."""
    wanted = sampler.params.logprobs if sampler is not None else None
    if wanted is None or sampled.logprobs is None:
        return None
    top: tuple[tuple[int, float], ...] = ()
    if wanted and sampled.top_ids is not None and sampled.top_logprobs is not None:
        top = tuple(
            zip(sampled.top_ids[row, :wanted].tolist(), sampled.top_logprobs[row, :wanted].tolist(), strict=True)
        )
    return TokenScores(float(sampled.logprobs[row]), top)
