"""The spans of one request, from its record. Pure; no OpenTelemetry here.

    POST /v1/...               server   from arrival to the last byte; one event for each attempt
    ├ queue                             until it had its place
    ├ render                            the prompt becomes tokens
    ├ attempt 0                         choose a pair, have it answer
    │ ├ prefill                client   the call to the prefill engine
    │ ├ decode                 client   the call to the decode engine; event: first_token
    │ │ └ kv_transfer                   from asking for the blocks to the first output
    └ attempt 1 ...                     with another pair, if the first one did not answer all of it

Called by: gateway.tracing. Attributes are names, numbers and causes: what engines say of a failure
may quote a prompt, and stays in the log and in `explain`.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from cluster.gateway.recovery import Cause
from cluster.request_records import AttemptRecord, RequestRecord

# (number of the attempt, or OF_REQUEST; what)
Key = tuple[int, str]
OF_REQUEST = -1
ROOT: Key = (OF_REQUEST, "request")
RENDER: Key = (OF_REQUEST, "render")
# These ended an attempt through nobody's fault.
_NO_ERROR = frozenset({Cause.DRAINED, Cause.RECOMPUTED})
_OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}

Value = str | int | float | bool


class Kind(enum.Enum):
    SERVER = "server"
    CLIENT = "client"
    INTERNAL = "internal"


@dataclass(frozen=True, slots=True)
class Event:
    name: str
    at_s: float  # since the request arrived
    attributes: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PlannedSpan:
    """Times are in seconds since the request arrived. `parent` None: the client's, or none."""

    key: Key
    parent: Key | None
    name: str
    began_s: float
    ended_s: float
    kind: Kind = Kind.INTERNAL
    attributes: Mapping[str, Value] = field(default_factory=dict)
    events: tuple[Event, ...] = ()
    error: str = ""  # error.type; "": none


def plan(record: RequestRecord) -> Iterator[PlannedSpan]:
    """Parents come before their children."""
    is_failure = record.status >= 500 or bool(record.error)
    attributes: dict[str, Value] = {
        "http.request.method": "POST",
        "http.route": record.endpoint,
        "http.response.status_code": record.status,
        "gen_ai.operation.name": _OPERATIONS.get(record.endpoint, record.endpoint),
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.answer_tokens,
        "pdcluster.request_id": record.request_id,
        "pdcluster.attempts": len(record.attempts),
        "pdcluster.stream": record.is_stream,
    }
    yield PlannedSpan(
        ROOT,
        None,
        f"POST {record.endpoint}",
        0.0,
        record.ended_s,
        Kind.SERVER,
        attributes,
        tuple(_left(number, attempt) for number, attempt in enumerate(record.attempts))
        if any(attempt.cause for attempt in record.attempts)
        else (),
        str(record.status) if is_failure else "",
    )
    if record.read_s is not None:
        until_s = record.placed_s if record.placed_s is not None else record.ended_s
        yield PlannedSpan((OF_REQUEST, "queue"), ROOT, "queue", record.read_s, until_s)
    if record.placed_s is not None:
        until_s = record.rendered_s if record.rendered_s is not None else record.ended_s
        yield PlannedSpan(RENDER, ROOT, "render", record.placed_s, until_s)
    for number, attempt in enumerate(record.attempts):
        ended_s = attempt.ended_s if attempt.ended_s is not None else record.ended_s
        yield from _attempt(number, attempt, ended_s)


def _attempt(number: int, attempt: AttemptRecord, ended_s: float) -> Iterator[PlannedSpan]:
    own: Key = (number, "attempt")
    error = attempt.cause if attempt.cause not in _NO_ERROR else ""
    yield PlannedSpan(
        own,
        ROOT,
        f"attempt {number}",
        attempt.asked_s,
        ended_s,
        attributes={
            "pdcluster.route": attempt.route,
            "pdcluster.prefill": attempt.prefill or "none",
            "pdcluster.decode": attempt.decode,
            "pdcluster.held_tokens": attempt.held_tokens,
            "pdcluster.kept_tokens": attempt.kept_tokens,
            "pdcluster.chosen_after_s": attempt.chosen_s - attempt.asked_s,
            **({"pdcluster.cause": attempt.cause} if attempt.cause else {}),
        },
        error=error,
    )
    blamed = attempt.stage if error else ""
    if attempt.prefill_s is not None:
        until_s = attempt.prefilled_s if attempt.prefilled_s is not None else ended_s
        yield _call(own, "prefill", attempt.prefill, attempt.prefill_s, until_s, error, blamed)
    if attempt.decode_s is not None:
        events = (Event("first_token", attempt.first_s),) if attempt.first_s is not None else ()
        worker, began_s = attempt.decode, attempt.decode_s
        yield _call(own, "decode", worker, began_s, ended_s, error, blamed, events)
    if attempt.transfer_s is not None:
        is_within = attempt.decode_s is not None and attempt.decode_s >= attempt.transfer_s
        is_staged = is_within and attempt.transferred_s != attempt.first_s
        until_s = attempt.transferred_s if attempt.transferred_s is not None else ended_s
        yield PlannedSpan(
            (number, "kv_transfer"),
            (number, "decode") if is_within and not is_staged else own,
            "kv_transfer",
            attempt.transfer_s,
            until_s,
            attributes={
                "pdcluster.connector": attempt.connector,
                "pdcluster.prefill": attempt.prefill,
                "pdcluster.decode": attempt.decode,
                "pdcluster.held_tokens": attempt.held_tokens,
            },
        )


def _call(
    parent: Key,
    stage: str,
    worker: str,
    began_s: float,
    ended_s: float,
    error: str,
    blamed: str,
    events: tuple[Event, ...] = (),
) -> PlannedSpan:
    return PlannedSpan(
        (parent[0], stage),
        parent,
        stage,
        began_s,
        ended_s,
        Kind.CLIENT,
        {"pdcluster.worker": worker},
        events,
        error if stage == blamed else "",
    )


def _left(number: int, attempt: AttemptRecord) -> Event:
    """How an attempt ended, on the request's own span: retries are seen without opening it."""
    at_s = attempt.ended_s if attempt.ended_s is not None else attempt.chosen_s
    if not attempt.cause:
        return Event("attempt finished", at_s, {"pdcluster.attempt": number})
    worker = attempt.prefill if attempt.stage == "prefill" else attempt.decode
    return Event(
        "attempt left",
        at_s,
        {
            "pdcluster.attempt": number,
            "pdcluster.cause": attempt.cause,
            "pdcluster.stage": attempt.stage,
            "pdcluster.worker": worker,
        },
    )
