"""Waiting until an engine has nothing in hand: before a change of role, and before its end."""

import asyncio
import os
import re
import signal
import time

import pytest
from live_worker import grant, reaches, streams

from cluster.identity import WorkerState

pytestmark = pytest.mark.integration

READY, DRAINING, STOPPED = WorkerState.READY, WorkerState.DRAINING, WorkerState.STOPPED
# Beyond what it waits for, a change of role is to take less than this.
SOON_S = 1.0


async def test_an_engine_with_nothing_in_hand_is_quiet_in_well_under_a_second(start):
    worker = await start()
    await reaches(worker, READY)
    began_s = time.monotonic()
    assert await worker.quiesce(30)
    assert time.monotonic() - began_s < SOON_S


async def test_quiet_means_that_the_last_stream_has_ended_and_the_worker_serves_on(start):
    worker = await start(simulated={"decode_step_s": 0.05})
    report = await reaches(worker, READY)
    async with streams(report, 3, 60) as answers:
        quiet = asyncio.create_task(worker.quiesce(60))
        texts = [await answer.text() for answer in answers]
        ended_s = time.monotonic()
        assert not quiet.done()
        assert await quiet
        assert time.monotonic() - ended_s < SOON_S
    assert all("[DONE]" in text for text in texts)
    assert (await worker.report()).state is READY
    async with streams(report, 1, 3) as (answer,):
        assert "[DONE]" in await answer.text()


async def test_a_grace_that_is_over_is_told_and_nothing_was_cut(start):
    worker = await start(simulated={"decode_step_s": 0.05})
    report = await reaches(worker, READY)
    async with streams(report, 1, 60) as (answer,):
        assert not await worker.quiesce(0.5)
        assert (await worker.report()).state is READY
        assert "[DONE]" in await answer.text()


async def test_quiet_waits_for_blocks_that_a_peer_may_still_pull(start):
    worker = await start(role="prefill")
    report = await reaches(worker, READY)
    await grant(report, "ask-1")
    quiet = asyncio.create_task(worker.quiesce(20))
    await asyncio.sleep(1)
    assert not quiet.done()
    await worker.release(["ask-1"])
    released_s = time.monotonic()
    assert await quiet
    assert time.monotonic() - released_s < SOON_S


async def test_blocks_that_nobody_pulls_hold_a_worker_no_longer_than_their_lease(start):
    worker = await start(role="prefill", lease_s=2.0)
    report = await reaches(worker, READY)
    await grant(report, "ask-2")
    began_s = time.monotonic()
    assert await worker.quiesce(60)
    assert 1.0 < time.monotonic() - began_s < 2.0 + SOON_S


async def test_a_caller_that_gives_up_changes_nothing(start):
    worker = await start(simulated={"decode_step_s": 0.05})
    report = await reaches(worker, READY)
    async with streams(report, 1, 60) as (answer,):
        quiet = asyncio.create_task(worker.quiesce(60))
        await asyncio.sleep(0.3)
        quiet.cancel()
        await asyncio.gather(quiet, return_exceptions=True)
        assert "[DONE]" in await answer.text()
    assert await worker.quiesce(10)


async def test_a_worker_that_is_not_ready_is_not_quiet(start):
    worker = await start(engine_args={"faults": {"extra_load_s": 30}})
    assert not await worker.quiesce(30)
    dies = await start(index=1, simulated={"decode_step_s": 0.5})
    report = await reaches(dies, READY)
    async with streams(report, 1, 60):
        quiet = asyncio.create_task(dies.quiesce(60))
        await asyncio.sleep(0.3)
        os.kill(report.engine_pid, signal.SIGKILL)
        async with asyncio.timeout(10):
            assert not await quiet


async def test_a_drain_says_what_it_waits_for_and_what_was_cut_off_in_the_end(start):
    worker = await start(role="prefill", simulated={"decode_step_s": 0.1})
    report = await reaches(worker, READY)
    await grant(report, "ask-3")
    async with streams(report, 2, 1000):
        stopping = asyncio.create_task(worker.stop(4))
        await reaches(worker, DRAINING)
        seen = set()
        while not stopping.done():
            seen.add((await worker.report()).message)
            await asyncio.sleep(0.05)
        await stopping
    waits = "2 requests in hand, 1 lease to be pulled"
    left = {int(m[1]) for text in seen if (m := re.fullmatch(rf"{waits}; (\d) s left", text))}
    assert {1, 2, 3} <= left
    last = await worker.report()
    assert last.state is STOPPED
    assert last.message == f"{waits} when its time was over"


async def test_an_engine_that_dies_while_it_is_drained_is_no_clean_end(start):
    worker = await start(simulated={"decode_step_s": 0.2})
    report = await reaches(worker, READY)
    async with streams(report, 1, 1000):
        stopping = asyncio.create_task(worker.stop(60))
        await reaches(worker, DRAINING)
        os.kill(report.engine_pid, signal.SIGKILL)
        async with asyncio.timeout(10):
            await stopping
    last = await worker.report()
    assert last.state is STOPPED
    assert last.message == "the engine ended by itself: exit code 137 (signal 9)"


async def test_a_drain_that_finished_in_time_cut_nothing_off(start):
    worker = await start(simulated={"decode_step_s": 0.05})
    report = await reaches(worker, READY)
    async with streams(report, 1, 20) as (answer,):
        stopping = asyncio.create_task(worker.stop(30))
        assert "[DONE]" in await answer.text()
    await stopping
    assert ((await worker.report()).state, (await worker.report()).message) == (STOPPED, "")
