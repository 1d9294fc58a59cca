"""Notice that an engine's host is cut off: within CUT_NOTICED_WITHIN_S (6 s), not by any answer
that it owes.

A cut sends no FIN. What still answers behind a living line is the kernel of the engine's host, so
an engine that is slow, busy or stopped (SIGSTOP) is never taken for one that is cut off; whether it
makes progress is for the workers' watchdog to tell.

    a stream, or the wait for an answer    keepalive probes after 2 s without a packet, one a
                                           second, three of them: 5 s
    a request that is on its way           sent again by the kernel, and not one acknowledgement
                                           for 5 s; looked at once a second: 6 s
    a connection that is being made        given up after 3 s (`upstream`)

Why not TCP_USER_TIMEOUT for the second: it also ends connections to an engine that does not read
for a while (measured, Linux 6.18: 20 MB to a server that reads nothing, 2 s: ETIMEDOUT after 2.3 s,
with the peer's kernel answering all along). A prompt of a million tokens is a body of megabytes.
"""

from __future__ import annotations

import socket
from typing import Protocol

from cluster.kv.connectors.silence import silent_s

CUT_NOTICED_WITHIN_S = 6.0
CHECK_EVERY_S = 1.0

_IDLE_S, _BETWEEN_PROBES_S, _PROBES = 2, 1, 3
_UNANSWERED_S = 5.0


class Socket(Protocol):
    """As much of a socket as event loops show of theirs."""

    def setsockopt(self, level: int, option: int, value: int) -> None: ...

    def getsockopt(self, level: int, option: int, length: int) -> bytes: ...


def probe(connected: Socket) -> None:
    """Have the kernel ask the other side's whether it is still there, when nothing else comes."""
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_S)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _BETWEEN_PROBES_S)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)


def is_cut(connected: Socket) -> bool:
    """Whether what was sent is sent again and again, and nobody has acknowledged anything."""
    return silent_s(connected) >= _UNANSWERED_S
