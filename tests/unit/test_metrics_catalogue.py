"""What is exported is what is declared, and docs/metrics.md says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from cluster.control import exported
from cluster.control.counted import Counted
from cluster.control.events import ChangeEnded, RoleChanged
from cluster.identity import Role, WorkerId
from cluster.observe import catalogue, reference
from cluster.observe.controller_metrics import ControllerMetrics
from cluster.observe.gateway_metrics import GatewayMetrics, Now
from cluster.observe.kv_metrics import KvMetrics
from cluster.observe.metric import Kind, Metric, Reader, Sample
from cluster.traffic import BOUNDS_S, PairTraffic, SpreadCounter

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_of_metrics_is_current():
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert page == reference.page(), "run scripts/write_metrics_reference"


def test_no_two_metrics_share_a_name_and_none_has_a_label_that_traffic_could_fill():
    metrics = [metric for part in catalogue.PARTS for metric in part.metrics]
    assert len({metric.name for metric in metrics}) == len(metrics)
    labels = {label for metric in metrics for label in metric.labels}
    assert labels <= {
        *("pool", "prefill_pool", "decode_pool", "worker", "role", "to", "node", "hardware"),
        *("island", "model", "engine", "state", "kind", "percentile", "connector", "outcome"),
        *("endpoint", "status", "why", "route", "way", "cause", "stage"),
    }


def test_a_counter_must_be_called_total_and_nothing_else_may():
    with pytest.raises(ValueError, match="counters alone end in _total"):
        Metric("x_seconds", Kind.COUNTER, "", "")
    with pytest.raises(ValueError, match="counters alone end in _total"):
        Metric("x_total", Kind.GAUGE, "", "")


def spread(*durations_s):
    counter = SpreadCounter()
    for duration_s in durations_s:
        counter.add(duration_s)
    return counter.spread()


def a_busy_gateway():
    metrics = GatewayMetrics()
    kv = KvMetrics(metrics.registry)
    metrics.answered("/v1/completions", 200)
    metrics.took("/v1/completions", 0.5)
    metrics.finished("disaggregated")
    metrics.queue_s.observe(0.0)
    metrics.retries.labels("hung").inc()
    metrics.recoveries.labels("continue", "failed").inc()
    metrics.poisonous.inc()
    metrics.engine_failures.labels("d", "decode").inc()
    metrics.render_asks.labels("it has images").inc()
    kv.transfers.labels("p", "d", "nixl", "pulled").inc()
    kv.open.labels("p").set(2)
    kv.lease_s.labels("p", "d", "nixl").observe(0.02)
    kv.failures.labels("p", "d", "nixl", "pull-failed").inc()
    kv.release_failures.labels("p").inc()
    kv.mismatches.labels("p", "d").inc()
    pair = PairTraffic(
        "p",
        "d",
        arrived=3,
        finished=3,
        prompt_tokens=70,
        held_tokens=30,
        answer_tokens=9,
        ttft_s=spread(0.04, 0.04, 40.0),
        tpot_s=spread(0.002),
    )
    alone = PairTraffic("", "d", arrived=1, finished=1, prompt_tokens=5, answer_tokens=2)
    metrics.watch(lambda: Now(2, 1, {"full": 4, "waited": 0}, 7, [pair, alone]))
    return metrics.exposition().decode()


def a_busy_controller():
    metrics = ControllerMetrics(
        lambda: [
            Sample(metric, tuple("x" for _ in metric.labels), 1)
            for metric in catalogue.CONTROLLER_READ
        ]
    )
    counted = Counted(metrics, lambda change: "scale", lambda: 0.0)
    counted.know(["p"])
    counted.take(RoleChanged(WorkerId("p", 0), Role.PREFILL, Role.DECODE, 1.0, 0.5))
    counted.take(ChangeEnded("scale p", 1, "done", 2.0, ""))
    return metrics.exposition().decode()


@pytest.mark.parametrize(
    ("exposition", "declared"),
    [
        (a_busy_gateway, (*catalogue.GATEWAY, *catalogue.KV)),
        (a_busy_controller, catalogue.CONTROLLER),
    ],
)
def test_registries_export_exactly_what_the_catalogue_says(exposition, declared):
    families = {
        family.name: family
        for family in text_string_to_metric_families(exposition())
        if not all(sample.name.endswith("_created") for sample in family.samples)
    }
    assert set(families) == {metric.name.removesuffix("_total") for metric in declared}
    for metric in declared:
        family = families[metric.name.removesuffix("_total")]
        assert family.type == metric.kind.value
        assert family.documentation == metric.help
        samples = [s for s in family.samples if not s.name.endswith("_created")]
        assert {sample.name for sample in samples} == set(metric.series)
        for sample in samples:
            assert set(sample.labels) - {"le"} == set(metric.labels), sample


def test_what_gateways_count_for_the_controller_is_what_prometheus_sees():
    text = a_busy_gateway()
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    value = {series: float(number) for series, _, number in lines}
    name = "pdcluster_gateway_ttft_seconds"
    pair = 'decode_pool="d",prefill_pool="p"'
    assert value[f"{name}_count{{{pair}}}"] == 3
    assert value[f"{name}_sum{{{pair}}}"] == pytest.approx(40.08)
    counts = [
        number
        for series, number in value.items()
        if series.startswith(f"{name}_bucket{{") and 'prefill_pool="p"' in series
    ]
    assert len(counts) == len(BOUNDS_S) + 1
    assert counts == sorted(counts)
    assert counts[sum(bound < 0.04 for bound in BOUNDS_S)] == 2
    assert counts[sum(bound < 0.04 for bound in BOUNDS_S) - 1] == 0
    assert counts[sum(bound < 40.0 for bound in BOUNDS_S)] == 3
    prompt = "pdcluster_gateway_prompt_tokens_total"
    assert value[f"{prompt}{{{pair}}}"] == 70
    assert value[f'{prompt}{{decode_pool="d",prefill_pool=""}}'] == 5
    assert value['pdcluster_gateway_refused_total{why="full"}'] == 4


def test_buckets_tell_40_ms_and_40_s_equally_well():
    for duration_s in (0.04, 40.0):
        upper = next(bound for bound in BOUNDS_S if bound >= duration_s)
        lower = max(bound for bound in BOUNDS_S if bound < duration_s)
        assert upper / lower < 1.3
    assert BOUNDS_S[0] == 0.001
    assert 600 <= BOUNDS_S[-1] < 1000


def test_a_sample_that_is_not_declared_so_is_refused():
    registry = CollectorRegistry()
    registry.register(Reader([catalogue.WORKER_RSS], lambda: [Sample(catalogue.WORKER_RSS, (), 1)]))
    with pytest.raises(ValueError, match="not declared so"):
        list(registry.collect())


def test_a_cluster_without_a_desired_state_exports_no_pools():
    assert list(exported.samples(None, [])) == []
