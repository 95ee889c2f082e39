"""Whose bearer key it is: the server's own (``api_key``) or a tenant's."""

from __future__ import annotations

import hmac
from collections import Counter

from starlette.datastructures import Headers

from ragkv.config import Settings
from ragkv.errors import ConfigError

ADMIN = ""


class Keys:
    """The keys that open a server, by the tenant they name; ``api_key`` names none and opens everything.

    Raises ConfigError where a key could not tell who sent it: two share one, or a tenant has no name.
    """

    def __init__(self, settings: Settings) -> None:
        if ADMIN in settings.tenants:
            raise ConfigError("setting 'tenants': a tenant's name is empty; name it", setting="tenants")
        self.tenants = tuple(settings.tenants)
        self._keys = {name: tenant.key.get_secret_value().encode() for name, tenant in settings.tenants.items()}
        if settings.bearer_key is not None:
            self._keys[ADMIN] = settings.bearer_key.encode()
        self._refuse_shared()

    def __bool__(self) -> bool:
        """Whether a key is needed at all."""
        return bool(self._keys)

    @property
    def admin(self) -> bool:
        """Whether there is a key that opens admin routes."""
        return ADMIN in self._keys

    def owner(self, headers: Headers) -> str | None:
        """The tenant whose key was sent, ADMIN for the ``api_key``, None for no or another key."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # Header values are latin-1 on the wire.
        sent = key.strip().encode("latin-1")
        # Every key is compared in full, so that the time taken tells nothing.
        owners = [name for name, known in self._keys.items() if hmac.compare_digest(sent, known)]
        return owners[0] if owners and scheme.lower() == "bearer" else None

    def _refuse_shared(self) -> None:
        key, count = Counter(self._keys.values()).most_common(1)[0] if self._keys else (b"", 0)
        if count > 1:
            names = sorted(name or "api_key" for name, known in self._keys.items() if known == key)
            raise ConfigError(
                f"setting 'tenants': {' and '.join(names)} have the same key; give each its own",
                setting="tenants",
                tenants=names,
            )
