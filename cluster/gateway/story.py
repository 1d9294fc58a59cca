"""What became of one request: its record, and one log line of those that people ask about.

    request ID failed path=/v1/completions status=502 took_s=3.1 left="decode/0 failed: ..." why=...

Said are failures of ours, requests that changed workers on their way, and slow ones; always with
the id that the client got in x-request-id. A request that goes well costs no line. Its record is
for `pdcluster explain` and for traces (`request_records`). Lengths and names only, no prompts, no
tokens. Called by: gateway.app, gateway.exchange, gateway.attempt.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from time import monotonic

from cluster.gateway.errors import ApiError
from cluster.gateway.recovery import Ended
from cluster.gateway.route import Route, Table
from cluster.gateway.trace_context import NO_TRACE, Trace
from cluster.request_records import AttemptRecord, RequestRecord, cut

SLOW_S = 60.0
_CLIENT_LEFT = 499
_WHY_CHARACTERS = 200
_STEPS_TOLD = 6


@dataclass(frozen=True, slots=True)
class Step:
    """A worker that did not answer the request to its end, and why."""

    worker: str
    cause: str
    why: str


class Story:
    """Of one request. Costs next to nothing while nothing happens."""

    __slots__ = ("_began_s", "_steps", "error", "record", "request_id", "trace")

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.error = ""  # what the client was told, if it was our fault
        self.record: RequestRecord | None = None  # None: it is not worth one
        self.trace: Trace = NO_TRACE
        self._began_s = monotonic()
        self._steps: list[Step] = []

    def now_s(self) -> float:
        """Seconds since it arrived. Not the loop's clock: uvloop's stands still within a turn."""
        return monotonic() - self._began_s

    def keep(self, record: RequestRecord, trace: Trace) -> None:
        """It is one for the engines, of somebody who may ask them."""
        self.record, self.trace = record, trace
        record.trace_id = trace.trace_id

    def attempt(
        self, route: Route, table: Table, held_tokens: int, kept_tokens: int, asked_s: float
    ) -> AttemptRecord:
        """`route` was chosen from `table`; the choice had begun at `asked_s`."""
        decode, prefill = route.decode, route.prefill
        attempt = AttemptRecord(
            str(decode.id),
            str(prefill.id) if prefill is not None else "",
            route.link.connector if route.link is not None else "",
            route.why,
            held_tokens,
            kept_tokens,
            decode.load.running,
            decode.load.waiting,
            decode.load.kv_usage,
            table.decode_choices,
            prefill.load.running if prefill is not None else 0,
            prefill.load.waiting if prefill is not None else 0,
            table.prefill_choices,
            asked_s,
            self.now_s(),
        )
        if self.record is not None:
            self.record.attempts.append(attempt)
        return attempt

    def end(self, status: int, took_s: float) -> RequestRecord | None:
        """`status`: 499 if the client left. Its record; None: it has none."""
        record = self.record
        if record is not None:
            record.status, record.ended_s, record.error = status, took_s, cut(self.error)
        return record

    def failed(self, error: ApiError) -> None:
        """The client is told `error`. One that is its own doing is not worth a line, except when
        engines have suffered from it."""
        if error.status >= 500 or self._steps:
            self.error = error.message

    def left(self, worker: str, ended: Ended) -> None:
        """An attempt has ended without the whole answer, on account of `worker`."""
        cause, why = ended.cause.value, ended.error.why
        self._steps.append(Step(worker, cause, why))
        if self.record is not None and self.record.attempts:
            attempt = self.record.attempts[-1]
            attempt.cause, attempt.stage, attempt.why = cause, ended.stage.value, cut(why)

    def line(self, path: str, status: int, took_s: float) -> tuple[int, str] | None:
        """Log level and text; None: not worth a line. `status`: 499 if the client left."""
        if not (self.error or self._steps or took_s >= SLOW_S):
            return None
        if self.error:
            verb = "failed"
        elif status == _CLIENT_LEFT:
            verb = "left by its client"
        else:
            verb = "finished"
        fields: dict[str, object] = {
            "path": path,
            "status": status,
            "took_s": f"{took_s:.3f}",
        }
        if self._steps:
            fields["attempts"] = len(self._steps) + (0 if self.error else 1)
            told = self._steps[:_STEPS_TOLD]
            fields["left"] = "; ".join(f"{one.worker} {one.cause}: {one.why}" for one in told)
        if self.error:
            fields["why"] = self.error
        if self.trace.trace_id:
            fields["trace"] = self.trace.trace_id
        level = logging.WARNING if self.error else logging.INFO
        return level, f"request {self.request_id} {verb} {key_values(fields)}"


def key_values(fields: dict[str, object]) -> str:
    """`k=v k="a value of several words"`: what has blanks or quotes is quoted, and cut."""
    return " ".join(f"{key}={_value(str(value))}" for key, value in fields.items())


def _value(text: str) -> str:
    if text and text.isprintable() and not any(c in text for c in ' "='):
        return text
    cut = text if len(text) <= _WHY_CHARACTERS else text[:_WHY_CHARACTERS] + "..."
    return json.dumps(cut, ensure_ascii=False)
