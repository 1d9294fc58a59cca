"""The record of one KV transfer, and the datagram in which an engine reports it.

An engine's connector (or the simulated engine) sends one JSON datagram per event to the Unix
datagram socket named in `PDCLUSTER_TRANSFER_SOCKET`; the worker that owns the engine listens.
A lost datagram loses a record, never a block: nothing waits for these.

Imported inside the engine's own process: standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from dataclasses import asdict, dataclass
from typing import Literal

SOCKET_ENV = "PDCLUSTER_TRANSFER_SOCKET"
# The way back: the engine binds this Unix datagram socket; each datagram is a JSON list of parts
# of request ids whose still pinned blocks prefill frees now.
RELEASE_SOCKET_ENV = "PDCLUSTER_RELEASE_SOCKET"

Side = Literal["prefill", "decode"]
# decode: pulled (blocks arrived), held (nothing was missing), failed.
# prefill: granted (blocks kept for a peer), taken (the peer has them), released, expired.
Outcome = Literal["pulled", "held", "failed", "granted", "taken", "released", "expired"]


@dataclass(frozen=True, slots=True)
class TransferRecord:
    """One event of one request's transfer, as the engine that saw it reports it.

    `request_id` is the engine's own id; it contains the gateway's `X-Request-Id`.
    """

    request_id: str
    side: Side
    outcome: Outcome
    at_s: float  # wall clock
    prompt_tokens: int = 0
    tokens_held: int = 0  # decode: already in its prefix cache, not moved
    tokens_pulled: int = 0
    blocks_pulled: int = 0
    bytes_pulled: int = 0
    took_s: float = 0.0


class TransferReporter:
    """Sends records to the worker. Never raises and never blocks: serving comes first."""

    def __init__(self, path: str | None = None) -> None:
        self._path = path or os.environ.get(SOCKET_ENV)
        self._socket: socket.socket | None = None
        if self._path:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)

    def send(self, record: TransferRecord) -> None:
        if self._socket is not None and self._path:
            with contextlib.suppress(OSError):
                self._socket.sendto(json.dumps(asdict(record)).encode(), self._path)


def parse(datagram: bytes) -> TransferRecord:
    """Raises: ValueError if the datagram is not a record."""
    try:
        return TransferRecord(**json.loads(datagram))
    except (TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"not a transfer record: {error}") from error
