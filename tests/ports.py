"""Ports for tests: free now, and not handed out again by anybody else while the test runs.

Not the kernel's free ports: those are also what every outgoing connection gets, so that a port just
given up may be somebody's a moment later, and "nothing listens there any more" would be a guess.
"""

from __future__ import annotations

import itertools
import os
import random
import socket

# Below what engines (20000 up), Ray's rendezvous and the kernel take.
_WINDOW = range(10_000, 15_000)
_WORKERS = 8


def _own_window() -> range:
    """The part of the window that belongs to this pytest-xdist worker."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _WORKERS
    size = len(_WINDOW) // _WORKERS
    return _WINDOW[worker * size : (worker + 1) * size]


_candidates = itertools.cycle(random.sample(_own_window(), len(_own_window())))


def free_port() -> int:
    """A TCP port of loopback that nobody listens on; another one at each call."""
    for port in _candidates:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("unreachable: the candidates never end")
