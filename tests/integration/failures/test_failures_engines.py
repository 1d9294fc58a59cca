"""Engines killed and stopped at chosen moments while eight streams run: no client notices.

Every answer is held against an undisturbed engine's, token by token. More moments, around one
gateway without a cluster: tests/integration/gateway.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time

import psutil
import pytest
from torn_cluster import GOES_ON_WITHIN_S, HUNG_AFTER_S, kill, until

from cluster.identity import WorkerState
from cluster.workers.health import detection_bound_s

pytestmark = [
    pytest.mark.integration,
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="session"),
]


async def test_a_prefill_worker_killed_before_its_prefills_is_not_missed(cluster):
    victim = await cluster.worker("prefill/0")
    kill(victim.engine_pid)
    # Its death is in no snapshot yet.
    streams = await cluster.streams()
    assert await streams.ended() == []


async def test_prompts_of_a_prefill_worker_killed_at_work_are_read_by_another(cluster):
    victim = await cluster.worker("prefill/0")
    streams = await cluster.streams(prompt_chars=1_000)

    async def is_at_work() -> bool:
        return await cluster.running(victim) > 1

    await until(is_at_work)
    assert not any(record.decode for record in streams.records)
    kill(victim.engine_pid)
    assert await streams.ended() == []


async def test_a_prefill_worker_killed_after_its_prefills_is_not_missed(cluster):
    victim = await cluster.worker("prefill/0")
    streams = await cluster.streams()
    await streams.all_begun()
    assert any(record.prefill == "prefill/0" for record in streams.records)
    killed_s = kill(victim.engine_pid)
    assert await streams.ended() == []
    assert streams.longest_wait_s(killed_s) < GOES_ON_WITHIN_S


async def test_a_decode_worker_killed_before_the_first_token_is_replaced(cluster):
    victim = await cluster.worker("decode/0")
    # It hangs before each first token: its requests are there when it dies.
    await cluster.fault(victim, hang=True)
    streams = await cluster.streams()

    async def has_some() -> bool:
        return await cluster.running(victim) > 1

    await until(has_some)
    kill(victim.engine_pid)
    assert await streams.ended() == []


async def test_streams_of_a_decode_worker_killed_in_the_middle_go_on_within_a_second(cluster):
    streams = await cluster.streams(tokens=100)
    await streams.all_begun()
    name = streams.records[0].decode
    victim = await cluster.worker(name)
    killed_s = kill(victim.engine_pid)
    assert await streams.ended() == []
    assert streams.at(name)
    assert streams.longest_wait_s(killed_s) < GOES_ON_WITHIN_S


async def test_whole_answers_survive_the_death_of_their_decode_worker(cluster):
    victim = await cluster.worker("decode/1")
    answers = await cluster.streams(is_stream=False, tokens=100)

    async def has_some() -> bool:
        return await cluster.running(victim) > 1

    await until(has_some)
    kill(victim.engine_pid)
    assert await answers.ended() == []


@pytest.mark.parametrize("part", ["actor", "supervisor", "process inside"])
async def test_streams_survive_the_death_of_a_part_of_their_worker(cluster, part):
    victim = await cluster.worker("decode/2")
    streams = await cluster.streams(tokens=100)
    await streams.all_begun()
    pid = await asyncio.to_thread(part_of, cluster.home, victim, part)
    kill(pid)
    assert await streams.ended() == []

    async def is_replaced() -> bool:
        return (await cluster.worker_or_none(victim.id)) is None

    await until(is_replaced)
    await cluster.whole()
    assert (await cluster.worker("decode/2")).id.generation > victim.id.generation
    assert not psutil.pid_exists(victim.engine_pid)


def part_of(home, worker, part):
    if part == "actor":
        return home.owner_of(str(worker.id))
    if part == "supervisor":
        return home.supervisor_of(str(worker.id))
    (child,) = home.children_of(worker.engine_pid)
    return child


async def test_a_decode_worker_that_stands_still_is_noticed_in_time_and_its_streams_go_on(cluster):
    streams = await cluster.streams(tokens=100)
    await streams.all_begun()
    name = streams.records[0].decode
    victim = await cluster.worker(name)
    os.kill(victim.engine_pid, signal.SIGSTOP)
    stopped_s = time.monotonic()

    async def is_noticed() -> bool:
        now = [r for r in (await cluster.status()).workers if r.id == victim.id]
        return not now or now[0].state is not WorkerState.READY

    await until(is_noticed)
    noticed_s = time.monotonic()
    # A report and a look of ours come on top.
    assert noticed_s - stopped_s < detection_bound_s(HUNG_AFTER_S) + 1.5
    assert await streams.ended() == []
    assert streams.longest_wait_s(noticed_s) < GOES_ON_WITHIN_S
    await cluster.whole()
    assert (await cluster.worker(name)).id.generation > victim.id.generation
    assert not psutil.pid_exists(victim.engine_pid)


async def test_a_worker_that_stands_still_for_a_moment_is_left_alone(cluster):
    streams = await cluster.streams(tokens=100)
    await streams.all_begun()
    name = streams.records[0].decode
    before = await cluster.worker(name)
    os.kill(before.engine_pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(HUNG_AFTER_S * 0.6)
    finally:
        os.kill(before.engine_pid, signal.SIGCONT)
    assert await streams.ended() == []
    # Had it been taken for hung, that would show by now.
    await asyncio.sleep(HUNG_AFTER_S)
    assert (await cluster.worker(name)).id == before.id


async def test_streams_go_on_when_blocks_do_not_come(cluster):
    victims = [await cluster.worker(f"decode/{index}") for index in (0, 1, 2)]
    for victim in victims:
        await cluster.fault(victim, fail_transfers=True)
    try:
        streams = await cluster.streams()
        assert await streams.ended() == []
        assert {record.route for record in streams.records} == {"recompute:pull-failed"}
    finally:
        for victim in victims:
            await cluster.fault(victim, fail_transfers=False)
