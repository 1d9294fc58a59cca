"""Ports for engines: below the ephemeral range, and never the same one twice on a node.

A port is reserved by an flock on its own file in `settings.ports_dir()`; the kernel gives it back
however the process that holds it dies. A reserved port was also free to bind at that moment. A
span is a run of consecutive ports (one NIXL side channel per tensor-parallel rank, say).

Engines bind late, seconds after we chose; a port in the ephemeral range would meanwhile be handed
to any outgoing connection. Called by: workers.worker, and the launcher for ports of its own.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from cluster.engines.base import PortNeed
from cluster.errors import NoCapacity
from cluster.settings import ports_dir

DEFAULT_WINDOW = range(20_000, 30_000)
_USABLE = range(1_024, 65_536)
# Fewer ports than this are too few for random starts to be of use.
_SMALLEST_WINDOW = 1_000
_RETRY_AFTER_S = 5.0


class PortLease:
    """Reserved ports by name. Held until `close` or the end of this process, whichever is first;
    not handed on to processes that this one starts."""

    def __init__(self, ports: Mapping[str, int], lock_fds: Sequence[int]) -> None:
        self.ports = dict(ports)
        self._lock_fds = list(lock_fds)

    def close(self) -> None:
        """Give the ports back. May be called twice."""
        while self._lock_fds:
            os.close(self._lock_fds.pop())

    def __enter__(self) -> PortLease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def reserve(
    needs: Sequence[PortNeed],
    host: str,
    rng: random.Random,
    *,
    folder: Path | None = None,
    window: range | None = None,
) -> PortLease:
    """Reserve every span of `needs` for an engine that will bind `host`.

    The search begins at a random place, so that a restarted engine does not get the port on which
    peers may still look for its former self. Takes a few milliseconds, blocks.

    Raises: NoCapacity: no such run of ports is free in the window.
    """
    folder = ports_dir() if folder is None else folder
    window = node_window() if window is None else window
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    ports: dict[str, int] = {}
    held: list[int] = []
    try:
        for need in needs:
            ports[need.name], fds = _reserve_span(need, host, rng, folder, need.window or window)
            held += fds
    except BaseException:
        PortLease({}, held).close()
        raise
    return PortLease(ports, held)


def node_window() -> range:
    """The ports of this node from which engines get theirs."""
    text = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii")
    low, high = (int(word) for word in text.split())
    return window_outside(range(low, high + 1))


def window_outside(ephemeral: range) -> range:
    """The part of the default window below the ephemeral range; if that is too small, the larger
    part of all usable ports outside of it; if that is too small as well, the default window,
    for a few lost races are better than no engine at all."""
    below = range(DEFAULT_WINDOW.start, min(DEFAULT_WINDOW.stop, ephemeral.start))
    # An ephemeral range that ends below the window does not touch it.
    if ephemeral.stop <= DEFAULT_WINDOW.start:
        below = DEFAULT_WINDOW
    if len(below) >= _SMALLEST_WINDOW:
        return below
    outside = max(
        range(_USABLE.start, ephemeral.start), range(ephemeral.stop, _USABLE.stop), key=len
    )
    return outside if len(outside) >= _SMALLEST_WINDOW else DEFAULT_WINDOW


def _reserve_span(
    need: PortNeed, host: str, rng: random.Random, folder: Path, window: range
) -> tuple[int, list[int]]:
    starts = len(window) - need.span + 1
    first = rng.randrange(starts) if starts > 0 else 0
    offset = 0
    while offset < starts:
        port = window[(first + offset) % starts]
        fds, taken_at = _try_span(range(port, port + need.span), host, folder)
        if fds:
            return port, fds
        # No run that contains the taken port can be free: go on behind it.
        offset += taken_at - port + 1
    run = "port is" if need.span == 1 else f"{need.span} consecutive ports are"
    raise NoCapacity(
        f"no {run} free for {need.name!r} on {host} in {window.start}-{window.stop - 1}; "
        "end what listens there (ss -ltn), or stop workers on this node",
        _RETRY_AFTER_S,
    )


def _try_span(span: range, host: str, folder: Path) -> tuple[list[int], int]:
    """Lock file descriptors for the whole span, or none and the port that was in the way."""
    fds: list[int] = []
    for port in span:
        fd = _lock(folder / f"{port}.lock")
        if fd is not None:
            fds.append(fd)
        if fd is None or not _is_free(host, port):
            PortLease({}, fds).close()
            return [], port
    return fds, span.start


def _lock(path: Path) -> int | None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        return None
    return fd


def _is_free(host: str, port: int) -> bool:
    """Whether nobody uses the port, on `host` or on all interfaces. Without SO_REUSEADDR: a port
    with connections that linger in TIME_WAIT counts as used."""
    wildcard = "::" if ":" in host else "0.0.0.0"
    for address in dict.fromkeys((host, wildcard)):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with contextlib.closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
            try:
                probe.bind((address, port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    return False
                raise
    return True
