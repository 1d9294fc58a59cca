"""Trace context in and out, spans from a record, and what becomes of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from cluster.gateway import spans
from cluster.gateway.recovery import Stage
from cluster.gateway.spans import Kind, PlannedSpan
from cluster.gateway.trace_context import NO_TRACE, NoTracing, read
from cluster.gateway.tracing import OtlpTracing, Told
from cluster.request_records import AttemptRecord, RequestRecord

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"


def headers(parent: str, state: str = "") -> dict[bytes, bytes]:
    found = {b"traceparent": parent.encode()}
    return {**found, b"tracestate": state.encode()} if state else found


@pytest.mark.parametrize(
    "parent",
    [
        "",
        "00",
        PARENT.upper(),
        PARENT + "-more",  # version 00 has no more
        PARENT.replace("00-", "ff-", 1),
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{SPAN}-1",
        PARENT + "\r\nx: y",
        "é" * 55,
    ],
)
def test_what_is_no_trace_context_is_dropped(parent: str):
    assert read(headers(parent)) is None
    assert NoTracing().begin(headers(parent, "a=1")).lines(0) == ""


def test_a_context_crosses_as_it_came():
    found = read(headers(PARENT, "rojo=1,congo=2"))
    assert found is not None
    assert found.is_sampled
    assert found.lines() == f"traceparent: {PARENT}\r\ntracestate: rojo=1,congo=2\r\n"
    assert read(headers(f"00-{TRACE}-{SPAN}-00")).is_sampled is False
    later = read(headers(f"01-{TRACE}-{SPAN}-01-what-a-later-version-adds"))
    assert later is not None
    assert later.lines() == f"traceparent: {PARENT}\r\n"
    for state in ("a\r\nx: y", "x" * 513, "ü"):
        assert read(headers(PARENT, state)).state == ""


def test_off_costs_one_look_at_the_headers():
    assert NoTracing().begin({b"x": b"y"}) is NO_TRACE
    assert NO_TRACE.lines(3, Stage.DECODE) == ""


# Spans of a record


def attempt(**more: Any) -> AttemptRecord:
    values: dict[str, Any] = {
        "prefill_s": 0.2,
        "prefilled_s": 0.5,
        "transfer_s": 0.5,
        "transferred_s": 0.6,
        "decode_s": 0.5,
        "first_s": 0.6,
        "ended_s": 1.0,
        **more,
    }
    return AttemptRecord(
        "d/0#1", "p/0#1", "nixl", "disaggregated", 16, 0, 1, 0, 0.5, 2, 1, 0, 1, 0.1, 0.11, **values
    )


def record(*attempts: AttemptRecord, **more: Any) -> RequestRecord:
    times = {"read_s": 0.01, "placed_s": 0.05, "rendered_s": 0.1, "ended_s": 1.0}
    values: dict[str, Any] = {"status": 200, **times, **more}
    kept = RequestRecord("r", "r-x", "g", "/v1/completions", 1000.0, **values)
    kept.attempts = list(attempts)
    return kept


def planned(kept: RequestRecord) -> dict[str, PlannedSpan]:
    found = list(spans.plan(kept))
    assert len({span.key for span in found}) == len(found)
    seen: set[Any] = {None}
    for span in found:
        assert span.parent in seen
        assert span.ended_s >= span.began_s
        seen.add(span.key)
    return {span.name: span for span in found}


def test_spans_have_the_records_times_and_nest_as_the_calls_do():
    found = planned(record(attempt()))
    assert [(name, span.began_s, span.ended_s) for name, span in found.items()] == [
        ("POST /v1/completions", 0.0, 1.0),
        ("queue", 0.01, 0.05),
        ("render", 0.05, 0.1),
        ("attempt 0", 0.1, 1.0),
        ("prefill", 0.2, 0.5),
        ("decode", 0.5, 1.0),
        ("kv_transfer", 0.5, 0.6),
    ]
    assert found["kv_transfer"].parent == found["decode"].key
    assert found["decode"].kind is found["prefill"].kind is Kind.CLIENT
    assert found["POST /v1/completions"].events == ()


def test_a_staged_transfer_is_before_the_decode_call():
    found = planned(record(attempt(transfer_s=0.4, transferred_s=0.5)))
    assert found["kv_transfer"].parent == found["attempt 0"].key


def test_a_request_that_got_nowhere_has_the_spans_that_it_came_to():
    found = planned(record(placed_s=None, rendered_s=None, status=429))
    assert list(found) == ["POST /v1/completions", "queue"]
    assert found["queue"].ended_s == 1.0
    assert found["POST /v1/completions"].error == ""
    found = planned(record(attempt(prefilled_s=None, transfer_s=None, decode_s=None), status=502))
    assert found["POST /v1/completions"].error == "502"
    assert found["prefill"].ended_s == 1.0
    assert "decode" not in found


def test_what_failed_is_marked_where_it_failed_and_told_on_the_root():
    lost = attempt(
        ended_s=0.4,
        prefilled_s=None,
        transfer_s=None,
        decode_s=None,
        cause="failed",
        stage="prefill",
        why="it said: my prompt",
    )
    found = planned(record(lost, attempt()))
    root = found["POST /v1/completions"]
    assert [event.name for event in root.events] == ["attempt left", "attempt finished"]
    assert root.events[0].attributes["pdcluster.worker"] == "p/0#1"
    assert (found["attempt 0"].error, found["attempt 1"].error, root.error) == ("failed", "", "")
    assert not any("my prompt" in str(span) for span in found.values())
    moved = planned(record(attempt(cause="drained", stage="decode", ended_s=0.7), attempt()))
    assert moved["attempt 0"].error == ""
    assert moved["attempt 0"].attributes["pdcluster.cause"] == "drained"


# Exported


class Kept(SpanExporter):
    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.spans += spans
        return SpanExportResult.SUCCESS


async def made(
    ratio: float, given: dict[bytes, bytes], *asked: tuple[int, Stage]
) -> tuple[dict[str, ReadableSpan], list[str]]:
    """The spans of a request, and what engines were told before."""
    exporter = Kept()
    tracing = OtlpTracing(exporter, ratio, "c", "g")
    trace = tracing.begin(given)
    lines = [trace.lines(*one) for one in asked]
    tracing.end(record(attempt()), trace)
    await tracing.close()
    return {span.name: span for span in exporter.spans}, lines


async def test_engines_are_told_the_ids_of_spans_that_come_later():
    found, lines = await made(0.0, headers(PARENT, "a=1"), (0, Stage.PREFILL), (0, Stage.DECODE))
    assert len(found) == 7
    for name, line in zip(("prefill", "decode"), lines, strict=True):
        span_id = found[name].context.span_id
        assert line == f"traceparent: 00-{TRACE}-{span_id:016x}-01\r\ntracestate: a=1\r\n"
    root = found["POST /v1/completions"]
    assert root.parent.span_id == int(SPAN, 16)
    assert root.parent.is_remote
    assert {span.context.trace_id for span in found.values()} == {int(TRACE, 16)}
    assert root.context.trace_state.to_header() == "a=1"
    assert root.start_time == 1_000_000_000_000
    assert root.end_time - root.start_time == 1_000_000_000


async def test_without_a_client_span_a_trace_begins():
    found, lines = await made(1.0, {}, (0, Stage.DECODE))
    root = found["POST /v1/completions"]
    assert root.parent is None
    assert f"{root.context.trace_id:032x}" in lines[0]
    assert len({span.context.span_id for span in found.values()}) == 7


async def test_the_ratio_is_of_requests_whose_client_has_not_decided():
    tracing = OtlpTracing(Kept(), 0.25, "c", "g")
    begun = [tracing.begin({}) for _ in range(2000)]
    assert 400 < sum(bool(trace.trace_id) for trace in begun) < 600
    assert all(trace.lines(0).endswith("-01\r\n") == bool(trace.trace_id) for trace in begun)
    assert tracing.begin(headers(PARENT)).trace_id == TRACE
    await tracing.close()


class Failing(Kept):
    result = SpanExportResult.FAILURE

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        library = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
        if self.result is SpanExportResult.FAILURE:
            logging.getLogger(library).error("nobody is there")
        return self.result


def test_a_failing_export_is_told_once_until_it_is_over(caplog: pytest.LogCaptureFixture):
    exporter = Failing()
    told = Told(exporter, "http://c/v1/traces")
    with caplog.at_level(logging.INFO):
        for result in ("FAILURE", "FAILURE", "SUCCESS", "SUCCESS", "FAILURE"):
            exporter.result = SpanExportResult[result]
            told.export([])
    told.shutdown()
    told.shutdown()
    assert caplog.messages == [
        "traces not exported to=http://c/v1/traces why=nobody is there",
        "traces exported again to=http://c/v1/traces",
        "traces not exported to=http://c/v1/traces why=nobody is there",
    ]
