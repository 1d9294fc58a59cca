"""What is told when nothing works, how it comes back by itself, and that nothing of it is left."""

from __future__ import annotations

import asyncio
import itertools
import json
import time

import pytest
from torn_cluster import GOES_ON_WITHIN_S, held, kill, leaks, until

from cluster.identity import WorkerState

pytestmark = [
    pytest.mark.integration,
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="session"),
]

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
AT_ONCE_S = 2.0
CRASHES = 3


async def test_without_a_decode_worker_the_truth_is_told_at_once_and_service_comes_back(cluster):
    streams = await cluster.streams(tokens=200)
    await streams.all_begun()
    decodes = [r for r in (await cluster.status()).workers if r.role == "decode"]
    killed_s = [kill(report.engine_pid) for report in decodes][-1]
    wrong = await streams.ended()
    assert time.monotonic() - killed_s < AT_ONCE_S
    assert len(wrong) == 8
    assert all(said.startswith("error") and "nobody else can go on" in said for said in wrong)
    asked_s = time.monotonic()
    status, retry_after, text = await cluster.endpoint_says(CHAT, HELLO, "asked-in-vain")
    assert time.monotonic() - asked_s < AT_ONCE_S
    assert status == 503
    assert int(retry_after) >= 1
    assert json.loads(text)["error"]["code"] == "no_worker_available"
    line = f"request asked-in-vain failed path={CHAT} status=503"
    await until(lambda: line in cluster.logged())

    async def is_served() -> bool:
        return (await cluster.endpoint_says(CHAT, HELLO))[0] == 200

    await until(is_served)
    assert await (await cluster.streams()).ended() == []


async def test_a_worker_that_crashes_again_and_again_is_restarted_ever_later_and_says_why(cluster):
    name = "decode/2"
    for crash in range(CRASHES):
        await cluster.whole()
        victim = await cluster.worker(name)
        assert victim.state is WorkerState.READY
        await cluster.fault(victim, crash_at_token=2)

        async def is_gone(victim=victim) -> bool:
            # Whoever meets it goes on elsewhere.
            assert await (await cluster.streams(tokens=5)).ended() == []
            return (await cluster.worker_or_none(victim.id)) is None

        await until(is_gone)
        shown = await asyncio.to_thread(cluster.home.command, "status", "--cluster", "torn")
        assert "simulated crash before token 2" in shown
        if crash:
            assert f"{name} failed {crash + 1} times in a row" in shown
    pauses = [
        float(dict(event.fields)["restart_in_s"])
        for event in (await cluster.status()).events
        if event.kind == "WorkerRemoved" and event.subject.startswith(f"{name}#")
    ][-CRASHES:]
    assert all(later == 2 * sooner for sooner, later in itertools.pairwise(pauses))


async def test_what_was_held_before_the_failures_is_held_after_them_and_no_more(cluster):
    before = await at_rest(cluster)
    streams = await cluster.streams(count=16, tokens=100)
    await streams.all_begun()
    workers = {r.id.name: r for r in (await cluster.status()).workers}
    kill(workers["prefill/1"].engine_pid)
    kill(workers["decode/0"].engine_pid)
    kill(await asyncio.to_thread(cluster.home.owner_of, str(workers["decode/1"].id)))
    kill((await asyncio.to_thread(cluster.home.of_kind, "ControllerActor"))[0].pid)
    kill((await asyncio.to_thread(cluster.home.of_kind, "GatewayReplica"))[0].pid)
    wrong = await streams.ended()
    assert all(said.startswith("cut") for said in wrong)
    await cluster.whole()
    found: list[str] = []

    async def is_as_before() -> bool:
        found[:] = leaks(before, await held(cluster.home))
        return not found

    try:
        await until(is_as_before, 30.0)
    except AssertionError:
        assert found == []


async def at_rest(cluster):
    while True:
        now = await held(cluster.home)
        if now.leases_open == now.requests_running == now.gateway_leases_open == 0:
            return now
        await asyncio.sleep(1.0)


async def test_streams_do_not_notice_that_the_disk_under_the_logs_is_full(cluster, full_log_disk):
    streams = await cluster.streams(tokens=100)
    await streams.all_begun()
    victim = await cluster.worker(streams.records[0].decode)
    killed_s = kill(victim.engine_pid)
    assert await streams.ended() == []
    assert streams.longest_wait_s(killed_s) < GOES_ON_WITHIN_S
    # Nor does the engine that comes in its place find room for a line.
    await cluster.whole()
    assert await (await cluster.streams()).ended() == []
    successor = await cluster.worker(victim.id.name)
    assert successor.id.generation > victim.id.generation
    assert successor.log_lines_lost > 0
