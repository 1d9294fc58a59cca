"""What an engine reports of its KV transfers: the last records, and totals of all.

Engine connectors send one datagram per event (`cluster.transfers`) to a Unix socket in the
worker's runtime folder. Records lie in a ring with growing numbers, so that a reader who asks
"after number N" misses at most what fell out of the ring. Called by: workers.worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from cluster.errors import InvalidInput
from cluster.transfers import TransferRecord, parse

log = logging.getLogger(__name__)

RING_RECORDS = 4096
# sun_path of a Unix socket, less its closing zero.
SOCKET_PATH_MAX_BYTES = 107
_DATAGRAM_MAX_BYTES = 1 << 16
# Request ids per release datagram: stays far below the kernel's limit for one (about 200 KiB).
_RELEASE_BATCH = 256
_LEASES_ENDED = frozenset({"taken", "released", "expired"})


class Ledger:
    """Adds up records. `lease_s`: how long prefill keeps blocks that nobody pulls."""

    def __init__(self, lease_s: float) -> None:
        self.transfers = 0
        self.transfer_failures = 0
        self.bytes_pulled = 0
        self.tokens_held = 0
        self.tokens_pulled = 0
        self._ring: deque[tuple[int, TransferRecord]] = deque(maxlen=RING_RECORDS)
        self._last_seq = 0
        self._open: dict[str, float] = {}  # request id → when its lease was granted, oldest first
        # A lease whose end was never reported (a lost datagram) is not counted for ever. Peers
        # may renew a lease, so well beyond its length.
        self._forget_after_s = max(600.0, 20 * lease_s)

    def add(self, record: TransferRecord) -> None:
        self._last_seq += 1
        self._ring.append((self._last_seq, record))
        if record.side == "decode":
            if record.outcome == "failed":
                self.transfer_failures += 1
            else:
                self.transfers += 1
            self.bytes_pulled += record.bytes_pulled
            self.tokens_held += record.tokens_held
            self.tokens_pulled += record.tokens_pulled
        elif record.outcome == "granted":
            self._open[record.request_id] = record.at_s
        elif record.outcome in _LEASES_ENDED:
            self._open.pop(record.request_id, None)

    def after(self, seq: int) -> list[tuple[int, TransferRecord]]:
        """Records with a number above `seq`, oldest first. 0: all that are still here."""
        return [(number, record) for number, record in self._ring if number > seq]

    def leases_open(self, now_s: float) -> int:
        """Leases granted and not yet ended. `now_s`: wall clock."""
        while self._open:
            request_id, granted_s = next(iter(self._open.items()))
            if now_s - granted_s <= self._forget_after_s:
                break
            del self._open[request_id]
        return len(self._open)


class TransferSocket:
    """Listens for records on a Unix datagram socket and feeds them to a ledger."""

    def __init__(self, path: Path, ledger: Ledger) -> None:
        self._path = path
        self._ledger = ledger
        self._socket: socket.socket | None = None

    def open(self) -> None:
        """Must run in the event loop. Raises: InvalidInput: the path is too long."""
        check_socket_path(self._path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(str(self._path))
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._drain)

    def close(self) -> None:
        """May be called twice."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None

    def _drain(self) -> None:
        # The kernel queues as few as ten datagrams: take all that are there, each time.
        while self._socket is not None:
            try:
                datagram = self._socket.recv(_DATAGRAM_MAX_BYTES)
            except OSError:
                return
            try:
                self._ledger.add(parse(datagram))
            except ValueError as error:
                log.warning("transfer record refused bytes=%d why=%s", len(datagram), error)


def send_release(path: Path, request_ids: Sequence[str]) -> bool:
    """Ask the engine that listens at `path` to let go of these requests' blocks. Never blocks.

    False: it does not listen; its leases then run out by themselves."""
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as sender:
        sender.setblocking(False)
        for first in range(0, len(request_ids), _RELEASE_BATCH):
            batch = list(request_ids[first : first + _RELEASE_BATCH])
            try:
                sender.sendto(json.dumps(batch).encode(), str(path))
            except OSError:
                return False
    return True


def check_socket_path(path: Path) -> None:
    """Raises: InvalidInput."""
    length = len(os.fsencode(path))
    if length > SOCKET_PATH_MAX_BYTES:
        raise InvalidInput(
            f"{path}: {length} bytes, and a Unix socket path has at most "
            f"{SOCKET_PATH_MAX_BYTES}; set XDG_RUNTIME_DIR to a shorter folder"
        )
