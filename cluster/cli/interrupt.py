"""Ctrl-C before a command begins: exit 130, at once and without a word.

Until then nothing is started that would have to be ended, but half a second of imports goes by. A
KeyboardInterrupt raised in there could be swallowed, or printed and lost, by whatever a module does
while it is imported. So the handler ends the process itself.
Imports nothing that takes time. Called by: cli.__main__, cli.main.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

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


def _end(_number: int, _frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)
