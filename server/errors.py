"""Errors as HTTP answers: one table of statuses, one body ``{"error": {"code", "message", "context"}}``, and
OpenAI's on OpenAI's routes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Scope

from ragkv import errors as e
from ragkv.server import openai_form

logger = logging.getLogger("ragkv.server")

CLIENT_CLOSED_REQUEST = 499
RETRY_AFTER_SECONDS = 1


class BodyTooLargeError(e.InputError):
    """The whole request body is over its limit; unlike DocumentError it is not about one document."""


class MediaTypeError(e.InputError):
    """The body is of a type the route does not read."""


# The nearest class in an error's ancestry decides.
STATUS: dict[type[e.RagkvError], int] = {
    e.RagkvError: 500,
    e.InputError: 422,
    BodyTooLargeError: 413,
    MediaTypeError: 415,
    e.NotFoundError: 404,
    e.ModelError: 503,
    e.StoreError: 503,
    e.StoreFullError: 507,
    e.CollectionError: 503,
    e.MissingExtraError: 501,
    e.QueueFullError: 429,
    e.CancelledError: CLIENT_CLOSED_REQUEST,
    e.EngineClosedError: 503,
    e.ServerError: 503,
}


def status_of(error: Exception) -> int:
    """The HTTP status of an error; anything unexpected is 500."""
    if isinstance(error, e.DocumentError) and "limit" in error.context:
        return 413
    return next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 500)


def told(error: Exception) -> tuple[str, str, dict[str, Any]]:
    """Code, message and context of an error. Of an unexpected one it tells nothing: its text may be private."""
    if isinstance(error, e.RagkvError):
        return error.code, error.message, error.context
    return "internal", "the server failed on this request; its log has the details", {}


def error_body(error: Exception) -> bytes:
    """The JSON body of an error."""
    code, message, context = told(error)
    return as_json({"error": {"code": code, "message": message, "context": context}})


def openai_body(error: Exception) -> bytes:
    """The same in OpenAI's form."""
    return as_json({"error": openai_form.error_of(status_of(error), *told(error))})


def as_json(value: object) -> bytes:
    return to_json(value, fallback=str, inf_nan_mode="null")


def error_response(
    scope: Scope,
    status: int,
    code: str,
    message: str,
    context: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """The answer to a request that cannot be served, in the form of the route it was sent to."""
    error: dict[str, Any] = {"code": code, "message": message, "context": context or {}}
    if openai_form.covers(scope["path"]):
        error = dict(openai_form.error_of(status, code, message, context or {}))
        status = openai_form.status_of(status)
    return Response(as_json({"error": error}), status, headers, media_type="application/json")


def respond(scope: Scope, error: Exception) -> Response:
    """The answer to an error; unexpected ones are logged with their traceback."""
    status = status_of(error)
    if not isinstance(error, e.RagkvError):
        logger.error("unexpected error", exc_info=error)
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status == 429 else None
    return error_response(scope, status, *told(error), headers)


def invalid(error: ValidationError | RequestValidationError, names: Mapping[Any, str] | None = None) -> e.InputError:
    """A validation error as InputError that names every field that is wrong, without echoing its value.
    ``names``: what the caller calls a field, where that differs."""
    fields = [{"field": _field(item["loc"], names or {}), "problem": _problem(item)} for item in error.errors()]
    message = "; ".join(f"{f['field']}: {f['problem']}" for f in fields[:5])
    if len(fields) > 5:
        message += f"; and {len(fields) - 5} more"
    return e.InputError(message, errors=fields)


def install(app: FastAPI) -> None:
    """Give every error that leaves a route, and the framework's own, the one body."""

    async def on_ragkv(request: Request, error: Exception) -> Response:
        return respond(request.scope, error)

    async def on_validation(request: Request, error: Exception) -> Response:
        return respond(request.scope, invalid(error) if isinstance(error, RequestValidationError) else error)

    async def on_hang_up(request: Request, _: Exception) -> Response:
        return respond(request.scope, e.CancelledError("the client hung up while sending the request"))

    app.add_exception_handler(e.RagkvError, on_ragkv)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(ClientDisconnect, on_hang_up)
    app.add_exception_handler(HTTPException, _on_http)


async def _on_http(request: Request, error: Exception) -> Response:
    scope = request.scope
    if not isinstance(error, HTTPException):
        return respond(scope, error)
    headers = dict(error.headers or {})
    if error.status_code == 404:
        return error_response(scope, 404, "no_route", f"there is no route {request.url.path}; see /openapi.json")
    if error.status_code == 405:
        allowed = headers.get("allow") or headers.get("Allow") or "other methods"
        message = f"{request.url.path} does not take {request.method}; it takes {allowed}"
        return error_response(scope, 405, "method_not_allowed", message, headers=headers)
    return error_response(scope, error.status_code, "http", str(error.detail), headers=headers)


def _field(location: Sequence[str | int], names: Mapping[Any, str]) -> str:
    parts = location[1:] if location and location[0] in ("body", "query", "path") else location
    return ".".join([*(names.get(part, str(part)) for part in parts[:1]), *map(str, parts[1:])]) or "body"


def _problem(item: Any) -> str:
    return "unknown field" if item["type"] == "extra_forbidden" else str(item["msg"]).removeprefix("Value error, ")
