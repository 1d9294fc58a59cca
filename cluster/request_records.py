"""The record of one request: which workers, why these, what they held, how long each part took.

The gateway replica that serves a request fills its record, packs it when the request has ended, and
sends it with its next report (`traffic.GatewayReport`); the controller keeps the latest packed, and
unpacks the one that `pdcluster explain` asks for. Names, numbers and causes: no prompts, no tokens.

A field that ends in `_s` is in seconds since the request arrived, None: it did not come to that;
`arrived_at_s` is wall clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from operator import attrgetter

import msgspec

# What a client may choose as `x-request-id`.
REQUEST_ID = r"[A-Za-z0-9._:-]{1,96}"
# A long answer may be moved more often; the first ones and the last are kept.
MOST_ATTEMPTS = 12
_WHY_CHARACTERS = 200


@dataclass(slots=True)
class AttemptRecord:
    """One pair of workers that had the request. Filled while it runs; nobody changes it later."""

    decode: str  # POOL/INDEX#GENERATION
    prefill: str  # "": decode prefilled by itself
    connector: str  # of the link between them; "": none was needed
    route: str  # why this pair, as in x-pdcluster-route
    held_tokens: int  # of the prompt, known to be in decode's prefix cache
    kept_tokens: int  # of the answer, from earlier attempts
    # What both were chosen by: as their engines last said, and how many there were to choose from.
    decode_running: int
    decode_waiting: int
    decode_kv_usage: float  # 0..1
    decode_choices: int
    prefill_running: int
    prefill_waiting: int
    prefill_choices: int
    asked_s: float  # the choice began
    chosen_s: float
    prefill_s: float | None = None  # prefill was called
    prefilled_s: float | None = None  # prefill had answered
    transfer_s: float | None = None  # decode was asked to take the prompt's blocks
    transferred_s: float | None = None  # its first output came, so it had them
    decode_s: float | None = None  # decode was called for the answer
    first_s: float | None = None  # the answer's first piece came; all of it, if it is not streamed
    ended_s: float | None = None
    # How it ended, if the request went on without these workers, or failed.
    cause: str = ""  # failed | hung | drained | recomputed
    stage: str = ""  # prefill | decode
    why: str = ""


@dataclass(slots=True)
class RequestRecord:
    """One request. Filled while it runs; nobody changes it later."""

    request_id: str  # as in x-request-id
    engine_id: str  # both engines' ids contain it; differs where the client chose `request_id`
    gateway: str  # the replica's own id
    endpoint: str
    arrived_at_s: float
    trace_id: str = ""  # 32 hex digits; "": not traced
    is_stream: bool = False
    status: int = 0  # of the answer; 499: the client left
    error: str = ""  # what the client was told, if it was not its own fault
    prompt_tokens: int = 0  # 0: not known here
    answer_tokens: int = 0  # over all attempts; 0: not known
    read_s: float | None = None  # the body was there and made sense
    placed_s: float | None = None  # it had waited for its place
    rendered_s: float | None = None  # the prompt was tokens
    ended_s: float = 0.0
    attempts_made: int = 0
    attempts: list[AttemptRecord] = field(default_factory=list)

    @property
    def first_s(self) -> float | None:
        """When the client's answer began; None: it did not."""
        return next((a.first_s for a in self.attempts if a.first_s is not None), None)


# A record on its way: its request's id, whether that failed or did not stay with its first workers,
# and the rest. A plain tuple: Ray's pickling takes 0.2 us for one, 9 us for one with names.
PackedRecord = tuple[str, bool, bytes]


_encode = msgspec.msgpack.Encoder().encode
_of_request = attrgetter(*(f.name for f in fields(RequestRecord) if f.name != "attempts"))
_of_attempt = attrgetter(*(f.name for f in fields(AttemptRecord)))


def pack(record: RequestRecord) -> PackedRecord:
    """Some 200 bytes; 6 KiB at the most. Measured: 3 us."""
    attempts = record.attempts
    record.attempts_made = len(attempts)
    if len(attempts) > MOST_ATTEMPTS:
        attempts = [*attempts[: MOST_ATTEMPTS - 1], attempts[-1]]
    is_troubled = bool(record.error) or record.attempts_made > 1 or record.status >= 500
    data = _encode((_of_request(record), [_of_attempt(attempt) for attempt in attempts]))
    return record.request_id, is_troubled, data


def unpack(packed: PackedRecord) -> RequestRecord:
    """Raises: ValueError: another version of pdcluster packed it."""
    try:
        request, attempts = msgspec.msgpack.decode(packed[2])
        record = RequestRecord(*request)
        record.attempts = [AttemptRecord(*values) for values in attempts]
        return record
    except (TypeError, ValueError) as error:  # the latter also from msgspec
        raise ValueError(f"not a request record: {error}") from error


def cut(text: str) -> str:
    """An engine's or our own words, no longer than a record takes."""
    return text if len(text) <= _WHY_CHARACTERS else text[:_WHY_CHARACTERS] + "..."
