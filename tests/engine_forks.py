"""Simulated engines of tests as processes that need not import anything first.

The imports of an engine take 0.6 s of CPU, and the tests of the gateway start 200 of them. Here one
process has imported them and forks itself: each engine is a process of its own, that can be killed
and stopped, and costs 0.05 s. How an engine starts from nothing is what tests/integration/
test_engine_simulated.py and everything under Ray are about.

    engine = forks().start(argv, log, environment)     # much like a subprocess.Popen

As a program it reads one JSON order a line, `{"argv", "log", "environment"}`, and answers with the
pid. When its standard input closes, as it does when the tests end in whatever way, it ends with all
its engines.
"""

from __future__ import annotations

import functools
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


class Forked:
    """One engine. Its exit code is its parent's to know: here it is running or has ended."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self._handle = os.pidfd_open(pid)
        except ProcessLookupError:
            self._handle = -1  # ended already

    def __del__(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)

    def poll(self) -> str | None:
        """None while it runs."""
        return "ended" if self._has_ended_within(0) else None

    def wait(self, timeout: float | None = None) -> None:
        """Raises: subprocess.TimeoutExpired."""
        if not self._has_ended_within(timeout):
            raise subprocess.TimeoutExpired(f"engine {self.pid}", timeout or 0)

    def send_signal(self, number: int) -> None:
        """To this process, or to nobody if it has ended: its pid may be another's by now."""
        if self.poll() is None:
            signal.pidfd_send_signal(self._handle, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _has_ended_within(self, timeout_s: float | None) -> bool:
        if self._handle < 0:
            return True
        ended = select.poll()
        ended.register(self._handle, select.POLLIN)
        return bool(ended.poll(None if timeout_s is None else timeout_s * 1000))


class Forks:
    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def start(self, argv: list[str], log: Path, environment: dict[str, str]) -> Forked:
        """`argv` after `python -m cluster.engines.simulated`; `environment` besides ours."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {"argv": argv, "log": str(log), "environment": environment}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return Forked(int(self._process.stdout.readline()))


@functools.cache
def forks() -> Forks:
    """This process's own; it ends with this process."""
    return Forks()


def _become_engine(order: dict[str, Any], log: int) -> None:
    """In the new process; never returns."""
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update(order["environment"])
        sys.argv = ["simulated", *order["argv"]]
        from cluster.engines.simulated.__main__ import main

        code = main()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    import cluster.engines.simulated.__main__  # noqa: F401  what this process is for

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries what has ended
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this says when it ends
    for line in sys.stdin:
        order = json.loads(line)
        with Path(order["log"]).open("wb") as log:
            pid = os.fork()
            if pid == 0:
                _become_engine(order, log.fileno())
        print(pid, flush=True)
    os.killpg(0, signal.SIGKILL)  # its own session: itself and its engines


if __name__ == "__main__":
    serve()
