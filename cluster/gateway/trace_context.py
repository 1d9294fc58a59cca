"""W3C trace context: what a client's headers say, and what engines are told.

Without tracing of its own the gateway hands a client's context on as it came, as the W3C asks of
those in between: engines may well trace. With it (`tracing`), engines hear of the gateway's spans.
What is no valid context is dropped, as if it had not been sent. Called by: gateway.app.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from cluster.gateway.recovery import Stage
from cluster.request_records import RequestRecord

# Later versions may append fields to the four of version 00.
_TRACEPARENT = re.compile(
    rb"(?!ff)(00(?!.{54})|(?!00)[0-9a-f]{2})-(?!0{32})(?P<trace>[0-9a-f]{32})"
    rb"-(?!0{16})(?P<span>[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})(-[ -~]{0,256})?"
)
_TRACESTATE = re.compile(rb"[ -~]{1,512}")
SAMPLED = 0x01


@dataclass(frozen=True, slots=True)
class TraceParent:
    """A span of somebody's, as it crosses between services."""

    trace_id: int
    span_id: int
    flags: int
    state: str = ""  # as it came: its members are others' business

    @property
    def is_sampled(self) -> bool:
        return bool(self.flags & SAMPLED)

    def lines(self) -> str:
        """As header lines of a request."""
        own = f"traceparent: 00-{self.trace_id:032x}-{self.span_id:016x}-{self.flags:02x}\r\n"
        return f"{own}tracestate: {self.state}\r\n" if self.state else own


class Trace(Protocol):
    """What engines are told of the trace that a request belongs to."""

    trace_id: str  # 32 hex digits if it is exported; else ""

    def lines(self, attempt: int, stage: Stage | None = None) -> str:
        """Header lines of a call to an engine; "" or ending with a line's end. `stage` None: to
        render the prompt, before there is an attempt."""
        ...


class Tracing(Protocol):
    """Whether and where requests are traced."""

    def begin(self, headers: Mapping[bytes, bytes]) -> Trace: ...

    def end(self, record: RequestRecord, trace: Trace) -> None:
        """The request of `trace` has ended."""
        ...

    async def close(self) -> None: ...


class PassedOn:
    """A context that is the client's business alone."""

    trace_id = ""

    def __init__(self, lines: str) -> None:
        self._lines = lines

    def lines(self, attempt: int, stage: Stage | None = None) -> str:
        return self._lines


NO_TRACE = PassedOn("")


class NoTracing:
    """Off: nothing is made, nothing is exported."""

    def begin(self, headers: Mapping[bytes, bytes]) -> Trace:
        if b"traceparent" not in headers:
            return NO_TRACE
        parent = read(headers)
        return PassedOn(parent.lines()) if parent is not None else NO_TRACE

    def end(self, record: RequestRecord, trace: Trace) -> None:
        return

    async def close(self) -> None:
        return


def read(headers: Mapping[bytes, bytes]) -> TraceParent | None:
    """The client's span; None: it told of none, or not as the W3C has it."""
    match = _TRACEPARENT.fullmatch(headers.get(b"traceparent", b""))
    if match is None:
        return None
    state = headers.get(b"tracestate", b"")
    return TraceParent(
        int(match["trace"], 16),
        int(match["span"], 16),
        int(match["flags"], 16),
        state.decode("ascii") if _TRACESTATE.fullmatch(state) else "",
    )
