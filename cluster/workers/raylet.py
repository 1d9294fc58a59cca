"""End a Ray actor's process with the raylet that runs it.

Measured (Ray 2.60): when a raylet is killed, its actors live on for more than 30 s, engines and
all, though nobody can reach them any more. Called by: any actor of ours, when it is made.
"""

from __future__ import annotations

import os
import select
import threading


def end_with_raylet() -> None:
    """From now on this process ends at once (exit code 1) when its parent does. Costs one thread
    that sleeps. Only for processes that a raylet started."""
    raylet_pid = os.getppid()
    try:
        raylet_fd = os.pidfd_open(raylet_pid)
    except ProcessLookupError:
        os._exit(1)
    if os.getppid() != raylet_pid:
        # It died in between, and its pid may already be another's.
        os._exit(1)
    threading.Thread(target=_wait, args=(raylet_fd,), name="raylet watch", daemon=True).start()


def _wait(raylet_fd: int) -> None:
    poll = select.poll()
    poll.register(raylet_fd, select.POLLIN)
    poll.poll()
    # Not sys.exit: Ray's own shutdown would wait for the raylet.
    os._exit(1)
