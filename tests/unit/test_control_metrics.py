"""What the controller exports and where it sends Prometheus. Over fake workers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from control_world import World, desired
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from cluster.control.api import Bearer, create_app
from cluster.control.changes import ChangeRole, Scale
from cluster.control.discovery import target_groups
from cluster.control.exported import samples, speakers
from cluster.identity import Role, WorkerId, WorkerState
from cluster.observe import catalogue
from cluster.traffic import GatewayReport
from cluster.workers.report import Counters, WorkerReport

TARGETS = [{"prefill": "p", "decode": "d", "ttft_s": 2.0, "percentile": 99}]


@pytest.fixture
async def world():
    world = World()
    await world.controller.step()
    await world.controller.apply(desired(decode=2, scaling={"targets": TARGETS}))
    await world.steps(3)
    return world


async def scraped(world):
    """value[name, labels as a frozenset]"""
    text = (await world.controller.metrics()).decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def key(metric, **labels):
    return metric.name, frozenset(labels.items())


def in_pool(metric, pool, role):
    return key(metric, pool=pool, role=role, island="i", hardware="")


async def test_desired_and_ready_replicas_are_told_per_pool_and_role(world):
    world.workers["d/1#1"].state = WorkerState.LOADING
    await world.steps()
    value = await scraped(world)
    assert value[in_pool(catalogue.REPLICAS_DESIRED, "d", "decode")] == 2
    assert value[in_pool(catalogue.REPLICAS_READY, "d", "decode")] == 1
    assert value[in_pool(catalogue.REPLICAS_READY, "p", "prefill")] == 1
    ups = [labels for name, labels in value if name == catalogue.WORKER_UP.name]
    states = {dict(labels)["worker"]: dict(labels)["state"] for labels in ups}
    assert states == {"p/0": "ready", "d/0": "ready", "d/1": "loading"}


async def test_a_worker_that_changed_its_role_counts_there_and_the_change_is_counted(world):
    await world.controller.ask(ChangeRole("d/1", Role.PREFILL), "ada")
    await world.steps(6)
    value = await scraped(world)
    for metric in (catalogue.REPLICAS_DESIRED, catalogue.REPLICAS_READY):
        assert value[in_pool(metric, "d", "decode")] == 1
        assert value[in_pool(metric, "d", "prefill")] == 1
    assert value[key(catalogue.ROLE_CHANGES, pool="d", to="prefill")] == 1
    assert value[key(catalogue.CHANGES, kind="role", state="done")] == 1


async def test_changes_of_every_kind_and_end_are_shown_from_nought(world):
    value = await scraped(world)
    shown = {labels: v for (name, labels), v in value.items() if name == catalogue.CHANGES.name}
    ends = ("done", "failed", "replaced")
    kinds = ("scale", "role", "drain-worker", "drain-node", "return-node", "apply")
    assert shown == {
        frozenset({("kind", kind), ("state", end)}): 0 for kind in kinds for end in ends
    }


async def test_starts_are_counted_and_timed_and_those_after_a_failure_are_restarts(world):
    value = await scraped(world)
    assert value[key(catalogue.WORKER_STARTS, pool="d")] == 2
    assert value[key(catalogue.WORKER_RESTARTS, pool="d")] == 0
    assert value[(f"{catalogue.TIME_TO_READY.name}_count", frozenset({("pool", "d")}))] == 2
    world.workers["d/0#1"].is_dead = True
    await world.steps(12)
    value = await scraped(world)
    assert WorkerId("d", 0, 2) in world.workers.alive
    assert value[key(catalogue.WORKER_STARTS, pool="d")] == 3
    assert value[key(catalogue.WORKER_RESTARTS, pool="d")] == 1
    assert value[(f"{catalogue.TIME_TO_READY.name}_count", frozenset({("pool", "d")}))] == 3


async def test_a_scale_down_counts_a_drain_and_no_restart(world):
    await world.controller.ask(Scale("d", 1), "ada")
    await world.steps(6)
    value = await scraped(world)
    assert value[key(catalogue.WORKER_DRAINS, pool="d")] == 1
    assert value[key(catalogue.WORKER_RESTARTS, pool="d")] == 0
    assert value[key(catalogue.CHANGES, kind="scale", state="done")] == 1


async def test_a_controller_that_comes_after_another_counts_adopted_workers_not_as_started(world):
    world.controller = world.new_controller()
    await world.steps(3)
    value = await scraped(world)
    assert value[key(catalogue.WORKER_STARTS, pool="d")] == 0
    assert value[(f"{catalogue.TIME_TO_READY.name}_count", frozenset({("pool", "d")}))] == 0
    assert value[in_pool(catalogue.REPLICAS_READY, "d", "decode")] == 2


async def test_the_stated_targets_are_exported_for_alerts_and_panels(world):
    value = await scraped(world)
    wanted = key(catalogue.TARGET_TTFT, prefill_pool="p", decode_pool="d", percentile="99")
    assert value[wanted] == 2.0
    assert not any(name == catalogue.TARGET_TPOT.name for name, _ in value)


def report(pool="d", index=0, generation=1, state=WorkerState.READY, **more):
    return WorkerReport(
        id=WorkerId(pool, index, generation),
        role=Role.PREFILL if pool == "p" else Role.DECODE,
        state=state,
        message="",
        node_ip="10.0.0.7",
        url=f"http://10.0.0.7:{20000 + generation}",
        started_at_s=0.0,
        **more,
    )


async def test_transfer_totals_are_the_workers_own_in_tokens_and_blocks(world):
    prints = world.workers["d/0#1"].fingerprint
    counters = Counters(
        transfers=5, transfer_failures=1, bytes_pulled=4096, tokens_pulled=70, tokens_held=33
    )
    told = [report(counters=counters, fingerprint=prints, rss_bytes=9)]
    found = {s.metric: s.value for s in samples(desired(), told) if s.labels == ("d/0", "d")}
    assert prints.block_size_tokens == 16
    assert found == {
        catalogue.WORKER_KV_TRANSFERS: 5,
        catalogue.WORKER_KV_FAILURES: 1,
        catalogue.WORKER_KV_BYTES: 4096,
        catalogue.WORKER_KV_TOKENS_PULLED: 70,
        catalogue.WORKER_KV_TOKENS_HELD: 33,
        catalogue.WORKER_KV_BLOCKS_PULLED: 4,
        catalogue.WORKER_KV_BLOCKS_SKIPPED: 2,
        catalogue.WORKER_LEASES_OPEN: 0,
        catalogue.WORKER_RSS: 9,
        catalogue.WORKER_LOG_LINES_LOST: 0,
    }


def test_of_two_generations_the_one_that_takes_work_speaks_else_the_newest():
    old, new = report(generation=1), report(generation=2, state=WorkerState.LOADING)
    assert speakers([new, old]) == [old]
    assert speakers([replace(old, state=WorkerState.DRAINING), new]) == [new]


# Discovery


GATEWAYS = (
    GatewayReport("g1", 0.0, 1, 0, 0, metrics_url="http://10.0.0.1:41000/metrics"),
    GatewayReport("g2", 0.0, 1, 0, 0),
)


def test_prometheus_is_sent_to_engines_gateways_and_the_controller_with_their_labels():
    groups = target_groups("c", desired(), [report()], GATEWAYS, "10.0.0.1:8001")
    assert [(group.targets, dict(group.labels)) for group in groups] == [
        (
            ("10.0.0.7:20001",),
            {
                "cluster": "c",
                "job": "pdcluster-engine",
                "__metrics_path__": "/metrics",
                "pool": "d",
                "role": "decode",
                "worker": "d/0",
                "node": "10.0.0.7",
                "hardware": "",
                "island": "i",
                "model": "simulated",
                "engine": "simulated",
            },
        ),
        (
            ("10.0.0.1:41000",),
            {
                "cluster": "c",
                "job": "pdcluster-gateway",
                "__metrics_path__": "/metrics",
                "gateway": "g1",
            },
        ),
        (("10.0.0.1:8001",), {"cluster": "c", "job": "pdcluster-controller"}),
    ]


@pytest.mark.parametrize("state", WorkerState)
def test_only_engines_that_answer_http_are_targets(state):
    groups = target_groups("c", desired(), [report(state=state)], (), "")
    answers = state.value in ("warming", "ready", "hung", "changing", "draining")
    assert len(groups) == answers


def test_a_worker_of_a_pool_that_is_gone_and_one_without_an_address_break_nothing():
    told = [report(pool="gone"), replace(report(), url="")]
    (group,) = target_groups("c", desired(), told, (), "")
    assert (group.labels["pool"], group.labels["island"]) == ("gone", "")
    assert target_groups("c", None, told, (), "") == ()


async def test_the_api_answers_as_prometheus_reads_it_and_only_with_the_token(world):
    await world.controller.gateway_report(GATEWAYS[0])
    http = TestClient(create_app(world.controller, Bearer("t")), base_url="http://head:8001")
    for path in ("/metrics", "/v1/discovery/prometheus"):
        assert http.get(path).status_code == 401
    http.headers["authorization"] = "Bearer t"
    answer = http.get("/v1/discovery/prometheus")
    assert answer.headers["content-type"] == "application/json"
    groups = answer.json()
    assert all(set(group) == {"targets", "labels"} for group in groups)
    assert [target for group in groups for target in group["targets"]] == [
        *("127.0.0.1:20000", "127.0.0.1:20001", "127.0.0.1:20000"),
        *("10.0.0.1:41000", "head:8001"),
    ]
    answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "pdcluster_pool_replicas_ready{" in answer.text
