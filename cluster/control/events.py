"""What has happened, as facts with fields. One `emit` feeds the log, `status` and `events`.

The newest EVENTS_KEPT are kept in the controller; they go with it, the log stays.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

from cluster.identity import Role, WorkerId, WorkerState

log = logging.getLogger(__name__)

EVENTS_KEPT = 500


@dataclass(frozen=True, slots=True)
class ControllerStarted:
    cluster: str
    adopted: int  # workers that were running already
    version: int


@dataclass(frozen=True, slots=True)
class DesiredChanged:
    cluster: str
    replicas: int


@dataclass(frozen=True, slots=True)
class WorkerStarted:
    worker: WorkerId
    cause: str


@dataclass(frozen=True, slots=True)
class WorkerNotStarted:
    worker: WorkerId
    why: str


@dataclass(frozen=True, slots=True)
class WorkerMoved:
    worker: WorkerId
    was: WorkerState
    now: WorkerState
    why: str


@dataclass(frozen=True, slots=True)
class WorkerUnanswering:
    worker: WorkerId
    why: str


@dataclass(frozen=True, slots=True)
class WorkerFoundIll:
    worker: WorkerId
    why: str  # what it failed, and its engine's own words
    failures: int  # in a row, of the place that it has in its pool


@dataclass(frozen=True, slots=True)
class WorkerDraining:
    worker: WorkerId
    cause: str


@dataclass(frozen=True, slots=True)
class WorkerRemoved:
    worker: WorkerId
    cause: str
    restart_in_s: float | None  # None: it is not to come back


@dataclass(frozen=True, slots=True)
class LinkRefused:
    link: str  # prefill pool -> decode pool
    why: str


@dataclass(frozen=True, slots=True)
class LinkAllowed:
    link: str


@dataclass(frozen=True, slots=True)
class ChangeAsked:
    what: str  # scale prefill from 1 to 3
    change: int
    asked_by: str
    why: str


@dataclass(frozen=True, slots=True)
class ChangeEnded:
    what: str
    change: int
    state: str  # done | failed | replaced
    took_s: float
    why: str


@dataclass(frozen=True, slots=True)
class RoleChanged:
    worker: WorkerId
    was: Role
    now: Role
    took_s: float  # from the moment it took no new work
    drained_s: float  # of that, until it had finished what it had


@dataclass(frozen=True, slots=True)
class RoleKept:
    worker: WorkerId
    why: str  # it did not change


@dataclass(frozen=True, slots=True)
class WorkerLetGo:
    worker: WorkerId
    why: str  # requests that it has go on elsewhere


@dataclass(frozen=True, slots=True)
class PoolsRollingOut:
    pools: str
    change: int


@dataclass(frozen=True, slots=True)
class PoolsRolledBack:
    pools: str
    change: int
    why: str


@dataclass(frozen=True, slots=True)
class GatewayNoted:
    """What a gateway replica has to say (traffic.GatewayNote)."""

    subject: str  # a worker or a request
    what: str  # RequestPoisonous, AnswerContinued, AnswerLost
    text: str
    request_id: str
    gateway: str


@dataclass(frozen=True, slots=True)
class AutoscalerDecided:
    """What it does becomes a Change, and that has its own events; this is what it only would do
    (dry run), or was refused."""

    pool: str
    action: str  # scale prefill from 1 to 2
    outcome: str  # would | refused
    why: str


@dataclass(frozen=True, slots=True)
class ShutdownAsked:
    cluster: str
    grace_s: float


Event = (
    ControllerStarted
    | DesiredChanged
    | WorkerStarted
    | WorkerNotStarted
    | WorkerMoved
    | WorkerUnanswering
    | WorkerFoundIll
    | WorkerDraining
    | WorkerRemoved
    | LinkRefused
    | LinkAllowed
    | ChangeAsked
    | ChangeEnded
    | RoleChanged
    | RoleKept
    | WorkerLetGo
    | PoolsRollingOut
    | PoolsRolledBack
    | GatewayNoted
    | AutoscalerDecided
    | ShutdownAsked
)


@dataclass(frozen=True, slots=True)
class Told:
    """An event as it leaves the controller: in words, and in plain fields for programs."""

    seq: int  # grows from event to event, also over restarts of the controller
    at_s: float  # wall clock
    kind: str  # the event's class: WorkerRemoved
    subject: str  # the worker, link or cluster that it is about
    text: str
    fields: Mapping[str, int | float | str | None]  # further ones


@dataclass(frozen=True, slots=True)
class Recorded:
    """An event and when it happened (wall clock)."""

    seq: int
    at_s: float
    event: Event

    def __str__(self) -> str:
        return describe(self.event)

    def told(self) -> Told:
        event = self.event
        subject, *rest = (field.name for field in fields(event))
        return Told(
            seq=self.seq,
            at_s=self.at_s,
            kind=type(event).__name__,
            subject=str(getattr(event, subject)),
            text=describe(event),
            fields={name: _plain(getattr(event, name)) for name in rest},
        )


class EventLog:
    """A bounded ring of events. `wall_s` gives the wall-clock time in seconds."""

    def __init__(self, wall_s: Callable[[], float]) -> None:
        self._wall_s = wall_s
        self._ring: deque[Recorded] = deque(maxlen=EVENTS_KEPT)
        self._seq = 0

    def emit(self, event: Event) -> None:
        at_s = self._wall_s()
        # By the clock where that is ahead, so that numbers grow over a restart, too.
        self._seq = max(self._seq + 1, int(at_s * 1000))
        self._ring.append(Recorded(self._seq, at_s, event))
        log.info("%s", describe(event))

    def last(self, count: int) -> tuple[Recorded, ...]:
        return tuple(self._ring)[-count:]

    def after(self, seq: int) -> tuple[Recorded, ...]:
        """Those that are kept and have a higher number, oldest first."""
        return tuple(recorded for recorded in self._ring if recorded.seq > seq)


def describe(event: Event) -> str:
    """Subject, past verb, k=v: `decode/0#2 removed cause='engine exited' restart_in_s=1`."""
    subject, *rest = fields(event)
    verb = "".join(f" {char.lower()}" if char.isupper() else char for char in type(event).__name__)
    said = " ".join(f"{field.name}={_shown(getattr(event, field.name))}" for field in rest)
    return f"{getattr(event, subject.name)} {' '.join(verb.split()[1:])} {said}".rstrip()


def _plain(value: object) -> int | float | str | None:
    return value if value is None or isinstance(value, int | float) else str(value)


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    return repr(text) if not text or any(char.isspace() for char in text) else text
