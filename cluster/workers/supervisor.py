"""Run one command, and leave nothing of it behind, whoever dies first.

    python -m cluster.workers.supervisor --owner-pid N --log FILE --grace-s S -- argv...

    owner (worker actor) ──stdin: "stop SECONDS" or EOF──▶ supervisor ──▶ command
                         ◀──stdout: one JSON object a line──   │    └──▶ its tree, adopted
                                              FILE, FILE.1 ◀───┘

- It is a child subreaper: whatever the command forks, in whatever session, descends from here.
- It ends the tree (SIGTERM, `--grace-s`, SIGKILL until nobody is left) when it gets SIGTERM or a
  stop line, when the command ends by itself, or when the owner goes. The owner is watched through
  a pidfd and through stdin. `--owner-pid 0`: no owner, stdin and stdout unused.
- With an owner it forks once and lets its first process end: Ray kills the direct children of a
  worker process that exits, and a supervisor killed first could not clean up.
- If it is itself killed, the command dies with it (PR_SET_PDEATHSIG); the owner ends the rest by
  the owner mark (workers.process).
- The command's output goes to FILE, which is moved to FILE.1 at `--log-limit-mib`. A disk that
  takes no more costs lines, counted, and never the command.
- Then it removes the /dev/shm segments that were made during its life and used by the tree, if no
  process uses them any more. Segments that were there before (weights kept in memory) stay.

Lines on stdout: {"event": "started", "pid", "supervisor_pid"}, {"event": "lost", "lines", "why"}
when lines were lost since the last such news, {"event": "exited", "code"} when the command itself
ends, {"event": "ended", "code", "lines_dropped"} when nothing is left.
Exit code: the command's, 128 + signal if one ended it, 127 if it cannot be started.

Sleeps in one poll; measured idle: no CPU tick in 20 s, 12 MiB resident. Standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from cluster.workers import tree
from cluster.workers.output import Log
from cluster.workers.segments import Segments

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_F_SETPIPE_SZ = 1031
_PIPE_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 16
# While ending: how often the tree is looked at again.
_ENDING_STEP_S = 0.05
# News of lost lines: at most this often.
_LOST_PAUSE_S = 1.0


class Supervisor:
    """One command, from start to nothing left. `run` returns the exit code."""

    def __init__(self, options: argparse.Namespace, owner_fd: int) -> None:
        self._argv: list[str] = options.argv
        self._grace_s: float = options.grace_s
        self._runtime_dir: str | None = options.runtime_dir
        self._owner_fd = owner_fd
        self._commands_fd = 0 if owner_fd >= 0 else -1
        self._log = Log(options.log, int(options.log_limit_mib * (1 << 20)))
        record = os.path.join(self._runtime_dir, "segments.json") if self._runtime_dir else None
        self._segments = Segments(record)
        self._lines_told = 0
        self._next_told_s = 0.0
        self._poll = select.poll()
        self._output_fd = -1
        self._wake_fd = -1
        self._child_pid = -1
        self._child: subprocess.Popen[bytes] | None = None
        self._code: int | None = None
        self._stop_asked = False

    def run(self) -> int:
        self._catch_signals()
        if not self._start():
            return self._leave(127)
        while self._code is None and not self._stop_asked:
            self._wait(None)
        self._end_tree()
        return self._leave(128 + signal.SIGKILL if self._code is None else self._code)

    def _catch_signals(self) -> None:
        # A Ray worker may have blocked or ignored some; neither suits the command.
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        self._wake_fd, wake_write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write_fd, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_stop)
        for number in (signal.SIGCHLD, signal.SIGHUP):
            signal.signal(number, lambda _number, _frame: None)

    def _on_stop(self, _number: int, _frame: FrameType | None) -> None:
        self._stop_asked = True

    def _start(self) -> bool:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        supervisor_pid = os.getpid()

        def in_child() -> None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != supervisor_pid:
                os._exit(128 + signal.SIGKILL)

        self._output_fd, output_write_fd = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._output_fd, False)
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._output_fd, _F_SETPIPE_SZ, _PIPE_BYTES)
        try:
            child = subprocess.Popen(
                self._argv,
                stdin=subprocess.DEVNULL,
                stdout=output_write_fd,
                stderr=output_write_fd,
                start_new_session=True,
                preexec_fn=in_child,
            )
        except (OSError, ValueError) as error:
            self._log.write(f"cannot start {self._argv[0]}: {error}\n".encode())
            os.close(self._output_fd)
            self._output_fd = -1
            return False
        finally:
            os.close(output_write_fd)
        self._child_pid = child.pid
        # Kept for its finalizer's sake: a collected Popen reaps its process by itself, and with it
        # the exit status of a command that ended at once.
        self._child = child
        for fd in (self._output_fd, self._wake_fd, self._owner_fd, self._commands_fd):
            if fd >= 0:
                self._poll.register(fd, select.POLLIN)
        if self._segments.inotify_fd >= 0:
            self._poll.register(self._segments.inotify_fd, select.POLLIN)
        self._tell(event="started", pid=child.pid, supervisor_pid=supervisor_pid)
        return True

    def _wait(self, at_most_s: float | None) -> None:
        """Sleep until something happens, and see to it."""
        now_s = time.monotonic()
        due_s = (at_most_s, self._segments.due_in_s(now_s), self._lost_due_in_s(now_s))
        waits = [wait_s for wait_s in due_s if wait_s is not None]
        for fd, _events in self._poll.poll(min(waits) * 1000 if waits else None):
            if fd == self._output_fd:
                self._copy_output()
            elif fd == self._owner_fd:
                self._poll.unregister(fd)
                self._stop_asked = True
            elif fd == self._commands_fd:
                self._obey()
            elif fd == self._segments.inotify_fd:
                self._segments.appeared(time.monotonic())
            elif fd == self._wake_fd:
                with contextlib.suppress(OSError):
                    os.read(fd, 512)
        self._reap()
        now_s = time.monotonic()
        self._segments.look_if_due(now_s)
        if self._lost_due_in_s(now_s) == 0.0:
            self._next_told_s = now_s + _LOST_PAUSE_S
            self._tell_lost()

    def _lost_due_in_s(self, now_s: float) -> float | None:
        if self._lines_told == self._log.lines_dropped:
            return None
        return max(0.0, self._next_told_s - now_s)

    def _tell_lost(self) -> None:
        self._lines_told = self._log.lines_dropped
        self._tell(event="lost", lines=self._lines_told, why=self._log.why_dropped)

    def _copy_output(self) -> bool:
        """One chunk from the command to the log. False: there is no more."""
        try:
            data = os.read(self._output_fd, _CHUNK_BYTES)
        except BlockingIOError:
            return False
        if data:
            self._log.write(data)
        else:
            self._poll.unregister(self._output_fd)
            os.close(self._output_fd)
            self._output_fd = -1
        return bool(data)

    def _obey(self) -> None:
        line = os.read(self._commands_fd, 256).decode(errors="replace")
        if not line:
            self._poll.unregister(self._commands_fd)
            self._stop_asked = True
        verb, _, seconds = line.strip().partition(" ")
        if verb == "stop":
            self._stop_asked = True
            with contextlib.suppress(ValueError):
                self._grace_s = float(seconds)

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
                pid, status = ended
                if pid == self._child_pid:
                    code = os.waitstatus_to_exitcode(status)
                    self._code = code if code >= 0 else 128 - code
                    # Its last words come before the news of its end. What its children go on
                    # to write is theirs: no more than one pipe full.
                    for _ in range(_PIPE_BYTES // _CHUNK_BYTES):
                        if self._output_fd < 0 or not self._copy_output():
                            break
                    if self._lines_told < self._log.lines_dropped:
                        self._tell_lost()
                    self._tell(event="exited", code=self._code)

    def _end_tree(self) -> None:
        self._segments.look()
        kill_at_s = time.monotonic() + self._grace_s
        asked: set[tuple[int, int]] = set()
        while left := tree.descendants(os.getpid()):
            for process in left:
                key = (process.pid, process.start_ticks)
                if time.monotonic() >= kill_at_s:
                    tree.send(process, signal.SIGKILL)
                elif key not in asked:
                    asked.add(key)
                    tree.send(process, signal.SIGTERM)
                    # A stopped process sees SIGTERM only once it goes on.
                    tree.send(process, signal.SIGCONT)
            self._wait(_ENDING_STEP_S)

    def _leave(self, code: int) -> int:
        while self._output_fd >= 0 and self._copy_output():
            pass
        tree.remove_segments(self._segments.attributed)
        if self._runtime_dir is not None:
            import shutil  # 2 MiB that a living supervisor can do without

            shutil.rmtree(self._runtime_dir, ignore_errors=True)
        self._tell(event="ended", code=code, lines_dropped=self._log.lines_dropped)
        return code

    def _tell(self, **event: object) -> None:
        if self._owner_fd >= 0:
            with contextlib.suppress(OSError):
                os.write(1, json.dumps(event).encode() + b"\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="cluster.workers.supervisor")
    parser.add_argument("--owner-pid", type=int, required=True, help="parent; 0: no owner")
    parser.add_argument("--log", required=True, help="file for the command's output")
    parser.add_argument("--log-limit-mib", type=float, default=32.0)
    parser.add_argument("--grace-s", type=float, required=True, help="between SIGTERM and SIGKILL")
    parser.add_argument("--runtime-dir", help="removed at the end")
    parser.add_argument("argv", nargs="+", metavar="-- COMMAND")
    options = parser.parse_args(argv)
    owner_fd = -1
    if options.owner_pid:
        owner_fd = _hold_owner(options.owner_pid)
        _errors_to(options.log)
    return Supervisor(options, owner_fd).run()


def _hold_owner(owner_pid: int) -> int:
    """A pidfd of the owner, held by a process that is no longer its child."""
    try:
        owner_fd = os.pidfd_open(owner_pid)
    except OSError as error:
        if error.errno != errno.ESRCH:
            raise
        sys.exit(f"the owner {owner_pid} is gone")
    if os.getppid() != owner_pid:
        # Had the owner died before pidfd_open, its pid might be another's by now.
        sys.exit(f"--owner-pid {owner_pid} is not the parent ({os.getppid()})")
    if os.fork() != 0:
        os._exit(0)
    os.setsid()
    # Ray runs its workers at nice 15 (RAY_worker_niceness); an engine is not background work.
    # Raising it again takes privileges that we may not have.
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    return owner_fd


def _errors_to(log: str) -> None:
    """Should we fail ourselves, the reason stands where people look. Also: whoever reads the
    owner's stderr is not to wait for us."""
    try:
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError:
        fd = os.open(os.devnull, os.O_WRONLY)
    os.dup2(fd, 2)
    os.close(fd)


if __name__ == "__main__":
    sys.exit(main())
