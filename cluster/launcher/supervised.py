"""A program beside the cluster that outlives `up`: started below a supervisor, found again, ended.

Known by the supervisor's pid and start time, and by an owner mark: never somebody else's process.

Called by: launcher.local_ray, launcher.prometheus, launcher.running.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from cluster.launcher.source_root import with_source_root
from cluster.settings import OWNER_ENV
from cluster.workers import tree

END_GRACE_S = 5.0


class Supervised(BaseModel):
    """What one is ended by."""

    model_config = ConfigDict(frozen=True)

    supervisor_pid: int
    supervisor_start_ticks: int

    def is_alive(self) -> bool:
        process = tree.read_process(self.supervisor_pid)
        return process is not None and process.start_ticks == self.supervisor_start_ticks


def launch(
    argv: Sequence[str], log: Path, env: Mapping[str, str], owner: str, runtime: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start `argv`, its output in `log`, which is made anew. `runtime`: a folder that goes when it
    ends. Returns at once, with the supervisor."""
    log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "cluster.workers.supervisor",
            *("--owner-pid", "0", "--log", str(log), "--grace-s", f"{END_GRACE_S:g}"),
            *(("--runtime-dir", str(runtime)) if runtime is not None else ()),
            "--",
            *argv,
        ],
        env={**with_source_root(env), OWNER_ENV: owner},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # Ctrl-C in the terminal is for `up`, which ends this in its own order.
        start_new_session=True,
        cwd="/",
    )


def known_by(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """The fields of Supervised."""
    started = tree.read_process(process.pid)
    return {
        "supervisor_pid": process.pid,
        "supervisor_start_ticks": started.start_ticks if started else 0,
    }


def is_running(own: Supervised) -> bool:
    """Also if it is a child of this process, which would keep it as a zombie."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(own.supervisor_pid, os.WNOHANG)
    return own.is_alive()


def end(own: Supervised, owner: str, within_s: float) -> None:
    """End it and everything below it. Blocks until it is gone, at most `within_s`. Idempotent."""
    process = tree.read_process(own.supervisor_pid)
    if process is None or process.start_ticks != own.supervisor_start_ticks:
        return
    if process.pid not in {marked.pid for marked in tree.marked(owner)}:
        return
    tree.send(process, signal.SIGTERM)
    deadline_s = time.monotonic() + within_s
    while is_running(own) and time.monotonic() < deadline_s:
        time.sleep(0.05)
