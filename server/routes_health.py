"""``GET /health`` and ``GET /metrics``, open to probes and scrapers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from anyio import fail_after
from fastapi import APIRouter, Response

from ragkv.errors import ServerError
from ragkv.server.metrics import CONTENT_TYPE
from ragkv.server.service import Service, ServiceDep
from ragkv.types import Health

PROBE_SECONDS = 5.0

T = TypeVar("T")

router = APIRouter(tags=["health"])


@router.get("/health", responses={503: {"model": Health, "description": "the engine is dead"}})
async def health(service: ServiceDep, response: Response) -> Health:
    """The engine's state; 503 when it failed, or does not answer within five seconds."""
    state = await _probe(service, service.engine.health)
    response.status_code = 503 if state.status == "failed" else 200
    return state


@router.get("/metrics", response_class=Response)
async def metrics(service: ServiceDep) -> Response:
    """Prometheus text."""
    engine = service.engine
    numbers, served = await _probe(service, lambda: (engine.metrics(), engine.tenant_service()))
    return Response(service.metrics.render(numbers, served), media_type=CONTENT_TYPE)


async def _probe(service: Service, call: Callable[[], T]) -> T:
    try:
        with fail_after(PROBE_SECONDS):
            return await service.probe(call)
    except TimeoutError as error:
        raise ServerError(
            f"the engine has not answered for {PROBE_SECONDS:g} s; restart the server if this lasts",
            seconds=PROBE_SECONDS,
        ) from error
