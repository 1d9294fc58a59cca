"""What clients do wrong, at the socket where an SDK would not let them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import openai
import pytest

from cluster.identity import Role
from cluster.topology.schema import LimitsSpec

pytestmark = pytest.mark.integration

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}


@pytest.fixture(scope="module")
def views(start_shared_engine, tools):
    return tuple(tools.view(start_shared_engine(role)) for role in (Role.PREFILL, Role.DECODE))


@pytest.fixture
async def gateway(views, start_gateway) -> AsyncIterator:
    async with start_gateway(*views) as running:
        yield running


def assert_openai_error(answer, code: str | None = None, param: str | None = None) -> None:
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    if code is not None:
        assert error["code"] == code
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b'{"messages": "\xff\xfe"}',
        b'{"temperature": NaN, "messages": []}',
        b'{"temperature": Infinity, "messages": []}',
        b'{"temperature": 1e999, "messages": []}',
    ],
)
async def test_what_is_not_json_is_refused(gateway, body):
    status, _, answer = await gateway.post(CHAT, body)
    assert status == 400
    assert_openai_error(answer, "invalid_json")


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"temperature": "nan"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": "Infinity"}, "top_p"),
        ({"logit_bias": {"5": "nan"}}, "logit_bias"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"stream": "yes"}, "stream"),
        ({"messages": []}, "messages"),
        ({"messages": ["Hello"]}, "messages"),
        ({"messages": None}, "messages"),
        ({"model": 5}, "model"),
    ],
)
async def test_wrong_values_are_refused_by_name(gateway, more, param):
    status, _, answer = await gateway.post(CHAT, {**HELLO, **more})
    assert status == 400
    assert_openai_error(answer, param=param)


@pytest.mark.parametrize("prompt", [None, [], [[]], [1, "a"], {"a": 1}, [-1], [1.5], 7])
async def test_prompts_of_the_wrong_shape_are_refused(gateway, prompt):
    status, _, answer = await gateway.post("/v1/completions", {"prompt": prompt})
    assert status == 400
    assert_openai_error(answer, param="prompt")


async def test_what_only_the_engine_can_judge_comes_back_in_its_words(gateway, views):
    status, headers, answer = await gateway.post(CHAT, {**HELLO, "top_p": 7})
    assert status == 400
    assert "top_p" in answer["error"]["message"]
    assert headers["x-pdcluster-decode"] == "decode/0"
    status, _, _ = await gateway.post(CHAT, HELLO)
    assert status == 200
    assert await gateway.metric("pdcluster_gateway_engine_failures_total") == 0


@pytest.mark.parametrize("key", [None, "", "wrong", "sk-test2"])
async def test_wrong_or_no_key_is_refused_before_anything_is_read(gateway, key):
    for path in (CHAT, "/v1/completions", "/tokenize"):
        status, headers, answer = await gateway.post(path, b"\xff" * 100, key=key)
        assert status == 401
        assert headers["www-authenticate"] == "Bearer"
        assert_openai_error(answer)


async def test_health_ready_and_metrics_ask_for_no_key(gateway):
    for path in ("/health", "/ready", "/metrics"):
        async with gateway.session.get(path) as response:
            assert response.status == 200
    async with gateway.session.get("/v1/models") as response:
        assert response.status == 401


async def test_unknown_model_path_and_method(gateway):
    status, _, answer = await gateway.post(CHAT, {**HELLO, "model": "gpt-17"})
    assert status == 404
    assert_openai_error(answer, "model_not_found", "model")
    status, _, answer = await gateway.post("/v2/chat", {})
    assert status == 404
    assert_openai_error(answer, "unknown_url")
    status, headers, answer = await gateway.post("/v1/models", {})
    assert (status, headers["allow"]) == (405, "GET")
    assert_openai_error(answer, "method_not_allowed")
    with pytest.raises(openai.NotFoundError):
        await gateway.openai.models.retrieve("gpt-17")


@pytest.mark.parametrize("extra_tokens", [1, 5000])
async def test_prompt_longer_than_the_context_is_refused(gateway, extra_tokens):
    prompt = "a" * (4096 - 1 + extra_tokens)
    with pytest.raises(openai.BadRequestError) as caught:
        await gateway.openai.completions.create(model="simulated", prompt=prompt, max_tokens=1)
    assert caught.value.code == "context_length_exceeded"
    assert "4096" in caught.value.message


async def test_prompt_that_just_fits_is_answered(gateway):
    answer = await gateway.openai.completions.create(
        model="simulated", prompt="a" * 4095, max_tokens=1
    )
    assert answer.usage.prompt_tokens == 4095


async def test_body_too_large_is_refused_without_keeping_it(views, start_gateway):
    async with start_gateway(*views, limits=LimitsSpec(max_body_mib=1)) as gateway:
        status, _, answer = await gateway.post(CHAT, b" " * 50 * 2**20)
        assert status == 413
        assert_openai_error(answer, "request_too_large")

        async def chunks():
            for _ in range(50):
                yield b" " * 2**20

        headers = {"Authorization": "Bearer sk-test"}
        async with gateway.session.post(CHAT, data=chunks(), headers=headers) as response:
            assert response.status == 413


async def test_body_that_never_comes_ends_with_the_deadline(views, start_gateway):
    async with start_gateway(*views, limits=LimitsSpec(request_deadline_s=0.3)) as gateway:
        host, port = gateway.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer sk-test\r\n"
            b"content-length: 100\r\n\r\n{"
        )
        head = await asyncio.wait_for(reader.readuntil(b"\r\n"), 60)
        assert b" 504 " in head
        writer.close()


async def test_no_worker_is_told_at_once(start_gateway):
    async with start_gateway(wait_ready=False) as gateway:
        for path, body in ((CHAT, HELLO), ("/v1/completions", {"prompt": "a"})):
            async with asyncio.timeout(10):
                status, headers, answer = await gateway.post(path, body)
            assert status == 503
            assert int(headers["retry-after"]) >= 1
            assert_openai_error(answer, "no_worker_available")
        async with gateway.session.get("/ready") as response:
            assert response.status == 503
        async with gateway.session.get("/health") as response:
            assert response.status == 200


async def test_raw_event_stream_is_well_formed(gateway):
    headers = {"Authorization": "Bearer sk-test"}
    body = {**HELLO, "stream": True}
    async with gateway.session.post(CHAT, json=body, headers=headers) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = (await response.text()).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    for event in events[:-2]:
        assert json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk"
