"""``POST /v1/query``: one question, answered as JSON or as server-sent events."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from ragkv.server.body import read_json
from ragkv.server.events import EventStream, NamedEvents, answer_of
from ragkv.server.hangup import unless_hung_up
from ragkv.server.openapi import json_body
from ragkv.server.service import ServiceDep, TenantDep
from ragkv.server.wire import QueryBody
from ragkv.types import Answer

router = APIRouter(tags=["query"])


@router.post("/v1/query", response_model=Answer, openapi_extra=json_body(QueryBody))
async def query(request: Request, service: ServiceDep, tenant: TenantDep) -> Answer | Response:
    """Answer a question from a collection, from the request's own documents, or the conversation alone."""
    body = await read_json(request, QueryBody, limit=service.json_limit)
    events = service.events(body.request(), tenant)
    if body.stream or "text/event-stream" in request.headers.get("accept", ""):
        return EventStream(events, NamedEvents())
    return await unless_hung_up(request.receive, answer_of(events))
