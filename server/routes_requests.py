"""``/v1/requests``: requests that wait or run, by the id that their stream began with."""

from __future__ import annotations

from fastapi import APIRouter, Request

from ragkv.server.body import read_json
from ragkv.server.openapi import json_body
from ragkv.server.service import ServiceDep, TenantDep
from ragkv.server.wire import Prioritized, PriorityBody

router = APIRouter(prefix="/v1/requests", tags=["requests"])


@router.patch("/{request_id}", openapi_extra=json_body(PriorityBody))
async def reprioritize(request_id: str, request: Request, service: ServiceDep, tenant: TenantDep) -> Prioritized:
    """Give a request another priority. A tenant reaches its own requests only."""
    body = await read_json(request, PriorityBody, limit=service.json_limit)
    await service.short(service.engine.reprioritize, request_id, body.priority, tenant=tenant)
    return Prioritized(id=request_id, priority=body.priority)


@router.delete("/{request_id}", status_code=204)
async def cancel(request_id: str, service: ServiceDep, tenant: TenantDep) -> None:
    """End a request; what it has said so far is its answer."""
    await service.short(service.engine.cancel, request_id, tenant=tenant)
