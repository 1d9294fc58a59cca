"""Engines that die, hang or refuse, and clients that leave."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import openai
import pytest

from cluster.identity import Role, WorkerId, WorkerState
from cluster.topology.schema import LimitsSpec

pytestmark = pytest.mark.integration

CHAT = "/v1/chat/completions"


def body(content: str = "Hello", **more):
    """Asks for exactly `max_tokens` (8) tokens."""
    messages = [{"role": "user", "content": content}]
    return {"messages": messages, "max_tokens": 8, "ignore_eos": True, **more}


async def first_event(response) -> bytes:
    return await asyncio.wait_for(response.content.readuntil(b"\n\n"), 60)


async def test_client_that_leaves_frees_both_engines(start_engine, start_gateway, tools):
    prefill = start_engine(Role.PREFILL)
    decode = start_engine(Role.DECODE, decode_step_s=0.05)
    async with start_gateway(tools.view(prefill), tools.view(decode)) as gateway:
        headers = {"Authorization": "Bearer sk-test"}
        request = body(max_tokens=2000, stream=True)
        async with gateway.session.post(CHAT, json=request, headers=headers) as response:
            await first_event(response)
            assert await decode.running() == 1
            response.close()

        async def is_free() -> bool:
            return await decode.running() == 0 and await prefill.running() == 0

        await tools.eventually(is_free)
        assert await gateway.metric("pdcluster_gateway_requests_total", 'status="499"') == 1
        assert await gateway.metric("pdcluster_gateway_requests_running") == 0


async def test_client_that_leaves_during_prefill_stops_it(start_engine, start_gateway, tools):
    prefill = start_engine(Role.PREFILL, prefill_tokens_per_s=100.0)
    decode = start_engine(Role.DECODE)
    async with start_gateway(tools.view(prefill), tools.view(decode)) as gateway:
        headers = {"Authorization": "Bearer sk-test"}
        request = asyncio.create_task(
            gateway.session.post(CHAT, json=body("x" * 3000), headers=headers)
        )

        async def is_busy() -> bool:
            return await prefill.running() == 1

        await tools.eventually(is_busy)
        request.cancel()

        async def is_free() -> bool:
            return await prefill.running() == 0

        await tools.eventually(is_free, 5.0)
        assert await gateway.metric("pdcluster_kv_leases_open") == 0
        assert await gateway.metric("pdcluster_kv_transfer_failures_total", 'cause="given-up"') == 1


async def test_dead_prefill_is_replaced_by_another(start_engine, start_gateway, tools):
    dead, alive = start_engine(Role.PREFILL), start_engine(Role.PREFILL)
    decode = start_engine(Role.DECODE)
    views = (tools.view(dead, 0), tools.view(alive, 1), tools.view(decode))
    async with start_gateway(*views) as gateway:
        dead.kill()
        routes = []
        for number in range(4):
            status, headers, _ = await gateway.post(CHAT, body(f"Hello {number} " * 20))
            assert status == 200
            routes.append((headers["x-pdcluster-prefill"], headers["x-pdcluster-route"]))
        assert routes == [("prefill/1", "disaggregated")] * 4
        assert await gateway.metric("pdcluster_gateway_retries_total", "prefill-failed") >= 1


async def test_without_prefill_decode_recomputes_and_says_so(start_engine, start_gateway, tools):
    prefill, decode = start_engine(Role.PREFILL), start_engine(Role.DECODE)
    async with start_gateway(tools.view(prefill), tools.view(decode)) as gateway:
        prefill.kill()
        status, headers, _ = await gateway.post(CHAT, body())
        assert status == 200
        assert headers["x-pdcluster-prefill"] == "none"
        assert headers["x-pdcluster-route"] == "recompute:prefill-failed"
        gateway.publish(tools.view(decode))

        async def is_known() -> bool:
            return await gateway.metric("pdcluster_gateway_snapshot_version") == 2

        await tools.eventually(is_known)
        _, headers, _ = await gateway.post(CHAT, body())
        assert headers["x-pdcluster-route"] == "recompute:no-prefill"
        assert await gateway.metric("pdcluster_gateway_routes_total", "recompute:no-prefill") == 1


async def test_policy_fail_refuses_instead_of_recomputing(start_engine, start_gateway, tools):
    prefill, decode = start_engine(Role.PREFILL), start_engine(Role.DECODE)
    views = (tools.view(prefill), tools.view(decode))
    async with start_gateway(*views, policy="fail") as gateway:
        await prefill.fault(refuse_prefill=True)
        status, headers, answer = await gateway.post(CHAT, body())
        assert status == 503
        assert "retry-after" in headers
        assert "prefill-failed" in answer["error"]["message"]


async def test_failed_pull_is_made_good_before_the_first_byte(start_engine, start_gateway, tools):
    prefill, decode = start_engine(Role.PREFILL), start_engine(Role.DECODE)
    async with start_gateway(tools.view(prefill), tools.view(decode)) as gateway:
        await decode.fault(fail_transfers=True)
        for stream in (False, True):
            headers = {"Authorization": "Bearer sk-test"}
            request = body("Hello again " * 20, stream=stream)
            async with gateway.session.post(CHAT, json=request, headers=headers) as response:
                assert response.status == 200
                assert response.headers["x-pdcluster-route"] == "recompute:pull-failed"
                assert b"error" not in await response.read()
        failures = "pdcluster_kv_transfer_failures_total"
        assert await gateway.metric(failures, 'cause="pull-failed"') == 2
        assert await gateway.metric(failures) == 2


async def test_dead_decode_is_replaced_before_the_first_byte(start_engine, start_gateway, tools):
    prefill = start_engine(Role.PREFILL)
    dead, alive = start_engine(Role.DECODE), start_engine(Role.DECODE)
    views = (tools.view(prefill), tools.view(dead, 0), tools.view(alive, 1))
    async with start_gateway(*views) as gateway:
        dead.kill()
        for number in range(4):
            status, headers, _ = await gateway.post(CHAT, body(f"Hello {number} " * 20))
            assert status == 200
            assert headers["x-pdcluster-decode"] == "decode/1"


async def test_decode_killed_in_mid_stream_ends_it_with_an_error_event(
    start_engine, start_gateway, tools
):
    prefill = start_engine(Role.PREFILL)
    decode = start_engine(Role.DECODE, decode_step_s=0.02)
    async with start_gateway(tools.view(prefill), tools.view(decode)) as gateway:
        stream = await gateway.openai.chat.completions.create(
            model="simulated",
            stream=True,
            messages=[{"role": "user", "content": "Hello"}],
            max_tokens=2000,
            extra_body={"ignore_eos": True},
        )

        async def read_while_decode_dies() -> None:
            async for _ in stream:
                if decode.process.poll() is None:
                    decode.kill()

        with pytest.raises(openai.APIError, match="broke"):
            await read_while_decode_dies()


async def test_answer_that_breaks_off_unstreamed_is_a_502(start_engine, start_gateway, tools):
    prefill, decode = start_engine(Role.PREFILL), start_engine(Role.DECODE)
    views = (tools.view(prefill), tools.view(decode))
    async with start_gateway(*views, prefill_attempts=1) as gateway:
        await decode.fault(crash_at_token=3)
        status, _, answer = await gateway.post(CHAT, body())
        assert status == 502
        assert answer["error"]["code"] == "engine_failed"


async def test_deadline_is_a_504_and_frees_the_engines(start_engine, start_gateway, tools):
    prefill, decode = start_engine(Role.PREFILL), start_engine(Role.DECODE)
    views = (tools.view(prefill), tools.view(decode))
    async with start_gateway(*views, limits=LimitsSpec(request_deadline_s=1.0)) as gateway:
        await decode.fault(hang=True)
        status, headers, answer = await gateway.post(CHAT, body())
        assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")

        async def is_free() -> bool:
            return await decode.running() == 0 and len(gateway.released) == 1

        await tools.eventually(is_free)
        assert headers["x-request-id"] in gateway.released[0]


async def test_deadline_in_mid_stream_is_an_error_event(start_engine, start_gateway, tools):
    prefill = start_engine(Role.PREFILL)
    decode = start_engine(Role.DECODE, decode_step_s=0.02)
    views = (tools.view(prefill), tools.view(decode))
    async with start_gateway(*views, limits=LimitsSpec(request_deadline_s=1.0)) as gateway:
        headers = {"Authorization": "Bearer sk-test"}
        request = body(max_tokens=2000, stream=True)
        async with gateway.session.post(CHAT, json=request, headers=headers) as response:
            events = (await response.read()).split(b"\n\n")
        assert response.status == 200
        assert len(events) > 5
        error = json.loads(events[-2].removeprefix(b"data: "))["error"]
        assert error["code"] == "deadline_exceeded"
        assert b"[DONE]" not in b"".join(events)


async def test_prefill_that_hangs_is_given_up_within_its_share(start_engine, start_gateway, tools):
    hung, decode = start_engine(Role.PREFILL), start_engine(Role.DECODE)
    views = (tools.view(hung), tools.view(decode))
    limits = LimitsSpec(request_deadline_s=3.0)
    async with start_gateway(*views, limits=limits) as gateway:
        await hung.fault(hang=True)
        status, headers, _ = await gateway.post(CHAT, body())
        assert status == 200
        assert headers["x-pdcluster-route"] == "recompute:prefill-failed"


async def test_overload_is_a_429_with_a_hint(start_engine, start_gateway, tools):
    prefill = start_engine(Role.PREFILL)
    decode = start_engine(Role.DECODE, decode_step_s=0.05)
    limits = LimitsSpec(max_concurrent_requests=1, max_queued_requests=1, queue_timeout_s=0.5)
    async with start_gateway(tools.view(prefill), tools.view(decode), limits=limits) as gateway:
        headers = {"Authorization": "Bearer sk-test"}
        request = body(max_tokens=2000, stream=True)
        async with gateway.session.post(CHAT, json=request, headers=headers) as response:
            await first_event(response)
            waiting = asyncio.create_task(gateway.post(CHAT, body()))
            await asyncio.sleep(0.1)
            status, answered, answer = await gateway.post(CHAT, body())
            assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
            assert int(answered["retry-after"]) >= 1
            status, _, answer = await waiting
            assert status == 429
            assert "waited" in answer["error"]["message"]
            response.close()

        async def is_served() -> bool:
            return (await gateway.post(CHAT, body()))[0] == 200

        await tools.eventually(is_served)


async def test_second_turn_fetches_only_what_decode_lacks(start_engine, start_gateway, tools):
    prefill = start_engine(Role.PREFILL, events=True)
    decode = start_engine(Role.DECODE, events=True)
    views = (tools.view(prefill), tools.view(decode))
    async with start_gateway(*views, local_prefill_below_tokens=100) as gateway:
        await asyncio.sleep(0.5)  # subscriptions
        first = "abcdefghij" * 60
        _, headers, _ = await gateway.post("/v1/completions", {"prompt": first, "max_tokens": 4})
        assert headers["x-pdcluster-route"] == "disaggregated"

        async def goes_local() -> bool:
            more = {"prompt": first + "k" * 30, "max_tokens": 4}
            _, headers, _ = await gateway.post("/v1/completions", more)
            return headers["x-pdcluster-route"] == "local-prefill"

        await tools.eventually(goes_local)
        longer = {"prompt": first + "m" * 300, "max_tokens": 4}
        before = await decode.pulled_tokens()
        _, headers, _ = await gateway.post("/v1/completions", longer)
        assert headers["x-pdcluster-route"] == "disaggregated"
        assert 200 < await decode.pulled_tokens() - before < 330
        assert await gateway.metric("pdcluster_gateway_held_tokens_total") > 500


async def test_only_ready_workers_are_used(start_engine, start_gateway, tools):
    prefill = start_engine(Role.PREFILL)
    one, two = start_engine(Role.DECODE), start_engine(Role.DECODE)
    views = (
        tools.view(prefill),
        tools.view(one, 0, state=WorkerState.DRAINING),
        tools.view(two, 1),
    )
    async with start_gateway(*views) as gateway:
        used = {(await gateway.post(CHAT, body()))[1]["x-pdcluster-decode"] for _ in range(4)}
        assert used == {"decode/1"}


async def test_engine_that_is_replaced_breaks_its_streams_at_once(
    start_engine, start_gateway, tools
):
    """A host that loses its power sends no FIN: only the snapshot tells that it is gone."""
    prefill, decode = start_engine(Role.PREFILL), start_engine(Role.DECODE)
    views = (tools.view(prefill), tools.view(decode))
    async with start_gateway(*views) as gateway:
        await decode.fault(hang=True)
        waiting = asyncio.create_task(gateway.post(CHAT, body()))

        async def is_busy() -> bool:
            return await decode.running() == 1

        await tools.eventually(is_busy)
        successor = start_engine(Role.DECODE)
        replaced = replace(tools.view(successor), id=WorkerId("decode", 0, 2))
        gateway.publish(tools.view(prefill), replaced)
        status, headers, _ = await asyncio.wait_for(waiting, 60)
        assert status == 200
        assert headers["x-pdcluster-decode"] == "decode/0"


async def test_rendering_goes_to_another_engine_when_one_is_dead(
    start_engine, start_gateway, tools
):
    """Without the model's files here, each prompt is rendered by an engine."""
    prefill = start_engine(Role.PREFILL)
    dead, alive = start_engine(Role.DECODE), start_engine(Role.DECODE)
    views = (tools.view(prefill), tools.view(dead, 0), tools.view(alive, 1))
    async with start_gateway(*views, model_path="/nowhere") as gateway:
        dead.kill()
        for number in range(4):
            status, headers, answer = await gateway.post(CHAT, body(f"Hello {number} " * 20))
            assert status == 200, answer
            assert headers["x-pdcluster-route"] == "disaggregated"
