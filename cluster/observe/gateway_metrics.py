"""What a gateway replica exports to Prometheus. One object per replica, its own registry.

Labels are few and bounded: pools, status codes, reasons out of fixed sets. Never a worker
generation, a model name from a request, or anything else a client can make up.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"

_TTFT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2)
_E2E_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class GatewayMetrics:
    """Counters, gauges and histograms, named `pdcluster_gateway_*`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        # Finding a labelled series costs more than counting in it: those of the hot path are kept.
        self._answered: dict[tuple[str, int], Counter] = {}
        self._routed: dict[str, Counter] = {}
        self.requests = self._counter(
            "requests",
            "Answers sent, by endpoint and status (499: the client left).",
            ("endpoint", "status"),
        )
        self.ttft_s = self._histogram(
            "ttft_seconds", "From the request's body to its first streamed byte.", _TTFT_BUCKETS
        )
        self.itl_s = self._histogram(
            "itl_seconds",
            "Mean gap between the pieces of one stream, one observation per stream.",
            _ITL_BUCKETS,
        )
        self.e2e_s = self._histogram(
            "e2e_seconds", "From the request's head to its last byte.", _E2E_BUCKETS
        )
        self.routes = self._counter(
            "routes", "Requests answered, by how they were routed.", ("route",)
        )
        self.retries = self._counter(
            "retries",
            "Attempts given up before the first byte, by reason: prefill-failed, pull-failed, "
            "decode-failed, hung, drained, recomputed.",
            ("why",),
        )
        self.recoveries = self._counter(
            "recoveries",
            "Answers that went on with another engine, by way (continue, repeat) and what ended "
            "the first one's (failed, hung, drained, recomputed).",
            ("way", "cause"),
        )
        self.poisonous = self._counter(
            "poisonous_requests", "Requests refused because two engines went away under them."
        )
        self.engine_failures = self._counter(
            "engine_failures", "Calls that an engine failed, by pool and stage.", ("pool", "stage")
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of answered requests.")
        self.held_tokens = self._counter(
            "held_tokens",
            "Of those, tokens that the chosen decode worker was known to hold already.",
        )
        self.render_asks = self._counter(
            "render_asks", "Prompts that an engine had to render, by reason.", ("why",)
        )

    def watch(
        self,
        running: Callable[[], float],
        queued: Callable[[], float],
        snapshot_version: Callable[[], float],
    ) -> None:
        """Gauges that are read when somebody scrapes."""
        self._gauge("requests_running", "Requests being served.").set_function(running)
        self._gauge("requests_queued", "Requests waiting for a place.").set_function(queued)
        self._gauge(
            "snapshot_version", "Version of the cluster snapshot that this replica routes by."
        ).set_function(snapshot_version)

    def answered(self, endpoint: str, status: int) -> None:
        """An answer was sent, or its client left (499)."""
        series = self._answered.get((endpoint, status))
        if series is None:
            series = self.requests.labels(endpoint, str(status))
            self._answered[endpoint, status] = series
        series.inc()

    def finished(self, route: str, prompt_tokens: int, held_tokens: int) -> None:
        """A request was answered by engines."""
        series = self._routed.get(route)
        if series is None:
            series = self._routed[route] = self.routes.labels(route)
        series.inc()
        if prompt_tokens:
            self.prompt_tokens.inc(prompt_tokens)
        if held_tokens:
            self.held_tokens.inc(held_tokens)

    def exposition(self) -> bytes:
        """The text format that Prometheus scrapes."""
        return generate_latest(self.registry)

    def _counter(self, name: str, help: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"pdcluster_gateway_{name}", help, labels, registry=self.registry)

    def _gauge(self, name: str, help: str) -> Gauge:
        return Gauge(f"pdcluster_gateway_{name}", help, registry=self.registry)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"pdcluster_gateway_{name}", help, buckets=buckets, registry=self.registry)
