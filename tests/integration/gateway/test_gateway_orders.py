"""Prefill and decode in each of the three orders: same tokens as one engine, and whatever breaks
off leaves nothing behind on either side."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest

from cluster.identity import Role
from cluster.topology.schema import LimitsSpec

pytestmark = pytest.mark.integration

CHAT = "/v1/chat/completions"
HEADERS = {"Authorization": "Bearer sk-test"}
# The order that each stands for: prefill first, decode first, together.
DIALECTS = ["ascend_mooncake", "ascend_layerwise", "sglang_nixl"]
SLOW_PREFILL = {"prefill_tokens_per_s": 100.0}


def body(content: str = "Hello " * 30, **more):
    """Asks for exactly `max_tokens` (8) tokens."""
    messages = [{"role": "user", "content": content}]
    return {"messages": messages, "max_tokens": 8, "ignore_eos": True, **more}


async def streamed(gateway, request) -> tuple[str, dict[str, str]]:
    """The whole text of a stream, and the headers."""
    sent = {**request, "stream": True}
    async with gateway.session.post(CHAT, json=sent, headers=HEADERS) as response:
        events = (await response.read()).split(b"\n\n")
        assert events[-2] == b"data: [DONE]", events
        said = [json.loads(event.removeprefix(b"data: ")) for event in events[:-2]]
        text = "".join(one["choices"][0]["delta"].get("content") or "" for one in said)
        return text, {name.lower(): value for name, value in response.headers.items()}


async def failures(gateway, stage: str) -> float:
    return await gateway.metric("pdcluster_gateway_engine_failures_total", f'stage="{stage}"')


async def all_is_given_back(gateway, tools, *engines) -> None:
    """Neither the gateway nor any engine keeps anything of a request."""

    async def is_idle() -> bool:
        busy = [await engine.running() for engine in engines]
        usage = [await engine.metric("vllm:kv_cache_usage_perc") for engine in engines]
        return gateway.is_idle and not any(busy) and not any(usage)

    await tools.eventually(is_idle)
    assert await gateway.metric("pdcluster_kv_leases_open") == 0


@pytest.fixture(params=DIALECTS)
def dialect(request) -> str:
    return request.param


@pytest.fixture
def started(dialect, start_engine, start_gateway, tools):
    """Engines by role and timings, and a gateway over them: `(gateway, *engines)`."""

    class Started:
        def __init__(self) -> None:
            self.engines = []

        def engine(self, role: Role, **timings):
            # The gateway's early releases go nowhere here: the lease must do.
            engine = start_engine(role, dialect, **{"lease_s": 4.0, **timings})
            self.engines.append(engine)
            return engine

        def gateway(self, **settings):
            indices = {Role.PREFILL: 0, Role.DECODE: 0}
            views = []
            for engine in self.engines:
                views.append(tools.view(engine, indices[engine.role], dialect))
                indices[engine.role] += 1
            return start_gateway(*views, dialect=dialect, **settings)

    return Started()


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
async def test_answer_is_that_of_a_single_engine_streamed_or_not(started, tools, path):
    prefill, decode = started.engine(Role.PREFILL), started.engine(Role.DECODE)
    request = body("One engine or two " * 20, max_tokens=40)
    if path != CHAT:
        request = {"prompt": "One engine or two " * 20, "max_tokens": 40, "ignore_eos": True}
    request["return_token_ids"] = True
    # Nothing of this prompt is in either engine's cache before.
    async with started.gateway() as gateway:
        status, headers, ours = await gateway.post(path, request)
        assert status == 200
        assert headers["x-pdcluster-route"] == "disaggregated"
        assert await decode.pulled_tokens() >= ours["usage"]["prompt_tokens"] - 16
        assert await prefill.metric("vllm:prompt_tokens_total") > 0
        alone = await prefill.ask(path, request)
        assert ours["choices"][0]["token_ids"] == alone["choices"][0]["token_ids"]
        if path == CHAT:
            text, _ = await streamed(gateway, request)
            assert text == alone["choices"][0]["message"]["content"]
        await all_is_given_back(gateway, tools, prefill, decode)


async def test_many_at_once_do_not_get_each_others_blocks(started, tools):
    prefill, decode = started.engine(Role.PREFILL), started.engine(Role.DECODE)
    async with started.gateway() as gateway:

        async def compare(number: int) -> None:
            request = body(f"{number} bottles of beer " * (5 + number), max_tokens=12)
            ours, _ = await streamed(gateway, request)
            alone = await prefill.ask(CHAT, request)
            assert ours == alone["choices"][0]["message"]["content"]

        await asyncio.gather(*(compare(number) for number in range(24)))
        await all_is_given_back(gateway, tools, prefill, decode)


async def test_several_answers_and_prompts_are_carried_over_too(started, dialect, tools):
    prefill, decode = started.engine(Role.PREFILL), started.engine(Role.DECODE)
    prompts = ["A first prompt " * 10, "Another one " * 20]
    request = {"prompt": prompts, "max_tokens": 6, "ignore_eos": True, "n": 2}
    async with started.gateway() as gateway:
        before = await prefill.metric("vllm:prompt_tokens_total")
        status, headers, ours = await gateway.post("/v1/completions", request)
        assert status == 200
        assert headers["x-pdcluster-prefill"] == "prefill/0"
        assert await prefill.metric("vllm:prompt_tokens_total") > before
        alone = await prefill.ask("/v1/completions", request)
        assert [c["text"] for c in ours["choices"]] == [c["text"] for c in alone["choices"]]
        await all_is_given_back(gateway, tools, prefill, decode)


async def test_client_that_leaves_during_prefill_frees_both(started, tools):
    prefill = started.engine(Role.PREFILL, **SLOW_PREFILL)
    decode = started.engine(Role.DECODE)
    async with started.gateway() as gateway:
        request = asyncio.create_task(
            gateway.session.post(CHAT, json=body("x" * 2000, stream=True), headers=HEADERS)
        )

        async def is_busy() -> bool:
            return await prefill.running() == 1

        await tools.eventually(is_busy)
        request.cancel()
        await all_is_given_back(gateway, tools, prefill, decode)


async def test_client_that_leaves_during_decode_frees_both(started, tools):
    prefill = started.engine(Role.PREFILL)
    decode = started.engine(Role.DECODE, decode_step_s=0.05)
    async with started.gateway() as gateway:
        request = body(max_tokens=2000, stream=True)
        async with gateway.session.post(CHAT, json=request, headers=HEADERS) as response:
            await asyncio.wait_for(response.content.readuntil(b"\n\n"), 60)
            assert await decode.running() == 1
            response.close()
        await all_is_given_back(gateway, tools, prefill, decode)


async def test_deadline_is_a_504_and_frees_both(started, tools):
    prefill, decode = started.engine(Role.PREFILL), started.engine(Role.DECODE)
    async with started.gateway(limits=LimitsSpec(request_deadline_s=1.0)) as gateway:
        await decode.fault(hang=True)
        status, _, answer = await gateway.post(CHAT, body())
        assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")
        await decode.fault(hang=False)
        await all_is_given_back(gateway, tools, prefill, decode)


async def test_prefill_that_refuses_is_replaced_by_another(started, tools):
    bad, good = started.engine(Role.PREFILL), started.engine(Role.PREFILL)
    decode = started.engine(Role.DECODE)
    async with started.gateway() as gateway:
        await bad.fault(refuse_prefill=True)
        for number in range(3):
            status, headers, _ = await gateway.post(CHAT, body(f"Hello {number} " * 20))
            assert (status, headers["x-pdcluster-prefill"]) == (200, "prefill/1")
        assert await gateway.metric("pdcluster_gateway_retries_total", "prefill-failed") >= 1
        assert (
            await gateway.metric("pdcluster_gateway_engine_failures_total", 'stage="decode"') == 0
        )
        await all_is_given_back(gateway, tools, bad, good, decode)


async def test_prefill_killed_at_work_is_replaced_by_another(started, tools):
    dying = started.engine(Role.PREFILL, **SLOW_PREFILL)
    good = started.engine(Role.PREFILL)
    decode = started.engine(Role.DECODE)
    async with started.gateway() as gateway:
        request = body("x" * 2000)
        answers = [asyncio.create_task(gateway.post(CHAT, request)) for _ in range(2)]

        async def is_busy() -> bool:
            return await dying.running() >= 1

        await tools.eventually(is_busy)
        dying.kill()
        for answer in answers:
            status, headers, told = await answer
            assert status == 200, told
            assert headers["x-pdcluster-prefill"] == "prefill/1"
        await all_is_given_back(gateway, tools, good, decode)


async def test_prefill_killed_after_decode_has_begun_is_not_missed(started, tools):
    prefill = started.engine(Role.PREFILL)
    decode = started.engine(Role.DECODE, decode_step_s=0.02)
    async with started.gateway() as gateway:
        request = body(max_tokens=60, stream=True)
        async with gateway.session.post(CHAT, json=request, headers=HEADERS) as response:
            await asyncio.wait_for(response.content.readuntil(b"\n\n"), 60)
            prefill.kill()
            rest = await response.content.read()
        assert b"error" not in rest
        assert rest.endswith(b"data: [DONE]\n\n")
        await all_is_given_back(gateway, tools, decode)


async def test_decode_killed_before_its_first_token_is_replaced_by_another(started, tools):
    prefill = started.engine(Role.PREFILL, **SLOW_PREFILL)
    dying, good = started.engine(Role.DECODE), started.engine(Role.DECODE)
    async with started.gateway() as gateway:
        answers = [asyncio.create_task(gateway.post(CHAT, body("x" * 150))) for _ in range(2)]

        async def is_busy() -> bool:
            return await prefill.running() > 0

        await tools.eventually(is_busy)
        dying.kill()
        for answer in answers:
            status, headers, told = await answer
            assert status == 200, told
            assert headers["x-pdcluster-decode"] == "decode/1"
        await all_is_given_back(gateway, tools, prefill, good)


async def test_blocks_that_do_not_come_lead_to_another_prefill(started, tools):
    bad, good = started.engine(Role.PREFILL), started.engine(Role.PREFILL)
    decode = started.engine(Role.DECODE)
    async with started.gateway() as gateway:
        await bad.fault(fail_transfers=True)
        for stream in (False, True):
            request = body("Hello again " * 20 + str(stream), stream=stream)
            async with gateway.session.post(CHAT, json=request, headers=HEADERS) as response:
                assert response.status == 200
                assert response.headers["x-pdcluster-prefill"] == "prefill/1"
                assert b"error" not in await response.read()
        assert await gateway.metric("pdcluster_gateway_retries_total", "pull-failed") >= 1
        await bad.fault(fail_transfers=False)
        # What was kept for a pull that failed is released, and the engine may take a moment.
        await all_is_given_back(gateway, tools, good, decode)


async def test_request_that_decode_gives_back_is_prefilled_again_in_its_order(
    started, dialect, tools
):
    if dialect.startswith("sglang"):
        pytest.skip("only vLLM-Ascend's decode engines give requests back")
    prefill, decode = started.engine(Role.PREFILL), started.engine(Role.DECODE)
    async with started.gateway() as gateway:
        alone = await prefill.ask(CHAT, body(max_tokens=20))
        await decode.fault(recompute_at_token=6)
        text, _ = await streamed(gateway, body(max_tokens=20))
        assert text == alone["choices"][0]["message"]["content"]
        assert await decode.metric("vllm:request_success_total") == 2
        assert await decode.metric("vllm:num_requests_running") == 0
        await all_is_given_back(gateway, tools, prefill, decode)


async def test_what_engines_hold_against_a_request_reaches_the_client(started, tools):
    prefill, decode = started.engine(Role.PREFILL), started.engine(Role.DECODE)
    async with started.gateway() as gateway:
        status, _, answer = await gateway.post(CHAT, body(presence_penalty=9.0))
        assert status == 400
        assert "presence_penalty" in answer["error"]["message"]
        await all_is_given_back(gateway, tools, prefill, decode)


async def test_without_prefill_decode_recomputes_if_it_can(started, dialect, tools):
    prefill, decode = started.engine(Role.PREFILL), started.engine(Role.DECODE)
    async with started.gateway() as gateway:
        prefill.kill()
        status, headers, answer = await gateway.post(CHAT, body())
        if dialect.startswith("sglang"):
            assert status == 503
            assert "its engines cannot prefill" in answer["error"]["message"]
        else:
            assert status == 200
            assert headers["x-pdcluster-route"] == "recompute:prefill-failed"
        await all_is_given_back(gateway, tools, decode)


async def test_decode_that_never_calls_the_metaserver_is_given_up(
    start_engine, start_gateway, tools
):
    dialect = "ascend_layerwise"
    prefill = start_engine(Role.PREFILL, dialect)
    mute, good = start_engine(Role.DECODE, dialect), start_engine(Role.DECODE, dialect)
    views = (
        tools.view(prefill, 0, dialect),
        tools.view(mute, 0, dialect),
        tools.view(good, 1, dialect),
    )
    limits = LimitsSpec(request_deadline_s=4.0)
    async with start_gateway(*views, dialect=dialect, limits=limits) as gateway:
        await mute.fault(mute_metaserver=True)
        for number in range(2):
            status, headers, _ = await gateway.post(CHAT, body(f"Hello {number} " * 20))
            assert (status, headers["x-pdcluster-decode"]) == (200, "decode/1")
        assert await gateway.metric("pdcluster_gateway_retries_total", "decode-failed") >= 1
        assert await failures(gateway, "prefill") == 0
        await all_is_given_back(gateway, tools, prefill, mute, good)


async def test_metaserver_listens_only_once_it_is_needed_and_knows_only_who_waits(
    start_engine, start_gateway, tools
):
    dialect = "ascend_layerwise"
    prefill, decode = start_engine(Role.PREFILL, dialect), start_engine(Role.DECODE, dialect)
    views = (tools.view(prefill, 0, dialect), tools.view(decode, 0, dialect))
    async with start_gateway(*views, dialect=dialect) as gateway:
        metaserver = gateway.parts.metaserver
        assert metaserver.address is None
        assert (await gateway.post(CHAT, body()))[0] == 200
        host, port = metaserver.address
        assert host == "127.0.0.1"
        async with aiohttp.ClientSession(f"http://{host}:{port}") as session:
            for path in ("/v1/metaserver/guessed", "/v1/metaserver", "/"):
                async with session.post(path, json={"request_id": "x"}) as answer:
                    assert answer.status == 404
    assert metaserver.address is None
