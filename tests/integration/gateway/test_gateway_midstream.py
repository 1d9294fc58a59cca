"""Answers that are broken off and go on with another engine: as if nothing had happened."""

from __future__ import annotations

import asyncio

import openai
import pytest
from told_streams import CHAT, COMPLETIONS, body, same, tell

from cluster.identity import Role

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("at_event", [1, 2, 30, 60, 61])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_stream_whose_decode_is_killed_goes_on_with_another(
    path, at_event, start_engine, start_gateway, tools
):
    prefill = start_engine(Role.PREFILL)
    decodes = [start_engine(Role.DECODE, decode_step_s=0.01) for _ in range(2)]
    views = [tools.view(decode, index) for index, decode in enumerate(decodes)]
    async with start_gateway(tools.view(prefill), *views) as gateway:
        request = body(path, logprobs=True if path == CHAT else 1)
        undisturbed = await tell(gateway, path, request)

        async def kill(name: str) -> None:
            decodes[int(name.rpartition("/")[2])].kill()

        told = await tell(gateway, path, request, at_event, kill)
        assert same(told, undisturbed)
        assert await gateway.metric("pdcluster_kv_leases_open") == 0


@pytest.mark.parametrize("more", [{"stop": ["zzzzz"]}, {"seed": 5, "temperature": 0.7}, {}])
async def test_eight_streams_survive_the_death_of_their_decode(
    more, start_engine, start_gateway, tools
):
    prefill = start_engine(Role.PREFILL)
    decodes = [start_engine(Role.DECODE, decode_step_s=0.01) for _ in range(3)]
    views = [tools.view(decode, index) for index, decode in enumerate(decodes)]
    async with start_gateway(tools.view(prefill), *views) as gateway:
        requests = [body(CHAT, user=str(n), max_tokens=40 + n, **more) for n in range(8)]
        undisturbed = [await tell(gateway, CHAT, request) for request in requests]
        streams = [asyncio.create_task(tell(gateway, CHAT, request)) for request in requests]
        await asyncio.sleep(0.2)
        decodes[0].kill()
        for told, wanted in zip(await asyncio.gather(*streams), undisturbed, strict=True):
            assert same(told, wanted)
        assert await gateway.metric("pdcluster_gateway_recoveries_total", 'cause="failed"') > 0


@pytest.mark.parametrize("is_stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_request_given_back_to_be_recomputed_goes_on(
    path, is_stream, start_engine, start_gateway, tools
):
    prefill, decode = start_engine(Role.PREFILL), start_engine(Role.DECODE)
    async with start_gateway(tools.view(prefill), tools.view(decode)) as gateway:
        request = body(path, logprobs=True if path == CHAT else 1)
        if is_stream:
            undisturbed = await tell(gateway, path, request)
            await decode.fault(recompute_at_token=20)
            assert same(await tell(gateway, path, request), undisturbed)
        else:
            _, _, undisturbed_answer = await gateway.post(path, request)
            await decode.fault(recompute_at_token=20)
            status, _, answer = await gateway.post(path, request)
            assert status == 200
            choice, wanted = answer["choices"][0], undisturbed_answer["choices"][0]
            for key in ("message", "text", "logprobs", "finish_reason", "stop_reason"):
                assert choice.get(key) == wanted.get(key)
            assert not choice.get("token_ids")
            counted = ("prompt_tokens", "completion_tokens", "total_tokens")
            usage, wanted_usage = answer["usage"], undisturbed_answer["usage"]
            assert [usage[key] for key in counted] == [wanted_usage[key] for key in counted]
        recomputed = await gateway.metric(
            "pdcluster_gateway_recoveries_total", 'cause="recomputed"'
        )
        assert recomputed == 1
        # The engine did nothing wrong.
        assert await gateway.metric("pdcluster_gateway_engine_failures_total") == 0
        assert await gateway.metric("pdcluster_kv_leases_open") == 0


async def test_what_cannot_go_on_for_certain_ends_with_the_reason(
    start_engine, start_gateway, tools
):
    prefill = start_engine(Role.PREFILL)
    decodes = [start_engine(Role.DECODE, decode_step_s=0.01) for _ in range(2)]
    views = [tools.view(decode, index) for index, decode in enumerate(decodes)]
    async with start_gateway(tools.view(prefill), *views) as gateway:

        async def kill(name: str) -> None:
            decodes[int(name.rpartition("/")[2])].kill()

        request = body(CHAT, temperature=0.7, response_format={"type": "json_object"})
        told = await tell(gateway, CHAT, request, 10, kill)
        assert told.error is not None
        assert told.error["code"] == "engine_failed"
        assert "it has a grammar" in told.error["message"]
        assert told.finishes == []


async def test_an_answer_with_a_grammar_is_said_again_if_it_is_greedy(
    start_engine, start_gateway, tools
):
    prefill = start_engine(Role.PREFILL)
    decodes = [start_engine(Role.DECODE, decode_step_s=0.005) for _ in range(2)]
    views = [tools.view(decode, index) for index, decode in enumerate(decodes)]
    async with start_gateway(tools.view(prefill), *views) as gateway:
        request = body(CHAT, response_format={"type": "json_object"}, logprobs=True)
        undisturbed = await tell(gateway, CHAT, request)

        async def kill(name: str) -> None:
            decodes[int(name.rpartition("/")[2])].kill()

        assert same(await tell(gateway, CHAT, request, 25, kill), undisturbed)
        assert await gateway.metric("pdcluster_gateway_recoveries_total", 'way="repeat"') == 1


async def test_clients_may_ask_for_token_ids_themselves(start_engine, start_gateway, tools):
    prefill, decode = start_engine(Role.PREFILL), start_engine(Role.DECODE)
    async with start_gateway(tools.view(prefill), tools.view(decode)) as gateway:
        stream = await gateway.openai.completions.create(
            model="simulated",
            prompt="Hello there",
            stream=True,
            max_tokens=5,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        ids = [one async for chunk in stream for one in chunk.choices[0].token_ids or ()]
        assert len(ids) == 5
        plain = await gateway.openai.completions.create(
            model="simulated", prompt="Hello there", max_tokens=5, extra_body={"ignore_eos": True}
        )
        assert isinstance(plain, openai.types.Completion)
        assert not getattr(plain.choices[0], "token_ids", None)


@pytest.mark.parametrize("is_stream", [True, False], ids=["stream", "whole"])
async def test_what_is_given_back_and_must_be_said_again_is_asked_of_another_engine(
    is_stream, start_engine, start_gateway, tools
):
    prefill = start_engine(Role.PREFILL)
    short, roomy = start_engine(Role.DECODE, events=True), start_engine(Role.DECODE, events=True)
    views = (tools.view(prefill), tools.view(short, 0), tools.view(roomy, 1))
    request = body(CHAT, response_format={"type": "json_object"})
    if not is_stream:
        request["n"] = 2
    async with start_gateway(*views[:2]) as gateway:
        await asyncio.sleep(0.5)  # subscriptions
        assert (await gateway.post(CHAT, request))[0] == 200
        await asyncio.sleep(0.5)  # the gateway hears what `short` holds
        gateway.publish(*views)

        async def know_both() -> bool:
            return await gateway.metric("pdcluster_gateway_snapshot_version") == 2

        await tools.eventually(know_both)
        await short.fault(recompute_at_token=20)
        # It holds the prompt: were it not for that, it would be asked again and again.
        if is_stream:
            told = await tell(gateway, CHAT, request)
            assert (told.decode, told.error, told.finishes) == ("decode/0", None, ["length"])
        else:
            status, headers, _ = await gateway.post(CHAT, request)
            assert (status, headers["x-pdcluster-decode"]) == (200, "decode/1")
