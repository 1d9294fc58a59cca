"""End TCP connections of this process whose other end has fallen silent.

A cable that is pulled says nothing: TCP sends again and again for a quarter of an hour, and a pull
of KV blocks over it is neither through nor failed for as long (measured: requests without an end).
Once data has been sent again and nothing was acknowledged for SILENT_FOR_S, the connection is shut
down, as if the peer had closed it: UCX reports it, and the stock connector fails the pull. By then
nothing can arrive any more in the blocks that it frees. UCX has no setting for this bound.

A peer that is merely slow acknowledges, even that it has no room: its kernel does. Hence not
TCP_USER_TIMEOUT, which also ends connections to an engine that does not read for a while
(gateway.liveness has the measurement): one in a long step, or stopped for a moment.

Runs inside the engine's process: standard library only.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from typing import Protocol

SILENT_FOR_S = 10.0
_LOOK_EVERY_S = 1.0
# struct tcp_info of linux/tcp.h: tcpi_retransmits and tcpi_probes are its third and fourth bytes,
# tcpi_last_ack_recv (ms) the u32 at 56. An acknowledgement sets the first two back to 0.
_INFO_BYTES, _RETRANSMITS, _PROBES, _LAST_ACK_RECV = 60, 2, 3, 56


class Socket(Protocol):
    """As much of a socket as event loops show of theirs."""

    def getsockopt(self, level: int, option: int, length: int) -> bytes: ...


class SilenceBound:
    """Ends connections as they fall silent. `look` lists the open files, at most once a second."""

    def __init__(self) -> None:
        self._next_look_s = 0.0

    def look(self) -> None:
        """To be called as the engine steps. Never raises."""
        now_s = time.monotonic()
        if now_s >= self._next_look_s:
            self._next_look_s = now_s + _LOOK_EVERY_S
            end_silent(SILENT_FOR_S)


def silent_s(connected: Socket) -> float:
    """For how long nobody has acknowledged anything, while what was sent is sent again and again,
    or it is asked in vain whether there is room for more; 0.0: somebody answers."""
    info = connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
    (last_ack_ms,) = struct.unpack_from("=I", info, _LAST_ACK_RECV)
    # One that was lost, or is on its way, says nothing.
    is_asked_in_vain = info[_RETRANSMITS] > 1 or info[_PROBES] > 1
    return last_ack_ms / 1000 if is_asked_in_vain else 0.0


def end_silent(after_s: float) -> int:
    """Shut down every TCP connection of this process that has been silent for so long. Returns how
    many. Never raises."""
    ended = 0
    for name in os.listdir("/proc/self/fd"):
        # Another thread may close it, or open something else under its number, at any moment.
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                ended += _end_if_silent(int(name), after_s)
    return ended


def _end_if_silent(fd: int, after_s: float) -> bool:
    borrowed = socket.socket(fileno=fd)
    try:
        if borrowed.proto != socket.IPPROTO_TCP or silent_s(borrowed) < after_s:
            return False
        borrowed.shutdown(socket.SHUT_RDWR)
        return True
    finally:
        borrowed.detach()
