"""One worker with a real process of the simulated engine, without Ray."""

import asyncio
import contextlib
import os
import signal
import time

import aiohttp
import pytest
from live_worker import reaches

from cluster.identity import WorkerState
from cluster.workers import tree

pytestmark = pytest.mark.integration

READY, FAILED, HUNG = WorkerState.READY, WorkerState.FAILED, WorkerState.HUNG


@contextlib.asynccontextmanager
async def generation(report, max_tokens):
    """A request that is in the engine's hand while the block runs."""
    body = {"model": "simulated", "prompt": "1", "max_tokens": max_tokens, "stream": True}
    body["ignore_eos"] = True
    headers = {"Authorization": "Bearer worker-test-secret"}
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session,
        session.post(f"{report.url}/v1/completions", json=body, headers=headers) as answer,
    ):
        assert answer.status == 200
        yield answer


async def test_a_worker_is_ready_with_a_token_behind_it_and_says_who_it_is(start):
    worker = await start()
    report = await reaches(worker, READY)
    assert report.counters.generation_tokens >= 1
    assert report.message == ""
    assert {"starting", "warming"} <= set(report.stage_s)
    fingerprint = report.fingerprint
    assert fingerprint.engine == "simulated"
    assert fingerprint.block_size_tokens == 16
    assert fingerprint.connector == "nixl"
    assert fingerprint.engine_version
    assert report.kv["events"].startswith("tcp://127.0.0.1:")
    assert tree.read_process(report.engine_pid) is not None
    # The tree's memory is read with the first sample after that.
    for _ in range(50):
        if (await worker.report()).rss_bytes > 10 << 20:
            break
        await asyncio.sleep(0.1)
    else:
        pytest.fail("no memory reported")


async def test_an_engine_that_answers_http_but_makes_no_token_never_becomes_ready(start):
    worker = await start(engine_args={"faults": {"hang": True}}, start_timeout_s=3.0)
    await reaches(worker, WorkerState.WARMING)
    report = await reaches(worker, READY, FAILED)
    assert report.state is FAILED
    assert report.message.startswith("not ready after 3 s, still warming")
    assert "start_timeout_s of pool decode" in report.message


async def test_a_start_that_fails_tells_exit_code_and_last_words_at_once(start):
    worker = await start(engine_args={"faults": {"start_failure": "no room for the cache"}})
    report = await reaches(worker, FAILED)
    assert "exit code 1" in report.message
    assert any("no room for the cache" in line for line in report.last_words)
    assert "worker-test-secret" not in repr(report)


async def test_an_engine_that_pdcluster_cannot_start_fails_with_the_key_at_fault(start):
    report = await reaches(await start(engine_args={"no-such": 1}), FAILED)
    assert "pools[decode].engine_args" in report.message
    report = await reaches(await start(interpreter="/no/such/python"), FAILED)
    assert "exit code 127" in report.message
    assert any("/no/such/python" in line for line in report.last_words)


async def test_a_killed_engine_fails_its_worker_with_the_signal(start):
    worker = await start()
    os.kill((await reaches(worker, READY)).engine_pid, signal.SIGKILL)
    report = await reaches(worker, FAILED, within_s=3.0)
    assert report.message == "the engine ended: exit code 137 (signal 9)"


async def test_a_killed_supervisor_leaves_nothing(start, remains, wrapped_interpreter, eventually):
    worker = await start(interpreter=wrapped_interpreter)
    report = await reaches(worker, READY)
    eventually(lambda: len(remains.segments) == 3)
    await asyncio.sleep(1.0)  # until the supervisor has seen them
    os.kill(tree.read_process(report.engine_pid).ppid, signal.SIGKILL)
    killed_s = time.monotonic()
    report = await reaches(worker, FAILED, within_s=5.0)
    assert report.message == "the engine ended: its supervisor was killed"
    remains.assert_gone(within_s=5.0 - (time.monotonic() - killed_s))


async def test_a_stopped_engine_is_hung_and_ready_again_when_it_goes_on(start):
    worker = await start(hung_after_s=1.5)
    pid = (await reaches(worker, READY)).engine_pid
    os.kill(pid, signal.SIGSTOP)
    report = await reaches(worker, HUNG, within_s=30.0)
    assert "metrics do not answer" in report.message
    os.kill(pid, signal.SIGCONT)
    report = await reaches(worker, READY)
    assert report.message == ""


async def test_an_engine_that_takes_work_and_makes_nothing_is_hung(start):
    worker = await start(hung_after_s=1.5, engine_args={"fault-endpoint": True})
    report = await reaches(worker, READY)
    async with (
        aiohttp.ClientSession() as session,
        session.post(
            f"{report.url}/simulate/fault",
            json={"hang": True},
            headers={"Authorization": "Bearer worker-test-secret"},
        ) as answer,
    ):
        assert answer.status == 200
    task = asyncio.create_task(hold(report))
    report = await reaches(worker, HUNG, within_s=30.0)
    assert "1 requests in hand" in report.message
    # Its clients give up, it has no work in hand any more, and it is hung all the same.
    task.cancel()
    await asyncio.sleep(4)
    assert (await worker.report()).state is HUNG


async def hold(report):
    async with generation(report, 5) as answer:
        await answer.read()


async def test_a_slow_engine_is_never_hung(start):
    # A token every 0.7 s, judged against a bound of 1 s, over several bounds.
    worker = await start(hung_after_s=1.0, simulated={"decode_step_s": 0.7})
    report = await reaches(worker, READY)
    states = set()
    async with generation(report, 8) as answer:
        reading = asyncio.create_task(answer.read())
        while not reading.done():
            states.add((await worker.report()).state)
            await asyncio.sleep(0.05)
    assert states == {READY}
    assert (await worker.report()).counters.generation_tokens >= 8


async def test_a_stop_lets_a_stream_end_first(start):
    worker = await start(simulated={"decode_step_s": 0.1})
    report = await reaches(worker, READY)
    async with generation(report, 15) as answer:
        await answer.content.readline()
        stopping = asyncio.create_task(worker.stop(30))
        text = await answer.text()
    await stopping
    assert text.rstrip().endswith("data: [DONE]")
    assert (await worker.report()).state is WorkerState.STOPPED


async def test_a_stop_without_grace_cuts_a_stream_and_a_second_stop_shortens_the_first(start):
    worker = await start(simulated={"decode_step_s": 0.5})
    report = await reaches(worker, READY)
    async with generation(report, 1000) as answer:
        await answer.content.readline()
        patient = asyncio.create_task(worker.stop(300))
        await asyncio.sleep(0.5)
        assert (await worker.report()).state is WorkerState.DRAINING
        async with asyncio.timeout(10):
            await worker.stop(0)
            await patient
    assert (await worker.report()).state is WorkerState.STOPPED


async def test_a_stop_during_the_start_ends_what_was_begun(start, remains):
    worker = await start(engine_args={"faults": {"extra_load_s": 60}})
    async with asyncio.timeout(10):
        await worker.stop(60)
        await worker.stop(60)
    assert (await worker.report()).state is WorkerState.STOPPED
    remains.assert_gone(within_s=1.0)


async def test_two_workers_of_one_node_have_ports_of_their_own(start):
    first, second = await start(index=0), await start(index=1)
    reports = [await reaches(worker, READY) for worker in (first, second)]
    addresses = [
        address
        for report in reports
        for address in (report.url, report.kv["events"], report.kv["replay"])
    ]
    assert len(set(addresses)) == 6


async def test_a_lease_is_counted_and_released_on_request(start):
    worker = await start(role="prefill")
    report = await reaches(worker, READY)
    body = {
        "model": "simulated",
        "prompt": "a prompt of more than one block of sixteen tokens",
        "max_tokens": 1,
        "kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False},
    }
    headers = {"Authorization": "Bearer worker-test-secret", "X-Request-Id": "ask-4711"}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{report.url}/v1/completions", json=body, headers=headers) as answer,
    ):
        assert answer.status == 200, await answer.text()
    assert await outcomes(worker, 1) == ["granted"]
    assert (await worker.report()).counters.leases_open == 1
    await worker.release(["ask-4711"])
    assert await outcomes(worker, 2) == ["granted", "released"]
    assert (await worker.report()).counters.leases_open == 0


async def outcomes(worker, count):
    for _ in range(200):
        if len(records := await worker.transfers(0)) >= count:
            break
        await asyncio.sleep(0.02)
    return [record.outcome for _, record in records]


async def test_the_log_of_an_engine_can_be_followed(start):
    worker = await start()
    await reaches(worker, READY)
    data, offset = await worker.read_log(0, 1 << 16)
    assert b"simulated engine" in data
    assert await worker.read_log(offset, 1 << 16) == (b"", offset)
    assert (await worker.read_log(-5, 1 << 16))[0] == data[-5:]
