"""What a gateway replica exports to Prometheus. One object per replica, its own registry.

What the controller is told too is kept in one place (gateway.tally) and read when somebody scrapes;
the rest is counted here. Declared in `catalogue`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from cluster.observe import catalogue
from cluster.observe.metric import Reader, Sample
from cluster.traffic import PairTraffic

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"

_READ = (
    *(catalogue.TTFT, catalogue.TPOT, catalogue.PROMPT_TOKENS, catalogue.HELD_TOKENS),
    *(catalogue.ANSWER_TOKENS, catalogue.PAIR_REQUESTS, catalogue.REQUESTS_RUNNING),
    *(catalogue.REQUESTS_QUEUED, catalogue.REFUSED, catalogue.SNAPSHOT_VERSION),
)


@dataclass(frozen=True, slots=True)
class Now:
    """What a replica is asked for when somebody scrapes it. `refused`: totals by reason."""

    running: int
    queued: int
    refused: Mapping[str, int]
    snapshot_version: int
    pairs: Sequence[PairTraffic]


class GatewayMetrics:
    """Counters and histograms, named `pdcluster_gateway_*`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        # Finding a labelled series costs more than counting in it: those of the hot path are kept.
        self._answered: dict[tuple[str, int], Counter] = {}
        self._routed: dict[str, Counter] = {}
        self._took: dict[str, Histogram] = {}
        self._requests = catalogue.REQUESTS.counter(self.registry)
        self._e2e_s = catalogue.E2E.histogram(self.registry)
        self._routes = catalogue.ROUTES.counter(self.registry)
        self.queue_s = catalogue.QUEUE.histogram(self.registry)
        self.retries = catalogue.RETRIES.counter(self.registry)
        self.recoveries = catalogue.RECOVERIES.counter(self.registry)
        self.poisonous = catalogue.POISONOUS.counter(self.registry)
        self.engine_failures = catalogue.ENGINE_FAILURES.counter(self.registry)
        self.render_asks = catalogue.RENDER_ASKS.counter(self.registry)

    def watch(self, now: Callable[[], Now]) -> None:
        """Have what is kept elsewhere exported, too. To be called once."""
        self.registry.register(Reader(_READ, lambda: _samples(now())))

    def know(
        self,
        answers: Iterable[tuple[str, int]] = (),
        retries: Iterable[str] = (),
        recoveries: Iterable[tuple[str, str]] = (),
        failures: Iterable[tuple[str, str]] = (),
    ) -> None:
        """Have these shown from 0: Prometheus sees no increase in a series that begins with 1, and
        what goes wrong first would be missing. Endpoint and status, reason, way and cause, pool and
        stage."""
        for endpoint, status in answers:
            self._requests.labels(endpoint, str(status))
        for why in retries:
            self.retries.labels(why)
        for way, cause in recoveries:
            self.recoveries.labels(way, cause)
        for pool, stage in failures:
            self.engine_failures.labels(pool, stage)

    def answered(self, endpoint: str, status: int) -> None:
        """An answer was sent, or its client left (499)."""
        series = self._answered.get((endpoint, status))
        if series is None:
            series = self._requests.labels(endpoint, str(status))
            self._answered[endpoint, status] = series
        series.inc()

    def took(self, endpoint: str, took_s: float) -> None:
        """A request is over, whatever became of it."""
        series = self._took.get(endpoint)
        if series is None:
            series = self._took[endpoint] = self._e2e_s.labels(endpoint)
        series.observe(took_s)

    def finished(self, route: str) -> None:
        """A request was answered by engines."""
        series = self._routed.get(route)
        if series is None:
            series = self._routed[route] = self._routes.labels(route)
        series.inc()

    def exposition(self) -> bytes:
        """The text format that Prometheus scrapes."""
        return generate_latest(self.registry)


def _samples(now: Now) -> Iterator[Sample]:
    yield Sample(catalogue.REQUESTS_RUNNING, (), now.running)
    yield Sample(catalogue.REQUESTS_QUEUED, (), now.queued)
    yield Sample(catalogue.SNAPSHOT_VERSION, (), now.snapshot_version)
    for why, count in now.refused.items():
        yield Sample(catalogue.REFUSED, (why,), count)
    for pair in now.pairs:
        key = (pair.prefill, pair.decode)
        yield Sample(catalogue.PAIR_REQUESTS, key, pair.arrived)
        yield Sample(catalogue.TTFT, key, pair.ttft_s)
        yield Sample(catalogue.TPOT, key, pair.tpot_s)
        yield Sample(catalogue.PROMPT_TOKENS, key, pair.prompt_tokens)
        yield Sample(catalogue.HELD_TOKENS, key, pair.held_tokens)
        yield Sample(catalogue.ANSWER_TOKENS, key, pair.answer_tokens)
