"""OpenAI's routes: ``POST /v1/chat/completions`` and ``GET /v1/models``, errors in OpenAI's form."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from ragkv.errors import NotFoundError
from ragkv.server.body import read_json
from ragkv.server.chat import ChatBody
from ragkv.server.completions import Chunks, completion
from ragkv.server.errors import as_json
from ragkv.server.events import EventStream, answer_of
from ragkv.server.hangup import unless_hung_up
from ragkv.server.openapi import json_body
from ragkv.server.service import Service, ServiceDep, TenantDep

ANY_MODEL = "default"

router = APIRouter(prefix="/v1", tags=["openai"])


class UnknownModelError(NotFoundError):
    """Another model was asked for than the one served."""

    code = "model_not_found"


@router.post("/chat/completions", openapi_extra=json_body(ChatBody))
async def chat_completions(request: Request, service: ServiceDep, tenant: TenantDep) -> Response:
    """Answer the last message of a conversation, with documents or a collection if any are named."""
    body = await read_json(request, ChatBody, limit=service.json_limit)
    model = await _served(service, body.model)
    events = service.events(body.request(), tenant)
    if body.stream:
        return EventStream(events, Chunks(model, usage=body.usage_asked))
    answer = await unless_hung_up(request.receive, answer_of(events))
    return Response(as_json(completion(answer)), media_type="application/json")


@router.get("/models")
async def models(service: ServiceDep) -> dict[str, Any]:
    """The one model that is served."""
    return {"object": "list", "data": [_model(service, await service.model())]}


@router.get("/models/{model:path}")
async def model(model: str, service: ServiceDep) -> dict[str, Any]:
    """The model, by its name or as `default`."""
    return _model(service, await _served(service, model))


async def _served(service: Service, asked: str) -> str:
    served = await service.model()
    if asked not in (served, ANY_MODEL):
        field = {"field": "model", "problem": "not served here"}
        raise UnknownModelError(
            f"the model {asked!r} is not served here; ask for {served!r} or {ANY_MODEL!r}", errors=[field]
        )
    return served


def _model(service: Service, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": service.since, "owned_by": "ragkv"}
