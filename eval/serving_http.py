"""A running server in the engine's place: every request is a stream of its REST API, with its own connection."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from uuid import uuid4

import httpx
import numpy as np

from ragkv.client import AsyncClient, Client
from ragkv.config import Settings
from ragkv.errors import ConfigError, NotFoundError, ServerError
from ragkv.eval.serving_drive import Callbacks
from ragkv.eval.workloads import Ask, Piece, Workload
from ragkv.types import DoneEvent, SourcesEvent

# Every token is about as likely as another, so that replies are as long as the load says, and not as the model would.
_TEMPERATURE = 10.0
_WORDS = (
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "was",
    "for",
    "on",
    "as",
    "with",
    "by",
    "at",
    "from",
    "his",
    "her",
    "it",
)
_NUMBER = re.compile(r"^ragkv_engine_(\w+) (\S+)$", re.MULTILINE)


@dataclass(eq=False)
class Sent:
    """A request. ``at_server`` is its id there, once the stream has begun."""

    id: str
    tenant: str
    fields: Mapping[str, Any]
    priority: int
    callbacks: Callbacks
    at_server: str = ""
    task: asyncio.Task[None] | None = field(default=None, repr=False)


class Texts:
    """Makes the server's requests. A conversation is a session, so only what is new of it is sent.

    A piece of so many tokens is so many words, and a chunk that many of its own.
    """

    def __init__(self, workload: Workload, chunk_tokens: int) -> None:
        self._run, self._names, self._chunk_tokens = uuid4().hex[:8], count(), chunk_tokens
        self._goes_on = {ask.after for ask in workload.asks}
        self._session: dict[int, str] = {}

    def __call__(self, ask: Ask, priority: int, callbacks: Callbacks) -> Sent:
        fields: dict[str, Any] = {
            "question": " ".join(words(piece) for piece in ask.pieces),
            "max_tokens": ask.output,
            "temperature": _TEMPERATURE,
            "seed": ask.number,
            "priority": priority,
        }
        if ask.after is not None or ask.number in self._goes_on:
            first = ask.number if ask.after is None else ask.after
            fields["session_id"] = self._session[ask.number] = self._session.get(first, f"{self._run}-{first}")
        if ask.chunks:
            fields["documents"] = [{"id": str(number), "text": self._chunk(number)} for number in ask.chunks]
        return Sent(f"{self._run}-{next(self._names)}", ask.tenant, fields, priority, callbacks)

    def _chunk(self, number: int) -> str:
        return words(Piece(1 << 61 | number, self._chunk_tokens))


def words(piece: Piece) -> str:
    """The same seed gives the same words, and a longer piece begins with a shorter one's."""
    places = np.random.default_rng(piece.seed).integers(len(_WORDS), size=piece.tokens)
    return " ".join(_WORDS[place] for place in places)


class ServerLoop:
    """What a driver drives, at ``url``. ``keys``: the bearer key of every tenant."""

    def __init__(self, url: str, keys: Mapping[str, str | None]) -> None:
        self._url = url
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ragkv-eval-http")
        self._thread.start()
        self._clients = {tenant: self._client(key) for tenant, key in keys.items()}
        self._sent: dict[str, Sent] = {}

    def submit(self, request: Sent) -> None:
        self._sent[request.id] = request
        self._start(self._serve(request))

    def reprioritize(self, request_id: str, priority: int, tenant: str = "") -> None:
        request = self._find(request_id)
        request.priority = priority
        if request.at_server:  # else it is told when the stream begins
            self._start(self._tell(request))

    def cancel(self, request_id: str, tenant: str = "") -> None:
        """Hang up."""
        if (task := self._find(request_id).task) is not None:
            self._loop.call_soon_threadsafe(task.cancel)

    def stats(self) -> dict[str, float]:
        """The server's own numbers. Raises ServerError: it does not answer."""
        try:
            text = httpx.get(f"{self._url}/metrics", timeout=30, trust_env=False).raise_for_status().text
        except httpx.HTTPError as error:
            raise ServerError(f"{self._url}/metrics: {error!r}; is the server running?", url=self._url) from error
        return {name: float(value) for name, value in _NUMBER.findall(text)}

    def close(self) -> None:
        for client in self._clients.values():
            self._start(client.aclose()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _client(self, key: str | None) -> AsyncClient:
        unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        return AsyncClient(self._url, key, transport=httpx.AsyncHTTPTransport(limits=unlimited))

    def _start(self, steps: Coroutine[Any, Any, None]) -> Any:
        return asyncio.run_coroutine_threadsafe(steps, self._loop)

    def _find(self, request_id: str) -> Sent:
        if request_id not in self._sent:
            raise NotFoundError(f"no request {request_id!r} is under way", request_id=request_id)
        return self._sent[request_id]

    async def _serve(self, request: Sent) -> None:
        request.task = asyncio.current_task()
        callbacks = request.callbacks
        try:
            await self._follow(request)
        except asyncio.CancelledError:
            callbacks.on_finish("cancelled", 0, 0)
        except Exception as error:
            callbacks.on_error(error)
        finally:
            del self._sent[request.id]

    async def _follow(self, request: Sent) -> None:
        callbacks = request.callbacks
        async with aclosing(self._clients[request.tenant].stream(**request.fields)) as events:
            async for event in events:
                if isinstance(event, SourcesEvent):
                    request.at_server = event.id
                    if request.priority != request.fields["priority"]:
                        await self._tell(request)
                elif isinstance(event, DoneEvent):
                    usage = event.answer.usage
                    callbacks.on_finish(event.answer.finish_reason, usage.prompt_tokens, usage.cached_tokens)
                else:
                    callbacks.on_token()

    async def _tell(self, request: Sent) -> None:
        with suppress(NotFoundError):  # it ended just now
            await self._clients[request.tenant].reprioritize(request.at_server, request.priority)


def keys_of(workload: Workload, settings: Settings) -> dict[str, str | None]:
    """The keys of a load's tenants, which the configuration here has as the server's has them.

    Raises:
        ConfigError: a tenant that it lacks, or has with another weight.
    """
    keys: dict[str, str | None] = {"": settings.bearer_key}
    for name, weight in {ask.tenant: ask.weight for ask in workload.asks if ask.tenant}.items():
        tenant = settings.tenants.get(name)
        if tenant is None or tenant.weight != weight:
            raise ConfigError(
                f"the load has a tenant {name!r} of weight {weight:g}: put [tenants.{name}] with a key and that weight "
                "into the server's ragkv.toml, and run this command where it is read, too",
                setting="tenants",
            )
        keys[name] = tenant.key.get_secret_value()
    return keys


@contextmanager
def opened_server(url: str, keys: Mapping[str, str | None]) -> Iterator[ServerLoop]:
    loop = ServerLoop(url, keys)
    try:
        yield loop
    finally:
        loop.close()


def facts_of(url: str, settings: Settings) -> dict[str, Any]:
    """What the server says of itself. Raises ServerError: it does not answer."""
    with Client(url, settings.bearer_key, timeout=30) as client:
        health = client.health()
    return {"model": health.model, "device": health.device, "dtype": health.dtype, "layers": health.layer_loop}
