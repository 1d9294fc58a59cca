"""The control API's values as JSON, both ways, and the names that both of its ends must know.

Unknown keys are ignored when reading: an older client understands a newer head.
Called by: control.api, control.api_*, control.client; the names also by cli.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from cluster.control.autoscale.view import Scaling
from cluster.control.changes import (
    Apply,
    Ask,
    Change,
    ChangeRole,
    DrainNode,
    DrainWorker,
    Plan,
    ReturnNode,
    Scale,
)
from cluster.control.discovery import TargetGroup
from cluster.control.events import Told
from cluster.control.live import Live
from cluster.control.requests import Explained
from cluster.control.state import ClusterStatus
from cluster.topology.schema import ServingSpec
from cluster.transfers import TransferRecord

NEXT_OFFSET_HEADER = "x-next-offset"
GENERATION_HEADER = "x-worker-generation"
ASKED_BY_HEADER = "x-pdcluster-asked-by"
KEY_HEADER = "idempotency-key"
MOST_LOG_BYTES = 1 << 22
LONGEST_WAIT_S = 30.0  # of GET /v1/events

# Types of a Problem that its reader tells apart.
INVALID = "invalid_request"  # not as the document has it
REFUSED = "refused"  # as it has it, but not to be done
UNKNOWN_NAME = "unknown_name"
UNKNOWN_REQUEST = "unknown_request"
WORKER_GONE = "worker_gone"

WHY_PATTERN = r"^[^\x00-\x1f\x7f]*$"
MOST_WHY_CHARACTERS = 500
NODE_PATTERN = r"^[A-Za-z0-9._:-]{1,255}$"


@dataclass(frozen=True, slots=True)
class Transfers:
    """Answer of GET /v1/transfers."""

    transfers: tuple[TransferRecord, ...]


@dataclass(frozen=True, slots=True)
class Changes:
    """Answer of GET /v1/changes."""

    changes: tuple[Change, ...]  # newest last


@dataclass(frozen=True, slots=True)
class Events:
    """Answer of GET /v1/events."""

    events: tuple[Told, ...]  # newest last


@dataclass(frozen=True, slots=True)
class Looked:
    """Answer of GET /v1/live."""

    live: Live
    scaling: Scaling


@dataclass(frozen=True, slots=True)
class Problem:
    """`error` of every answer that is no success. `type` is for programs, `message` for people."""

    message: str
    type: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """Body of every answer that is no success."""

    error: Problem


_STATUS = TypeAdapter(ClusterStatus)
_TRANSFERS = TypeAdapter(Transfers)
_CHANGE = TypeAdapter(Change)
_CHANGES = TypeAdapter(Changes)
_PLAN = TypeAdapter(Plan)
_EVENTS = TypeAdapter(Events)
_SCALING = TypeAdapter(Scaling)
_LOOKED = TypeAdapter(Looked)
_EXPLAINED = TypeAdapter(Explained)
_TARGETS = TypeAdapter(tuple[TargetGroup, ...])
_REFUSAL = TypeAdapter(Refusal)


def status_json(status: ClusterStatus) -> bytes:
    return _STATUS.dump_json(status)


def read_status(data: bytes) -> ClusterStatus:
    """Raises: ValueError."""
    return _STATUS.validate_json(data)


def transfers_json(records: Sequence[TransferRecord]) -> bytes:
    return _TRANSFERS.dump_json(Transfers(tuple(records)))


def read_transfers(data: bytes) -> tuple[TransferRecord, ...]:
    """Raises: ValueError."""
    return _TRANSFERS.validate_json(data).transfers


def change_json(change: Change) -> bytes:
    return _CHANGE.dump_json(change)


def read_change(data: bytes) -> Change:
    """Raises: ValueError."""
    return _CHANGE.validate_json(data)


def changes_json(changes: Sequence[Change]) -> bytes:
    return _CHANGES.dump_json(Changes(tuple(changes)))


def read_changes(data: bytes) -> tuple[Change, ...]:
    """Raises: ValueError."""
    return _CHANGES.validate_json(data).changes


def plan_json(plan: Plan) -> bytes:
    return _PLAN.dump_json(plan)


def read_plan(data: bytes) -> Plan:
    """Raises: ValueError."""
    return _PLAN.validate_json(data)


def events_json(events: Sequence[Told]) -> bytes:
    return _EVENTS.dump_json(Events(tuple(events)))


def read_events(data: bytes) -> tuple[Told, ...]:
    """Raises: ValueError."""
    return _EVENTS.validate_json(data).events


def scaling_json(scaling: Scaling) -> bytes:
    return _SCALING.dump_json(scaling)


def read_scaling(data: bytes) -> Scaling:
    """Raises: ValueError."""
    return _SCALING.validate_json(data)


def looked_json(looked: Looked) -> bytes:
    return _LOOKED.dump_json(looked)


def read_looked(data: bytes) -> Looked:
    """Raises: ValueError."""
    return _LOOKED.validate_json(data)


def explained_json(explained: Explained) -> bytes:
    return _EXPLAINED.dump_json(explained)


def read_explained(data: bytes) -> Explained:
    """Raises: ValueError."""
    return _EXPLAINED.validate_json(data)


def targets_json(groups: Sequence[TargetGroup]) -> bytes:
    return _TARGETS.dump_json(tuple(groups))


def posted(ask: Ask) -> tuple[str, dict[str, Any]]:
    """The path and the body that ask for `ask`."""
    body: dict[str, Any]
    match ask:
        case Scale():
            at, body = f"pools/{ask.pool}/scale", {"replicas": ask.replicas}
        case ChangeRole():
            at = f"workers/{ask.worker}/role"
            body = {"role": ask.role.value, "may_restart": ask.may_restart}
        case DrainWorker():
            at, body = f"workers/{ask.worker}/drain", {}
        case DrainNode():
            at = f"nodes/{_quoted(ask.node)}/drain"
            body = {"may_end_service": True} if ask.may_end_service else {}
        case ReturnNode():
            return f"/v1/nodes/{_quoted(ask.node)}/return", {}
        case Apply():
            at, body = "apply", {**serving_body(ask.serving), "surge": ask.surge}
    return f"/v1/{at}", {**body, "grace_s": ask.grace_s}


def serving_body(serving: ServingSpec) -> dict[str, Any]:
    """What is stated of it: a key that the head does not know yet, or whose default is another
    there, goes out only if somebody wrote it."""
    return {"serving": serving.model_dump(mode="json", exclude_unset=True)}


def _quoted(node: str) -> str:
    return urllib.parse.quote(node, safe="")


def refusal_json(message: str, kind: str) -> bytes:
    return _REFUSAL.dump_json(Refusal(Problem(message, kind)))


def read_refusal(data: bytes) -> Problem:
    """Raises: ValueError."""
    return _REFUSAL.validate_json(data).error
