"""Quantiles of the time to first token, out of a gateway's Prometheus text. Pure."""

from __future__ import annotations

from collections.abc import Sequence

_SERIES = "pdcluster_gateway_ttft_seconds_bucket"


def ttft_s(exposition: str, quantile: float) -> float | None:
    """Seconds within which `quantile` (0..1) of the streams had their first byte; None: no stream
    yet. Between two bucket bounds it is interpolated, as Prometheus' histogram_quantile does."""
    buckets: dict[float, float] = {}
    for line in exposition.splitlines():
        if line.startswith(_SERIES):
            labels, _, count = line.rpartition(" ")
            bound = float(labels.partition('le="')[2].partition('"')[0])
            buckets[bound] = buckets.get(bound, 0.0) + float(count)
    return _quantile(sorted(buckets.items()), quantile)


def _quantile(buckets: Sequence[tuple[float, float]], quantile: float) -> float | None:
    total = buckets[-1][1] if buckets else 0.0
    if not total:
        return None
    rank = quantile * total
    below_s, below = 0.0, 0.0
    for bound_s, count in buckets:
        if count >= rank and count > below:
            if bound_s == float("inf"):
                return below_s
            return below_s + (bound_s - below_s) * (rank - below) / (count - below)
        below_s, below = bound_s, count
    return None
