"""Who may ask: bearer key, admin routes, and the guard of a server without a key against web pages."""

from __future__ import annotations

import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ragkv.server.errors import error_response

OPEN_PATHS = frozenset({"/health", "/metrics", "/openapi.json"})
ADMIN_PREFIX = "/v1/cache"


class Access:
    """ASGI middleware; it answers before a body is read.

    With a key, everything but OPEN_PATHS needs ``Authorization: Bearer <key>``. Without one the server only
    listens on a loopback address; admin routes are closed, and requests that a web page in a local browser
    could forge (foreign ``Origin``, or ``Host`` rebound by DNS) are refused.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None) -> None:
        self._app = app
        self._key = api_key.encode() if api_key is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        await (refusal or self._app)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if self._key is None:
            return _foreign(headers) or _admin(scope["path"])
        if scope["path"] in OPEN_PATHS or self._knows_key(headers):
            return None
        return error_response(
            401,
            "unauthorized",
            "this server needs its api_key: send 'Authorization: Bearer <key>'",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _knows_key(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # Header values are latin-1 on the wire.
        sent = key.strip().encode("latin-1")
        return scheme.lower() == "bearer" and hmac.compare_digest(sent, self._key or b"")


def is_loopback(host: str) -> bool:
    """Whether a host name or address can only mean this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost" or host.lower().endswith(".localhost")


def _admin(path: str) -> Response | None:
    if path != ADMIN_PREFIX and not path.startswith(ADMIN_PREFIX + "/"):
        return None
    return error_response(
        403,
        "forbidden",
        "admin routes are closed while the server has no api_key; set RAGKV_API_KEY (or api_key in "
        "ragkv.toml), restart it and send the key, or use `ragkv cache` on the server's machine",
        setting="api_key",
    )


def _foreign(headers: Headers) -> Response | None:
    for header in ("host", "origin"):
        value = headers.get(header)
        if value is not None and not is_loopback(_hostname(value, header)):
            return error_response(
                403,
                "forbidden",
                f"without an api_key this server only answers local requests, not {header} {value!r}; set "
                "RAGKV_API_KEY and send it as bearer key",
                header=header,
                setting="api_key",
            )
    return None


def _hostname(value: str, header: str) -> str:
    try:
        return urlsplit(value if header == "origin" else f"//{value}").hostname or ""
    except ValueError:
        return ""
