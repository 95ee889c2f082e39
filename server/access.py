"""Who may ask, and what: bearer keys, admin routes, and the guard of a server without a key against web pages."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ragkv.server.errors import error_response
from ragkv.server.keys import ADMIN, Keys

OPEN_PATHS = frozenset({"/health", "/metrics", "/openapi.json"})
ADMIN_PREFIX = "/v1/cache"
# Collections are everybody's: what one tenant removed, or added to them, all would see.
SHARED_PREFIX = "/v1/collections"


class Access:
    """ASGI middleware; it answers before a body is read, and tells routes who asks in ``request.state.tenant``.

    With keys, everything but OPEN_PATHS needs ``Authorization: Bearer <key>``; admin routes, and changes of
    collections where there are tenants, need the ``api_key``. Without any, the server only listens on a
    loopback address, admin routes are closed, and requests that a web page in a local browser could forge
    (foreign ``Origin``, or ``Host`` rebound by DNS) are refused.
    """

    def __init__(self, app: ASGIApp, *, keys: Keys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        await (refusal or self._app)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        owner = self._keys.owner(headers) if self._keys else ADMIN
        scope.setdefault("state", {})["tenant"] = owner or ADMIN
        if not self._keys:
            return _foreign(scope, headers) or self._admin(scope)
        if scope["path"] in OPEN_PATHS:
            return None
        if owner is None:
            return _unknown(scope)
        return self._admin(scope) if owner != ADMIN else None

    def _admin(self, scope: Scope) -> Response | None:
        """What needs the ``api_key``, asked for without it."""
        changes = scope["method"] not in ("GET", "HEAD") and _below(scope["path"], SHARED_PREFIX)
        if not (_below(scope["path"], ADMIN_PREFIX) or (changes and self._keys.tenants)):
            return None
        if self._keys.admin:
            message = "this route needs the server's api_key, not a tenant's: what it does concerns all tenants"
        else:
            message = (
                "admin routes are closed while the server has no api_key; set RAGKV_API_KEY (or api_key in "
                "ragkv.toml), restart it and send the key, or use `ragkv cache` and `ragkv ingest` on the server's "
                "machine"
            )
        return error_response(scope, 403, "forbidden", message, {"setting": "api_key"})


def is_loopback(host: str) -> bool:
    """Whether a host name or address can only mean this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost" or host.lower().endswith(".localhost")


def _unknown(scope: Scope) -> Response:
    message = "this server needs its api_key, or a tenant's key: send 'Authorization: Bearer <key>'"
    return error_response(scope, 401, "unauthorized", message, headers={"WWW-Authenticate": "Bearer"})


def _below(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(prefix + "/")


def _foreign(scope: Scope, headers: Headers) -> Response | None:
    for header in ("host", "origin"):
        value = headers.get(header)
        if value is not None and not is_loopback(_hostname(value, header)):
            message = (
                f"without an api_key this server only answers local requests, not {header} {value!r}; set "
                "RAGKV_API_KEY and send it as bearer key"
            )
            return error_response(scope, 403, "forbidden", message, {"header": header, "setting": "api_key"})
    return None


def _hostname(value: str, header: str) -> str:
    try:
        return urlsplit(value if header == "origin" else f"//{value}").hostname or ""
    except ValueError:
        return ""
