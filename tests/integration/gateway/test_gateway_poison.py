"""A request that takes engines down, its neighbours, and a cluster without workers."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import Any

import pytest
from told_streams import CHAT, COMPLETIONS, body, same, tell

from cluster.identity import Role, WorkerId
from cluster.snapshot import Load

pytestmark = pytest.mark.integration

POISON = 77
POISONED = "pdcluster_gateway_poisonous_total"


async def one_is_left(engines) -> bool:
    """A connection is seen to break a moment before its process is seen to have ended."""
    return [engine.process.poll() for engine in engines].count(None) == 1


async def test_a_request_that_kills_its_prefills_is_stopped_after_two(
    start_engine, start_gateway, tools
):
    prefills = [start_engine(Role.PREFILL, prefill_tokens_per_s=2000.0) for _ in range(3)]
    decode = start_engine(Role.DECODE)
    views = [tools.view(prefill, index) for index, prefill in enumerate(prefills)]
    async with start_gateway(*views, tools.view(decode)) as gateway:
        for prefill in prefills:
            await prefill.fault(crash_at_token=1)
        status, headers, answer = await gateway.post(
            CHAT, body(CHAT), **{"x-request-id": "the-poison"}
        )
        assert (status, answer["error"]["code"]) == (422, "request_kills_engines")
        await tools.eventually(lambda: one_is_left(prefills))
        dead = [n for n, prefill in enumerate(prefills) if prefill.process.poll() is not None]
        for number in dead:
            assert f"prefill/{number}" in answer["error"]["message"]
        # Not to decode's own prefill either, whatever the policy.
        assert decode.process.poll() is None
        assert await decode.metric("vllm:request_success_total") == 0
        assert await gateway.metric(POISONED) == 1
        (note,) = gateway.parts.tally.report(0, 0, 0, 0).notes
        assert (note.kind, note.request_id) == ("RequestPoisonous", "the-poison")
        assert headers["x-request-id"] == "the-poison"
        assert all(f"prefill/{number}" in note.text for number in dead)
        assert gateway.is_idle


@pytest.mark.parametrize("is_stream", [True, False], ids=["stream", "whole"])
async def test_a_request_that_kills_its_decodes_is_stopped_after_two(
    is_stream, start_engine, start_gateway, tools
):
    prefill = start_engine(Role.PREFILL)
    decodes = [start_engine(Role.DECODE) for _ in range(3)]
    views = [tools.view(decode, index) for index, decode in enumerate(decodes)]
    async with start_gateway(tools.view(prefill), *views) as gateway:
        for decode in decodes:
            await decode.fault(crash_at_token=1)
        status, _, answer = await gateway.post(CHAT, body(CHAT, stream=is_stream))
        assert (status, answer["error"]["code"]) == (422, "request_kills_engines")
        await tools.eventually(lambda: one_is_left(decodes))


@pytest.mark.parametrize("count", [4, 12])
async def test_neighbours_of_a_poison_request_are_answered(
    count, start_engine, start_gateway, tools
):
    """All of them are on the engine that dies first. They go on one at a time, so that the second
    engine to die names its request."""
    prefills = [start_engine(Role.PREFILL, prefill_tokens_per_s=1000.0) for _ in range(3)]
    decode = tools.view(start_engine(Role.DECODE))
    views = [tools.view(prefill, index) for index, prefill in enumerate(prefills)]
    # All else is busy, so that they meet on the first.
    busy = [replace(view, load=Load(running=50)) for view in views[1:]]
    async with start_gateway(views[0], *busy, decode) as gateway:
        for prefill in prefills:
            await prefill.fault(poison_token=POISON)

        def ask(*prompt: int) -> asyncio.Task[tuple[int, dict[str, str], Any]]:
            request = {"prompt": list(prompt), "max_tokens": 8}
            return asyncio.create_task(gateway.post(COMPLETIONS, request))

        neighbours = [ask(*[index + 5] * 150) for index in range(count)]

        async def are_there() -> bool:
            return await prefills[0].running() == count

        await tools.eventually(are_there)
        poison = ask(POISON, *[200] * 149)
        statuses = [status for status, _, _ in await asyncio.gather(poison, *neighbours)]
        assert statuses == [422] + [200] * count
        await tools.eventually(lambda: one_is_left(prefills))
        assert prefills[0].process.poll() is not None
        assert await gateway.metric(POISONED) == 1


async def test_a_request_is_not_blamed_for_engines_that_were_gone_before_it_came(
    start_engine, start_gateway, tools
):
    """As the kernel has it: a killed engine takes connections for a while, and breaks them."""
    broken: list[bytes] = []

    async def break_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        broken.append(await reader.readline())
        writer.transport.abort()

    decode = start_engine(Role.DECODE)
    like = tools.view(start_engine(Role.PREFILL))
    async with contextlib.AsyncExitStack() as dying:
        views = []
        for index in range(3):
            server = await asyncio.start_server(break_off, "127.0.0.1")
            await dying.enter_async_context(server)
            port = server.sockets[0].getsockname()[1]
            gone = WorkerId("prefill", index, 1)
            views.append(replace(like, id=gone, url=f"http://127.0.0.1:{port}"))
        async with start_gateway(*views, tools.view(decode)) as gateway:
            status, headers, _ = await gateway.post(CHAT, body(CHAT))
            assert (status, headers["x-pdcluster-decode"]) == (200, "decode/0")
            assert await gateway.metric(POISONED) == 0
    asked = [line.split()[1] for line in broken]
    assert asked == [b"/v1/completions", b"/health", b"/health"]


async def test_a_stream_may_outlive_more_engines_than_that(start_engine, start_gateway, tools):
    prefill = start_engine(Role.PREFILL)
    decodes = [start_engine(Role.DECODE, decode_step_s=0.01) for _ in range(5)]
    views = [tools.view(decode, index) for index, decode in enumerate(decodes)]
    async with start_gateway(tools.view(prefill), *views) as gateway:
        request = body(CHAT, max_tokens=250)
        wanted = await tell(gateway, CHAT, request)
        stream = asyncio.create_task(tell(gateway, CHAT, request))
        for _ in range(4):
            await asyncio.sleep(0.3)
            for decode in decodes:
                if decode.process.poll() is None and await decode.running():
                    decode.kill()
        await tools.eventually(lambda: one_is_left(decodes))
        assert same(await stream, wanted)
        assert await gateway.metric(POISONED) == 0
        assert await gateway.metric("pdcluster_gateway_recoveries_total", 'cause="failed"') == 4


async def test_a_rejected_request_is_no_mark_against_its_workers(
    start_engine, start_gateway, tools
):
    views = tools.view(start_engine(Role.PREFILL)), tools.view(start_engine(Role.DECODE))
    async with start_gateway(*views) as gateway:
        status, _, _ = await gateway.post(CHAT, body(CHAT, top_p=7))
        assert status == 400
        assert await gateway.metric("pdcluster_gateway_engine_failures_total") == 0
        assert await gateway.metric("pdcluster_gateway_retries_total") == 0
        assert gateway.parts.fleet._suspects() == frozenset()


async def test_without_workers_the_answer_is_at_once_and_service_returns_by_itself(
    start_engine, start_gateway, tools
):
    prefill, decode = start_engine(Role.PREFILL), start_engine(Role.DECODE)
    async with start_gateway(tools.view(prefill), tools.view(decode)) as gateway:
        decode.kill()
        # The snapshot still shows it; then it does not.
        for workers in ((tools.view(prefill), tools.view(decode)), (tools.view(prefill),), ()):
            gateway.publish(*workers)
            async with asyncio.timeout(10):
                status, headers, answer = await gateway.post(CHAT, body(CHAT))
            assert (status, answer["error"]["code"]) == (503, "no_worker_available")
            assert int(headers["retry-after"]) >= 1
        successor = start_engine(Role.DECODE)
        view = tools.view(successor)
        gateway.publish(tools.view(prefill), replace(view, id=WorkerId("decode", 0, 2)))

        async def is_served() -> bool:
            return (await gateway.post(CHAT, body(CHAT)))[0] == 200

        await tools.eventually(is_served)
