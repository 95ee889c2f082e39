"""Errors as OpenAI's clients expect them: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PREFIXES = ("/v1/chat", "/v1/models")
_STATUS = {422: 400}
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {
    "prompt_too_long": "context_length_exceeded",
    "queue_full": "rate_limit_exceeded",
    "unauthorized": "invalid_api_key",
}


def covers(path: str) -> bool:
    """Whether a route is one of OpenAI's."""
    return any(path == prefix or path.startswith(prefix + "/") for prefix in _PREFIXES)


def status_of(status: int) -> int:
    """The status OpenAI's API has for what ours answers with ``status``."""
    return _STATUS.get(status, status)


def error_of(status: int, code: str, message: str, context: Mapping[str, Any]) -> dict[str, str | None]:
    """The body's ``error``. ``param`` is the first field that is wrong; ``code`` is OpenAI's where it has one."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    fields = context.get("errors") or [{}]
    return {"message": message, "type": kind, "param": fields[0].get("field"), "code": _CODES.get(code, code)}
