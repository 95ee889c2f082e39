"""The REST door: a FastAPI app over an engine, and the runner that serves it."""

from __future__ import annotations

from ragkv.server.app import create_app
from ragkv.server.contract import EngineAPI
from ragkv.server.run import bind, serve, url_of

__all__ = ["EngineAPI", "bind", "create_app", "serve", "url_of"]
