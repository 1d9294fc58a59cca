"""One metric: its declaration, and what prometheus_client needs to export it.

    Metric          name, kind, labels, unit, what it means and where the number comes from
    .counter(...)   an object that is counted in as things happen
    Reader          numbers that somebody else keeps, read when somebody scrapes

The declarations themselves are in `catalogue`; nothing is exported that is not declared there.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.core import (
    Metric as Family,
)
from prometheus_client.registry import Collector

from cluster.traffic import BOUNDS_S, Spread


class Kind(enum.StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """`name`: as it is scraped; a counter's ends in `_total`, a histogram's has no ending of its
    own. `unit`: "": a plain number. `labels`: bounded by the topology or by a fixed set of words,
    never by traffic. `source`: where the number comes from."""

    name: str
    kind: Kind
    help: str
    source: str
    labels: tuple[str, ...] = ()
    unit: str = ""

    def __post_init__(self) -> None:
        if (self.kind is Kind.COUNTER) != self.name.endswith("_total"):
            raise ValueError(f"{self.name} is a {self.kind}: counters alone end in _total")

    @property
    def series(self) -> tuple[str, ...]:
        """The names of its samples."""
        if self.kind is Kind.HISTOGRAM:
            return tuple(f"{self.name}_{ending}" for ending in ("bucket", "sum", "count"))
        return (self.name,)

    def counter(self, registry: CollectorRegistry) -> Counter:
        assert self.kind is Kind.COUNTER
        return Counter(self.name, self.help, self.labels, registry=registry)

    def gauge(self, registry: CollectorRegistry) -> Gauge:
        assert self.kind is Kind.GAUGE
        return Gauge(self.name, self.help, self.labels, registry=registry)

    def histogram(self, registry: CollectorRegistry) -> Histogram:
        """Of durations in seconds."""
        assert self.kind is Kind.HISTOGRAM
        return Histogram(self.name, self.help, self.labels, buckets=BOUNDS_S, registry=registry)


@dataclass(frozen=True, slots=True)
class Sample:
    """What a Reader reads. `labels`: values, in the order of the metric's. A Spread for histograms,
    a number for everything else."""

    metric: Metric
    labels: tuple[str, ...]
    value: float | Spread


class Reader(Collector):
    """Exports `metrics` as `read` tells them at that moment. A sample of any other metric, or with
    another number of labels, is a mistake: ValueError."""

    def __init__(self, metrics: Sequence[Metric], read: Callable[[], Iterable[Sample]]) -> None:
        self._metrics = tuple(metrics)
        self._read = read

    def describe(self) -> Iterator[Family]:
        for metric in self._metrics:
            yield _family(metric)

    def collect(self) -> Iterator[Family]:
        families = {metric: _family(metric) for metric in self._metrics}
        for sample in self._read():
            metric, labels = sample.metric, sample.labels
            if metric not in families or len(labels) != len(metric.labels):
                raise ValueError(f"{metric.name}{labels}: not declared so")
            family = families[metric]
            if isinstance(family, HistogramMetricFamily):
                assert isinstance(sample.value, Spread)
                family.add_metric(labels, *_buckets(sample.value))
            else:
                assert isinstance(family, CounterMetricFamily | GaugeMetricFamily)
                assert not isinstance(sample.value, Spread)
                family.add_metric(labels, sample.value)
        yield from families.values()


def _family(metric: Metric) -> Family:
    if metric.kind is Kind.COUNTER:
        return CounterMetricFamily(metric.name, metric.help, labels=metric.labels)
    if metric.kind is Kind.GAUGE:
        return GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
    return HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)


def _buckets(spread: Spread) -> tuple[list[tuple[str, float]], float]:
    """A Spread as cumulative counts per bound of BOUNDS_S, and its sum."""
    counts = spread.counts or (0,) * (len(BOUNDS_S) + 1)
    bounds = [*(str(bound) for bound in BOUNDS_S), "+Inf"]
    return list(zip(bounds, map(float, accumulate(counts)), strict=True)), spread.sum_s
