"""Errors as HTTP answers: one table of statuses, one body ``{"error": {"code", "message", "context"}}``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from ragkv import errors as e

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


def error_body(error: Exception) -> bytes:
    """The JSON body of an error. Of an unexpected one it tells nothing: its text may be private."""
    if isinstance(error, e.RagkvError):
        return _body(error.code, error.message, error.context)
    return _body("internal", "the server failed on this request; its log has the details", {})


def error_response(
    status: int, code: str, message: str, *, headers: dict[str, str] | None = None, **context: object
) -> Response:
    return Response(_body(code, message, context), status, headers, media_type="application/json")


def respond(error: Exception) -> Response:
    """The answer to an error; unexpected ones are logged with their traceback."""
    status = status_of(error)
    if not isinstance(error, e.RagkvError):
        logger.error("unexpected error", exc_info=error)
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status == 429 else None
    return Response(error_body(error), status, headers, media_type="application/json")


def invalid(error: ValidationError | RequestValidationError) -> e.InputError:
    """A validation error as InputError that names every field that is wrong, without echoing its value."""
    fields = [{"field": _field(item["loc"]), "problem": _problem(item)} for item in error.errors()]
    message = "; ".join(f"{f['field']}: {f['problem']}" for f in fields[:5])
    if len(fields) > 5:
        message += f"; and {len(fields) - 5} more"
    return e.InputError(message, errors=fields)


def install(app: FastAPI) -> None:
    """Give every error that leaves a route, and the framework's own, the one body."""

    async def on_ragkv(_: Request, error: Exception) -> Response:
        return respond(error)

    async def on_validation(_: Request, error: Exception) -> Response:
        return respond(invalid(error) if isinstance(error, RequestValidationError) else error)

    async def on_hang_up(_: Request, __: Exception) -> Response:
        return respond(e.CancelledError("the client hung up while sending the request"))

    app.add_exception_handler(e.RagkvError, on_ragkv)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(ClientDisconnect, on_hang_up)
    app.add_exception_handler(HTTPException, _on_http)


async def _on_http(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        return respond(error)
    headers = dict(error.headers or {})
    if error.status_code == 404:
        return error_response(404, "no_route", f"there is no route {request.url.path}; see /openapi.json")
    if error.status_code == 405:
        allowed = headers.get("allow") or headers.get("Allow") or "other methods"
        message = f"{request.url.path} does not take {request.method}; it takes {allowed}"
        return error_response(405, "method_not_allowed", message, headers=headers)
    return error_response(error.status_code, "http", str(error.detail), headers=headers)


def _body(code: str, message: str, context: dict[str, Any]) -> bytes:
    error = {"code": code, "message": message, "context": context}
    return to_json({"error": error}, fallback=str, inf_nan_mode="null")


def _field(location: Sequence[str | int]) -> str:
    parts = location[1:] if location and location[0] in ("body", "query", "path") else location
    return ".".join(str(part) for part in parts) or "body"


def _problem(item: Any) -> str:
    return "unknown field" if item["type"] == "extra_forbidden" else str(item["msg"])
