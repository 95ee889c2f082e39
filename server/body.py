"""Request bodies: bounded while they arrive, then parsed strictly."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from ragkv.errors import InputError
from ragkv.server.errors import BodyTooLargeError, MediaTypeError, invalid

M = TypeVar("M", bound=BaseModel)

# A JSON body escapes text, at worst six characters for one, and may hold several documents.
JSON_BODY_FACTOR = 4
_INT64 = 2**63


def media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def limited(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The body, piece by piece. Raises BodyTooLargeError once over ``limit`` bytes are announced or came."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise _too_large(limit, int(announced))
    received = 0
    async for piece in request.stream():
        received += len(piece)
        if received > limit:
            raise _too_large(limit, None)
        yield piece


async def read_json(request: Request, model: type[M], *, limit: int) -> M:
    """The JSON body as ``model``.
    Raises BodyTooLargeError over ``limit`` bytes, MediaTypeError when it is not sent as JSON, InputError
    when it is not valid UTF-8 JSON, nests over 200 levels, holds NaN or numbers beyond 64 bits, or does not
    fit the model.
    """
    if media_type(request) != "application/json":
        sent = media_type(request) or "none"
        raise MediaTypeError(f"send a JSON body with 'Content-Type: application/json', not {sent}", content_type=sent)
    body = b"".join([piece async for piece in limited(request, limit)])
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise InputError(f"the body is not valid UTF-8 JSON: {error}") from error
    _refuse_huge_numbers(data)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise invalid(error) from error


def _too_large(limit: int, size: int | None) -> BodyTooLargeError:
    return BodyTooLargeError(
        f"the request body is over {limit:,} bytes; send less in one request or raise max_document_bytes",
        limit=limit,
        bytes=size,
    )


def _refuse_huge_numbers(data: object) -> None:
    """The parser turns 1e999 into infinity and takes integers of any length; neither can be sent back."""
    if isinstance(data, dict):
        for value in data.values():
            _refuse_huge_numbers(value)
    elif isinstance(data, list):
        for value in data:
            _refuse_huge_numbers(value)
    elif (isinstance(data, int) and not -_INT64 <= data < _INT64) or (
        isinstance(data, float) and not math.isfinite(data)
    ):
        raise InputError("the body holds a number that does not fit into 64 bits; send it as a string")
