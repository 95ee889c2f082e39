"""Prometheus metrics, in a registry of the app's own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ragkv.types import Answer

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TTFT_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
_TBT_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_SHARE_BUCKETS = (0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1)
_TIMES_BUCKETS = (0, 1, 2, 4, 8, 16)
_NOT_IN_A_NAME = re.compile(r"[^a-zA-Z0-9_]")


class Metrics:
    """What the server counts itself, plus every number the engine reports as a gauge
    ``ragkv_engine_<name>``. ``tenant`` is one of the settings', or "" for requests that no tenant's key made."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "ragkv_http_requests",
            "HTTP requests by route, method and status.",
            ["route", "method", "status"],
            registry=self._registry,
        )
        self.ttft = self._by_tenant("ragkv_ttft_seconds", "Time to first token of finished requests.", _TTFT_BUCKETS)
        self.tbt = self._by_tenant(
            "ragkv_tbt_seconds", "Time between two tokens, or pieces of text, as they leave.", _TBT_BUCKETS
        )
        self.queue = self._by_tenant("ragkv_queue_seconds", "Time requests waited for their turn.", _TTFT_BUCKETS)
        self.preemptions = self._by_tenant(
            "ragkv_preemptions", "How often others took a request's place.", _TIMES_BUCKETS
        )
        self.recomputed_share = Histogram(
            "ragkv_recomputed_share",
            "Recomputed token-layers over all context token-layers, per query with context.",
            registry=self._registry,
            buckets=_SHARE_BUCKETS,
        )
        self.chunks = Counter(
            "ragkv_chunks",
            "Retrieved chunks by where their KV came from: prefix, device, ram, ssd, remote, computed, dropped.",
            ["kv"],
            registry=self._registry,
        )
        self.tokens = Counter(
            "ragkv_tokens",
            "Tokens of finished queries: prompt, context, cached, completion.",
            ["kind"],
            registry=self._registry,
        )

    def observe(self, answer: Answer, tenant: str) -> None:
        """Count a finished request."""
        self.ttft.labels(tenant).observe(answer.timing.ttft_ms / 1000)
        self.queue.labels(tenant).observe(answer.timing.queue_ms / 1000)
        self.preemptions.labels(tenant).observe(answer.preemptions)
        if answer.usage.context_tokens:
            self.recomputed_share.observe(answer.recomputed_share)
        for chunk in answer.chunks:
            self.chunks.labels(chunk.kv).inc()
        for kind in ("prompt", "context", "cached", "completion"):
            self.tokens.labels(kind).inc(getattr(answer.usage, f"{kind}_tokens"))

    def render(self, engine_numbers: Mapping[str, float], service: Mapping[str, float]) -> bytes:
        """The exposition text: the server's own metrics, each of the engine's numbers as a gauge, and the
        ``service`` of each tenant."""
        live = CollectorRegistry()
        for name, value in sorted(engine_numbers.items()):
            gauge = f"ragkv_engine_{_NOT_IN_A_NAME.sub('_', name)}"
            Gauge(gauge, f"The engine's `{name}`, read at the scrape.", registry=live).set(value)
        served = Gauge(
            "ragkv_tenant_service",
            "Computed tokens served to a tenant, priced as the scheduler does.",
            ["tenant"],
            registry=live,
        )
        for tenant, value in sorted(service.items()):
            served.labels(tenant).set(value)
        return generate_latest(self._registry) + generate_latest(live)

    def _by_tenant(self, name: str, about: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, about, ["tenant"], registry=self._registry, buckets=buckets)
