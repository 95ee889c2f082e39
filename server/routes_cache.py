"""``/v1/cache``: the chunk store's state and upkeep. Closed without an api_key (see ``access``)."""

from __future__ import annotations

from fastapi import APIRouter, Request

from ragkv.server.body import read_json
from ragkv.server.openapi import json_body
from ragkv.server.service import ServiceDep
from ragkv.server.wire import CheckBody, Cleared
from ragkv.types import StoreCheck, StoreInfo

router = APIRouter(prefix="/v1/cache", tags=["cache"])


@router.get("")
async def cache_stats(service: ServiceDep) -> StoreInfo:
    """What the chunk store and idle conversations hold, and the store's hits and misses."""
    return await service.short(service.engine.cache_stats)


@router.post("/check", openapi_extra=json_body(CheckBody, required=False))
async def cache_check(request: Request, service: ServiceDep) -> StoreCheck:
    """Compare index and files, and repair them with ``fix``."""
    has_body = request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers
    body = await read_json(request, CheckBody, limit=service.json_limit) if has_body else CheckBody()
    return await service.long(service.engine.cache_check, fix=body.fix)


@router.delete("")
async def cache_clear(service: ServiceDep) -> Cleared:
    """Remove all KV on disk that is not being read, idle conversations' too; it is computed again at need."""
    return Cleared(removed=await service.long(service.engine.cache_clear))
