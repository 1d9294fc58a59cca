"""What the KV-transfer coordinator exports to Prometheus. Declared in `catalogue`."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry

from cluster.observe import catalogue


class KvMetrics:
    """Counters, a gauge and a histogram, named `pdcluster_kv_*`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.transfers = catalogue.KV_TRANSFERS.counter(registry)
        self.failures = catalogue.KV_FAILURES.counter(registry)
        self.open = catalogue.KV_LEASES_OPEN.gauge(registry)
        self.lease_s = catalogue.KV_LEASE.histogram(registry)
        self.release_failures = catalogue.KV_RELEASE_FAILURES.counter(registry)
        self.mismatches = catalogue.KV_MISMATCHES.counter(registry)

    def know(
        self,
        prefill_pool: str,
        decode_pool: str,
        connector: str,
        ends: Iterable[str],
        failures: Iterable[str],
    ) -> None:
        """Have the counters of this link shown from 0: Prometheus sees no increase in a series that
        begins with 1. `ends`: how transfers may end; `failures`: why not well."""
        for end in ends:
            self.transfers.labels(prefill_pool, decode_pool, connector, end)
        for failure in failures:
            self.failures.labels(prefill_pool, decode_pool, connector, failure)
        self.release_failures.labels(prefill_pool)
        self.mismatches.labels(prefill_pool, decode_pool)
