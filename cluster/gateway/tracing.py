"""OpenTelemetry: spans of requests, exported by OTLP over HTTP from a thread of the library's own.

    begin   what the client's traceparent says, or a new trace; engines are told of spans that have
            an id already and are made later
    end     the record's spans (`spans`), with these ids; the library batches and exports them

A collector that is not there costs one log line until it is back: the library's queue is bounded,
and what does not fit is dropped. Imported by gateway.app only where tracing is on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping, Sequence

from opentelemetry import trace as otel
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, Decision, TraceIdRatioBased
from opentelemetry.trace import SpanKind, StatusCode

from cluster import __version__
from cluster.gateway import spans
from cluster.gateway.recovery import Stage
from cluster.gateway.spans import Key, Kind, PlannedSpan
from cluster.gateway.trace_context import SAMPLED, PassedOn, Trace, TraceParent, read
from cluster.request_records import RequestRecord
from cluster.topology.tracing import TracingSpec

log = logging.getLogger(__name__)

# Of one attempt at exporting; the library tries again within it.
_EXPORT_BOUND_S = 5.0
_FLUSH_BOUND_S = 2.0
_KINDS = {
    Kind.SERVER: SpanKind.SERVER,
    Kind.CLIENT: SpanKind.CLIENT,
    Kind.INTERNAL: SpanKind.INTERNAL,
}
# Of the W3C's flags, those that are defined: sampled, and that the trace id is random.
_KNOWN_FLAGS = 0x03
# What these say of a failed export, batch after batch, is said once, by `Told`.
_CHATTY = (
    OTLPSpanExporter.__module__,
    "opentelemetry.sdk.trace.export",
    "opentelemetry.sdk._shared_internal",
)


class OtlpTrace:
    """A request that is traced. Gives out ids of spans that are made when it has ended."""

    def __init__(self, ids: RandomIdGenerator, trace_id: int, parent: TraceParent | None) -> None:
        self._ids = ids
        self.number = trace_id
        self.trace_id = f"{trace_id:032x}"
        self.parent = parent
        self.known: dict[Key, int] = {}

    def lines(self, attempt: int, stage: Stage | None = None) -> str:
        """See trace_context.Trace."""
        key = spans.RENDER if stage is None else (attempt, stage.value)
        span_id = self.known.get(key)
        if span_id is None:
            span_id = self.known[key] = self._ids.generate_span_id()
        parent = self.parent
        if parent is None:
            return TraceParent(self.number, span_id, SAMPLED).lines()
        flags = parent.flags & _KNOWN_FLAGS
        return TraceParent(self.number, span_id, flags, parent.state).lines()


class _GivenIds(RandomIdGenerator):
    """Random ids, but for those that were given out before their span was made."""

    trace_id = 0
    span_id = 0

    def generate_trace_id(self) -> int:
        given, self.trace_id = self.trace_id, 0
        return given or super().generate_trace_id()

    def generate_span_id(self) -> int:
        given, self.span_id = self.span_id, 0
        return given or super().generate_span_id()


class OtlpTracing:
    """See trace_context.Tracing. Owned by one event loop; `close` once."""

    @classmethod
    def start(cls, spec: TracingSpec, cluster: str, replica: str) -> OtlpTracing:
        """Starts the exporting thread; connects to nothing yet."""
        exporter = OTLPSpanExporter(endpoint=spec.traces_url, timeout=_EXPORT_BOUND_S)
        return cls(Told(exporter, spec.traces_url), spec.sample_ratio, cluster, replica)

    def __init__(
        self, exporter: SpanExporter, sample_ratio: float, cluster: str, replica: str
    ) -> None:
        self._random = RandomIdGenerator()
        self._given = _GivenIds()
        self._sampler = TraceIdRatioBased(sample_ratio)
        self._exporter = exporter
        resource = Resource.create(
            {
                "service.name": "pdcluster-gateway",
                "service.namespace": cluster,
                "service.instance.id": replica,
            }
        )
        # Whether a request is traced was decided when it began.
        self._provider = TracerProvider(
            sampler=ALWAYS_ON,
            resource=resource,
            id_generator=self._given,
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("pdcluster", __version__)

    def begin(self, headers: Mapping[bytes, bytes]) -> Trace:
        parent = read(headers)
        if parent is not None:
            if parent.is_sampled:
                return OtlpTrace(self._random, parent.trace_id, parent)
            return PassedOn(parent.lines())
        trace_id = self._random.generate_trace_id()
        sampled = self._sampler.should_sample(None, trace_id, "")
        if sampled.decision is Decision.RECORD_AND_SAMPLE:
            return OtlpTrace(self._random, trace_id, None)
        # Or engines that trace by themselves would begin a trace of their own.
        return PassedOn(TraceParent(trace_id, self._random.generate_span_id(), 0).lines())

    def end(self, record: RequestRecord, trace: Trace) -> None:
        if not isinstance(trace, OtlpTrace):
            return
        contexts: dict[Key, Context] = {}
        for planned in spans.plan(record):
            parent = contexts[planned.parent] if planned.parent is not None else _outside(trace)
            contexts[planned.key] = self._make(planned, parent, record.arrived_at_s, trace)

    async def close(self) -> None:
        """Export what is left, for at most _FLUSH_BOUND_S seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH_BOUND_S):
                await asyncio.to_thread(self._provider.force_flush)
        # First the exporter: the provider would wait for it to give up by itself.
        self._exporter.shutdown()
        await asyncio.to_thread(self._provider.shutdown)

    def _make(
        self, planned: PlannedSpan, parent: Context, arrived_at_s: float, trace: OtlpTrace
    ) -> Context:
        def at_ns(since_s: float) -> int:
            return int((arrived_at_s + since_s) * 1e9)

        self._given.trace_id = trace.number
        self._given.span_id = trace.known.get(planned.key, 0)
        span = self._tracer.start_span(
            planned.name,
            parent,
            _KINDS[planned.kind],
            planned.attributes,
            start_time=at_ns(planned.began_s),
        )
        for event in planned.events:
            span.add_event(event.name, event.attributes, at_ns(event.at_s))
        if planned.error:
            span.set_attribute("error.type", planned.error)
            span.set_status(StatusCode.ERROR)
        span.end(at_ns(planned.ended_s))
        return otel.set_span_in_context(span, Context())


class Told(SpanExporter):
    """Another exporter, whose failures are told when they begin and when they are over."""

    def __init__(self, exporter: SpanExporter, url: str) -> None:
        self._exporter = exporter
        self._url = url
        self._last_words = _LastWords()
        self._fails = False
        self._is_over = False
        for name in _CHATTY:
            logging.getLogger(name).addFilter(self._last_words)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        fails = result is not SpanExportResult.SUCCESS
        if fails and not self._fails:
            why = self._last_words.text
            log.warning("traces not exported to=%s why=%s", self._url, why)
        elif self._fails and not fails:
            log.info("traces exported again to=%s", self._url)
        self._fails = fails
        return result

    def shutdown(self) -> None:
        """May be called twice: by its owner, and by the provider."""
        if self._is_over:
            return
        self._is_over = True
        self._exporter.shutdown()
        for name in _CHATTY:
            logging.getLogger(name).removeFilter(self._last_words)

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


class _LastWords(logging.Filter):
    """Keeps what the library would have logged, instead of logging it."""

    text = ""

    def filter(self, record: logging.LogRecord) -> bool:
        self.text = record.getMessage()
        return False


def _outside(trace: OtlpTrace) -> Context:
    """The client's span as a parent; without one, nothing: not what happens to be current."""
    parent = trace.parent
    if parent is None:
        return Context()
    context = otel.SpanContext(
        parent.trace_id,
        parent.span_id,
        is_remote=True,
        trace_flags=otel.TraceFlags(parent.flags & _KNOWN_FLAGS),
        trace_state=otel.TraceState.from_header([parent.state] if parent.state else []),
    )
    return otel.set_span_in_context(otel.NonRecordingSpan(context), Context())
