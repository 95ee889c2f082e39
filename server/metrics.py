"""Prometheus metrics, in a registry of the app's own."""

from __future__ import annotations

import re
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ragkv.types import Answer

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TTFT_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
_SHARE_BUCKETS = (0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1)
_NOT_IN_A_NAME = re.compile(r"[^a-zA-Z0-9_]")


class Metrics:
    """What the server counts itself, plus every number the engine reports as a gauge
    ``ragkv_engine_<name>``."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "ragkv_http_requests",
            "HTTP requests by route, method and status.",
            ["route", "method", "status"],
            registry=self._registry,
        )
        self.ttft = Histogram(
            "ragkv_ttft_seconds",
            "Time to first token of finished queries.",
            registry=self._registry,
            buckets=_TTFT_BUCKETS,
        )
        self.recomputed_share = Histogram(
            "ragkv_recomputed_share",
            "Recomputed token-layers over all context token-layers, per query with context.",
            registry=self._registry,
            buckets=_SHARE_BUCKETS,
        )
        self.chunks = Counter(
            "ragkv_chunks",
            "Retrieved chunks by where their KV came from: device, ram, ssd, remote, computed, dropped.",
            ["kv"],
            registry=self._registry,
        )
        self.tokens = Counter(
            "ragkv_tokens",
            "Tokens of finished queries: prompt, context, cached, completion.",
            ["kind"],
            registry=self._registry,
        )

    def observe(self, answer: Answer) -> None:
        """Count a finished query."""
        self.ttft.observe(answer.timing.ttft_ms / 1000)
        if answer.usage.context_tokens:
            self.recomputed_share.observe(answer.recomputed_share)
        for chunk in answer.chunks:
            self.chunks.labels(chunk.kv).inc()
        for kind in ("prompt", "context", "cached", "completion"):
            self.tokens.labels(kind).inc(getattr(answer.usage, f"{kind}_tokens"))

    def render(self, engine_numbers: Mapping[str, float]) -> bytes:
        """The exposition text: the server's own metrics and each of the engine's numbers as a gauge."""
        live = CollectorRegistry()
        for name, value in sorted(engine_numbers.items()):
            gauge = f"ragkv_engine_{_NOT_IN_A_NAME.sub('_', name)}"
            Gauge(gauge, f"The engine's `{name}`, read at the scrape.", registry=live).set(value)
        return generate_latest(self._registry) + generate_latest(live)
