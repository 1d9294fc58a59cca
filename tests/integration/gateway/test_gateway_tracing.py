"""Spans of requests, as a real collector gets them; and what engines hear of the trace."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import pytest
from otlp_collector import collecting, overheard
from ports import free_port
from told_streams import CHAT, body, tell

from cluster.identity import Role
from cluster.topology.tracing import TracingSpec

pytestmark = pytest.mark.integration

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CLIENT_SPAN = "00f067aa0ba902b7"
PARENT = {"traceparent": f"00-{TRACE}-{CLIENT_SPAN}-01", "tracestate": "rojo=00f067aa0ba902b7"}
SECRET = "a very private question about Zanzibar"
SPANS = ["queue", "render", "attempt 0", "prefill", "decode", "kv_transfer", f"POST {CHAT}"]


def asks(**more):
    messages = [{"role": "user", "content": SECRET}]
    return {"messages": messages, "max_tokens": 8, "ignore_eos": True, **more}


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Spans leave within 0.1 s, not the library's 5 s."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")


@pytest.fixture(scope="module")
def engines(start_shared_engine):
    return start_shared_engine(Role.PREFILL), start_shared_engine(Role.DECODE)


@pytest.fixture
async def collector():
    async with collecting() as found:
        yield found


@pytest.fixture
def traced(start_gateway, collector):
    def start(*views, ratio=1.0, **settings):
        spec = TracingSpec(otlp_endpoint=collector.url, sample_ratio=ratio)
        return start_gateway(*views, tracing=spec, **settings)

    return start


async def test_one_trace_goes_from_the_client_through_both_engines(
    start_engine, traced, collector, tools
):
    prefill = start_engine(Role.PREFILL, prefill_tokens_per_s=1000.0)
    decode = start_engine(Role.DECODE, decode_step_s=0.02)
    async with (
        overheard(prefill.url) as (at_prefill, of_prefill),
        overheard(decode.url) as (at_decode, of_decode),
    ):
        views = (
            replace(tools.view(prefill), url=at_prefill),
            replace(tools.view(decode), url=at_decode),
        )
        async with traced(*views) as gateway:
            began_ns = time.time_ns()
            status, headers, _ = await gateway.post(CHAT, asks(), **PARENT)
            ended_ns = time.time_ns()
            assert status == 200
            spans = await collector.of_trace(TRACE, len(SPANS))
    assert sorted(spans) == sorted(SPANS)
    root = spans[f"POST {CHAT}"]
    parents = {name: span.parent_id for name, span in spans.items()}
    own = {name: span.span_id for name, span in spans.items()}
    assert parents[root.name] == CLIENT_SPAN
    assert {parents[name] for name in ("queue", "render", "attempt 0")} == {root.span_id}
    assert parents["prefill"] == parents["decode"] == own["attempt 0"]
    assert parents["kv_transfer"] == own["decode"]
    assert len(set(own.values())) == len(SPANS)
    # What engines hear is that the spans of the calls to them are their parents.
    assert [told["traceparent"] for told in of_prefill] == [f"00-{TRACE}-{own['prefill']}-01"]
    assert [told["traceparent"] for told in of_decode] == [f"00-{TRACE}-{own['decode']}-01"]
    assert {told["tracestate"] for told in (*of_prefill, *of_decode)} == {PARENT["tracestate"]}
    # Durations are those of the request.
    assert began_ns <= root.began_ns
    assert root.ended_ns <= ended_ns
    for name in set(SPANS) - {root.name}:
        assert root.began_ns <= spans[name].began_ns <= spans[name].ended_ns <= root.ended_ns
    tokens = root.attributes["gen_ai.usage.input_tokens"]
    assert tokens > 10
    assert spans["prefill"].took_s >= tokens / 1000 * 0.9
    assert spans["prefill"].ended_ns <= spans["decode"].began_ns
    assert spans["decode"].took_s >= 7 * 0.02 * 0.9
    assert spans["kv_transfer"].took_s <= spans["decode"].took_s
    assert ("first_token", {}) in spans["decode"].events
    # Who it was.
    assert root.attributes["pdcluster.request_id"] == headers["x-request-id"]
    assert root.attributes["http.response.status_code"] == 200
    assert root.attributes["gen_ai.usage.output_tokens"] == 8
    assert spans["prefill"].attributes["pdcluster.worker"] == "prefill/0#1"
    assert spans["kv_transfer"].attributes["pdcluster.connector"] == "nixl"
    assert root.resource["service.name"] == "pdcluster-gateway"
    assert root.resource["service.namespace"] == "test"
    assert not any(span.is_error for span in spans.values())
    # Nothing of what was asked, and no key.
    for secret in ("Zanzibar", "sk-test", "engine-key"):
        assert secret.encode() not in collector.raw


async def test_a_stream_that_changes_workers_says_so_in_its_trace(
    start_engine, traced, collector, tools
):
    prefill = start_engine(Role.PREFILL)
    decodes = [start_engine(Role.DECODE, decode_step_s=0.01) for _ in range(2)]
    views = [tools.view(decode, index) for index, decode in enumerate(decodes)]
    async with traced(tools.view(prefill), *views) as gateway:

        async def kill(name: str) -> None:
            decodes[int(name.rpartition("/")[2])].kill()

        await tell(gateway, CHAT, body(CHAT), 20, kill)
        await tools.eventually(lambda: _is_there(collector, "attempt 1"))
        trace_id = next(span.trace_id for span in collector.spans if span.name == "attempt 1")
        found = [span for span in collector.spans if span.trace_id == trace_id]
        root = next(span for span in found if span.name == f"POST {CHAT}")
        first, second = (
            next(span for span in found if span.name == f"attempt {number}") for number in (0, 1)
        )
    assert root.parent_id == ""
    assert not root.is_error  # the client noticed nothing
    name, left = root.events[0]
    assert (name, left["pdcluster.cause"], left["pdcluster.stage"]) == (
        "attempt left",
        "failed",
        "decode",
    )
    assert first.is_error
    assert first.attributes["error.type"] == "failed"
    assert not second.is_error
    assert second.attributes["pdcluster.kept_tokens"] > 0
    assert second.began_ns >= first.ended_ns
    assert first.attributes["pdcluster.decode"] == left["pdcluster.worker"]


async def _is_there(collector, name):
    return any(span.name == name for span in collector.spans)


async def test_clients_decide_for_their_own_and_the_rest_is_sampled(
    engines, traced, collector, tools
):
    prefill, decode = engines
    async with overheard(decode.url) as (at_decode, heard):
        views = (tools.view(prefill), replace(tools.view(decode), url=at_decode))
        async with traced(*views, ratio=0.0) as gateway:
            await gateway.post(CHAT, asks())
            not_sampled = f"00-{TRACE[::-1]}-{CLIENT_SPAN}-00"
            await gateway.post(CHAT, asks(), traceparent=not_sampled)
            await gateway.post(CHAT, asks(), traceparent="00-nonsense")
            await gateway.post(CHAT, asks(), **PARENT)
            spans = await collector.of_trace(TRACE, len(SPANS))
    assert {span.trace_id for span in collector.spans} == {TRACE}
    told = [headers.get("traceparent", "") for headers in heard]
    # Engines that trace must neither begin traces of their own.
    assert [header[-3:] for header in told] == ["-00", "-00", "-00", "-01"]
    assert told[1] == not_sampled
    assert told[3] == f"00-{TRACE}-{spans['decode'].span_id}-01"


async def test_off_exports_nothing_and_hands_the_clients_context_on(
    engines, start_gateway, collector, tools
):
    prefill, decode = engines
    async with overheard(decode.url) as (at_decode, heard):
        views = (tools.view(prefill), replace(tools.view(decode), url=at_decode))
        async with start_gateway(*views) as gateway:
            await gateway.post(CHAT, asks(), **PARENT)
            await gateway.post(CHAT, asks())
            await gateway.post(CHAT, asks(), traceparent="00-0-0-01", tracestate="x=1")
    assert heard[0]["traceparent"] == PARENT["traceparent"]
    assert heard[0]["tracestate"] == PARENT["tracestate"]
    for told in heard[1:]:
        assert "traceparent" not in told
        assert "tracestate" not in told
    assert collector.posts == 0


async def test_a_collector_that_is_not_there_costs_a_line(
    engines, start_gateway, tools, caplog, monkeypatch
):
    monkeypatch.setattr("cluster.gateway.tracing._EXPORT_BOUND_S", 0.2)
    prefill, decode = engines
    dead = TracingSpec(otlp_endpoint=f"http://127.0.0.1:{free_port()}")
    with caplog.at_level(logging.INFO):
        views = (tools.view(prefill), tools.view(decode))
        async with start_gateway(*views, tracing=dead) as gateway:
            for number in range(6):
                status, _, _ = await gateway.post(CHAT, asks(user=str(number)))
                assert status == 200

                async def is_said() -> bool:
                    return any("traces not exported" in line for line in caplog.messages)

                await tools.eventually(is_said)
            began_s = time.monotonic()
        assert time.monotonic() - began_s < 10.0
    said = [line for line in caplog.messages if "trace" in line.lower() or "4318" in line]
    assert len(said) == 1
    assert "why=" in said[0]
    assert not [r for r in caplog.records if r.name.startswith(("opentelemetry", "urllib3"))]
