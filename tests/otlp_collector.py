"""An OpenTelemetry collector for tests: takes OTLP over HTTP on loopback and keeps the spans; and a
proxy in front of an engine that remembers what trace context it was told."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Span:
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    began_ns: int
    ended_ns: int
    attributes: dict[str, Any]
    events: list[tuple[str, dict[str, Any]]]
    is_error: bool
    state: str
    resource: dict[str, Any]

    @property
    def took_s(self) -> float:
        return (self.ended_ns - self.began_ns) / 1e9


@dataclass
class Collector:
    url: str
    spans: list[Span] = field(default_factory=list)
    posts: int = 0
    raw: bytes = b""

    async def of_trace(self, trace_id: str, count: int) -> dict[str, Span]:
        """The `count` spans of a trace, by name; waits for them."""
        deadline_s = time.monotonic() + 15
        while len(found := [span for span in self.spans if span.trace_id == trace_id]) < count:
            assert time.monotonic() < deadline_s, [span.name for span in self.spans]
            await asyncio.sleep(0.05)
        assert len(found) == count, sorted(span.name for span in found)
        named = {span.name: span for span in found}
        assert len(named) == count
        return named


@contextlib.asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    async def take(request: web.Request) -> web.Response:
        body = await request.read()
        collector.posts += 1
        collector.raw += body
        collector.spans += _spans(ExportTraceServiceRequest.FromString(body))
        return web.Response()

    async with _serving("/v1/traces", take) as url:
        collector = Collector(url)
        yield collector


@contextlib.asynccontextmanager
async def overheard(engine_url: str) -> AsyncIterator[tuple[str, list[dict[str, str]]]]:
    """An address that stands for an engine's, and the headers of each generating call to it."""
    heard: list[dict[str, str]] = []

    async def hand_on(request: web.Request) -> web.StreamResponse:
        if request.path.endswith("completions"):
            heard.append({name.lower(): value for name, value in request.headers.items()})
        sent = {
            k: v
            for k, v in request.headers.items()
            if k.lower() in ("authorization", "x-request-id", "content-type")
        }
        body = await request.read()
        async with (
            aiohttp.ClientSession() as session,
            session.request(
                request.method, engine_url + request.path_qs, data=body, headers=sent
            ) as answer,
        ):
            response = web.StreamResponse(status=answer.status)
            response.content_type = answer.content_type
            await response.prepare(request)
            async for piece in answer.content.iter_any():
                await response.write(piece)
            await response.write_eof()
            return response

    async with _serving("/{path:.*}", hand_on) as url:
        yield url, heard


@contextlib.asynccontextmanager
async def _serving(path: str, handler: Any) -> AsyncIterator[str]:
    app = web.Application(client_max_size=1 << 26)
    app.router.add_route("*", path, handler)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def _spans(request: ExportTraceServiceRequest) -> list[Span]:
    return [
        Span(
            span.name,
            span.trace_id.hex(),
            span.span_id.hex(),
            span.parent_span_id.hex(),
            span.kind,
            span.start_time_unix_nano,
            span.end_time_unix_nano,
            _attributes(span.attributes),
            [(event.name, _attributes(event.attributes)) for event in span.events],
            span.status.code == 2,
            span.trace_state,
            _attributes(of_resource.resource.attributes),
        )
        for of_resource in request.resource_spans
        for of_scope in of_resource.scope_spans
        for span in of_scope.spans
    ]


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}
