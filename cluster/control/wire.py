"""The control API's values as JSON, both ways, and the names that both of its ends must know.

Unknown keys are ignored when reading: an older client understands a newer head.
Called by: control.api, control.client.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter

from cluster.control.state import ClusterStatus
from cluster.transfers import TransferRecord

NEXT_OFFSET_HEADER = "x-next-offset"
GENERATION_HEADER = "x-worker-generation"
MOST_LOG_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class Transfers:
    """Answer of GET /v1/transfers."""

    transfers: tuple[TransferRecord, ...]


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


def refusal_json(message: str, kind: str) -> bytes:
    return _REFUSAL.dump_json(Refusal(Problem(message, kind)))


def read_refusal(data: bytes) -> Problem:
    """Raises: ValueError."""
    return _REFUSAL.validate_json(data).error
