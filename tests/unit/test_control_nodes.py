"""What the controller makes of Ray's nodes: silent hosts, drained ones that are gone, pending
placements, and drains that would end the service."""

from __future__ import annotations

import asyncio

import pytest
from control_world import World, desired

from cluster.control import wire
from cluster.control.changes import ChangeState, DrainNode, ReturnNode
from cluster.errors import InvalidInput
from cluster.identity import Role, WorkerId, WorkerState
from cluster.workers.nodes import RayNode, _of
from cluster.workers.placement import NodeFacts

A, B, C = "node-a", "node-b", "node-c"
LOST = "health check failed due to missing too many heartbeats"


def ray_node(id_, address="127.0.0.1", is_alive=True, silence="", cpus=8.0):
    facts = NodeFacts(address, {"ray.io/node-id": id_}, {"CPU": cpus}, {"CPU": 0.0})
    return RayNode(id_, is_alive, facts, silence)


@pytest.fixture
async def world():
    """Two decode workers and a prefill one, all on node A."""
    world = World()
    world.workers.ray_nodes = (ray_node(A), ray_node(B, "127.0.0.2"))
    await world.controller.step()
    await world.controller.apply(desired(decode=2))
    await world.steps(3)
    return world


async def look(world, *nodes):
    world.workers.ray_nodes = nodes
    await world.steps(2, each_s=5.0)


async def silent(world):
    return {host.address: host for host in (await world.controller.status()).silent_hosts}


# Silent hosts


async def test_a_host_that_fell_silent_is_shown_with_since_when_until_it_is_back(world):
    assert await silent(world) == {}
    await look(world, ray_node(A), ray_node(B, "127.0.0.2", False, LOST))
    since_s = world.clock.wall_s() - 5.0
    await world.steps(2, each_s=100.0)
    (host,) = (await silent(world)).values()
    assert (host.address, host.since_s, host.why) == ("127.0.0.2", since_s, LOST)
    await look(world, ray_node(A), ray_node(B, "127.0.0.2", False, LOST), ray_node(C, "127.0.0.2"))
    assert await silent(world) == {}


async def test_a_host_that_was_ended_on_request_is_not_silent(world):
    await look(world, ray_node(A), ray_node(B, "127.0.0.2", False))
    assert await silent(world) == {}


@pytest.mark.parametrize(("reason", "silence"), [(1, ""), (4, ""), (2, LOST), (None, LOST)])
def test_ray_says_whether_somebody_ended_a_node(reason, silence):
    row = {"NodeID": A, "Alive": False, "NodeManagerAddress": "10.0.0.1", "Resources": {}}
    assert _of({**row, "DeathReason": reason, "DeathReasonMessage": LOST}, {}).silence == silence
    assert _of({**row, "Alive": True, "DeathReason": 0, "DeathReasonMessage": ""}, {}).silence == ""


async def test_a_host_whose_worker_does_not_answer_is_shown_before_ray_misses_it(world):
    heard_s = world.clock.wall_s()
    world.workers["d/0#1"].is_mute = True
    await world.steps(4, each_s=2.0)
    (host,) = (await silent(world)).values()
    assert host.since_s == heard_s
    assert host.why == "d/0#1 does not answer from there"
    status = wire.read_status(wire.status_json(await world.controller.status()))
    assert status.silent_hosts == (host,)


async def test_a_ray_that_does_not_answer_is_asked_once_and_holds_nobody_up(world):
    asked = []
    answer = asyncio.get_running_loop().create_future()

    async def nodes():
        asked.append(1)
        return await answer

    world.workers.nodes = nodes
    await world.steps(2, each_s=60.0)
    assert asked == [1]
    answer.set_result((ray_node(A), ray_node(B, "127.0.0.2", False, LOST)))
    await world.steps(1)
    assert list(await silent(world)) == ["127.0.0.2"]


# Drained nodes that are gone


async def test_a_drained_node_is_forgotten_once_ray_has_no_such_node(world):
    await world.controller.ask(DrainNode(A), "ada@ops")
    for handle in world.workers.alive.values():
        handle.node_id = B
    await world.steps(40)
    assert (await world.controller.desired()).drained_nodes.keys() == {A}
    await look(world, ray_node(B, "127.0.0.2"))
    assert (await world.controller.desired()).drained_nodes == {}
    assert world.store.desired().drained_nodes == {}


async def test_a_drained_node_is_kept_while_ray_tells_of_none_or_a_worker_is_on_it(world):
    change = await world.controller.ask(DrainNode(A), "ada@ops")
    world.workers.ray_nodes = (ray_node(B, "127.0.0.2"),)
    await world.steps(1, each_s=6.0)
    assert (await world.controller.change(change.id)).state is ChangeState.RUNNING
    assert (await world.controller.desired()).drained_nodes.keys() == {A}
    for handle in world.workers.alive.values():
        handle.node_id = B
    await look(world)
    assert (await world.controller.desired()).drained_nodes.keys() == {A}
    assert (await world.controller.change(change.id)).state is ChangeState.DONE


# Workers that no node has taken yet


async def test_what_no_node_has_taken_is_asked_for_anew_when_nodes_are_drained_or_returned(world):
    pending = world.workers["d/1#1"]
    pending.state, pending.node_ip, pending.node_id = WorkerState.STARTING, "", ""
    await world.steps(1)
    await world.controller.ask(DrainNode(A, may_end_service=True), "ada@ops")
    await world.steps(3)
    assert WorkerId("d", 1, 1) not in world.workers.alive
    anew = world.workers["d/1#2"]
    assert anew.spec.avoided_nodes == (A,)
    assert pending.stopped_with_s is None
    anew.state, anew.node_ip, anew.node_id = WorkerState.STARTING, "", ""
    await world.controller.ask(ReturnNode(A), "ada@ops")
    await world.steps(3)
    assert world.workers["d/1#3"].spec.avoided_nodes == ()
    assert (await world.controller.status()).failed == ()


# Drains that would end the service


async def test_the_node_without_which_nobody_would_serve_is_drained_only_by_force(world):
    world.workers.ray_nodes = (ray_node(A), ray_node(B, "127.0.0.2", cpus=0.5))
    with pytest.raises(InvalidInput) as refused:
        await world.controller.ask(DrainNode(A), "ada@ops")
    said = str(refused.value)
    assert "found node-a; all that prefill are on it, and no other could take one (p needs" in said
    assert "on 127.0.0.2: only CPU 0.5" in said
    assert said.endswith(
        "so nobody would prefill; add a node first, or `--force` (may_end_service)"
    )
    assert (await world.controller.desired()).drained_nodes == {}
    assert await world.controller.changes() == ()
    await world.controller.ask(DrainNode(A, may_end_service=True), "ada@ops")
    assert (await world.controller.desired()).drained_nodes.keys() == {A}


async def test_one_who_serves_elsewhere_or_could_be_started_elsewhere_is_enough(world):
    world.workers["p/0#1"].node_id = B
    world.workers["d/0#1"].node_id = B
    world.workers.ray_nodes = (ray_node(A),)
    await world.steps(1)
    await world.controller.ask(DrainNode(A), "ada@ops")
    world.workers.ray_nodes = (ray_node(A), ray_node(B), ray_node(C))
    await world.controller.ask(ReturnNode(A), "ada@ops")
    for handle in world.workers.alive.values():
        handle.node_id = B
    await world.steps(1)
    await world.controller.ask(DrainNode(B), "ada@ops")


async def test_who_decodes_counts_by_role_and_a_single_node_has_no_other(world):
    world.workers.ray_nodes = (ray_node(A),)
    world.workers["p/0#1"].state = WorkerState.LOADING
    await world.steps(1)
    with pytest.raises(InvalidInput, match="all that decode are on it, and there is no other node"):
        await world.controller.ask(DrainNode(A), "ada@ops")
    assert {r.role for r in (await world.controller.status()).workers} == {
        Role.PREFILL,
        Role.DECODE,
    }


def test_force_goes_over_the_wire():
    path, body = wire.posted(DrainNode("10.0.0.7", 5.0, may_end_service=True))
    assert path == "/v1/nodes/10.0.0.7/drain"
    assert body == {"grace_s": 5.0, "may_end_service": True}
    # A head that does not know it yet takes a drain that does not say it.
    assert "may_end_service" not in wire.posted(DrainNode("10.0.0.7"))[1]
