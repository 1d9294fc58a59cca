"""What the KV-transfer coordinator exports to Prometheus.

Labels are pools, connectors and outcomes: bounded by the topology file, never by traffic.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

# A pull within one machine takes milliseconds, a queued decode holds its lease for minutes.
_LEASE_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class KvMetrics:
    """Counters, a gauge and a histogram, named `pdcluster_kv_*`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.transfers = Counter(
            "pdcluster_kv_transfers",
            "KV transfers that ended, by pools, connector and outcome.",
            ("prefill_pool", "decode_pool", "connector", "outcome"),
            registry=registry,
        )
        self.open = Gauge(
            "pdcluster_kv_leases_open",
            "Prompts whose blocks this gateway has prefill keep for decode.",
            ("prefill_pool",),
            registry=registry,
        )
        self.lease_s = Histogram(
            "pdcluster_kv_lease_seconds",
            "From prefill's answer to the end of the transfer, however it ended.",
            ("connector",),
            buckets=_LEASE_BUCKETS,
            registry=registry,
        )
        self.release_failures = Counter(
            "pdcluster_kv_release_failures",
            "Early releases that did not reach the prefill worker; its lease runs out instead.",
            ("prefill_pool",),
            registry=registry,
        )
        self.mismatches = Counter(
            "pdcluster_kv_mismatches",
            "Transfers refused because the two engines' KV blocks are unlike.",
            ("prefill_pool", "decode_pool"),
            registry=registry,
        )
