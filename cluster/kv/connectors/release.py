"""Early release: letting go of blocks that prefill keeps for a peer who will not come.

`PDCLUSTER_RELEASE_SOCKET` names a Unix datagram socket that the connector's scheduler side binds.
A datagram is a JSON list of request ids as the gateway knows them; an engine's own id contains one
of them (`chatcmpl-<id>-1a2b3c4d`).

vLLM steps every millisecond while any finished request still pins blocks, also without traffic. So
a release takes effect within milliseconds on an idle engine (2 ms measured), and after the running
step on a busy one. The same stepping lets leases expire on an idle engine.

Runs inside the engine's process: the standard library and `cluster.transfers` only.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable

from cluster.transfers import RELEASE_SOCKET_ENV

# A release may overtake the end of its prefill step; it is remembered for longer than any step.
REMEMBER_RELEASE_S = 120.0
MAX_REMEMBERED_RELEASES = 1024
# Shorter ids would match other people's requests ("1" is part of almost every id).
MIN_RELEASE_ID_CHARS = 8
MAX_DATAGRAM_BYTES = 65_536
# So many are read in one engine step; the rest waits for the next.
MAX_DATAGRAMS_PER_STEP = 64

logger = logging.getLogger("vllm.pdcluster")


class Releases:
    """The release socket, and which pinned requests it says to let go."""

    def __init__(self, path: str | None, now_s: Callable[[], float] = time.monotonic) -> None:
        """Binds `path`, replacing a stale socket. None: no early release.

        Raises: OSError if the socket cannot be bound."""
        self._now_s = now_s
        self._path = path
        self._socket: socket.socket | None = None
        self._remembered: OrderedDict[str, float] = OrderedDict()  # id -> forget at
        self._pinned: set[str] = set()
        self._due: set[str] = set()
        if path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
            self._socket.bind(path)

    def pin(self, request_id: str) -> None:
        """The request's blocks wait for a peer."""
        self._forget_old()
        self._pinned.add(request_id)
        if any(_names(asked, request_id) for asked in self._remembered):
            self._due.add(request_id)

    def unpin(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._pinned.discard(request_id)
            self._due.discard(request_id)

    def due(self) -> frozenset[str]:
        """Requests to let go now: each is told once."""
        for asked in self._read():
            self._remembered[asked] = self._now_s() + REMEMBER_RELEASE_S
            self._remembered.move_to_end(asked)
            self._due.update(held for held in self._pinned if _names(asked, held))
        while len(self._remembered) > MAX_REMEMBERED_RELEASES:
            self._remembered.popitem(last=False)
        due, self._due = frozenset(self._due), set()
        return due

    def close(self) -> None:
        """May be called twice."""
        if self._socket is not None and self._path:
            self._socket.close()
            self._socket = None
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)

    def _forget_old(self) -> None:
        now_s = self._now_s()
        while self._remembered and next(iter(self._remembered.values())) <= now_s:
            self._remembered.popitem(last=False)

    def _read(self) -> list[str]:
        if self._socket is None:
            return []
        asked: list[str] = []
        for _ in range(MAX_DATAGRAMS_PER_STEP):
            try:
                datagram = self._socket.recv(MAX_DATAGRAM_BYTES)
            except BlockingIOError:
                break
            except OSError as error:
                logger.warning("pdcluster release socket unreadable: %s", error)
                break
            asked.extend(parse_release(datagram))
        return asked


def parse_release(datagram: bytes) -> list[str]:
    """The request ids of one datagram. What is not a list of long enough strings is left out."""
    try:
        ids = json.loads(datagram)
    except ValueError:
        ids = None
    if not isinstance(ids, list):
        logger.warning("pdcluster release datagram is not a JSON list bytes=%d", len(datagram))
        return []
    good = [asked for asked in ids if isinstance(asked, str) and len(asked) >= MIN_RELEASE_ID_CHARS]
    if len(good) < len(ids):
        logger.warning("pdcluster release left out ids count=%d", len(ids) - len(good))
    return good


def _names(asked: str, request_id: str) -> bool:
    """Whether `asked` is a dash-delimited part of the engine's own id."""
    return f"-{asked}-" in f"-{request_id}-"


def release_socket_path(data_parallel_rank: int) -> str | None:
    """Where this engine core listens: rank 0 on the path itself, rank N on `<path>.N`."""
    path = os.environ.get(RELEASE_SOCKET_ENV)
    if path and data_parallel_rank:
        return f"{path}.{data_parallel_rank}"
    return path or None
