"""The worker's end of the supervisor: start an engine's process tree, hear of it, end it.

    process = EngineProcess(...); await process.start()
    process.ended        set when nothing of the tree is left
    await process.stop(grace_s)

The supervisor (workers.supervisor) does the work and survives us; should it be killed itself,
`_clean_up` here ends the rest by the owner mark. Called by: workers.worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.workers import tree

log = logging.getLogger(__name__)

# When the owner goes without a word, all must be gone within 5 s, and Ray needs up to one second
# to notice that its raylet died.
OWNER_GONE_GRACE_S = 2.0
_SWEEP_BOUND_S = 5.0
_READ_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Exit:
    """How the command ended by itself. `code` is None if the supervisor could not tell."""

    code: int | None

    @property
    def was_killed(self) -> bool:
        """By SIGKILL, which is never the engine's own doing."""
        return self.code is None or self.code == 128 + signal.SIGKILL

    def __str__(self) -> str:
        if self.code is None:
            return "its supervisor was killed"
        if self.code > 128:
            return f"exit code {self.code} (signal {self.code - 128})"
        return f"exit code {self.code}"


@dataclass(frozen=True, slots=True)
class LostLines:
    """Lines of the command's output that its log did not take, and why the last of them."""

    count: int = 0
    why: str = ""

    def __str__(self) -> str:
        return f"{self.count} lines of the log are lost: {self.why}"


class EngineProcess:
    """One engine's process tree, under a supervisor of its own."""

    def __init__(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str],
        owner: str,
        log_path: Path,
        runtime_dir: Path,
    ) -> None:
        self.pid: int | None = None
        self.supervisor_pid: int | None = None
        self.runs = asyncio.Event()  # the command was started, `pid` is set
        # The command itself is gone; others of its tree may still be ending.
        self.exited: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self.ended = asyncio.Event()
        self.lost_lines = LostLines()
        self._argv = tuple(argv)
        self._environment = dict(environment)
        self._owner = owner
        self._log_path = log_path
        self._runtime_dir = runtime_dir
        self._commands_fd = -1
        self._events_fd = -1
        self._unread = b""
        self._is_clean = False
        self._starting: asyncio.Task[None] | None = None
        self._cleaning: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"EngineProcess(owner={self._owner!r}, pid={self.pid})"

    async def start(self) -> None:
        """Start the supervisor and with it the command. Returns before the command runs.

        Raises: OSError: no supervisor could be started (no memory, no processes left).
        Cancel: the start goes on; `stop` waits for it and ends what it started."""
        self._starting = asyncio.create_task(self._start(), name=f"start {self._owner}")
        await asyncio.shield(self._starting)

    async def stop(self, grace_s: float) -> None:
        """End the tree: SIGTERM, SIGKILL after `grace_s`. Returns when nothing is left of it.

        Cancel: safe, the supervisor goes on ending it. May be called twice."""
        if self._starting is not None:
            await asyncio.wait({self._starting})
        if not self.ended.is_set() and self._commands_fd >= 0:
            with contextlib.suppress(OSError):
                os.write(self._commands_fd, f"stop {grace_s}\n".encode())
            await self.ended.wait()

    def rss_bytes(self) -> int:
        """Resident memory of the tree, supervisor included; shared pages count in each process.
        0 when it is gone. Reads /proc: some milliseconds."""
        if self.supervisor_pid is None or self.ended.is_set():
            return 0
        own = tree.read_process(self.supervisor_pid)
        below = tree.descendants(self.supervisor_pid)
        return sum(process.rss_bytes for process in below) + (own.rss_bytes if own else 0)

    async def _start(self) -> None:
        supervisor = await asyncio.to_thread(self._spawn)
        assert supervisor.stdin is not None
        assert supervisor.stdout is not None
        # Ours from here on: Popen would close them when it is collected.
        self._commands_fd = os.dup(supervisor.stdin.fileno())
        self._events_fd = os.dup(supervisor.stdout.fileno())
        supervisor.stdin.close()
        supervisor.stdout.close()
        os.set_blocking(self._events_fd, False)
        asyncio.get_running_loop().add_reader(self._events_fd, self._hear)
        # It forks and its first process ends at once: see there.
        await asyncio.to_thread(supervisor.wait)

    def _spawn(self) -> subprocess.Popen[bytes]:
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        if self._log_path.exists():
            # Of an earlier cluster of this name: its last words are not ours.
            os.replace(self._log_path, self._log_path.with_name(self._log_path.name + ".1"))
        return subprocess.Popen(
            (
                sys.executable,
                "-m",
                "cluster.workers.supervisor",
                f"--owner-pid={os.getpid()}",
                f"--log={self._log_path}",
                f"--grace-s={OWNER_GONE_GRACE_S}",
                f"--runtime-dir={self._runtime_dir}",
                "--",
                *self._argv,
            ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self._environment,
            # Private and empty: `python -m` puts it first on the engine's path.
            cwd=self._runtime_dir,
        )

    def _hear(self) -> None:
        try:
            data = os.read(self._events_fd, _READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            self._hang_up()
            return
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            self._note(json.loads(line))

    def _note(self, event: Mapping[str, int | str]) -> None:
        kind = event["event"]
        if kind == "started":
            self.pid = int(event["pid"])
            self.supervisor_pid = int(event["supervisor_pid"])
            self.runs.set()
        elif kind == "lost":
            if not self.lost_lines.count:
                log.warning("%s loses log_lines why=%s", self._owner, event["why"])
            self.lost_lines = LostLines(int(event["lines"]), str(event["why"]))
        elif kind == "exited" and not self.exited.done():
            self.exited.set_result(Exit(int(event["code"])))
        elif kind == "ended":
            self._is_clean = True
            if not self.exited.done():
                self.exited.set_result(Exit(int(event["code"])))
            if event["lines_dropped"]:
                log.warning("%s lost log_lines=%s", self._owner, event["lines_dropped"])

    def _hang_up(self) -> None:
        asyncio.get_running_loop().remove_reader(self._events_fd)
        os.close(self._events_fd)
        os.close(self._commands_fd)
        self._events_fd = self._commands_fd = -1
        if self._is_clean:
            self.ended.set()
            return
        log.error("%s supervisor killed pid=%s", self._owner, self.supervisor_pid)
        self._cleaning = asyncio.create_task(self._clean_up(), name=f"clean up {self._owner}")

    async def _clean_up(self) -> None:
        """What the supervisor would have done."""
        left = await asyncio.to_thread(tree.end_marked, self._owner, bound_s=_SWEEP_BOUND_S)
        if left:
            log.error("%s left pids=%s", self._owner, [process.pid for process in left])
        await asyncio.to_thread(self._remove_files)
        if not self.exited.done():
            self.exited.set_result(Exit(None))
        self.ended.set()

    def _remove_files(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            recorded = json.loads((self._runtime_dir / "segments.json").read_text("utf-8"))
            tree.remove_segments(recorded)
        shutil.rmtree(self._runtime_dir, ignore_errors=True)
