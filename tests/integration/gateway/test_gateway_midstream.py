"""Answers that are broken off and go on with another engine: as if nothing had happened.

The simulated engine's next token depends on every token before it, so an answer that lost, doubled
or changed a single one differs from then on.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest

from cluster.identity import Role

pytestmark = pytest.mark.integration

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HEADERS = {"Authorization": "Bearer sk-test"}


def body(path: str, **more: Any) -> dict[str, Any]:
    text = "Tell me of the broken stream " * 6
    said = {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}
    return {**said, "max_tokens": 60, "ignore_eos": True, "temperature": 0, **more}


@dataclass
class Told:
    """A stream as a client makes sense of it."""

    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    finishes: list[str] = field(default_factory=list)
    roles: int = 0
    ids: set[str] = field(default_factory=set)
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    is_done: bool = False
    decode: str = ""

    def add(self, event: bytes) -> None:
        if event == b"data: [DONE]\n\n":
            self.is_done = True
            return
        assert b'token_ids":[' not in event
        said = json.loads(event.removeprefix(b"data: "))
        if "error" in said:
            self.error = said["error"]
            return
        self.ids.add(said["id"])
        self.usage = said.get("usage") or self.usage
        for choice in said["choices"]:
            delta = choice.get("delta") or {}
            self.roles += "role" in delta
            self.text += choice.get("text") or delta.get("content") or ""
            logprobs = choice.get("logprobs") or {}
            self.logprobs += [one["logprob"] for one in logprobs.get("content") or ()]
            self.logprobs += logprobs.get("token_logprobs") or ()
            self.offsets += logprobs.get("text_offset") or ()
            if choice.get("finish_reason"):
                self.finishes.append(choice["finish_reason"])


async def tell(gateway, path: str, request: dict[str, Any], at_event=None, deed=None) -> Told:
    """Read a stream to its end; do `deed(worker name)` before event number `at_event`."""
    told = Told()
    asked = {**request, "stream": True, "stream_options": {"include_usage": True}}
    async with gateway.session.post(path, json=asked, headers=HEADERS) as response:
        told.decode = response.headers["x-pdcluster-decode"]
        number = 0
        while not response.content.at_eof():
            if number == at_event:
                await deed(told.decode)
            event = await asyncio.wait_for(response.content.readuntil(b"\n\n"), 20)
            told.add(event)
            number += 1
            if told.is_done or told.error:
                break
    return told


def same(told: Told, undisturbed: Told) -> bool:
    usage, wanted = dict(told.usage or {}), dict(undisturbed.usage or {})
    # How much of a prompt was cached depends on who was asked before.
    for one in (usage, wanted):
        one.pop("prompt_tokens_details", None)
    assert told.error is None
    assert len(told.ids) == 1
    assert (told.text, told.logprobs, told.offsets) == (
        undisturbed.text,
        undisturbed.logprobs,
        undisturbed.offsets,
    )
    assert usage == wanted
    return (told.finishes, told.roles, told.is_done) == (
        undisturbed.finishes,
        undisturbed.roles,
        undisturbed.is_done,
    )


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
