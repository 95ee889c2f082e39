"""The OpenAPI description of bodies that the routes read themselves."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from ragkv.server.chat import ChatBody
from ragkv.server.wire import CheckBody, DocumentsBody, PriorityBody, QueryBody

_REF = "#/components/schemas/{model}"
_BODIES = (QueryBody, ChatBody, PriorityBody, DocumentsBody, CheckBody)
_FILES = {
    "type": "object",
    "required": ["files"],
    "properties": {
        "files": {"type": "array", "items": {"type": "string", "format": "binary"}},
        "encode": {"type": "string", "enum": ["eager", "lazy"]},
    },
}


def json_body(model: type[BaseModel], *, required: bool = True) -> dict[str, Any]:
    """A route's ``openapi_extra`` for a JSON body."""
    content = {"application/json": {"schema": {"$ref": _REF.format(model=model.__name__)}}}
    return {"requestBody": {"required": required, "content": content}}


def documents_body() -> dict[str, Any]:
    """The same for documents, which come as JSON or as files."""
    extra = json_body(DocumentsBody)
    extra["requestBody"]["content"]["multipart/form-data"] = {"schema": _FILES}
    return extra


def install(app: FastAPI, *, bearer: bool) -> None:
    """Make ``/openapi.json`` tell the bodies' schemas and, where a key is needed, that it is."""

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            bodies = [(model, "validation") for model in _BODIES]
            definitions = models_json_schema(bodies, ref_template=_REF)[1]["$defs"]  # type: ignore[arg-type]
            schema["components"]["schemas"] = definitions | schema["components"]["schemas"]
            if bearer:
                schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                schema["security"] = [{"key": []}]
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign]
