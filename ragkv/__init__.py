"""ragkv: serving middleware for RAG that reuses, blends and schedules precomputed chunk KV caches.

``import ragkv`` is light: torch is imported when an :class:`Engine` is first touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ragkv.version import __version__

if TYPE_CHECKING:
    from ragkv.client import AsyncClient, Client
    from ragkv.config import Settings, load_settings
    from ragkv.engine import Engine
    from ragkv.errors import RagkvError
    from ragkv.retrievers import Document
    from ragkv.types import Answer, DoneEvent, QueryRequest, SourcesEvent, TokenEvent

_HOMES = {
    "Answer": "ragkv.types",
    "AsyncClient": "ragkv.client",
    "Client": "ragkv.client",
    "Document": "ragkv.retrievers",
    "DoneEvent": "ragkv.types",
    "Engine": "ragkv.engine",
    "QueryRequest": "ragkv.types",
    "RagkvError": "ragkv.errors",
    "Settings": "ragkv.config",
    "SourcesEvent": "ragkv.types",
    "TokenEvent": "ragkv.types",
    "load_settings": "ragkv.config",
}

__all__ = [
    "Answer",
    "AsyncClient",
    "Client",
    "Document",
    "DoneEvent",
    "Engine",
    "QueryRequest",
    "RagkvError",
    "Settings",
    "SourcesEvent",
    "TokenEvent",
    "__version__",
    "load_settings",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ragkv' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
