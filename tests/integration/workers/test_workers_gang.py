"""Replicas that span nodes: one Ray of four nodes on this machine, simulated engines.

Whatever part of a replica is killed, all of it goes and comes again under one new generation."""

import asyncio
import contextlib
import os
import signal
import socket
import time

import aiohttp
import pytest
import ray
from ray_nodes import ray_of

from cluster.control.actor import RayWorkers
from cluster.control.clock import SystemClock
from cluster.control.controller import Controller
from cluster.control.state import DesiredState
from cluster.control.store import Store
from cluster.errors import InvalidInput, PeerGone
from cluster.identity import WorkerId, WorkerState
from cluster.models.store import resolve
from cluster.settings import ClusterPaths, ray_namespace
from cluster.topology.schema import ModelSpec, ServingSpec
from cluster.workers import handle, tree

pytestmark = [pytest.mark.integration, pytest.mark.e2e, pytest.mark.slow]

NAME = f"gang-{os.getpid()}"
NODES = 4  # two for a replica, one to come in for a lost one, one more to be lost
WITHIN_S = 40.0


@pytest.fixture(scope="module")
def rack():
    """Every node has room for one rank."""
    with ray_of(NAME, [{}] * NODES) as racked:
        yield racked


def desired(replicas=1, **pool):
    model = resolve(ModelSpec(id="simulated"), lambda _what, _part: None)
    serving = {
        "model": {"id": "simulated"},
        "pools": [
            {
                "name": "pair",
                "role": "mixed",
                "engine": "simulated",
                "replicas": replicas,
                "nodes_per_replica": 2,
                "parallel": {"tensor": 2},
                **pool,
            }
        ],
        "islands": [{"name": "here", "pools": ["pair"]}],
        "health": {"restart_backoff_s": 0.1, "hung_after_s": 20},
    }
    return DesiredState(
        cluster=NAME,
        serving=ServingSpec.model_validate(serving),
        model_path=model.path,
        model_digest=model.digest,
        max_model_len_tokens=4096,
        kv_bytes_per_token=1024,
        host="127.0.0.1",
    )


class Entries(dict):
    def put(self, key, value):
        self[key] = value

    def delete(self, key):
        self.pop(key, None)


@contextlib.asynccontextmanager
async def controlled(state):
    """A controller at work on `state`; ends every worker afterwards."""
    store = Store(Entries())
    store.put_engine_key("gang-test-secret")
    controller = Controller(NAME, RayWorkers(), store, SystemClock())
    running = asyncio.create_task(controller.run())
    await controller.apply(state)
    try:
        yield controller
    finally:
        await controller.shutdown(0.0)
        await running


async def reports(controller):
    return {report.id: report for report in (await controller.status()).workers}


async def ready(controller, generation):
    """The report of that generation, once it is the only one there is."""
    deadline_s = time.monotonic() + WITHIN_S
    while True:
        found = await reports(controller)
        if list(found) == [WorkerId("pair", 0, generation)]:
            report = found[WorkerId("pair", 0, generation)]
            if report.state is WorkerState.READY:
                return report
        assert time.monotonic() < deadline_s, found
        await asyncio.sleep(0.05)


def actor(worker, rank):
    return ray.get_actor(f"worker:{worker}:{rank}", namespace=ray_namespace(NAME))


async def pid_of(part, worker, rank):
    if part == "actor":
        return await actor(worker, rank).__ray_call__.remote(lambda _self: os.getpid())
    return (await actor(worker, rank).report.remote()).engine_pid


def processes(worker):
    return [p.pid for rank in (0, 1) for p in tree.marked(f"{NAME}/{worker}:{rank}")]


def left(worker):
    """What there is of a replica: processes, actors, a placement group that holds resources."""
    found = [f"process {pid}" for pid in processes(worker)]
    found += [
        entry["name"]
        for entry in ray.util.list_named_actors(all_namespaces=True)
        if entry["name"].startswith(f"worker:{worker}:")
    ]
    groups = ray.util.placement_group_table().values()
    found += [g["state"] for g in groups if g["name"] == str(worker) and g["state"] != "REMOVED"]
    return found


async def is_gone(worker, within_s=15.0):
    deadline_s = time.monotonic() + within_s
    while left(worker):
        assert time.monotonic() < deadline_s, left(worker)
        await asyncio.sleep(0.05)


def answers(url):
    host, port = url.removeprefix("http://").split(":")
    return is_open(host, int(port))


def is_open(host, port):
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


async def test_a_replica_is_ready_when_all_ranks_met_at_the_port_that_rank_0_holds(rack):
    async with controlled(desired()) as controller:
        report = await ready(controller, 1)
        place = await actor(report.id, 0).meeting_place.remote()
        assert place.host == "127.0.0.1"
        assert is_open(place.host, place.ports["rendezvous"])
        ranks = [await actor(report.id, rank).report.remote() for rank in (0, 1)]
        assert [rank.url for rank in ranks] == [report.url, ""]
        # Measured anew every few seconds, so asked for after those of its ranks.
        whole = (await reports(controller))[report.id]
        assert whole.rss_bytes == 0 or whole.rss_bytes >= max(rank.rss_bytes for rank in ranks)
        nodes = {await self_node(report.id, rank) for rank in (0, 1)}
        assert len(nodes) == 2

        replica = await handle.find(NAME, report.id)
        head_log, _ = await replica.read_log(0, 1 << 16)
        other_log, _ = await replica.read_log(0, 1 << 16, rank=1)
        assert b"rank 1 joined" in head_log
        met = f"rank 1 of 2 follows 127.0.0.1:{place.ports['rendezvous']}".encode()
        assert met in other_log
        with pytest.raises(InvalidInput, match=r"rank of pair/0: found 2; it has ranks 0 to 1"):
            await replica.read_log(0, 1, rank=2)
    await is_gone(report.id)
    assert not answers(report.url)
    assert not is_open(place.host, place.ports["rendezvous"])


async def self_node(worker, rank):
    def node(_self):
        return ray.get_runtime_context().get_node_id()

    return await actor(worker, rank).__ray_call__.remote(node)


@pytest.mark.parametrize(
    ("part", "rank"), [("engine", 0), ("engine", 1), ("actor", 0), ("actor", 1)]
)
async def test_a_killed_part_of_one_rank_takes_the_whole_replica_along_and_it_comes_again_as_one(
    rack, part, rank
):
    async with controlled(desired()) as controller:
        first = await ready(controller, 1)
        os.kill(await pid_of(part, first.id, rank), signal.SIGKILL)
        second = await ready(controller, 2)
        await is_gone(first.id)
        assert len(processes(second.id)) >= 4  # an engine and its supervisor for each rank
        (slot,) = (await controller.status()).failed
        assert slot.failures == 1
        if (part, rank) == ("engine", 1):
            assert slot.why.startswith("rank 1 on 127.0.0.1: the engine ended: exit code 137")
    await is_gone(second.id)


async def test_a_lost_node_takes_the_replica_along_and_it_comes_again_on_nodes_that_remain(rack):
    async with controlled(desired()) as controller:
        first = await ready(controller, 1)
        nodes = [await self_node(first.id, rank) for rank in (0, 1)]
        # One of the two at least is not the head, with which all of Ray would go.
        node = next(node for node in rack.worker_nodes if node.node_id in nodes)
        lost = node.node_id
        os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)
        second = await ready(controller, 2)
        await is_gone(first.id)
        assert lost not in {await self_node(second.id, rank) for rank in (0, 1)}
    await is_gone(second.id)


async def test_drain_finishes_streams_before_any_rank_stops(rack):
    async with controlled(desired(simulated={"decode_step_s": 0.05})) as controller:
        report = await ready(controller, 1)
        body = {"model": "simulated", "prompt": "hello", "max_tokens": 60, "stream": True}
        head = {"Authorization": "Bearer gang-test-secret"}
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{report.url}/v1/completions", json=body, headers=head) as answer,
        ):
            assert await answer.content.readline()
            await controller.apply(desired(replicas=0))
            others = []
            text = b""
            async for line in answer.content:
                text += line
                with contextlib.suppress(ray.exceptions.RayActorError, ValueError):
                    others.append((await actor(report.id, 1).report.remote()).state)
        assert text.endswith(b"data: [DONE]\n\n")
        assert len(others) > 10
        assert set(others[:-5]) == {WorkerState.READY}
        await is_gone(report.id)
        async with asyncio.timeout(5):  # the controller hears of it last
            while await reports(controller):  # noqa: ASYNC110 its actor has no event to wait for
                await asyncio.sleep(0.05)
        assert (await controller.status()).failed == ()


async def test_rank_0_ends_the_others_also_when_whoever_asked_it_is_gone(rack):
    async with controlled(desired()) as controller:
        report = await ready(controller, 1)
        other = actor(report.id, 1)
        await actor(report.id, 0).stop.remote(0.0)
        deadline_s = time.monotonic() + 10
        while (await other.report.remote()).state is not WorkerState.STOPPED:
            assert time.monotonic() < deadline_s
            await asyncio.sleep(0.05)


async def test_a_rank_says_why_it_does_not_start_when_rank_0_could_not(rack):
    broken = desired(simulated={"load_s": 0}, engine_args={"faults": {"start_failure": "no room"}})
    async with controlled(broken) as controller:
        deadline_s = time.monotonic() + WITHIN_S
        while not (failed := (await controller.status()).failed):
            assert time.monotonic() < deadline_s
            await asyncio.sleep(0.05)
        assert failed[0].last_words[-1] == "no room"


async def hears_that_it_is_gone(replica):
    try:
        while True:
            await replica.report()
    except PeerGone as error:
        return str(error)


async def test_whoever_asks_a_replica_that_lost_a_rank_hears_that_it_is_gone(rack):
    spec = desired().worker_spec(WorkerId("pair", 7, 1), "gang-test-secret")
    replica = await handle.spawn(spec)
    try:
        deadline_s = time.monotonic() + WITHIN_S
        while (await replica.report()).state is not WorkerState.READY:
            assert time.monotonic() < deadline_s
            await asyncio.sleep(0.05)
        os.kill(await pid_of("actor", spec.id, 1), signal.SIGKILL)
        assert "pair/7#1 is gone" in await hears_that_it_is_gone(replica)
        with pytest.raises(PeerGone):
            await replica.stop(0.0)  # and yet rank 0 has ended
        assert not answers((await actor(spec.id, 0).report.remote()).url)
        assert ClusterPaths(NAME).worker_log(spec.id, 1).exists()
        assert await handle.find(NAME, spec.id) is None
    finally:
        await handle.remove(NAME, spec.id)
    await is_gone(spec.id)
