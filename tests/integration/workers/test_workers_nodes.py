"""Which nodes a replica is on, and nodes that take no new ones: a real Ray of two nodes."""

import asyncio
import os
import time

import pytest
import ray
from live_worker import streams
from ray_nodes import ray_of, simulated_worker

from cluster.identity import WorkerState
from cluster.topology.schema import PlacementSpec
from cluster.workers import handle
from cluster.workers.nodes import look

pytestmark = pytest.mark.integration

NAME = f"nodes-{os.getpid()}"


@pytest.fixture(scope="module")
def racked():
    with ray_of(NAME, [{"num_cpus": 2}, {"num_cpus": 2}]) as racked:
        yield racked


@pytest.fixture(scope="module")
def nodes(racked):
    """The ids of the two nodes."""
    return [node["NodeID"] for node in ray.nodes()]


def spec(index, avoided=(), **pool):
    pool = {
        "placement": PlacementSpec(resources={"CPU": 1}),
        "simulated": {"decode_step_s": 0.02},
        **pool,
    }
    return simulated_worker(NAME, index, pool, revision="r17", avoided_nodes=tuple(avoided))


async def ready(replica):
    deadline_s = time.monotonic() + 40
    while (report := await replica.report()).state is not WorkerState.READY:
        assert time.monotonic() < deadline_s, report
        await asyncio.sleep(0.05)
    return report


async def test_a_worker_goes_to_the_node_that_is_not_avoided_and_says_which(nodes):
    specs = [spec(at, [avoided]) for at, avoided in enumerate(nodes)]
    try:
        reports = [await ready(await handle.spawn(each)) for each in specs]
        assert [report.node_id for report in reports] == list(reversed(nodes))
        assert [report.node_ids for report in reports] == [(node,) for node in reversed(nodes)]
        assert {report.revision for report in reports} == {"r17"}
    finally:
        for each in specs:
            await handle.remove(NAME, each.id)


async def test_a_worker_that_only_drained_nodes_could_take_is_told_apart(nodes):
    waits = spec(5, nodes)
    try:
        report = await (await handle.spawn(waits)).report()
        assert report.state is WorkerState.STARTING
        assert report.message.startswith("needs a node with CPU 1; on 127.0.0.1")
        assert report.message.endswith(": drained")
        assert report.node_id == ""
    finally:
        await handle.remove(NAME, waits.id)


async def test_a_worker_without_room_needs_no_grace_to_end(nodes):
    waits = spec(6, nodes)
    replica = await handle.spawn(waits)
    try:
        begun_s = time.monotonic()
        await replica.stop(60.0)
        assert time.monotonic() - begun_s < 20
    finally:
        await handle.remove(NAME, waits.id)
    assert waits.id not in await handle.find_all(NAME)


async def test_a_replica_over_nodes_names_them_all_and_is_quiet_as_one(nodes):
    gang = spec(7, nodes_per_replica=2)
    replica = await handle.spawn(gang)
    try:
        report = await ready(replica)
        assert sorted(report.node_ids) == sorted(nodes)
        assert report.node_ids[0] == report.node_id
        async with streams(report, 2, 50) as answers:
            assert not await replica.quiesce(0.3)
            quiet = asyncio.create_task(replica.quiesce(30))
            for answer in answers:
                assert "[DONE]" in await answer.text()
            ended_s = time.monotonic()
            assert await quiet
            assert time.monotonic() - ended_s < 1.5
        assert (await replica.report()).state is WorkerState.READY
    finally:
        await handle.remove(NAME, gang.id)


async def test_a_node_that_is_killed_is_told_from_those_that_live(racked, nodes):
    before = await look()
    assert {node.id for node in before if node.is_alive} == set(nodes)
    assert [node.silence for node in before] == ["", ""]
    (victim,) = racked.worker_nodes
    racked.remove_node(victim, allow_graceful=False)
    deadline_s = time.monotonic() + 60
    while all(node.is_alive for node in await look()):
        assert time.monotonic() < deadline_s, "Ray never missed it"
        await asyncio.sleep(0.5)
    (dead,) = [node for node in await look() if not node.is_alive]
    assert dead.id in nodes
    assert dead.silence
