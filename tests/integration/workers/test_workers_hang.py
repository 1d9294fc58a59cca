"""Engines that stand still, wholly or in part, against engines that are merely slow.

Real processes, stopped and killed by signals; the bounds are those of workers.health."""

import asyncio
import contextlib
import os
import re
import signal
import time

import aiohttp
import pytest
from live_worker import reaches, session, streams

from cluster.identity import WorkerState
from cluster.workers.health import detection_bound_s, idle_detection_bound_s

pytestmark = [pytest.mark.integration, pytest.mark.e2e, pytest.mark.slow]

READY, FAILED, HUNG = WorkerState.READY, WorkerState.FAILED, WorkerState.HUNG
HUNG_AFTER_S = 3.0
# Of a machine whose cores are shared with other tests: not part of the promise.
SLACK_S = 2.0


async def core_of(worker):
    """The process id of the engine's second process."""
    for _ in range(100):
        log, _ = await worker.read_log(0, 1 << 16)
        if found := re.search(rb"core process pid=(\d+)", log):
            return int(found[1])
        await asyncio.sleep(0.05)
    raise AssertionError(log)


async def found_hung(worker, pid, bound_s):
    """Stop `pid`, and the report of the worker that is then hung."""
    os.kill(pid, signal.SIGSTOP)
    stopped_s = time.monotonic()
    report = await reaches(worker, HUNG, FAILED, within_s=bound_s + SLACK_S)
    assert report.state is HUNG
    # Since then at the earliest, but for what it got done just before.
    assert time.monotonic() - stopped_s > HUNG_AFTER_S - 1.5
    return report


async def test_a_stopped_engine_with_streams_in_hand_is_hung_in_time_and_goes_on_with_them(start):
    worker = await start(hung_after_s=HUNG_AFTER_S, simulated={"decode_step_s": 0.02})
    report = await reaches(worker, READY)
    async with streams(report, 8, 400) as answers:
        await asyncio.sleep(1.5)
        hung = await found_hung(worker, report.engine_pid, detection_bound_s(HUNG_AFTER_S))
        assert "metrics do not answer" in hung.message
        assert "8 requests in hand" in hung.message
        os.kill(report.engine_pid, signal.SIGCONT)
        assert (await reaches(worker, READY)).message == ""
        for answer in answers:
            assert (await answer.text()).rstrip().endswith("data: [DONE]")


async def test_a_stopped_engine_without_work_is_hung_in_the_same_time(start):
    worker = await start(hung_after_s=HUNG_AFTER_S)
    report = await reaches(worker, READY)
    await asyncio.sleep(1)
    await found_hung(worker, report.engine_pid, detection_bound_s(HUNG_AFTER_S))


@pytest.mark.parametrize("count", [8, 0])
async def test_a_stopped_process_behind_a_server_that_answers_is_found(start, count):
    worker = await start(
        hung_after_s=HUNG_AFTER_S,
        engine_args={"core-process": True},
        simulated={"decode_step_s": 0.02},
    )
    report = await reaches(worker, READY)
    core = await core_of(worker)
    bound_s = (detection_bound_s if count else idle_detection_bound_s)(HUNG_AFTER_S)
    async with streams(report, count, 3000):
        await asyncio.sleep(0.5)
        hung = await found_hung(worker, core, bound_s)
        assert f"{count or 1} requests in hand" in hung.message
        async with session() as opened, opened.get(f"{report.url}/health") as answer:
            assert answer.status == 200  # which is why nobody may go by that
        os.kill(core, signal.SIGCONT)
        await reaches(worker, READY)


@pytest.mark.parametrize("count", [8, 0])
async def test_a_killed_process_inside_fails_the_engine_before_its_server_ends(start, count):
    worker = await start(engine_args={"core-process": True}, simulated={"decode_step_s": 0.02})
    report = await reaches(worker, READY)
    core = await core_of(worker)
    async with streams(report, count, 3000) as answers:
        os.kill(core, signal.SIGKILL)
        killed_s = time.monotonic()
        failed = await reaches(worker, FAILED, within_s=4.0)
        assert "answered 503: its /health says it is dead" in failed.message
        assert any("core process died" in line for line in failed.last_words)
        assert time.monotonic() - killed_s < 4.0  # its server lingers as long
        for answer in answers:
            # The engine's own error event, or the worker ended the engine before it came.
            with contextlib.suppress(aiohttp.ClientError):
                assert '"error"' in await answer.text()


async def test_a_prefill_of_many_bounds_that_makes_no_token_is_left_alone(start):
    # 600 tokens at 50 a second: 12 s, against a bound of 3 s.
    worker = await start(
        hung_after_s=HUNG_AFTER_S,
        simulated={"prefill_tokens_per_s": 50.0},
        block_size_tokens=16,
    )
    report = await reaches(worker, READY)
    states = set()

    async def long_one():
        async with streams(report, 1, 2, prompt=[7] * 600):
            pass

    began_s = time.monotonic()
    prefilling = asyncio.create_task(long_one())
    while not prefilling.done():
        states.add((await worker.report()).state)
        await asyncio.sleep(0.05)
    await prefilling
    assert time.monotonic() - began_s > 3 * HUNG_AFTER_S
    assert states == {READY}


async def test_an_engine_that_fails_every_request_is_hung_though_it_has_no_work(start):
    worker = await start(
        hung_after_s=HUNG_AFTER_S, engine_args={"faults": {"fail_next": 0}, "fault-endpoint": True}
    )
    report = await reaches(worker, READY)
    async with session() as opened:
        body = {"fail_next": 1_000_000}
        async with opened.post(f"{report.url}/simulate/fault", json=body) as answer:
            assert answer.status == 200
    bound_s = idle_detection_bound_s(HUNG_AFTER_S) + SLACK_S
    hung = await reaches(worker, HUNG, within_s=bound_s)
    assert "answered 500: " in hung.message
