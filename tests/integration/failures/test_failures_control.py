"""The controller and a gateway replica killed while eight streams run."""

from __future__ import annotations

import asyncio
import time

import pytest
from torn_cluster import GOES_ON_WITHIN_S, kill, until

pytestmark = [
    pytest.mark.integration,
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="session"),
]


async def only(cluster, kind):
    (process,) = await asyncio.to_thread(cluster.home.of_kind, kind)
    return process


async def test_streams_do_not_notice_that_the_controller_is_killed(cluster):
    before = await cluster.status()
    streams = await cluster.streams(tokens=100)
    await streams.all_begun()
    killed_s = kill((await only(cluster, "ControllerActor")).pid)
    assert await streams.ended() == []
    assert streams.longest_wait_s(killed_s) < GOES_ON_WITHIN_S
    after = await cluster.status()
    assert after.controller_started_at_s > before.controller_started_at_s
    assert [r.id for r in after.workers] == [r.id for r in before.workers]


async def test_streams_go_on_elsewhere_while_there_is_no_controller(cluster):
    streams = await cluster.streams(tokens=100)
    await streams.all_begun()
    victim = await cluster.worker(streams.records[0].decode)
    kill((await only(cluster, "ControllerActor")).pid)
    killed_s = kill(victim.engine_pid)
    further = await cluster.streams()
    assert await streams.ended() + await further.ended() == []
    assert streams.longest_wait_s(killed_s) < GOES_ON_WITHIN_S
    await cluster.whole()
    assert (await cluster.worker(victim.id.name)).id.generation > victim.id.generation


async def test_a_killed_gateway_replica_takes_its_own_streams_and_no_others(cluster):
    replicas = await asyncio.to_thread(cluster.home.of_kind, "GatewayReplica")
    assert len(replicas) == 2
    streams = await cluster.streams(count=16, tokens=100)
    await streams.all_begun()
    kill(replicas[0].pid)
    # Others are served from this moment on; what was sent to the dead one is sent again.
    further = await cluster.streams()
    assert await further.ended() == []
    wrong = await streams.ended()
    assert all(said.startswith("cut") for said in wrong)
    # By chance all 16 connections go to one replica once in 32,768 times.
    assert 0 < len(wrong) < 16

    async def are_two() -> bool:
        found = await asyncio.to_thread(cluster.home.of_kind, "GatewayReplica")
        return len(found) == 2

    await until(are_two)


async def test_a_gateway_replica_that_comes_back_refuses_nobody(cluster):
    replicas = await asyncio.to_thread(cluster.home.of_kind, "GatewayReplica")
    kill(replicas[1].pid)
    served_after_s = None
    while served_after_s is None or time.monotonic() < served_after_s:
        streams = await cluster.streams(tokens=10)
        assert await streams.ended() == []
        now = await asyncio.to_thread(cluster.home.of_kind, "GatewayReplica")
        if served_after_s is None and len(now) == 2 and now != replicas:
            # A Python that starts takes a second or two.
            served_after_s = time.monotonic() + 4.0
