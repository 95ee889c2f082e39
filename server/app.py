"""The FastAPI app over an engine."""

from __future__ import annotations

from fastapi import FastAPI

from ragkv.server import (
    errors,
    openapi,
    routes_cache,
    routes_chat,
    routes_documents,
    routes_health,
    routes_query,
    routes_requests,
)
from ragkv.server.access import Access
from ragkv.server.contract import EngineAPI
from ragkv.server.keys import Keys
from ragkv.server.metrics import Metrics
from ragkv.server.observe import Observe
from ragkv.server.service import Service


def create_app(engine: EngineAPI) -> FastAPI:
    """The REST API of ``engine``, configured by its settings. The engine stays the caller's to close.
    There are no HTML documentation pages: they would load scripts from the network. ``/openapi.json`` is
    served.
    """
    app = FastAPI(
        title="ragkv",
        version="1",
        description="Answers from documents whose KV caches are computed once.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    keys = Keys(engine.settings)
    app.state.service = Service(engine, Metrics())
    for routes in (routes_query, routes_chat, routes_requests, routes_documents, routes_cache, routes_health):
        app.include_router(routes.router)
    errors.install(app)
    openapi.install(app, bearer=bool(keys))
    # The last one added is the outermost.
    app.add_middleware(Access, keys=keys)
    app.add_middleware(Observe, metrics=app.state.service.metrics)
    return app
