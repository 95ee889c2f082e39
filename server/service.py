"""What the routes share: the engine, the metrics, and the threads blocking calls run in."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from functools import partial
from time import time
from typing import Annotated, ParamSpec, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import Depends
from starlette.requests import Request

from ragkv.server.body import JSON_BODY_FACTOR
from ragkv.server.contract import EngineAPI
from ragkv.server.metrics import Metrics
from ragkv.server.observe import observed
from ragkv.types import Event
from ragkv.types import Request as Asked

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
    since: int = field(default_factory=lambda: int(time()))

    @property
    def json_limit(self) -> int:
        return self.engine.settings.max_document_bytes * JSON_BODY_FACTOR

    def events(self, request: Asked, tenant: str) -> AsyncGenerator[Event, None]:
        """The answer to a request, counted as it passes."""
        return observed(self.engine.astream(request, tenant=tenant), self.metrics, tenant)

    async def model(self) -> str:
        """The name of the model that is served."""
        return (await self.short(self.engine.health)).model

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


async def _tenant(request: Request) -> str:
    tenant: str = request.state.tenant
    return tenant


ServiceDep = Annotated[Service, Depends(_service)]
# Whose key came with the request; "" for the api_key's, and where no key is needed.
TenantDep = Annotated[str, Depends(_tenant)]
