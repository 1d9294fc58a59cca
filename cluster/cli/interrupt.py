"""Exit 130 on Ctrl-C, also before a command begins, and whatever crashes at the end of Python.

Until a command begins nothing is started that would have to be ended, but half a second of imports
goes by. A KeyboardInterrupt raised in there could be swallowed, or printed and lost, by whatever a
module does while it is imported. So the handler ends the process itself, without a word.
Imports nothing that takes time. Called by: cli.__main__, cli.main.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130


def ends_at_once() -> None:
    """From now on, until `raises`. Nothing changes where Ctrl-C is ignored, as in a job that a
    shell has put into the background."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raises() -> None:
    """A KeyboardInterrupt again: a command is about to begin. Idempotent, in any thread."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def leave(code: int) -> NoReturn:
    """End an interrupted command, whose own cleaning up is done, without Python's: there Ray
    crashes if it was interrupted while it connected (SIGSEGV after the last word, 2 of 28 runs)."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more, or it is closed
            stream.flush()
    os._exit(code)


def _end(_number: int, _frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)
