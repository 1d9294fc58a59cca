"""End TCP connections of this process whose other end has fallen silent.

A cable that is pulled says nothing: TCP sends again and again for a quarter of an hour, and a pull
of KV blocks over it is neither through nor failed for as long (measured: requests without an end).
With a bound on data that nobody acknowledges, the kernel ends the connection, UCX reports it, and
the stock connector fails the pull. By then nothing can arrive any more in the blocks that it frees.
A peer that is merely slow acknowledges: its kernel does. UCX has no setting for this bound.

Runs inside the engine's process: standard library only.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time

SILENT_FOR_S = 10.0
_LOOK_EVERY_S = 1.0


class SilenceBound:
    """Bounds connections as they come. `look` lists the open files, at most once a second."""

    def __init__(self) -> None:
        self._next_look_s = 0.0

    def look(self) -> None:
        """To be called as the engine steps. Never raises."""
        now_s = time.monotonic()
        if now_s >= self._next_look_s:
            self._next_look_s = now_s + _LOOK_EVERY_S
            bound_silence(SILENT_FOR_S)


def bound_silence(silent_for_s: float) -> int:
    """Let the kernel end every TCP connection of this process whose data is not acknowledged for
    so long, also those that wait already. Returns how many there are. Never raises."""
    bounded = 0
    for name in os.listdir("/proc/self/fd"):
        # Another thread may close it, or open something else under its number, at any moment.
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                bounded += _bound(int(name), int(silent_for_s * 1000))
    return bounded


def _bound(fd: int, silent_for_ms: int) -> bool:
    borrowed = socket.socket(fileno=fd)
    try:
        if borrowed.proto != socket.IPPROTO_TCP:
            return False
        borrowed.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, silent_for_ms)
        return True
    finally:
        borrowed.detach()
