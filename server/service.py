"""What the routes share: the engine, the metrics, and the threads blocking calls run in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, ParamSpec, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import Depends
from starlette.requests import Request

from ragkv.server.body import JSON_BODY_FACTOR
from ragkv.server.contract import EngineAPI
from ragkv.server.metrics import Metrics

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Service:
    """One per app. Long calls (ingest, store checks) have threads of their own, so that a dozen of them never
    keep a health check or a document listing waiting."""

    engine: EngineAPI
    metrics: Metrics
    long_calls: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(4))
    short_calls: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(16))
    probes: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(4))

    @property
    def json_limit(self) -> int:
        return self.engine.settings.max_document_bytes * JSON_BODY_FACTOR

    async def short(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await to_thread.run_sync(partial(call, *args, **kwargs), limiter=self.short_calls)

    async def long(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await to_thread.run_sync(partial(call, *args, **kwargs), limiter=self.long_calls)

    async def probe(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """For health checks: cancelled at once even where the call hangs."""
        return await to_thread.run_sync(partial(call, *args, **kwargs), limiter=self.probes, abandon_on_cancel=True)


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(_service)]
