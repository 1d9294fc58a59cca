"""Run a host's own programs, each for a bounded time, and end them with the probe."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading

# nvidia-smi and npu-smi wake eight or sixteen sleeping cards one by one.
_BOUND_S = 30.0

_children: list[subprocess.Popen[bytes]] = []
_guard = threading.Lock()
_has_ended = threading.Event()


def run(argv: list[str]) -> tuple[int, str, str]:
    """(exit code, output, errors). -1: not to be started, or not ended in time."""
    try:
        # In one with its entry: `end_all` must not come between them and miss it.
        with _guard:
            if _has_ended.is_set():
                return -1, "", "the probe ends"
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            _children.append(process)
    except OSError as error:
        return -1, "", str(error)
    try:
        out, err = process.communicate(timeout=_BOUND_S)
        return process.returncode, out.decode(errors="replace"), err.decode(errors="replace")
    except subprocess.TimeoutExpired:
        _kill(process)
        process.communicate()
        return -1, "", f"{argv[0]} did not end within {_BOUND_S:g} s"
    finally:
        with _guard:
            _children.remove(process)


def end_all() -> None:
    """Kill what still runs; nothing is started any more."""
    with _guard:
        _has_ended.set()
        for process in _children:
            _kill(process)


def last_line(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
